//! The versions of a key: the states of one secret and the transitions between them.
//!
//! ```text
//! pending -> active -> retiring -> retired          any but revoked -> revoked
//!               ^----------+----------'  (roll back)
//! ```
//!
//! A transition gets the version and the time, and returns the version in its new state, or an
//! error that names both states. `expired` is not a state: it follows from the window.

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    digest::{KeyDigest, PepperId},
    id::{RotationId, VersionNumber},
    note::{Note, NotesTold},
    sink_name::SinkName,
    time::{Timestamp, Window, WindowPosition},
};

/// One secret of a key: its digest, its validity and its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeyVersion {
    /// The number, counted from 1 within the key.
    pub(crate) number: VersionNumber,
    /// The digest of its secret.
    pub(crate) digest: KeyDigest,
    /// The pepper that keys the digest.
    pub(crate) pepper: PepperId,
    pub(crate) created_at: Timestamp,
    /// The validity of its secret, in every state. No rotation extends it.
    pub(crate) window: Window,
    /// The last rotation that it was part of; none for a withdrawn version.
    pub(crate) rotation: Option<RotationId>,
    /// The rotation that staged it; none for the first version of a key and for a withdrawn
    /// version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) staged_by: Option<RotationId>,
    pub(crate) state: VersionState,
    /// The notes about it in its present state.
    #[serde(default, skip_serializing_if = "NotesTold::is_nothing")]
    pub(crate) told: NotesTold,
}

/// The state of a version, with the facts of that state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum VersionState {
    /// Distributed to sidecars and accepted, but not handed over yet.
    Pending {
        /// The time at which it was staged.
        since: Timestamp,
        /// The time at which it is withdrawn if it is not handed over. With a sink, it is not
        /// withdrawn then, but a use of it hands it over.
        withdraw_after: Timestamp,
        /// The sink that may have received its secret. With a sink, only an operator withdraws the
        /// version.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sink: Option<SinkName>,
    },
    /// The version that the consumer should use.
    Active {
        /// The time at which it became active.
        since: Timestamp,
    },
    /// An old version, accepted until it retires or expires.
    Retiring {
        /// The begin of the overlap.
        since: Timestamp,
        /// The end of the overlap that the consumer was promised, never later than the expiry of
        /// the version. The policy decides what happens then.
        until: Timestamp,
        /// The version to use instead.
        replaced_by: VersionNumber,
    },
    /// The planned end. For a limited time, a roll-back can make the version active again.
    Retired {
        /// The time at which it retired.
        since: Timestamp,
        /// The version to use instead.
        replaced_by: VersionNumber,
        /// Why it retired at this time, as text for people.
        reason: Arc<str>,
    },
    /// The immediate end, for good.
    Revoked {
        /// The time at which it was revoked.
        since: Timestamp,
        /// Why it was revoked, as text for people.
        reason: Arc<str>,
    },
}

/// A [`VersionState`] without its facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyState {
    /// [`VersionState::Pending`]
    Pending,
    /// [`VersionState::Active`]
    Active,
    /// [`VersionState::Retiring`]
    Retiring,
    /// [`VersionState::Retired`]
    Retired,
    /// [`VersionState::Revoked`]
    Revoked,
}

/// A transition that the state of a version does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("version {version} is {from} and cannot become {to}")]
pub struct TransitionError {
    version: VersionNumber,
    from: KeyState,
    to: KeyState,
}

/// The reason why a version cannot become active again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReinstateError {
    /// Its state does not allow it.
    #[error(transparent)]
    State(#[from] TransitionError),
    /// The version retired too long ago: `rollback_for` of the policy is over.
    #[error("version {version} retired at {since}, longer ago than rollback_for allows")]
    TooLate {
        /// The number of the version.
        version: VersionNumber,
        /// The time at which the version retired.
        since: Timestamp,
    },
}

impl KeyVersion {
    /// Hands a pending version over: it becomes active.
    ///
    /// # Errors
    ///
    /// When it is not pending.
    pub(crate) fn activate(self, now: Timestamp) -> Result<Self, TransitionError> {
        match self.state {
            VersionState::Pending { .. } => Ok(self.with(VersionState::Active { since: now })),
            VersionState::Active { .. }
            | VersionState::Retiring { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => Err(self.refuse(KeyState::Active)),
        }
    }

    /// Begins the overlap of an active version. It lasts for `overlap`, but at most until the
    /// version expires.
    ///
    /// # Errors
    ///
    /// When it is not active.
    pub(crate) fn begin_retiring(
        self,
        now: Timestamp,
        overlap: Duration,
        replaced_by: VersionNumber,
    ) -> Result<Self, TransitionError> {
        match self.state {
            VersionState::Active { .. } => {
                let until = self.not_beyond_expiry(now.saturating_add(overlap));
                Ok(self.with(VersionState::Retiring {
                    since: now,
                    until,
                    replaced_by,
                }))
            }
            VersionState::Pending { .. }
            | VersionState::Retiring { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => Err(self.refuse(KeyState::Retiring)),
        }
    }

    /// Moves the end of the overlap of a retiring version to `until`, but at most to the expiry of
    /// the version.
    ///
    /// # Errors
    ///
    /// When it is not retiring.
    pub(crate) fn extend(self, until: Timestamp) -> Result<Self, TransitionError> {
        match self.state {
            VersionState::Retiring {
                since, replaced_by, ..
            } => {
                let until = self.not_beyond_expiry(until);
                Ok(self.with(VersionState::Retiring {
                    since,
                    until,
                    replaced_by,
                }))
            }
            VersionState::Pending { .. }
            | VersionState::Active { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => Err(self.refuse(KeyState::Retiring)),
        }
    }

    /// Retires a retiring version: its planned end.
    ///
    /// # Errors
    ///
    /// When it is not retiring.
    pub(crate) fn retire(self, now: Timestamp, reason: Arc<str>) -> Result<Self, TransitionError> {
        match self.state {
            VersionState::Retiring { replaced_by, .. } => Ok(self.with(VersionState::Retired {
                since: now,
                replaced_by,
                reason,
            })),
            VersionState::Pending { .. }
            | VersionState::Active { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => Err(self.refuse(KeyState::Retired)),
        }
    }

    /// Makes an old version active again, for a roll-back: a retiring version, or one that retired
    /// less than `rollback_for` ago. Does not check its expiry.
    ///
    /// # Errors
    ///
    /// When the version is in another state, or retired `rollback_for` ago or earlier.
    pub(crate) fn reinstate(
        self,
        now: Timestamp,
        rollback_for: Duration,
    ) -> Result<Self, ReinstateError> {
        match self.state {
            VersionState::Retiring { .. } => Ok(self.with(VersionState::Active { since: now })),
            VersionState::Retired { since, .. } => {
                if now < since.saturating_add(rollback_for) {
                    Ok(self.with(VersionState::Active { since: now }))
                } else {
                    Err(ReinstateError::TooLate {
                        version: self.number,
                        since,
                    })
                }
            }
            VersionState::Pending { .. }
            | VersionState::Active { .. }
            | VersionState::Revoked { .. } => Err(self.refuse(KeyState::Active).into()),
        }
    }

    /// Revokes the version, in any other state: its immediate end, for good.
    ///
    /// # Errors
    ///
    /// When it is revoked already.
    pub(crate) fn revoke(self, now: Timestamp, reason: Arc<str>) -> Result<Self, TransitionError> {
        match self.state {
            VersionState::Pending { .. }
            | VersionState::Active { .. }
            | VersionState::Retiring { .. }
            | VersionState::Retired { .. } => {
                Ok(self.with(VersionState::Revoked { since: now, reason }))
            }
            VersionState::Revoked { .. } => Err(self.refuse(KeyState::Revoked)),
        }
    }

    /// Withdraws a pending version: it is revoked, and does not belong to a rotation any more, so
    /// that its rotation can stage another version.
    ///
    /// # Errors
    ///
    /// When it is not pending.
    pub(crate) fn withdraw(
        self,
        now: Timestamp,
        reason: Arc<str>,
    ) -> Result<Self, TransitionError> {
        match self.state {
            VersionState::Pending { .. } => Ok(Self {
                rotation: None,
                staged_by: None,
                ..self.revoke(now, reason)?
            }),
            VersionState::Active { .. }
            | VersionState::Retiring { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => Err(self.refuse(KeyState::Revoked)),
        }
    }

    /// Returns whether sidecars accept the version at `now`, or will accept it later if its state
    /// does not change.
    #[must_use]
    pub(crate) fn is_accepted(&self, now: Timestamp) -> bool {
        let lives = match self.state {
            VersionState::Pending { .. }
            | VersionState::Active { .. }
            | VersionState::Retiring { .. } => true,
            VersionState::Retired { .. } | VersionState::Revoked { .. } => false,
        };
        lives && self.window.position(now) != WindowPosition::After
    }

    /// Returns the earliest announced end: for a retiring version the end of its overlap, and
    /// otherwise its expiry, if it expires.
    #[must_use]
    pub(crate) fn ends_at(&self) -> Option<Timestamp> {
        match self.state {
            VersionState::Retiring { until, .. } => Some(until),
            VersionState::Pending { .. }
            | VersionState::Active { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => self.window.expires_at,
        }
    }

    /// Records that `sink` may hold the secret of a pending version from now on.
    ///
    /// # Errors
    ///
    /// When it is not pending.
    pub(crate) fn begin_delivery(
        self,
        sink: SinkName,
        withdraw_after: Timestamp,
    ) -> Result<Self, TransitionError> {
        match self.state {
            VersionState::Pending { since, .. } => Ok(self.with(VersionState::Pending {
                since,
                withdraw_after,
                sink: Some(sink),
            })),
            VersionState::Active { .. }
            | VersionState::Retiring { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => Err(self.refuse(KeyState::Pending)),
        }
    }

    /// Records a note about the version.
    #[must_use]
    pub(crate) fn told_of(self, note: &Note) -> Self {
        Self {
            told: self.told.and(note),
            ..self
        }
    }

    fn not_beyond_expiry(&self, end: Timestamp) -> Timestamp {
        self.window
            .expires_at
            .map_or(end, |expires_at| end.min(expires_at))
    }

    /// Returns the version in state `state`. The notes are dropped if the kind of the state
    /// changes, so that they can be made again in the new state.
    fn with(self, state: VersionState) -> Self {
        let told = if self.state.kind() == state.kind() {
            self.told
        } else {
            NotesTold::default()
        };
        Self {
            state,
            told,
            ..self
        }
    }

    fn refuse(&self, to: KeyState) -> TransitionError {
        TransitionError {
            version: self.number,
            from: self.state.kind(),
            to,
        }
    }
}

impl VersionState {
    /// Returns the state without its facts.
    #[must_use]
    pub(crate) const fn kind(&self) -> KeyState {
        match self {
            Self::Pending { .. } => KeyState::Pending,
            Self::Active { .. } => KeyState::Active,
            Self::Retiring { .. } => KeyState::Retiring,
            Self::Retired { .. } => KeyState::Retired,
            Self::Revoked { .. } => KeyState::Revoked,
        }
    }
}

impl KeyState {
    /// All states, in the order in which a version passes through them.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Active,
        Self::Retiring,
        Self::Retired,
        Self::Revoked,
    ];

    /// Returns whether a version in this state is accepted within its window.
    #[must_use]
    pub(crate) const fn is_live(self) -> bool {
        match self {
            Self::Pending | Self::Active | Self::Retiring => true,
            Self::Retired | Self::Revoked => false,
        }
    }

    /// Returns the name of the state, the same wherever users see it.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Retiring => "retiring",
            Self::Retired => "retired",
            Self::Revoked => "revoked",
        }
    }
}

impl fmt::Display for KeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A new version, as a change adds it to the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVersion {
    /// The number, not used before for the key.
    pub number: VersionNumber,
    /// The digest of its secret.
    pub digest: KeyDigest,
    /// The pepper that keys the digest.
    pub pepper: PepperId,
    /// The validity of its secret.
    #[serde(default)]
    pub window: Window,
}

impl NewVersion {
    /// Creates the version in its first state.
    #[must_use]
    pub(crate) fn begin(
        self,
        now: Timestamp,
        state: VersionState,
        rotation: Option<RotationId>,
    ) -> KeyVersion {
        KeyVersion {
            number: self.number,
            digest: self.digest,
            pepper: self.pepper,
            created_at: now,
            window: self.window,
            rotation,
            staged_by: rotation,
            state,
            told: NotesTold::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing;

    const OVERLAP: Duration = Duration::from_secs(10);
    const ROLLBACK_FOR: Duration = Duration::from_secs(100);

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn next() -> VersionNumber {
        VersionNumber::FIRST.next()
    }

    /// Creates a version that is in `state` since 1,000 ms and expires at 1,000,000 ms.
    fn version(state: KeyState) -> KeyVersion {
        let since = at(1_000);
        let record = testing::record();
        let new = NewVersion {
            number: VersionNumber::FIRST,
            digest: record.digest,
            pepper: record.pepper,
            window: Window::new(None, Some(at(1_000_000))),
        };
        let state = match state {
            KeyState::Pending => VersionState::Pending {
                since,
                withdraw_after: at(61_000),
                sink: None,
            },
            KeyState::Active => VersionState::Active { since },
            KeyState::Retiring => VersionState::Retiring {
                since,
                until: at(11_000),
                replaced_by: next(),
            },
            KeyState::Retired => VersionState::Retired {
                since,
                replaced_by: next(),
                reason: "test".into(),
            },
            KeyState::Revoked => VersionState::Revoked {
                since,
                reason: "test".into(),
            },
        };
        new.begin(since, state, None)
    }

    /// Returns the states from which a transition is possible, each with the state after it.
    fn possible<E>(
        transition: impl Fn(KeyVersion) -> Result<KeyVersion, E>,
    ) -> Vec<(KeyState, KeyState)> {
        KeyState::ALL
            .into_iter()
            .filter_map(|from| {
                let to = transition(version(from)).ok()?;
                Some((from, to.state.kind()))
            })
            .collect()
    }

    #[test]
    fn every_state_has_its_transitions_and_no_others() {
        use KeyState::{Active, Pending, Retired, Retiring, Revoked};
        let now = at(2_000);
        let reason = || Arc::from("test");
        assert_eq!(possible(|v| v.activate(now)), [(Pending, Active)]);
        let sink: SinkName = "files".parse().expect("a name");
        assert_eq!(
            possible(|v| v.begin_delivery(sink.clone(), now)),
            [(Pending, Pending)]
        );
        assert_eq!(
            possible(|v| v.begin_retiring(now, OVERLAP, next())),
            [(Active, Retiring)]
        );
        assert_eq!(possible(|v| v.extend(at(20_000))), [(Retiring, Retiring)]);
        assert_eq!(possible(|v| v.retire(now, reason())), [(Retiring, Retired)]);
        assert_eq!(
            possible(|v| v.reinstate(now, ROLLBACK_FOR)),
            [(Retiring, Active), (Retired, Active)]
        );
        assert_eq!(
            possible(|v| v.withdraw(now, reason())),
            [(Pending, Revoked)]
        );
        assert_eq!(
            possible(|v| v.revoke(now, reason())),
            [Pending, Active, Retiring, Retired].map(|from| (from, Revoked))
        );
    }

    #[test]
    fn a_refusal_names_both_states() {
        let refusal = version(KeyState::Revoked).activate(at(2_000));
        let text = refusal.expect_err("it is revoked").to_string();
        assert_eq!(text, "version 1 is revoked and cannot become active");
    }

    #[test]
    fn no_overlap_outlives_the_version() {
        let long = Duration::from_hours(24);
        let retiring = version(KeyState::Active).begin_retiring(at(2_000), long, next());
        let retiring = retiring.expect("it is active");
        assert_eq!(retiring.ends_at(), Some(at(1_000_000)));
        let extended = retiring.extend(at(9_000_000)).expect("it is retiring");
        assert_eq!(extended.ends_at(), Some(at(1_000_000)));
        let shortened = extended.extend(at(3_000)).expect("it is retiring");
        assert_eq!(shortened.ends_at(), Some(at(3_000)));
    }

    #[test]
    fn a_retired_version_returns_until_the_roll_back_is_over() {
        // Retired at 1,000 ms.
        let reinstate = |now| version(KeyState::Retired).reinstate(at(now), ROLLBACK_FOR);
        assert!(reinstate(100_999).is_ok());
        assert!(matches!(
            reinstate(101_000),
            Err(ReinstateError::TooLate { .. })
        ));
    }

    #[test]
    fn acceptance_ends_with_the_window_and_not_with_the_deadline() {
        for state in [KeyState::Active, KeyState::Retiring] {
            assert!(version(state).is_accepted(at(999_999)));
            assert!(!version(state).is_accepted(at(1_000_000)));
        }
    }

    #[test]
    fn what_was_told_is_told_again_in_another_part_of_the_life() {
        let mut retiring = version(KeyState::Retiring);
        retiring.told.drained = true;
        let extended = retiring.extend(at(20_000)).expect("it is retiring");
        assert!(extended.told.drained);
        let active = extended.reinstate(at(2_000), ROLLBACK_FOR);
        assert_eq!(active.expect("it is retiring").told, NotesTold::default());
    }
}
