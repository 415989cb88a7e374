//! The deliveries in the tests of every sink.

use super::SecretDelivery;
use crate::key::{
    ConsumerId, KeyId, KeyringName, RotationId, Secret, VersionNumber, VersionRef, Window, testing,
};

/// A key whose versions are delivered.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) keyring: KeyringName,
    pub(super) consumer: ConsumerId,
    pub(super) key_id: KeyId,
}

/// One version of the key.
#[derive(Debug)]
pub(super) struct Version<'a> {
    owner: &'a Owner,
    number: u32,
    rotation: RotationId,
    pub(super) secret: Secret,
}

impl Owner {
    pub(super) fn new() -> Self {
        Self {
            keyring: testing::keyring_name(),
            consumer: "team/checkout".parse().expect("a valid name"),
            key_id: KeyId::generate().expect("the random source works"),
        }
    }

    pub(super) fn version(&self, number: u32) -> Version<'_> {
        Version {
            owner: self,
            number,
            rotation: RotationId::generate().expect("the random source works"),
            secret: testing::secret(self.key_id),
        }
    }
}

impl Version<'_> {
    pub(super) fn delivery(&self) -> SecretDelivery<'_> {
        SecretDelivery {
            keyring: &self.owner.keyring,
            consumer: &self.owner.consumer,
            version: VersionRef {
                key_id: self.owner.key_id,
                version: VersionNumber::new(self.number).expect("counted from 1"),
            },
            rotation: self.rotation,
            window: Window::default(),
            secret: &self.secret,
        }
    }

    /// Checks that a log or an error contains neither the secret nor one of the halves of its
    /// secret part.
    pub(super) fn assert_absent(&self, text: &str) {
        let secret = self.secret.expose();
        let (public, hidden) = secret.rsplit_once('_').expect("a token has three parts");
        let (first, second) = hidden.split_at(hidden.len() / 2);
        for part in [secret, first, second] {
            assert!(!text.contains(part), "a part behind {public} is in: {text}");
        }
    }
}
