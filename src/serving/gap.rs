//! Gaps: runs that are gone without a complete report of their uses.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{About, Holding, RunKey};
use crate::{
    clock::BootTime,
    key::{KeyringName, RotationPolicy, Timestamp},
};

/// A run that is gone: the uses that it saw since its last report are unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// The description that the run sent of itself.
    pub(crate) about: About,
    /// The keyrings that it held.
    pub(crate) keyrings: BTreeSet<KeyringName>,
    /// The run has reported every use before this moment; none when it reported nothing.
    pub(crate) complete_until: Option<Timestamp>,
    /// When the control plane last had contact with the run.
    pub(crate) last_seen: Timestamp,
    /// The time until which the run may have served, by the wall clock.
    pub(crate) until: Timestamp,
    /// Whether an operator has stated that the run no longer serves.
    pub(crate) is_forgotten: bool,
    /// The time from which this control plane counts the gap's age, by its boot clock: the end of
    /// the run, or the moment at which the gap was loaded from the store.
    pub(super) ended: BootTime,
    /// The age of the gap at `ended`, as former control planes have measured it; zero when the run
    /// ended in this one.
    pub(super) age_before: Duration,
    pub(super) newest_stream: u64,
    /// Whether its process is known to have ended.
    pub(super) has_ended: bool,
    /// The keyrings that a forgotten run may still serve, because it may return; empty for other
    /// gaps.
    pub(super) held: BTreeMap<KeyringName, Holding>,
}

/// The gaps that still matter.
#[derive(Clone, Debug, Default)]
pub(super) struct Gaps(BTreeMap<RunKey, Gap>);

/// The time for which a gap is remembered (30 days): no policy requires a version to be idle for
/// longer.
const KEPT_FOR: Duration = RotationPolicy::MAX_IDLE_FOR;
/// The most gaps of one node. Only the gap that ended last decides. This number is enough to show a
/// sidecar that crashes again and again.
const MAX_OF_NODE: usize = 16;
/// The most gaps in total: a page for each, if a mesh of this size vanishes at once.
const MAX_GAPS: usize = 10_000;

impl Gap {
    /// Returns how long ago the run ended, as far as boot clocks have measured.
    #[must_use]
    pub(crate) fn age(&self, now: BootTime) -> Duration {
        self.age_before + now.saturating_since(self.ended)
    }
}

impl Gaps {
    pub(super) fn iter(&self) -> impl Iterator<Item = (&RunKey, &Gap)> {
        self.0.iter()
    }

    pub(super) fn get(&self, key: &RunKey) -> Option<&Gap> {
        self.0.get(key)
    }

    pub(super) fn load(&mut self, key: RunKey, gap: Gap) {
        self.0.insert(key, gap);
    }

    /// Adds a gap, and returns the gaps that it removed to make room.
    pub(super) fn add(&mut self, key: RunKey, gap: Gap) -> Vec<RunKey> {
        let now = gap.ended;
        let node = key.node.clone();
        self.0.insert(key, gap);
        let oldest = |of_node: bool| {
            let gaps = self.0.iter();
            let gaps = gaps.filter(|(key, _)| !of_node || key.node == node);
            let oldest = gaps.max_by_key(|(_, gap)| gap.age(now));
            oldest.map(|(key, _)| key.clone())
        };
        let of_node = self.0.keys().filter(|key| key.node == node).count();
        let surplus = if of_node > MAX_OF_NODE {
            oldest(true)
        } else if self.0.len() > MAX_GAPS {
            oldest(false)
        } else {
            None
        };
        let surplus: Vec<_> = surplus.into_iter().collect();
        for key in &surplus {
            self.0.remove(key);
        }
        surplus
    }

    /// Closes the gap of a run that is back.
    pub(super) fn close(&mut self, key: &RunKey) -> Option<Gap> {
        self.0.remove(key)
    }

    /// Closes the gaps that are too old to matter, and returns them.
    pub(super) fn forget_old(&mut self, now: BootTime) -> Vec<RunKey> {
        let gaps = self.0.iter();
        let old = gaps.filter(|(_, gap)| gap.age(now) > KEPT_FOR);
        let old: Vec<RunKey> = old.map(|(key, _)| key.clone()).collect();
        for key in &old {
            self.0.remove(key);
        }
        old
    }
}
