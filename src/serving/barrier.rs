//! How far the sidecars of a keyring are from a point that all of them must reach.

use std::time::Duration;

use super::{Holding, Now, Presence, Run, RunKey, Target};
use crate::key::Timestamp;

/// How far the runs that may serve a keyring are from a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Barrier {
    /// The number of runs that have confirmed the target.
    pub(crate) confirmed: usize,
    /// The number of runs that may serve, without those that are passed by.
    pub(crate) total: usize,
    /// The runs that have not confirmed the target.
    pub(crate) laggards: Vec<Laggard>,
    /// The runs that may serve and that the caller does not wait for.
    pub(crate) passed_by: Vec<RunKey>,
}

/// A run that has not confirmed a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Laggard {
    pub(crate) key: RunKey,
    /// The cluster of its node.
    pub(crate) cluster: String,
    /// Whether it is connected, lost or stopped.
    pub(crate) presence: Presence,
    /// The number of revisions by which it lags.
    pub(crate) behind: u64,
    /// Whether it already uses the target, but its snapshot file does not contain it.
    pub(crate) lacks_disk: bool,
    /// When the control plane last had contact with it.
    pub(crate) last_seen: Timestamp,
    /// The time for which it may still serve its state; none while its stream is open and may
    /// extend the time.
    pub(crate) rest: Option<Duration>,
    /// The end of `rest`, by the control plane's wall clock.
    pub(crate) serves_until: Option<Timestamp>,
}

impl Barrier {
    /// Returns whether every run that may serve has confirmed the target.
    #[must_use]
    pub(crate) const fn is_passed(&self) -> bool {
        self.laggards.is_empty()
    }

    /// Returns the longest time for which a laggard may still serve; none while one is connected,
    /// because time does not end its serving.
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
