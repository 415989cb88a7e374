//! Sinks: where the secret of a scheduled rotation is delivered before the hand-over.
//!
//! [`file`] writes it to a directory, [`exec`] hands it to a program, [`vault`] puts it into a KV version 2 mount. A
//! delivery that failed may have arrived all the same: a time-out tells nothing of the other side. To deliver the same
//! version again is harmless everywhere.

pub(crate) mod exec;
pub(crate) mod file;
mod redact;
#[cfg(test)]
mod testing;
pub(crate) mod vault;

use std::collections::BTreeMap;

use crate::{
    config::{SinkSettings, sink::SinkTarget},
    key::{ConsumerId, KeyringName, RotationId, Secret, SinkName, VersionRef, Window},
};

use exec::{ExecError, ExecSink};
use file::{FileError, FileSink};
use vault::{VaultError, VaultSink};

/// The sinks of a control plane, by name.
#[derive(Debug, Default)]
pub struct Sinks(BTreeMap<SinkName, Sink>);

/// One place to which secrets are delivered.
#[derive(Debug)]
pub struct Sink {
    name: SinkName,
    kind: Kind,
}

/// A secret on its way, with what it is.
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    /// The keyring of the key.
    pub keyring: &'a KeyringName,
    /// Whose key it is.
    pub consumer: &'a ConsumerId,
    /// The key and the new version.
    pub version: VersionRef,
    /// The rotation that the version comes from.
    pub rotation: RotationId,
    /// When the version is valid.
    pub window: Window,
    /// The version's secret.
    pub secret: &'a Secret,
}

/// Why a secret was not delivered, or not known to be. Says what to do, and nothing secret.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// A policy names a sink that the file does not have.
    #[error(
        "there is no sink {0}: declare it under `sinks` in the control plane's file, or name another one in the policy"
    )]
    Unknown(SinkName),
    /// The files could not be written.
    #[error("sink {sink}: {error}")]
    File {
        /// Which one.
        sink: SinkName,
        /// Why not.
        error: FileError,
    },
    /// The program did not take it.
    #[error("sink {sink}: {error}")]
    Exec {
        /// Which one.
        sink: SinkName,
        /// Why not.
        error: ExecError,
    },
    /// The Vault did not take it.
    #[error("sink {sink}: {error}")]
    Vault {
        /// Which one.
        sink: SinkName,
        /// Why not.
        error: VaultError,
    },
}

#[derive(Debug)]
enum Kind {
    File(FileSink),
    Exec(ExecSink),
    Vault(Box<VaultSink>),
}

impl SinkError {
    /// In what kind of sink it failed: the same for all texts of programs and Vaults.
    #[must_use]
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "unknown_sink",
            Self::File { .. } => "file_sink",
            Self::Exec { .. } => "exec_sink",
            Self::Vault { .. } => "vault_sink",
        }
    }
}

impl Sinks {
    /// The sinks of the control plane's file. Nothing is delivered or tried.
    ///
    /// # Errors
    ///
    /// When a Vault's certificates cannot be used.
    pub fn new(settings: &[SinkSettings]) -> Result<Self, SinkError> {
        settings
            .iter()
            .map(|settings| Ok((settings.name.clone(), Sink::new(settings)?)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The sink `name`.
    ///
    /// # Errors
    ///
    /// When the file does not have it.
    pub fn get(&self, name: &SinkName) -> Result<&Sink, SinkError> {
        self.0
            .get(name)
            .ok_or_else(|| SinkError::Unknown(name.clone()))
    }

    /// The names in order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &SinkName> {
        self.0.keys()
    }
}

impl Sink {
    fn new(settings: &SinkSettings) -> Result<Self, SinkError> {
        let name = settings.name.clone();
        let kind = match &settings.target {
            SinkTarget::File(settings) => Kind::File(FileSink::new(settings)),
            SinkTarget::Exec(settings) => Kind::Exec(ExecSink::new(settings)),
            SinkTarget::Vault(settings) => match VaultSink::new(settings) {
                Ok(vault) => Kind::Vault(Box::new(vault)),
                Err(error) => return Err(SinkError::Vault { sink: name, error }),
            },
        };
        Ok(Self { name, kind })
    }

    /// Delivers a secret. Returns when it is where it should be, durably.
    ///
    /// When the future is dropped, a program that was started is killed; files are written to their end.
    ///
    /// # Errors
    ///
    /// When it was not delivered, or is not known to be.
    pub async fn deliver(&self, delivery: &Delivery<'_>) -> Result<(), SinkError> {
        let sink = || self.name.clone();
        match &self.kind {
            Kind::File(file) => file
                .deliver(delivery)
                .await
                .map_err(|error| SinkError::File {
                    sink: sink(),
                    error,
                }),
            Kind::Exec(exec) => exec
                .deliver(delivery)
                .await
                .map_err(|error| SinkError::Exec {
                    sink: sink(),
                    error,
                }),
            Kind::Vault(vault) => vault
                .deliver(delivery)
                .await
                .map_err(|error| SinkError::Vault {
                    sink: sink(),
                    error,
                }),
        }
    }
}
