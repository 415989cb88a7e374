//! Builders for tests.

use super::{
    digest::{MasterPepper, Pepper, PepperId},
    id::{KeyId, KeyringName, VersionNumber},
    permission::{AllowedSources, Scopes},
    record::KeyRecord,
    time::Window,
    token::{Prefix, Secret},
    version::KeyState,
};

/// Returns the name of the keyring in tests.
pub(crate) fn keyring_name() -> KeyringName {
    "payments".parse().expect("a valid name")
}

/// Returns the pepper of the keyring in tests.
pub(crate) fn pepper() -> Pepper {
    MasterPepper::new(PepperId::new(1), &[7; Pepper::LEN])
        .expect("32 bytes")
        .for_keyring(&keyring_name())
}

/// Generates a secret of key `id`.
pub(crate) fn secret(id: KeyId) -> Secret {
    Secret::generate(&Prefix::default(), id).expect("the random source works")
}

/// Returns the record of an active version without bounds, of a secret that is not kept.
pub(crate) fn record() -> KeyRecord {
    record_of(&secret(KeyId::generate().expect("the random source works")))
}

/// Returns the record of an active version without bounds, of `secret`.
pub(crate) fn record_of(secret: &Secret) -> KeyRecord {
    let key_id = secret
        .presented()
        .parse(&Prefix::default())
        .expect("a token");
    KeyRecord {
        digest: pepper().digest(&secret.presented()),
        pepper: pepper().id(),
        key_id,
        version: VersionNumber::FIRST,
        consumer: "checkout".parse().expect("a valid id"),
        state: KeyState::Active,
        window: Window::default(),
        retiring_since: None,
        retires_at: None,
        scopes: Scopes::default(),
        allowed_sources: AllowedSources::default(),
        replaced_by: None,
        rotation: None,
    }
}
