//! The rotation engine: a pure function that plans the changes that are due by policy, evidence and
//! time.
//!
//! A staged version that is not handed over in time is withdrawn, because the process with its
//! secret is gone. If a sink may have received the secret, the version is held instead, and a use
//! of it hands it over. A retiring version retires when its overlap is over and the
//! [`evidence`](super::evidence) shows that nobody uses it. If it is still used, the policy
//! decides. The engine notes everything that people have to know, once. It retires a version
//! without a successor only if that version has expired.

mod left_behind;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{
    change::{Change, OldVersion},
    consumer::Key,
    evidence::{Evidence, Idleness, Since},
    id::{KeyId, VersionRef},
    keyring::Keyring,
    note::Note,
    policy::{OnDeadline, RotationPolicy},
    sink_name::SinkName,
    time::{Timestamp, WindowPosition},
    version::{KeyVersion, VersionState},
};

use crate::duration::written;

pub(crate) use left_behind::{secret_lost, settle_left_behind, staged};

/// The phase of a version in its rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Phase {
    /// The version is pending: relatch waits until every sidecar accepts it, and then until its
    /// sink, if it has one, confirms the secret.
    Stage,
    /// The version is retiring, and may be in use.
    Overlap,
    /// The version is retiring, and nobody uses it any more. It retires at the end of the promised
    /// overlap.
    Drain,
    /// The version is retiring, its overlap is over, and something keeps it from retiring. Or it is
    /// pending, and the delivery of its secret is held.
    Held,
    /// The version is pending, and relatch does not have its secret any more. Only a use of the
    /// version, or an operator, ends this phase.
    SecretLost,
}

/// The progress of a rotation if nobody intervenes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outlook {
    pub(crate) phase: Phase,
    /// The condition that the rotation waits for, as text for people.
    pub(crate) waits_for: String,
    /// The earliest end, if the version is not used any more; none when it is unknown.
    pub(crate) earliest_end: Option<Timestamp>,
}

/// The shortest extension: 1 s, the interval of the engine. A shorter one would need a new deadline
/// each second.
const MIN_EXTENSION: Duration = Duration::from_secs(1);

/// Returns the changes that are due at `now`. The changes of one version are together and in order.
/// After `limit` changes, no further version is examined.
///
/// After the changes are applied, a second call at the same time returns nothing, unless `limit`
/// was reached.
#[must_use]
pub(crate) fn plan(
    keyring: &Keyring,
    evidence: &Evidence,
    now: Timestamp,
    limit: usize,
) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut handed_over = BTreeSet::new();
    for (key, version) in keyring.moving().chain(keyring.due(now)) {
        if changes.len() >= limit {
            break;
        }
        if handed_over.contains(&key.id) {
            // The hand-over has already planned the changes of its other versions.
            continue;
        }
        let planned = changes.len();
        let case = Case {
            key,
            policy: &keyring.policy_of(key),
            evidence,
            now,
        };
        case.plan(version.clone(), &mut changes);
        let is_hand_over = |change: &Change| matches!(change, Change::HandedOver { .. });
        if changes[planned..].iter().any(is_hand_over) {
            handed_over.insert(key.id);
        }
    }
    changes
}

/// Returns the keys whose scheduled rotation is to be started at `now`: their policy names a sink,
/// and they have no rotation in progress.
#[must_use]
pub(crate) fn due_rotations(keyring: &Keyring, now: Timestamp) -> Vec<KeyId> {
    keyring
        .due(now)
        .filter(|(key, version)| is_to_rotate(keyring, key, version, now))
        .map(|(key, _)| key.id)
        .collect()
}

/// Returns whether the scheduled rotation of a key is to be started at `now`.
#[must_use]
pub(crate) fn is_rotation_due(keyring: &Keyring, key: &Key, now: Timestamp) -> bool {
    key.active()
        .is_some_and(|version| is_to_rotate(keyring, key, version, now))
}

fn is_to_rotate(keyring: &Keyring, key: &Key, version: &KeyVersion, now: Timestamp) -> bool {
    let policy = keyring.policy_of(key);
    let is_due = policy
        .rotation_due_at(version)
        .is_some_and(|due| due <= now);
    let is_free = key.pending().is_none() && key.retiring().next().is_none();
    policy.sink.is_some() && is_due && is_free
}

/// Returns the outlook for a version in a rotation; none if it is neither pending nor retiring.
#[must_use]
pub(crate) fn outlook(
    keyring: &Keyring,
    which: VersionRef,
    evidence: &Evidence,
    now: Timestamp,
) -> Option<Outlook> {
    let (key, version) = keyring.version(which)?;
    let case = Case {
        key,
        policy: &keyring.policy_of(key),
        evidence,
        now,
    };
    case.outlook(version)
}

/// Returns the time from which requests with a retiring version are denied even if it is in use.
/// That is the end of its overlap, if the policy retires it then and another version replaces it,
/// and otherwise its expiry. None if the version is not retiring, or if nothing ends it while it is
/// in use.
#[must_use]
pub(crate) fn denied_from(
    keyring: &Keyring,
    key: &Key,
    version: &KeyVersion,
    now: Timestamp,
) -> Option<Timestamp> {
    let VersionState::Retiring { until, .. } = version.state else {
        return None;
    };
    match keyring.policy_of(key).on_deadline {
        OnDeadline::Retire if has_successor(key, now) => Some(until),
        OnDeadline::Retire | OnDeadline::Extend | OnDeadline::Hold => version.window.expires_at,
    }
}

/// A key, with everything that decides what is due for it.
struct Case<'a> {
    key: &'a Key,
    policy: &'a RotationPolicy,
    evidence: &'a Evidence,
    now: Timestamp,
}

impl Case<'_> {
    /// Adds the changes that are due for a version, one after the other. Each is planned as if the
    /// ones before it were applied.
    fn plan(&self, mut version: KeyVersion, changes: &mut Vec<Change>) {
        while let Some(change) = self.next(&version) {
            let after = match &change {
                Change::Noted { note, .. } => Some(version.clone().told_of(note)),
                Change::OverlapExtended { until, .. } => version.clone().extend(*until).ok(),
                Change::HandedOver { old, .. } => {
                    let old = *old;
                    changes.push(change);
                    self.plan_after_hand_over(version, old, changes);
                    return;
                }
                Change::KeyringCreated { .. }
                | Change::ConsumerCreated { .. }
                | Change::KeyCreated { .. }
                | Change::VersionStaged { .. }
                | Change::VersionWithdrawn { .. }
                | Change::VersionRetired { .. }
                | Change::RolledBack { .. }
                | Change::DeliveryBegun { .. }
                | Change::KeyringPolicySet { .. }
                | Change::KeyPolicySet { .. }
                | Change::WebhookAdded { .. }
                | Change::WebhookRemoved { .. }
                | Change::VersionsRevoked { .. } => None,
            };
            changes.push(change);
            match after {
                Some(after) => version = after,
                None => return,
            }
        }
    }

    /// Adds the changes that are due after a hand-over: for `new`, which is active then, and for
    /// `old`, which is retiring.
    fn plan_after_hand_over(
        &self,
        new: KeyVersion,
        old: Option<OldVersion>,
        changes: &mut Vec<Change>,
    ) {
        let mut key = self.key.clone();
        let overlap = |until: Timestamp| until.saturating_since(self.now);
        let old = old.and_then(|old| {
            let version = key.versions.get(old.version)?.clone();
            version
                .begin_retiring(self.now, overlap(old.until), new.number)
                .ok()
        });
        let after: Vec<KeyVersion> = new.activate(self.now).into_iter().chain(old).collect();
        for version in &after {
            key.versions.put(version.clone());
        }
        let case = Case { key: &key, ..*self };
        for version in after {
            case.plan(version, changes);
        }
    }

    fn next(&self, version: &KeyVersion) -> Option<Change> {
        match &version.state {
            VersionState::Pending {
                withdraw_after,
                sink,
                ..
            } if *withdraw_after <= self.now || version.told.secret_lost => {
                self.give_up_staging(version, *withdraw_after, sink.as_ref())
            }
            VersionState::Retiring { since, until, .. } => {
                self.end_overlap(version, *since, *until)
            }
            VersionState::Active { .. } => self.tell_of_active(version),
            VersionState::Pending { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => None,
        }
    }

    /// Returns the change for a staged version whose time is over, or whose secret is lost. Without
    /// a sink, nobody holds its secret, and it is withdrawn. With a sink, the secret may have
    /// arrived. A use of the version proves it and hands the version over. Without a use, the
    /// version stays accepted until an operator has checked the sink, because a consumer may read
    /// the secret at any time.
    fn give_up_staging(
        &self,
        version: &KeyVersion,
        withdraw_after: Timestamp,
        sink: Option<&SinkName>,
    ) -> Option<Change> {
        let rotation = version.rotation?;
        let reason = match sink {
            None => "the rotation was not handed over in time",
            Some(sink) => {
                if self.evidence.of(self.name(version)).requests > 0 {
                    return Some(Change::HandedOver {
                        key_id: self.key.id,
                        rotation,
                        version: version.number,
                        old: old_version(self.key, version, self.policy.overlap, self.now),
                    });
                }
                if version.told.secret_lost {
                    return None;
                }
                let why = format!(
                    "sink {sink} has not confirmed the secret; check what it holds, then abort the rotation: relatch rotate abort {} --reason TEXT",
                    self.key.id
                );
                return self.hold(version, withdraw_after, &why);
            }
        };
        Some(Change::VersionWithdrawn {
            key_id: self.key.id,
            rotation,
            version: version.number,
            reason: reason.into(),
        })
    }

    fn end_overlap(
        &self,
        version: &KeyVersion,
        since: Timestamp,
        until: Timestamp,
    ) -> Option<Change> {
        if version.window.position(self.now) == WindowPosition::After {
            return Some(self.retire(version, "it has expired".into()));
        }
        let is_over = until <= self.now;
        match self.idleness(version, since) {
            Idleness::Complete { since, .. } if !version.told.drained => Some(self.note(
                version,
                Note::Drained {
                    unused_since: since,
                },
            )),
            Idleness::Complete {
                since,
                complete_until,
            } if is_over && self.has_successor() => Some(self.retire(
                version,
                format!(
                    "the overlap is over and no request has used it since {since}; sidecars have reported every request until {complete_until}"
                )
                .into(),
            )),
            Idleness::Complete { .. } if !is_over => None,
            Idleness::Complete { .. } | Idleness::Pending { .. } | Idleness::Unknown
                if is_over && !self.has_successor() => self.hold(version, until, NO_SUCCESSOR),
            idleness if is_over => self.meet_deadline(version, until, idleness),
            Idleness::Complete { .. } | Idleness::Pending { .. } | Idleness::Unknown => {
                self.remind(version, since, until)
            }
        }
    }

    /// Returns the change that the policy requires when the overlap is over and the evidence does
    /// not show that nobody uses the version.
    fn meet_deadline(
        &self,
        version: &KeyVersion,
        until: Timestamp,
        idleness: Idleness,
    ) -> Option<Change> {
        let why = self.missing(idleness);
        match self.policy.on_deadline {
            OnDeadline::Retire => Some(
                self.retire(
                    version,
                    format!(
                        "the overlap is over, and the policy retires the version although {why}"
                    )
                    .into(),
                ),
            ),
            OnDeadline::Extend => {
                let by = self.policy.idle_for.max(MIN_EXTENSION);
                let longer = version.clone().extend(self.now.saturating_add(by)).ok()?;
                Some(Change::OverlapExtended {
                    key_id: self.key.id,
                    version: version.number,
                    until: longer.ends_at().filter(|end| *end > until)?,
                    reason: format!("the overlap was over, but {why}").into(),
                })
            }
            OnDeadline::Hold => self.hold(version, until, &why),
        }
    }

    fn hold(&self, version: &KeyVersion, until: Timestamp, why: &str) -> Option<Change> {
        (version.told.held_at != Some(until)).then(|| {
            self.note(
                version,
                Note::Held {
                    deadline: until,
                    reason: why.into(),
                },
            )
        })
    }

    /// Returns the reminder of the end of an overlap, when it is time. An overlap of at most
    /// `remind_before` has none: the reminder would come with its begin.
    fn remind(&self, version: &KeyVersion, since: Timestamp, until: Timestamp) -> Option<Change> {
        let from = until.saturating_sub(self.policy.remind_before);
        let is_time = since < from && from <= self.now;
        (is_time && version.told.reminded_of != Some(until))
            .then(|| self.note(version, Note::Reminder { deadline: until }))
    }

    fn tell_of_active(&self, version: &KeyVersion) -> Option<Change> {
        let has_come = |at: Option<Timestamp>| at.is_some_and(|at| at <= self.now);
        if let Some(expires_at) = version.window.expires_at
            && has_come(self.policy.expiring_at(version))
        {
            return Some(self.note(version, Note::Expiring { expires_at }));
        }
        let due = self
            .policy
            .rotation_due_at(version)
            .filter(|due| *due <= self.now)?;
        (self.policy.sink.is_none() && !version.told.rotation_due)
            .then(|| self.note(version, Note::RotationDue { since: due }))
    }

    fn outlook(&self, version: &KeyVersion) -> Option<Outlook> {
        let (since, until) = match &version.state {
            VersionState::Pending { sink, .. } => {
                let waits_for = match sink {
                    None => "every sidecar to accept the new version".to_owned(),
                    Some(sink) if version.told.secret_lost => secret_lost(self.name(version), sink),
                    Some(sink) => format!("sink {sink} to accept the secret"),
                };
                return Some(Outlook {
                    phase: if version.told.secret_lost {
                        Phase::SecretLost
                    } else if version.told.held_at.is_some() {
                        Phase::Held
                    } else {
                        Phase::Stage
                    },
                    waits_for,
                    earliest_end: None,
                });
            }
            VersionState::Retiring { since, until, .. } => (*since, *until),
            VersionState::Active { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => return None,
        };
        let is_over = until <= self.now;
        let idleness = self.idleness(version, since);
        let (phase, waits_for, earliest_end) = match idleness {
            Idleness::Complete { .. } | Idleness::Pending { .. } | Idleness::Unknown
                if is_over && !self.has_successor() =>
            {
                (Phase::Held, NO_SUCCESSOR.to_owned(), None)
            }
            Idleness::Complete { since, .. } => (
                Phase::Drain,
                format!("the end of the overlap at {until}; not used since {since}"),
                Some(until.max(self.now)),
            ),
            Idleness::Pending { until: idle_at, .. } => (
                if is_over { Phase::Held } else { Phase::Overlap },
                self.missing(idleness),
                Some(idle_at.max(until).max(self.now)),
            ),
            Idleness::Unknown => (
                if is_over { Phase::Held } else { Phase::Overlap },
                self.missing(idleness),
                None,
            ),
        };
        let earliest_end = match (version.window.expires_at, self.policy.on_deadline) {
            (expires_at, OnDeadline::Retire) => [expires_at, Some(until.max(self.now))]
                .into_iter()
                .flatten()
                .chain(earliest_end)
                .min(),
            (Some(expires_at), OnDeadline::Extend | OnDeadline::Hold) => {
                Some(earliest_end.map_or(expires_at, |end| end.min(expires_at)))
            }
            (None, OnDeadline::Extend | OnDeadline::Hold) => earliest_end,
        };
        Some(Outlook {
            phase,
            waits_for,
            earliest_end,
        })
    }

    fn idleness(&self, version: &KeyVersion, since: Timestamp) -> Idleness {
        let idle_for = self.policy.idle_for;
        self.evidence.idleness(self.name(version), since, idle_for)
    }

    const fn name(&self, version: &KeyVersion) -> VersionRef {
        VersionRef {
            key_id: self.key.id,
            version: version.number,
        }
    }

    /// Returns what keeps the evidence from being complete, as a clause.
    fn missing(&self, idleness: Idleness) -> String {
        missing(idleness, self.policy.idle_for)
    }

    /// Returns whether consumers have an active version to use.
    fn has_successor(&self) -> bool {
        has_successor(self.key, self.now)
    }

    fn retire(&self, version: &KeyVersion, reason: Arc<str>) -> Change {
        Change::VersionRetired {
            key_id: self.key.id,
            version: version.number,
            reason,
            forced: false,
        }
    }

    fn note(&self, version: &KeyVersion, note: Note) -> Change {
        Change::Noted {
            key_id: self.key.id,
            version: version.number,
            note,
        }
    }
}

impl Phase {
    /// Returns the name of the phase: the label `phase` in metrics.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Stage => "stage",
            Self::Overlap => "overlap",
            Self::Drain => "drain",
            Self::Held => "held",
            Self::SecretLost => "secret_lost",
        }
    }
}

/// Returns the version that begins to retire when `new` becomes active at `now`, with the end of
/// its overlap.
pub(super) fn old_version(
    key: &Key,
    new: &KeyVersion,
    overlap: Duration,
    now: Timestamp,
) -> Option<OldVersion> {
    let old = key.active()?;
    let retiring = old.clone().begin_retiring(now, overlap, new.number).ok()?;
    Some(OldVersion {
        version: old.number,
        until: retiring.ends_at().unwrap_or(now),
    })
}

/// Returns whether consumers of a key have an active version to use at `now`.
fn has_successor(key: &Key, now: Timestamp) -> bool {
    key.active()
        .is_some_and(|active| active.window.position(now) == WindowPosition::Inside)
}

/// Returns what keeps evidence from being complete, as a clause. For complete evidence, returns
/// since when the version is unused.
pub(super) fn missing(idleness: Idleness, idle_for: Duration) -> String {
    let idle_for = written(idle_for);
    match idleness {
        Idleness::Complete { since, .. } => format!("it was not used since {since}"),
        Idleness::Pending { until, since } => match since {
            Since::Overlap(at) => format!(
                "it must be unused for {idle_for} since the overlap began at {at}, and sidecars must report all requests until {until}"
            ),
            Since::Use(at) => {
                format!("it was last used at {at} and must be unused for {idle_for}, until {until}")
            }
            Since::Gap(at) => format!(
                "a sidecar vanished without its last report and may have seen requests until {at}; the version must be unused for {idle_for} after that, until {until}"
            ),
        },
        Idleness::Unknown => "a sidecar has not reported any requests yet".to_owned(),
    }
}

/// The condition that a version without a successor waits for. Its consumer depends on it, even
/// after its deadline.
const NO_SUCCESSOR: &str =
    "no active version replaces it; roll back, rotate, or retire it by force";

#[cfg(test)]
#[expect(
    clippy::unchecked_time_subtraction,
    reason = "the durations of a scene are constants"
)]
mod tests;
