//! What a sidecar needs to judge a keyring's keys, as it travels.

use crate::{
    key::{Epoch, KeyringName, Pepper, PepperId},
    keyring::KeyringSettings,
    proto::discovery,
};

/// Settings cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SettingsError {
    /// A pepper is not 32 bytes long.
    #[error("a pepper of the wrong length")]
    Pepper,
    /// There is none.
    #[error("settings without a pepper")]
    NoPepper,
    /// The prefix of tokens cannot be one.
    #[error("settings with an invalid prefix")]
    Prefix,
}

/// The wire form of settings.
#[must_use]
pub fn encode(
    keyring: &KeyringName,
    epoch: Epoch,
    settings: &KeyringSettings,
) -> discovery::KeyringSettings {
    let peppers = settings.peppers.iter().map(|pepper| discovery::Pepper {
        id: pepper.id().get(),
        secret: pepper.expose().to_vec().into(),
    });
    discovery::KeyringSettings {
        keyring: keyring.to_string(),
        epoch: epoch.get(),
        prefix: settings.prefix.as_str().to_owned(),
        issued_only: settings.issued_only,
        peppers: peppers.collect(),
        help_url: settings.help_url.clone().unwrap_or_default(),
    }
}

/// The settings of a message.
///
/// # Errors
///
/// When they cannot be used.
pub(crate) fn decode(
    settings: &discovery::KeyringSettings,
) -> Result<KeyringSettings, SettingsError> {
    let peppers = settings
        .peppers
        .iter()
        .map(|pepper| Pepper::new(PepperId::new(pepper.id), &pepper.secret))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| SettingsError::Pepper)?;
    if peppers.is_empty() {
        return Err(SettingsError::NoPepper);
    }
    Ok(KeyringSettings {
        prefix: settings.prefix.parse().map_err(|_| SettingsError::Prefix)?,
        issued_only: settings.issued_only,
        peppers,
        help_url: Some(settings.help_url.clone()).filter(|url| !url.is_empty()),
    })
}
