//! How far the sidecars of a keyring are from a point that all of them are to reach.

use std::time::Duration;

use super::{Holding, Now, Presence, Run, RunKey, Target};
use crate::key::Timestamp;

/// How far the runs that may serve a keyring are from a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Barrier {
    /// How many have confirmed it.
    pub(crate) confirmed: usize,
    /// How many there are.
    pub(crate) total: usize,
    /// The others.
    pub(crate) laggards: Vec<Laggard>,
    /// Those for which nobody waits, because the caller says so.
    pub(crate) passed_by: Vec<RunKey>,
}

/// A run that has not confirmed a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Laggard {
    /// Which.
    pub(crate) key: RunKey,
    /// Its cluster.
    pub(crate) cluster: String,
    /// Whether it is connected, lost or stopped.
    pub(crate) presence: Presence,
    /// By how many revisions it lags.
    pub(crate) behind: u64,
    /// It uses the target already, but its snapshot file does not have it.
    pub(crate) lacks_disk: bool,
    /// When it was last heard of.
    pub(crate) last_seen: Timestamp,
    /// How long it may still serve what it has; none while it is connected.
    pub(crate) rest: Option<Duration>,
    /// The same as a time of the control plane's wall clock.
    pub(crate) serves_until: Option<Timestamp>,
}

impl Barrier {
    /// Whether everything that may serve has confirmed.
    #[must_use]
    pub(crate) const fn is_passed(&self) -> bool {
        self.laggards.is_empty()
    }

    /// How long the last laggard may still serve; none while one is connected, which has no end that time brings.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn rest(&self) -> Option<Duration> {
        let rests = self.laggards.iter().map(|laggard| laggard.rest);
        rests.collect::<Option<Vec<_>>>()?.into_iter().max()
    }
}

impl Laggard {
    pub(super) fn of(key: &RunKey, run: &Run, held: &Holding, target: Target, now: Now) -> Self {
        let rest = (!run.is_answered(held)).then(|| held.rest(now.boot));
        let progress = &held.progress;
        let in_use = match target {
            Target::Applied(..) => progress.applied,
            Target::Revoked(_) => progress.revoked_through,
        };
        Self {
            key: key.clone(),
            cluster: run.about.cluster.clone(),
            presence: run.presence(),
            behind: progress.applied.behind(target.revision()),
            lacks_disk: run.keeps(held, now.boot) && in_use >= target.revision(),
            last_seen: run.last_seen,
            rest,
            serves_until: rest.map(|rest| now.wall.saturating_add(rest)),
        }
    }
}
