//! Builders for tests.

use crate::{
    key::{AllowedSources, Epoch, KeyId, Scopes, Window, operation::KeySpec, testing},
    proto::discovery as wire,
};

/// The settings of the keyring that tests speak of.
pub(super) fn settings(epoch: Epoch) -> wire::KeyringSettings {
    let pepper = testing::pepper();
    wire::KeyringSettings {
        keyring: testing::keyring_name().to_string(),
        epoch: epoch.get(),
        prefix: "rlk".to_owned(),
        issued_only: true,
        peppers: vec![wire::Pepper {
            id: pepper.id().get(),
            secret: pepper.expose().to_vec().into(),
        }],
        help_url: String::new(),
    }
}

/// A key without bounds.
pub(super) fn spec(key_id: KeyId) -> KeySpec {
    KeySpec {
        key_id,
        consumer: "checkout".parse().expect("a valid id"),
        name: String::new(),
        scopes: Scopes::default(),
        allowed_sources: AllowedSources::default(),
        window: Window::default(),
        imported: false,
    }
}
