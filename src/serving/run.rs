//! A run: one process of a sidecar.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{Gap, Held, Lock, Now, Progress, Target};
use crate::{
    clock::BootTime,
    key::{Epoch, KeyringName, Revision, Timestamp},
    tls::Identity,
};

/// Names a run. Ordered by node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RunKey {
    /// The sidecar.
    pub node: String,
    /// Its process.
    pub run_id: String,
}

/// One process of a sidecar, while it may serve.
#[derive(Clone, Debug)]
pub struct Run {
    /// What it says of itself.
    pub about: About,
    /// When it was last heard of.
    pub(crate) last_seen: Timestamp,
    /// Since when a stream is open; none without one.
    pub(crate) connected_at: Option<Timestamp>,
    /// It has reported every use of a key before this moment; none when it has reported nothing.
    pub(crate) complete_until: Option<Timestamp>,
    /// What it holds of each keyring.
    pub keyrings: BTreeMap<KeyringName, Holding>,
    /// The snapshot file that it keeps.
    pub(crate) file: Option<SnapshotFile>,
    pub(super) lock: Option<Lock>,
    /// The streams that are open.
    pub(super) open: BTreeSet<u64>,
    pub(super) newest_stream: u64,
    /// Since when no stream is open; none while one is, and of a run that has ended.
    pub(super) lost_at: Option<Timestamp>,
    /// Its process has ended, and its file is left.
    pub(super) ended: Option<Ended>,
}

/// What a sidecar says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Its cluster.
    pub cluster: String,
    /// The version of relatch that it runs.
    pub version: String,
    /// What its operator says of it.
    pub labels: BTreeMap<String, String>,
    /// Whom its certificate speaks for; none without one, and of those that are known from the store.
    pub(crate) identity: Option<Identity>,
}

/// What a run holds of a keyring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// What it has confirmed.
    pub progress: Progress,
    /// It may serve until then without another answer; none when it was never granted anything.
    pub(super) until: Option<BootTime>,
    /// The largest grant that may not have run out. It is on record.
    pub(super) granted: Duration,
    /// The run asks for it, and gets it: an open stream may extend its time.
    pub(super) is_followed: bool,
    /// It is held on demand, so that no file holds it,
    pub(super) is_on_demand: bool,
    /// but for what a former run, which held it in full, may have left there: that serves until then.
    pub(super) in_file_until: Option<BootTime>,
}

/// A snapshot file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotFile {
    /// Random; it stays when the file is rewritten.
    pub(crate) id: String,
    /// The number of the last write to the file that the run began from; zero when it did not begin from the file.
    pub(crate) begun_from_write: u64,
}

/// The end of a process that has left a snapshot file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) at: Timestamp,
    pub(super) has_told_all: bool,
    /// The number of the last write to the file; zero when it is not known.
    pub(super) last_write: u64,
}

/// Whether a run may serve, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// One of its streams is open.
    Connected,
    /// Its stream ended, at this time, without a Goodbye.
    Lost(Timestamp),
    /// Its process ended, at this time, and left a snapshot file.
    Stopped(Timestamp),
}

impl RunKey {
    /// The first that the runs of a node may have.
    pub(super) fn first_of(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            run_id: String::new(),
        }
    }
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

    /// A run that was not in the book any more. Its counts have grown on: its next report tells what it saw meanwhile. One that
    /// was forgotten may serve what it was granted.
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

    /// Whether one of its streams is open.
    #[must_use]
    pub(crate) fn is_connected(&self) -> bool {
        !self.open.is_empty()
    }

    /// How many of its streams are open; more than one only while one of them is being given up.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.open.len()
    }

    /// Whether it may serve, in one word.
    #[must_use]
    pub(crate) fn presence(&self) -> Presence {
        match (&self.ended, self.is_connected()) {
            (Some(ended), _) => Presence::Stopped(ended.at),
            (None, true) => Presence::Connected,
            (None, false) => Presence::Lost(self.lost_at.unwrap_or(self.last_seen)),
        }
    }

    /// What it holds of a keyring; none when it may not serve that.
    pub(super) fn holding(&self, keyring: &KeyringName, now: BootTime) -> Option<&Holding> {
        let holding = self.keyrings.get(keyring)?;
        (self.is_answered(holding) || holding.is_within(now)).then_some(holding)
    }

    /// Whether it may serve what it holds without an end that time brings.
    pub(super) fn is_answered(&self, holding: &Holding) -> bool {
        self.is_connected() && holding.is_followed
    }

    /// Whether its snapshot file holds a keyring.
    pub(super) fn keeps(&self, holding: &Holding, now: BootTime) -> bool {
        self.file.is_some() && holding.may_be_in_file(now)
    }

    pub(super) fn may_serve_any(&self, now: BootTime) -> bool {
        self.is_connected() || self.keyrings.values().any(|held| held.is_within(now))
    }

    /// When the last of its bounds passes; none when it was never granted anything.
    pub(super) fn last_bound(&self) -> Option<BootTime> {
        self.keyrings.values().filter_map(|held| held.until).max()
    }

    /// How long it may serve without another answer, from `now` on; none while it is connected.
    #[must_use]
    pub(crate) fn rest(&self, now: BootTime) -> Option<Duration> {
        let bound = self.last_bound()?;
        (!self.is_connected()).then(|| bound.saturating_since(now))
    }
}

impl Holding {
    /// A stream begins on which it is followed.
    pub(super) fn greet(&mut self, held: &Held, max_serve_for: Duration, now: Now) {
        let full = held.deny_after.min(max_serve_for);
        self.progress.greet(held, now.wall);
        self.is_followed = true;
        if held.is_on_demand && !self.is_on_demand {
            self.in_file_until = self.until;
        }
        self.is_on_demand = held.is_on_demand;
        if held.revision > Revision::default() {
            // Nobody knows who has granted what it serves.
            self.suppose(full, now.boot);
        }
        self.granted = self.granted.max(full);
    }

    /// An answer to a beat that arrived at `arrived` lets the run serve for `serve_for`; whether that is on record.
    pub(super) fn grant(&mut self, serve_for: Duration, arrived: BootTime) -> bool {
        let bound = arrived.saturating_add(stretched(serve_for));
        let on_record = serve_for <= self.granted;
        if !on_record || self.until.is_none_or(|until| until <= bound) {
            // The larger grant before it has run out by then.
            self.granted = serve_for;
        }
        self.until = self.until.max(Some(bound));
        on_record
    }

    /// The run may serve for `serve_for` from `now` on, as far as is known.
    pub(super) fn suppose(&mut self, serve_for: Duration, now: BootTime) {
        self.granted = self.granted.max(serve_for);
        self.until = self
            .until
            .max(Some(now.saturating_add(stretched(serve_for))));
    }

    /// What another run held is what this one holds.
    pub(super) fn inherit(&mut self, other: &Self) {
        self.granted = self.granted.max(other.granted);
        self.until = self.until.max(other.until);
    }

    /// Whether a snapshot file of the run may hold it.
    pub(super) fn may_be_in_file(&self, now: BootTime) -> bool {
        !self.is_on_demand || self.in_file_until.is_some_and(|until| now < until)
    }

    fn is_within(&self, now: BootTime) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    pub(super) fn has_reached(&self, epoch: Epoch, target: Target, has_file: bool) -> bool {
        self.progress.has_reached(epoch, target, has_file)
    }

    /// How long the run may serve without another answer, from `now` on.
    #[must_use]
    pub(crate) fn rest(&self, now: BootTime) -> Duration {
        self.until
            .map_or(Duration::ZERO, |until| until.saturating_since(now))
    }
}

/// A time by another boot clock, which may be slower by 1 %.
pub(super) fn stretched(time: Duration) -> Duration {
    time.saturating_add(time / 100)
        .saturating_add(Duration::from_millis(1))
}
