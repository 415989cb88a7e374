//! The settings of a keyring that a sidecar needs for its checks, and their encoding.

use crate::{
    key::{Epoch, KeyringName, Pepper, PepperId},
    keyring::KeyringSettings,
    proto::discovery,
};

/// The reason that settings cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SettingsError {
    /// A pepper is not 32 bytes long.
    #[error("a pepper of the wrong length")]
    Pepper,
    /// The settings contain no pepper.
    #[error("settings without a pepper")]
    NoPepper,
    /// The prefix of keys is not valid.
    #[error("settings with an invalid prefix")]
    Prefix,
}

/// Encodes settings as a message.
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

/// Decodes the settings of a message.
///
/// # Errors
///
/// When a pepper is not 32 bytes long or missing, or the prefix is not valid.
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
