//! The record that sidecars hold of one key version, and its standing at a time.

use super::{
    digest::{KeyDigest, PepperId},
    id::{ConsumerId, KeyId, RotationId, VersionNumber, VersionRef},
    permission::{AllowedSources, Scopes},
    time::{Timestamp, Window, WindowPosition},
    version::KeyState,
};

/// The record of one key version, as sidecars receive it. A record is never a decision: every
/// request is checked against the time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// The digest of its secret. Sidecars look the record up by it.
    pub digest: KeyDigest,
    /// The pepper that keys the digest.
    pub pepper: PepperId,
    /// The id of the key, the same for all its versions.
    pub key_id: KeyId,
    /// The number of the version within the key.
    pub version: VersionNumber,
    /// The owner of the key.
    pub consumer: ConsumerId,
    /// The state when the record was created.
    pub state: KeyState,
    /// The validity of the secret, in every state.
    pub window: Window,
    /// The begin of the overlap, in state retiring. Also none if an older control plane omitted it.
    pub retiring_since: Option<Timestamp>,
    /// The announced end of the overlap, in state retiring. The control plane ends the overlap by a
    /// change of the state. Until that change arrives, the version is accepted.
    pub retires_at: Option<Timestamp>,
    /// The permissions of the key.
    pub scopes: Scopes,
    /// The addresses that the key may be used from.
    pub allowed_sources: AllowedSources,
    /// The version that replaces this one, in states retiring and retired.
    pub replaced_by: Option<VersionNumber>,
    /// The rotation in progress that the version is part of.
    pub rotation: Option<RotationId>,
}

/// The standing of a version at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The version is accepted.
    Accepted,
    /// The window of the version has not begun.
    NotYetValid,
    /// The window of the version is over.
    Expired,
    /// The control plane has retired the version.
    Retired,
    /// The version is revoked, for good.
    Revoked,
}

impl KeyRecord {
    /// Returns the reference to the version.
    #[must_use]
    pub(crate) const fn version_ref(&self) -> VersionRef {
        VersionRef {
            key_id: self.key_id,
            version: self.version,
        }
    }

    /// Returns the standing of the version at `now`, by the wall clock: see [`Standing::of`].
    #[must_use]
    pub(crate) fn standing(&self, now: Timestamp) -> Standing {
        Standing::of(self.state, &self.window, now)
    }
}

impl Standing {
    /// Returns the standing of a version at `now`, by the wall clock. Only the control plane ends
    /// an overlap, because only it knows whether the old version is still in use.
    #[must_use]
    pub(crate) fn of(state: KeyState, window: &Window, now: Timestamp) -> Self {
        match state {
            KeyState::Revoked => return Self::Revoked,
            KeyState::Retired => return Self::Retired,
            KeyState::Pending | KeyState::Active | KeyState::Retiring => {}
        }
        match window.position(now) {
            WindowPosition::After => Self::Expired,
            WindowPosition::Before => Self::NotYetValid,
            WindowPosition::Inside => Self::Accepted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn record(state: KeyState, retires_at: Option<i64>) -> KeyRecord {
        KeyRecord {
            state,
            window: Window::new(Some(at(100)), Some(at(200))),
            retires_at: retires_at.map(at),
            ..testing::record()
        }
    }

    #[test]
    fn window_is_judged_at_every_look() {
        for state in [KeyState::Pending, KeyState::Active] {
            let record = record(state, None);
            assert_eq!(record.standing(at(99)), Standing::NotYetValid);
            assert_eq!(record.standing(at(100)), Standing::Accepted);
            assert_eq!(record.standing(at(199)), Standing::Accepted);
            assert_eq!(record.standing(at(200)), Standing::Expired);
        }
    }

    #[test]
    fn retiring_version_is_accepted_beyond_its_deadline_until_it_expires() {
        let record = record(KeyState::Retiring, Some(150));
        assert_eq!(record.standing(at(99)), Standing::NotYetValid);
        assert_eq!(record.standing(at(150)), Standing::Accepted);
        assert_eq!(record.standing(at(199)), Standing::Accepted);
        assert_eq!(record.standing(at(200)), Standing::Expired);
    }

    #[test]
    fn revoked_and_retired_versions_are_so_at_any_time() {
        for now in [0, 100, 150, 200, 300] {
            assert_eq!(
                record(KeyState::Revoked, None).standing(at(now)),
                Standing::Revoked
            );
            assert_eq!(
                record(KeyState::Retired, None).standing(at(now)),
                Standing::Retired
            );
        }
    }
}
