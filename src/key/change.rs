//! The changes of a keyring. Each is one row of its log.

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

/// A change of a keyring. Stored as JSON, so that an auditor can read the log without relatch.
///
/// Variants and fields may be added. The existing ones stay readable for as long as logs are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Change {
    /// The keyring was created. Always the first change of a log, and only there.
    KeyringCreated {
        /// The name of the keyring.
        name: KeyringName,
        /// The prefix of its tokens.
        prefix: Prefix,
        /// Whether keys of another system may be imported.
        allow_imported: bool,
        /// The URL of a page for consumers whose key is about to retire.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        help_url: Option<String>,
    },
    /// A consumer was created.
    ConsumerCreated {
        /// The id of the consumer, new in its keyring.
        consumer: ConsumerId,
        /// The name for people; may be empty.
        name: String,
    },
    /// A key was created, or imported, with its first version, which is active.
    KeyCreated {
        /// The id of the key, new in its keyring.
        key_id: KeyId,
        /// The owner of the key, an existing consumer.
        consumer: ConsumerId,
        /// The name for people; may be empty.
        name: String,
        /// Whether its secret comes from another system.
        imported: bool,
        /// The permissions of the key.
        scopes: Scopes,
        /// The addresses that the key may be used from.
        allowed_sources: AllowedSources,
        /// The first version. Its digest is new in the keyring.
        version: NewVersion,
    },
    /// A rotation began: a version was staged.
    VersionStaged {
        /// The key of the rotation.
        key_id: KeyId,
        /// The new rotation.
        rotation: RotationId,
        /// The new version, in state pending.
        version: NewVersion,
        /// The time at which the version is withdrawn if it is not handed over.
        withdraw_after: Timestamp,
    },
    /// The barrier was passed: the new version is active, the old one retiring.
    HandedOver {
        /// The key of the rotation.
        key_id: KeyId,
        /// The rotation that staged the new version.
        rotation: RotationId,
        /// The version that became active.
        version: VersionNumber,
        /// The version that began to retire; none when no version was active.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        old: Option<OldVersion>,
    },
    /// A staged version was withdrawn before its hand-over.
    VersionWithdrawn {
        /// The key of the rotation.
        key_id: KeyId,
        /// The rotation that staged the version.
        rotation: RotationId,
        /// The version, which is now revoked.
        version: VersionNumber,
        /// Why the version was withdrawn, as text for people.
        reason: Arc<str>,
    },
    /// A retiring version retired: its planned end.
    VersionRetired {
        /// The key of the version.
        key_id: KeyId,
        /// The version, which is now retired.
        version: VersionNumber,
        /// Why the version retired at this time, as text for people.
        reason: Arc<str>,
        /// Whether an operator retired it with `--force`, with or without complete evidence.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        forced: bool,
    },
    /// The end of the overlap of a retiring version was moved.
    OverlapExtended {
        /// The key of the version.
        key_id: KeyId,
        /// The retiring version.
        version: VersionNumber,
        /// The new end of the overlap.
        until: Timestamp,
        /// Why the overlap was extended, as text for people.
        reason: Arc<str>,
    },
    /// An earlier version became active again.
    RolledBack {
        /// The key of the version.
        key_id: KeyId,
        /// The version that is active again.
        version: VersionNumber,
        /// The version that began to retire instead; none when no version was active.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replaced: Option<OldVersion>,
        /// The operator's reason, at most 512 bytes.
        reason: Arc<str>,
    },
    /// The delivery of the secret of a scheduled rotation to a sink began. From this change on,
    /// somebody may hold the secret.
    DeliveryBegun {
        /// The key of the rotation.
        key_id: KeyId,
        /// The rotation that staged the version.
        rotation: RotationId,
        /// The staged version.
        version: VersionNumber,
        /// The sink that receives the secret.
        sink: SinkName,
        /// The time from which a use of the version hands it over.
        withdraw_after: Timestamp,
    },
    /// A note about a version was added for people. It changes nothing for sidecars.
    Noted {
        /// The key of the version.
        key_id: KeyId,
        /// The version that the note is about.
        version: VersionNumber,
        /// The content of the note.
        note: Note,
    },
    /// The policy of the keyring was set.
    KeyringPolicySet {
        /// The whole policy.
        policy: RotationPolicy,
    },
    /// The settings of a key that override the policy of its keyring were set.
    KeyPolicySet {
        /// The key with its own settings.
        key_id: KeyId,
        /// All of its overrides.
        overrides: PolicyOverrides,
    },
    /// A webhook was added: it receives events from now on.
    WebhookAdded {
        /// The webhook, with its filters.
        webhook: Webhook,
    },
    /// A webhook was removed: it receives no more events.
    WebhookRemoved {
        /// The id of the removed webhook.
        id: WebhookId,
    },
    /// Versions of a key were revoked, immediately and for good.
    VersionsRevoked {
        /// The key of the versions.
        key_id: KeyId,
        /// The versions, which are now revoked.
        versions: Vec<VersionNumber>,
        /// Why the versions were revoked, as text for people.
        reason: Arc<str>,
    },
}

/// The version that begins to retire at a hand-over or a roll-back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OldVersion {
    pub(crate) version: VersionNumber,
    /// The end of its overlap.
    pub(crate) until: Timestamp,
}

impl Change {
    /// Returns the key of the change, if it is about a key.
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

    /// Returns the rotation that the change names, if any.
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

    /// Returns the version that began to retire with this change, if any.
    #[must_use]
    pub(crate) fn old_version(&self) -> Option<OldVersion> {
        if let Self::HandedOver { old, .. } | Self::RolledBack { replaced: old, .. } = self {
            *old
        } else {
            None
        }
    }

    /// Returns the name of the change in the log: the field `kind`.
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
