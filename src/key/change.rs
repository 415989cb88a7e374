//! A committed change: one row of a keyring's log.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    id::{ConsumerId, KeyId, KeyringName, RotationId, VersionNumber},
    note::Note,
    permission::{AllowedSources, Scopes},
    policy::{PolicyOverrides, RotationPolicy},
    sink_name::SinkName,
    time::Timestamp,
    token::Prefix,
    version::NewVersion,
    webhook::{Webhook, WebhookId},
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
        /// Whether an operator retired it although the evidence was not complete.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        forced: bool,
    },
    /// The deadline of a retiring version was moved.
    OverlapExtended {
        /// The key.
        key_id: KeyId,
        /// The version.
        version: VersionNumber,
        /// The new deadline.
        until: Timestamp,
        /// Why.
        reason: Arc<str>,
    },
    /// An old version is the one to use again.
    RolledBack {
        /// The key.
        key_id: KeyId,
        /// The version that is active again.
        version: VersionNumber,
        /// The version that began to retire instead; none when no version was active.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replaced: Option<OldVersion>,
        /// Why.
        reason: Arc<str>,
    },
    /// The secret of a scheduled rotation is on its way to a sink: from here on somebody may hold it.
    DeliveryBegun {
        /// The key.
        key_id: KeyId,
        /// The rotation.
        rotation: RotationId,
        /// The version.
        version: VersionNumber,
        /// Where to.
        sink: SinkName,
        /// From when on a use of the version is taken for a hand-over.
        withdraw_after: Timestamp,
    },
    /// Something was found that people are told of; it changes nothing for sidecars.
    Noted {
        /// The key.
        key_id: KeyId,
        /// The version.
        version: VersionNumber,
        /// What was found.
        note: Note,
    },
    /// How the keys of the keyring are rotated.
    KeyringPolicySet {
        /// The whole policy.
        policy: RotationPolicy,
    },
    /// In what a key departs from the policy of its keyring.
    KeyPolicySet {
        /// The key.
        key_id: KeyId,
        /// All of its departures.
        overrides: PolicyOverrides,
    },
    /// Somebody is told of events from now on.
    WebhookAdded {
        /// Who, and of what.
        webhook: Webhook,
    },
    /// Somebody is told of nothing any more.
    WebhookRemoved {
        /// Which one.
        id: WebhookId,
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
    pub(crate) version: VersionNumber,
    /// Until when it stays accepted.
    pub(crate) until: Timestamp,
}

impl Change {
    /// The key that it is about, if it is about one.
    #[must_use]
    pub(crate) const fn key_id(&self) -> Option<KeyId> {
        match self {
            Self::KeyringCreated { .. }
            | Self::ConsumerCreated { .. }
            | Self::KeyringPolicySet { .. }
            | Self::WebhookAdded { .. }
            | Self::WebhookRemoved { .. } => None,
            Self::KeyCreated { key_id, .. }
            | Self::OverlapExtended { key_id, .. }
            | Self::RolledBack { key_id, .. }
            | Self::DeliveryBegun { key_id, .. }
            | Self::Noted { key_id, .. }
            | Self::KeyPolicySet { key_id, .. }
            | Self::VersionStaged { key_id, .. }
            | Self::HandedOver { key_id, .. }
            | Self::VersionWithdrawn { key_id, .. }
            | Self::VersionRetired { key_id, .. }
            | Self::VersionsRevoked { key_id, .. } => Some(*key_id),
        }
    }

    /// The rotation that it names, if it names one.
    #[must_use]
    pub(crate) const fn rotation(&self) -> Option<RotationId> {
        match self {
            Self::VersionStaged { rotation, .. }
            | Self::HandedOver { rotation, .. }
            | Self::VersionWithdrawn { rotation, .. }
            | Self::DeliveryBegun { rotation, .. } => Some(*rotation),
            Self::KeyringCreated { .. }
            | Self::ConsumerCreated { .. }
            | Self::KeyCreated { .. }
            | Self::VersionRetired { .. }
            | Self::OverlapExtended { .. }
            | Self::RolledBack { .. }
            | Self::Noted { .. }
            | Self::KeyringPolicySet { .. }
            | Self::KeyPolicySet { .. }
            | Self::WebhookAdded { .. }
            | Self::WebhookRemoved { .. }
            | Self::VersionsRevoked { .. } => None,
        }
    }

    /// The version that began to retire by it.
    #[must_use]
    pub(crate) fn old_version(&self) -> Option<OldVersion> {
        if let Self::HandedOver { old, .. } | Self::RolledBack { replaced: old, .. } = self {
            *old
        } else {
            None
        }
    }

    /// Its name in the log.
    #[must_use]
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::KeyringCreated { .. } => "keyring_created",
            Self::ConsumerCreated { .. } => "consumer_created",
            Self::KeyCreated { .. } => "key_created",
            Self::VersionStaged { .. } => "version_staged",
            Self::HandedOver { .. } => "handed_over",
            Self::VersionWithdrawn { .. } => "version_withdrawn",
            Self::VersionRetired { .. } => "version_retired",
            Self::OverlapExtended { .. } => "overlap_extended",
            Self::RolledBack { .. } => "rolled_back",
            Self::DeliveryBegun { .. } => "delivery_begun",
            Self::Noted { .. } => "noted",
            Self::KeyringPolicySet { .. } => "keyring_policy_set",
            Self::KeyPolicySet { .. } => "key_policy_set",
            Self::WebhookAdded { .. } => "webhook_added",
            Self::WebhookRemoved { .. } => "webhook_removed",
            Self::VersionsRevoked { .. } => "versions_revoked",
        }
    }
}
