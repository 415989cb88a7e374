//! A run: one process of a sidecar.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{About, Gap, Holding, Lock, Now};
use crate::{
    clock::BootTime,
    key::{KeyringName, Timestamp},
};

/// One process of a sidecar, while it may serve.
#[derive(Clone, Debug)]
pub struct Run {
    /// The description that the run sends of itself.
    pub about: About,
    /// When the control plane last had contact with the run.
    pub(crate) last_seen: Timestamp,
    /// The time at which its newest stream began; none when no stream has begun since the control
    /// plane started.
    pub(crate) connected_at: Option<Timestamp>,
    /// It has reported every use of a key before this moment; none when it has reported nothing.
    pub(crate) complete_until: Option<Timestamp>,
    /// The keyrings that it holds.
    pub keyrings: BTreeMap<KeyringName, Holding>,
    /// The snapshot file that it keeps.
    pub(crate) file: Option<SnapshotFile>,
    pub(super) lock: Option<Lock>,
    /// The numbers of its open streams.
    pub(super) open: BTreeSet<u64>,
    pub(super) newest_stream: u64,
    /// The time since which no stream is open; none while one is open, and for a run that has
    /// ended.
    pub(super) lost_at: Option<Timestamp>,
    /// The end of its process, if the process left a snapshot file.
    pub(super) ended: Option<Ended>,
}

/// The snapshot file of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotFile {
    /// A random id, which stays the same when the file is rewritten.
    pub(crate) id: String,
    /// The number of the last write to the file that the run began from; zero when it did not begin from the file.
    pub(crate) begun_from_write: u64,
}

/// The end of a process that has left a snapshot file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) at: Timestamp,
    pub(super) has_told_all: bool,
    /// The number of the last write to the file; zero when the number is unknown.
    pub(super) last_write: u64,
}

/// The state of a run that may serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// One of its streams is open.
    Connected,
    /// Its stream ended, at this time, without a Goodbye.
    Lost(Timestamp),
    /// Its process ended, at this time, and left a snapshot file.
    Stopped(Timestamp),
}

impl Run {
    pub(super) fn new(about: About, now: Timestamp) -> Self {
        Self {
            about,
            last_seen: now,
            connected_at: None,
            complete_until: None,
            keyrings: BTreeMap::new(),
            file: None,
            lock: None,
            open: BTreeSet::new(),
            newest_stream: 0,
            lost_at: None,
            ended: None,
        }
    }

    /// Creates a run that was not in the book. If it has a gap, it returns: its counters have
    /// continued, and its next report contains the uses that it saw meanwhile. A run that was
    /// forgotten may serve what it was granted.
    pub(super) fn back(gap: Option<Gap>, now: Now) -> Self {
        let mut run = Self::new(About::default(), now.wall);
        if let Some(mut gap) = gap {
            let ended = now.boot.saturating_sub(gap.age(now.boot));
            let holding = |name| {
                let mut holding = gap.held.remove(&name).unwrap_or_default();
                holding.until = holding.until.max(Some(ended));
                (name, holding)
            };
            run.complete_until = gap.complete_until;
            run.keyrings = gap.keyrings.into_iter().map(holding).collect();
        }
        run
    }

    /// Returns whether one of its streams is open.
    #[must_use]
    pub(crate) fn is_connected(&self) -> bool {
        !self.open.is_empty()
    }

    /// Returns how many of its streams are open; more than one only while an older one is being
    /// closed.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.open.len()
    }

    /// Returns the state of the run.
    #[must_use]
    pub(crate) fn presence(&self) -> Presence {
        match (&self.ended, self.is_connected()) {
            (Some(ended), _) => Presence::Stopped(ended.at),
            (None, true) => Presence::Connected,
            (None, false) => Presence::Lost(self.lost_at.unwrap_or(self.last_seen)),
        }
    }

    /// Returns its holding of a keyring; none when it may not serve the keyring.
    pub(super) fn holding(&self, keyring: &KeyringName, now: BootTime) -> Option<&Holding> {
        let holding = self.keyrings.get(keyring)?;
        (self.is_answered(holding) || holding.is_within(now)).then_some(holding)
    }

    /// Returns whether it may serve a keyring without a bound in time: an open stream may extend
    /// its grant.
    pub(super) fn is_answered(&self, holding: &Holding) -> bool {
        self.is_connected() && holding.is_followed
    }

    /// Returns whether its snapshot file may contain a keyring.
    pub(super) fn keeps(&self, holding: &Holding, now: BootTime) -> bool {
        self.file.is_some() && holding.may_be_in_file(now)
    }

    pub(super) fn may_serve_any(&self, now: BootTime) -> bool {
        self.is_connected() || self.keyrings.values().any(|held| held.is_within(now))
    }

    /// Returns the latest of its bounds; none when it was never granted anything.
    pub(super) fn last_bound(&self) -> Option<BootTime> {
        self.keyrings.values().filter_map(|held| held.until).max()
    }

    /// Returns how long it may serve without another answer, from `now` on; none while it is
    /// connected, or when it was never granted anything.
    #[must_use]
    pub(crate) fn rest(&self, now: BootTime) -> Option<Duration> {
        let bound = self.last_bound()?;
        (!self.is_connected()).then(|| bound.saturating_since(now))
    }
}
