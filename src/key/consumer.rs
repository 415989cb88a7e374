//! The consumers and keys of a keyring.

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

/// A caller of the API. Keys belong to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Consumer {
    /// The name for people; may be empty.
    pub(crate) name: String,
    pub(crate) created_at: Timestamp,
    pub(crate) keys: PagedSet<KeyId>,
}

/// One credential of a consumer. Its id stays the same in all rotations; its secrets are its
/// versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) id: KeyId,
    /// The owner of the key.
    pub(crate) consumer: ConsumerId,
    /// The name for people; may be empty.
    pub(crate) name: String,
    /// Whether the first secret comes from another system.
    pub(crate) imported: bool,
    /// The permissions of the key.
    pub(crate) scopes: Scopes,
    /// The addresses that the key may be used from.
    pub(crate) allowed_sources: AllowedSources,
    /// The settings that override the policy of the keyring; none for most keys.
    pub(crate) policy: Option<Arc<PolicyOverrides>>,
    pub(crate) versions: Versions,
}

/// The overrides of a key without its own settings.
static NO_OVERRIDES: PolicyOverrides = PolicyOverrides::NONE;

impl Key {
    /// Returns the settings that override the policy of the keyring.
    #[must_use]
    pub(crate) fn overrides(&self) -> &PolicyOverrides {
        self.policy.as_deref().unwrap_or(&NO_OVERRIDES)
    }

    /// Returns the version that the consumer should use, if there is one.
    #[must_use]
    pub(crate) fn active(&self) -> Option<&KeyVersion> {
        self.versions
            .values()
            .find(|version| matches!(version.state, VersionState::Active { .. }))
    }

    /// Returns the version that is staged and not handed over, if there is one.
    #[must_use]
    pub(crate) fn pending(&self) -> Option<&KeyVersion> {
        self.versions
            .values()
            .find(|version| matches!(version.state, VersionState::Pending { .. }))
    }

    /// Returns the retiring versions, in the order of their numbers.
    pub(crate) fn retiring(&self) -> impl Iterator<Item = &KeyVersion> {
        self.versions
            .values()
            .filter(|version| matches!(version.state, VersionState::Retiring { .. }))
    }

    /// Returns the versions that sidecars accept at `now` or will accept later.
    pub(crate) fn accepted(&self, now: Timestamp) -> impl Iterator<Item = &KeyVersion> {
        self.versions
            .values()
            .filter(move |version| version.is_accepted(now))
    }

    /// Returns the version that `rotation` replaced with `new`, and the end of its overlap. For a
    /// retired or revoked version, returns the time at which it ended.
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

    /// Returns the lifetime of the active version, from its `not_before` or else its creation to
    /// its expiry. Without an active version, returns that of the newest version.
    #[must_use]
    pub(crate) fn lifetime(&self) -> Lifetime {
        let limit = || {
            let version = self.active().or_else(|| self.versions.last())?;
            let start = version.window.not_before.unwrap_or(version.created_at);
            Some(version.window.expires_at?.saturating_since(start))
        };
        limit().map_or(Lifetime::Unlimited, Lifetime::Limited)
    }

    /// Returns the number for the next version.
    #[must_use]
    pub(crate) fn next_number(&self) -> VersionNumber {
        self.versions
            .last()
            .map_or(VersionNumber::FIRST, |last| last.number.next())
    }

    /// Returns the record of one of its versions for sidecars.
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

    /// Returns the rotation that a version is part of now. It runs from the staging of the new
    /// version until the old version ends.
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
