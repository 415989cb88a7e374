//! Consumers and their keys, as a keyring holds them.

use std::sync::Arc;

use super::{
    change::OldVersion,
    id::{ConsumerId, KeyId, RotationId, VersionNumber},
    lifetime::Lifetime,
    paged::PagedSet,
    permission::{AllowedSources, Scopes},
    policy::PolicyOverrides,
    record::KeyRecord,
    time::Timestamp,
    version::{KeyVersion, VersionState},
    versions::Versions,
};

/// A caller that keys belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Consumer {
    /// For people.
    pub(crate) name: String,
    /// When it was made.
    pub(crate) created_at: Timestamp,
    /// The ids of its keys.
    pub(crate) keys: PagedSet<KeyId>,
}

/// One credential of a consumer. Its id is stable across rotations; its secrets are its versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// Its id.
    pub(crate) id: KeyId,
    /// Whose it is.
    pub(crate) consumer: ConsumerId,
    /// For people.
    pub(crate) name: String,
    /// Whether its first secret comes from another system.
    pub(crate) imported: bool,
    /// What it may do.
    pub(crate) scopes: Scopes,
    /// From where.
    pub(crate) allowed_sources: AllowedSources,
    /// In what it departs from the policy of its keyring; few keys do.
    pub(crate) policy: Option<Arc<PolicyOverrides>>,
    /// Its versions by number.
    pub(crate) versions: Versions,
}

/// Those of a key that departs from nothing.
static NO_OVERRIDES: PolicyOverrides = PolicyOverrides::NONE;

impl Key {
    /// In what it departs from the policy of its keyring.
    #[must_use]
    pub(crate) fn overrides(&self) -> &PolicyOverrides {
        self.policy.as_deref().unwrap_or(&NO_OVERRIDES)
    }

    /// The version that the consumer should use, if there is one.
    #[must_use]
    pub(crate) fn active(&self) -> Option<&KeyVersion> {
        self.versions
            .values()
            .find(|version| matches!(version.state, VersionState::Active { .. }))
    }

    /// The version whose rotation has not been handed over, if there is one.
    #[must_use]
    pub(crate) fn pending(&self) -> Option<&KeyVersion> {
        self.versions
            .values()
            .find(|version| matches!(version.state, VersionState::Pending { .. }))
    }

    /// The versions that are retiring, the oldest first.
    pub(crate) fn retiring(&self) -> impl Iterator<Item = &KeyVersion> {
        self.versions
            .values()
            .filter(|version| matches!(version.state, VersionState::Retiring { .. }))
    }

    /// The versions that sidecars accept at `now`, or will.
    pub(crate) fn accepted(&self, now: Timestamp) -> impl Iterator<Item = &KeyVersion> {
        self.versions
            .values()
            .filter(move |version| version.is_accepted(now))
    }

    /// The version that `rotation` replaced by `new`, and until when it is accepted; one that has ended, when it did.
    #[must_use]
    pub(crate) fn replaced_by(
        &self,
        rotation: RotationId,
        new: VersionNumber,
    ) -> Option<OldVersion> {
        let is_old =
            |version: &&KeyVersion| version.number != new && version.rotation == Some(rotation);
        let old = self.versions.values().find(is_old)?;
        let until = match old.state {
            VersionState::Retiring { until, .. } => until,
            VersionState::Retired { since, .. } | VersionState::Revoked { since, .. } => since,
            VersionState::Pending { .. } | VersionState::Active { .. } => return None,
        };
        Some(OldVersion {
            version: old.number,
            until,
        })
    }

    /// How long the active version was to live when it was made; where none is active, the newest one.
    #[must_use]
    pub(crate) fn lifetime(&self) -> Lifetime {
        let limit = || {
            let version = self.active().or_else(|| self.versions.last())?;
            let start = version.window.not_before.unwrap_or(version.created_at);
            Some(version.window.expires_at?.saturating_since(start))
        };
        limit().map_or(Lifetime::Unlimited, Lifetime::Limited)
    }

    /// The number for the next version.
    #[must_use]
    pub(crate) fn next_number(&self) -> VersionNumber {
        self.versions
            .last()
            .map_or(VersionNumber::FIRST, |last| last.number.next())
    }

    /// What sidecars are told of one of its versions.
    pub(super) fn record(&self, version: &KeyVersion) -> KeyRecord {
        let (retiring_since, retires_at, replaced_by) = match version.state {
            VersionState::Retiring {
                since,
                until,
                replaced_by,
            } => (Some(since), Some(until), Some(replaced_by)),
            VersionState::Retired { replaced_by, .. } => (None, None, Some(replaced_by)),
            VersionState::Pending { .. }
            | VersionState::Active { .. }
            | VersionState::Revoked { .. } => (None, None, None),
        };
        KeyRecord {
            digest: version.digest,
            pepper: version.pepper,
            key_id: self.id,
            version: version.number,
            consumer: self.consumer.clone(),
            state: version.state.kind(),
            window: version.window,
            retiring_since,
            retires_at,
            scopes: self.scopes.clone(),
            allowed_sources: self.allowed_sources.clone(),
            replaced_by,
            rotation: self.running_rotation(version),
        }
    }

    /// The rotation that a version takes part in now: from its staging until the version that it replaces has ended.
    fn running_rotation(&self, version: &KeyVersion) -> Option<RotationId> {
        let runs = match version.state {
            VersionState::Pending { .. } | VersionState::Retiring { .. } => true,
            VersionState::Active { .. } => self.versions.values().any(|other| {
                matches!(other.state, VersionState::Retiring { .. })
                    && other.rotation == version.rotation
            }),
            VersionState::Retired { .. } | VersionState::Revoked { .. } => false,
        };
        version.rotation.filter(|_| runs)
    }
}
