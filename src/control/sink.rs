//! Sinks: the places to which the secret of a scheduled rotation is delivered before the hand-over.
//!
//! [`file`] writes it to a directory, [`exec`] passes it to a program, [`vault`] writes it to a KV
//! version 2 mount. A delivery that failed may still have arrived: a timeout says nothing about the
//! other side. Repeated delivery of the same version is harmless in every sink.

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

/// A secret to deliver, with the facts about it.
#[derive(Clone, Copy, Debug)]
pub struct SecretDelivery<'a> {
    /// The keyring of the key.
    pub keyring: &'a KeyringName,
    /// The consumer that owns the key.
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

/// Why a secret was not delivered, or is not known to be. The message states what to do, and
/// contains no secret.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// A policy names a sink that the file does not declare.
    #[error(
        "there is no sink {0}: declare it under `sinks` in the control plane's file, or name another one in the policy"
    )]
    Unknown(SinkName),
    /// The files could not be written.
    #[error("sink {sink}: {error}")]
    File {
        /// The name of the sink.
        sink: SinkName,
        /// Why the files could not be written.
        error: FileError,
    },
    /// The program did not accept the secret.
    #[error("sink {sink}: {error}")]
    Exec {
        /// The name of the sink.
        sink: SinkName,
        /// Why the program failed.
        error: ExecError,
    },
    /// The Vault did not accept the secret.
    #[error("sink {sink}: {error}")]
    Vault {
        /// The name of the sink.
        sink: SinkName,
        /// Why the Vault did not accept it.
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
    /// Returns the kind of the failed sink. It is the same for all texts of programs and Vaults.
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
    /// Creates the sinks of the control plane's file. Nothing is delivered or tried.
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

    /// Returns the sink `name`.
    ///
    /// # Errors
    ///
    /// When the file does not declare it.
    pub fn get(&self, name: &SinkName) -> Result<&Sink, SinkError> {
        self.0
            .get(name)
            .ok_or_else(|| SinkError::Unknown(name.clone()))
    }

    /// Returns the names in order.
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

    /// Delivers a secret. When this returns, the secret is durable at its destination.
    ///
    /// When the future is dropped, a program that was started is killed; files are still written
    /// completely.
    ///
    /// # Errors
    ///
    /// When the secret was not delivered, or is not known to be.
    pub async fn deliver(&self, delivery: &SecretDelivery<'_>) -> Result<(), SinkError> {
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
