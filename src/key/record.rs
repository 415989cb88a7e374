//! What a sidecar knows of one key version, and how it stands at a moment.

use super::{
    digest::{KeyDigest, PepperId},
    id::{ConsumerId, KeyId, RotationId, VersionNumber, VersionRef},
    permission::{AllowedSources, Scopes},
    time::{Position, Timestamp, Window},
    version::KeyState,
};

/// One key version as it is distributed. A record is never a verdict: time is judged on every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// Of its secret; what it is found by.
    pub digest: KeyDigest,
    /// The pepper that keys the digest.
    pub pepper: PepperId,
    /// The key, the same for all its versions.
    pub key_id: KeyId,
    /// Which version of the key.
    pub version: VersionNumber,
    /// Whose key it is.
    pub consumer: ConsumerId,
    /// As of the record's making.
    pub state: KeyState,
    /// When the secret is valid at all.
    pub window: Window,
    /// The beginning of the overlap, in state retiring; none also where an older control plane left it out.
    pub retiring_since: Option<Timestamp>,
    /// The announced end of the overlap, in state retiring. The control plane ends it, by a change of the state; until
    /// that comes, the version is accepted.
    pub retires_at: Option<Timestamp>,
    /// What the key may do.
    pub scopes: Scopes,
    /// From where.
    pub allowed_sources: AllowedSources,
    /// The version that takes this one's place, in states retiring and retired.
    pub replaced_by: Option<VersionNumber>,
    /// The rotation that the version takes part in.
    pub rotation: Option<RotationId>,
}

/// How a version stands at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is accepted.
    Accepted,
    /// Its window has not begun.
    NotYetValid,
    /// Its window is over.
    Expired,
    /// The control plane has ended it as planned.
    Retired,
    /// It was ended at once, for good.
    Revoked,
}

impl KeyRecord {
    /// What names it.
    #[must_use]
    pub(crate) const fn version_ref(&self) -> VersionRef {
        VersionRef {
            key_id: self.key_id,
            version: self.version,
        }
    }

    /// How the version stands at `now`, by the wall clock: see [`Standing::of`].
    #[must_use]
    pub(crate) fn standing(&self, now: Timestamp) -> Standing {
        Standing::of(self.state, &self.window, now)
    }
}

impl Standing {
    /// How a version stands at `now`, by the wall clock. An overlap is ended by the control plane alone: only it knows
    /// whether the old version is still in use.
    #[must_use]
    pub(crate) fn of(state: KeyState, window: &Window, now: Timestamp) -> Self {
        match state {
            KeyState::Revoked => return Self::Revoked,
            KeyState::Retired => return Self::Retired,
            KeyState::Pending | KeyState::Active | KeyState::Retiring => {}
        }
        match window.position(now) {
            Position::After => Self::Expired,
            Position::Before => Self::NotYetValid,
            Position::Inside => Self::Accepted,
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
