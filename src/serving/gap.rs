//! Gaps: runs that have ended without telling every use.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{About, Holding, RunKey};
use crate::{
    clock::BootTime,
    key::{KeyringName, RotationPolicy, Timestamp},
};

/// A run that is gone: nobody knows what it saw used before it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// What it said of itself.
    pub(crate) about: About,
    /// The keyrings that it held.
    pub(crate) keyrings: BTreeSet<KeyringName>,
    /// It has reported every use before this moment; none when it reported nothing.
    pub(crate) complete_until: Option<Timestamp>,
    /// When it was last heard of.
    pub(crate) last_seen: Timestamp,
    /// It may have served until then, by the wall clock.
    pub(crate) until: Timestamp,
    /// Somebody answers for it that it does not serve any more.
    pub(crate) is_forgotten: bool,
    /// The same as `until` by the boot clock of this control plane,
    pub(super) ended: BootTime,
    /// and how long before that it was, as far as former ones have measured.
    pub(super) age_before: Duration,
    pub(super) newest_stream: u64,
    /// Its process is known to have ended.
    pub(super) has_ended: bool,
    /// What it may serve all the same: of one that is forgotten, which may come back.
    pub(super) held: BTreeMap<KeyringName, Holding>,
}

/// The gaps that matter still.
#[derive(Clone, Debug, Default)]
pub(super) struct Gaps(BTreeMap<RunKey, Gap>);

/// How long a gap is remembered: no policy asks a version to be idle for longer.
const KEPT_FOR: Duration = RotationPolicy::MAX_IDLE_FOR;
/// The most gaps of one node. Only the last to end decides; a sidecar that dies again and again shows as such.
const MAX_OF_NODE: usize = 16;
/// The most gaps in all: a page of each, should a mesh of that size vanish at once.
const MAX_GAPS: usize = 10_000;

impl Gap {
    /// How long ago it ended, as far as boot clocks have measured.
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

    /// Adds a gap; returns those that have to make room for it.
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

    /// The run is back.
    pub(super) fn close(&mut self, key: &RunKey) -> Option<Gap> {
        self.0.remove(key)
    }

    /// Closes those that are too old to matter, and returns them.
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
