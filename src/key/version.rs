//! A version of a key: one secret's life.
//!
//! ```text
//! pending -> active -> retiring -> retired          any but revoked -> revoked
//!               ^----------+----------'  (roll back)
//! ```
//!
//! A transition takes the version and the time and returns the version in its new state, or an error that names both.
//! `expired` is no state: it is what the window says.

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    digest::{KeyDigest, PepperId},
    id::{RotationId, VersionNumber},
    note::{Note, Told},
    sink_name::SinkName,
    time::{Position, Timestamp, Window},
};

/// One secret of a key, with what is known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeyVersion {
    /// Counted from 1 within the key.
    pub(crate) number: VersionNumber,
    /// Of its secret.
    pub(crate) digest: KeyDigest,
    /// The pepper that keys the digest.
    pub(crate) pepper: PepperId,
    /// When it was made.
    pub(crate) created_at: Timestamp,
    /// When its secret is valid at all; no rotation makes it longer.
    pub(crate) window: Window,
    /// The last rotation that it took part in.
    pub(crate) rotation: Option<RotationId>,
    /// The rotation that staged it and has not withdrawn it; none for the first version of a key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) staged_by: Option<RotationId>,
    /// Where it is in its life.
    pub(crate) state: VersionState,
    /// What was told of it already.
    #[serde(default, skip_serializing_if = "Told::is_nothing")]
    pub(crate) told: Told,
}

/// Where a version is in its life, with the facts of that state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum VersionState {
    /// Distributed and accepted, its secret not handed out yet.
    Pending {
        /// When it was staged.
        since: Timestamp,
        /// When it is withdrawn if it was not handed over until then.
        withdraw_after: Timestamp,
        /// Where its secret may have arrived: from then on only an operator takes the version back.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sink: Option<SinkName>,
    },
    /// The version that the consumer should use.
    Active {
        /// When it became so.
        since: Timestamp,
    },
    /// The old version, accepted until it is retired or expires.
    Retiring {
        /// When the overlap began.
        since: Timestamp,
        /// The end of the overlap that the consumer was promised, never later than the version's own expiry. What is
        /// then, the policy says.
        until: Timestamp,
        /// The version to use instead.
        replaced_by: VersionNumber,
    },
    /// Its planned end. A roll-back may return it for a while.
    Retired {
        /// When it ended.
        since: Timestamp,
        /// The version to use instead.
        replaced_by: VersionNumber,
        /// Why it ended then.
        reason: Arc<str>,
    },
    /// Its immediate end, never undone.
    Revoked {
        /// When it ended.
        since: Timestamp,
        /// Why.
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

/// A transition that a version's state does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("version {version} is {from} and cannot become {to}")]
pub struct TransitionError {
    version: VersionNumber,
    from: KeyState,
    to: KeyState,
}

/// Why a version cannot return from its retirement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReinstateError {
    /// Its state has no way back.
    #[error(transparent)]
    State(#[from] TransitionError),
    /// It retired too long ago.
    #[error("version {version} retired at {since}, longer ago than a roll-back may reach")]
    TooLate {
        /// The version.
        version: VersionNumber,
        /// When it retired.
        since: Timestamp,
    },
}

impl KeyVersion {
    /// Hands a pending version over: it becomes the one to use.
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

    /// Begins the overlap of an active version, for `overlap` but never beyond its own expiry.
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

    /// Moves the deadline of a retiring version, never beyond its own expiry.
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

    /// Ends a retiring version as planned.
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

    /// Rolls back: a retiring version, or one that retired at most `rollback_for` ago, is active again.
    ///
    /// # Errors
    ///
    /// When it is in another state, or retired longer ago.
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

    /// Ends the version at once and for good.
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

    /// Takes a pending version back: it ends as a revoked one does, and belongs to no rotation any more, so that its rotation
    /// can stage another version.
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

    /// Whether sidecars accept the version at `now` or will later, as long as nothing is done about it.
    #[must_use]
    pub(crate) fn is_accepted(&self, now: Timestamp) -> bool {
        let lives = match self.state {
            VersionState::Pending { .. }
            | VersionState::Active { .. }
            | VersionState::Retiring { .. } => true,
            VersionState::Retired { .. } | VersionState::Revoked { .. } => false,
        };
        lives && self.window.position(now) != Position::After
    }

    /// The earliest end that is announced: the version's own expiry, or the end of its overlap.
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

    /// Notes that the secret of a pending version may be in other hands from now on.
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

    /// The version after people were told of it.
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

    /// The same in another state. What was told of the former one is forgotten when it begins another part of its life.
    fn with(self, state: VersionState) -> Self {
        let told = if self.state.kind() == state.kind() {
            self.told
        } else {
            Told::default()
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
    /// The state without its facts.
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
    /// All of them, in the order of a life.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Active,
        Self::Retiring,
        Self::Retired,
        Self::Revoked,
    ];

    /// Whether such a version is accepted within its window.
    #[must_use]
    pub(crate) const fn is_live(self) -> bool {
        match self {
            Self::Pending | Self::Active | Self::Retiring => true,
            Self::Retired | Self::Revoked => false,
        }
    }

    /// The name that users see everywhere.
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

/// A version as the log first tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVersion {
    /// Its number.
    pub number: VersionNumber,
    /// The digest of its secret.
    pub digest: KeyDigest,
    /// The pepper that keys the digest.
    pub pepper: PepperId,
    /// When its secret is valid.
    #[serde(default)]
    pub window: Window,
}

impl NewVersion {
    /// The version in its first state.
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
            told: Told::default(),
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

    /// A version in each state since 1,000 ms, that expires at 1,000,000 ms.
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

    /// The states from which a transition is possible, each with where it leads.
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
        assert_eq!(active.expect("it is retiring").told, Told::default());
    }
}
