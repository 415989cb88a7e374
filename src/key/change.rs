//! A committed change: one row of a keyring's log.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    id::{ConsumerId, KeyId, KeyringName, RotationId, VersionNumber},
    policy::{AllowedSources, Scopes},
    time::Timestamp,
    token::Prefix,
    version::NewVersion,
};

/// What happened to a keyring. Stored as JSON, so that an auditor can read the log without relatch.
///
/// Variants and fields may be added; what is here stays readable for as long as logs are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Change {
    /// The log's first change.
    KeyringCreated {
        /// The keyring's name.
        name: KeyringName,
        /// What its tokens begin with.
        prefix: Prefix,
        /// Whether keys of another system may be imported.
        allow_imported: bool,
        /// A page for consumers whose key is about to retire.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        help_url: Option<String>,
    },
    /// A consumer was made.
    ConsumerCreated {
        /// Its id.
        consumer: ConsumerId,
        /// For people.
        name: String,
    },
    /// A key was made, or imported, with its first version, which is active.
    KeyCreated {
        /// Its id.
        key_id: KeyId,
        /// Whose it is.
        consumer: ConsumerId,
        /// For people.
        name: String,
        /// Whether its secret comes from another system.
        imported: bool,
        /// What it may do.
        scopes: Scopes,
        /// From where.
        allowed_sources: AllowedSources,
        /// Its first version.
        version: NewVersion,
    },
    /// A rotation began: a version was staged.
    VersionStaged {
        /// The key.
        key_id: KeyId,
        /// The rotation.
        rotation: RotationId,
        /// The new version, pending.
        version: NewVersion,
        /// When the version is withdrawn unless it was handed over.
        withdraw_after: Timestamp,
    },
    /// The barrier was passed: the new version is active, the old one retiring.
    HandedOver {
        /// The key.
        key_id: KeyId,
        /// The rotation.
        rotation: RotationId,
        /// The version that became active.
        version: VersionNumber,
        /// The version that began to retire; none when no version was active.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        old: Option<OldVersion>,
    },
    /// A staged version was taken back before its secret was handed out.
    VersionWithdrawn {
        /// The key.
        key_id: KeyId,
        /// The rotation.
        rotation: RotationId,
        /// The version, revoked now.
        version: VersionNumber,
        /// Why.
        reason: Arc<str>,
    },
    /// A retiring version came to its planned end.
    VersionRetired {
        /// The key.
        key_id: KeyId,
        /// The version.
        version: VersionNumber,
        /// Why now.
        reason: Arc<str>,
    },
    /// Versions were ended at once.
    VersionsRevoked {
        /// The key.
        key_id: KeyId,
        /// The versions.
        versions: Vec<VersionNumber>,
        /// Why.
        reason: Arc<str>,
    },
}

/// The version that retires at a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OldVersion {
    /// The version.
    pub version: VersionNumber,
    /// Until when it stays accepted.
    pub until: Timestamp,
}

impl Change {
    /// The key that it is about, if it is about one.
    #[must_use]
    pub const fn key_id(&self) -> Option<KeyId> {
        match self {
            Self::KeyringCreated { .. } | Self::ConsumerCreated { .. } => None,
            Self::KeyCreated { key_id, .. }
            | Self::VersionStaged { key_id, .. }
            | Self::HandedOver { key_id, .. }
            | Self::VersionWithdrawn { key_id, .. }
            | Self::VersionRetired { key_id, .. }
            | Self::VersionsRevoked { key_id, .. } => Some(*key_id),
        }
    }

    /// Its name in the log.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::KeyringCreated { .. } => "keyring_created",
            Self::ConsumerCreated { .. } => "consumer_created",
            Self::KeyCreated { .. } => "key_created",
            Self::VersionStaged { .. } => "version_staged",
            Self::HandedOver { .. } => "handed_over",
            Self::VersionWithdrawn { .. } => "version_withdrawn",
            Self::VersionRetired { .. } => "version_retired",
            Self::VersionsRevoked { .. } => "versions_revoked",
        }
    }
}
