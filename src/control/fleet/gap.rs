//! Gaps: sidecars that went without their last report.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::MemberKey;
use crate::{
    key::{KeyringName, Timestamp},
    store::{PresenceKey, PresenceRow},
};

/// One process of a sidecar that went without its last report: nobody knows what it saw used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Its cluster.
    pub cluster: String,
    /// The version of relatch that it ran.
    pub version: String,
    /// The keyrings to which it subscribed.
    pub keyrings: BTreeSet<KeyringName>,
    /// It has told of every use before this moment; none when it told nothing.
    pub complete_until: Option<Timestamp>,
    /// When it was last heard of.
    pub last_contact: Timestamp,
    /// It may have served until then: one lease after its last contact, or after the begin of this control plane where
    /// it was not heard of since.
    pub until: Timestamp,
}

/// The gaps that matter still.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    gaps: BTreeMap<MemberKey, Gap>,
    /// Those that the store does not have yet.
    unsaved: BTreeSet<MemberKey>,
}

/// How long a gap is remembered. No version is asked to be idle for longer.
const KEPT_FOR: Duration = Duration::from_hours(30 * 24);
/// The most gaps of one node. Only the last to end decides; a sidecar that dies again and again shows as such.
const MAX_OF_NODE: usize = 16;
/// The most gaps in all: a page of each, should a mesh of that size vanish at once.
const MAX_GAPS: usize = 10_000;

impl Gaps {
    pub(super) fn iter(&self) -> impl Iterator<Item = (&MemberKey, &Gap)> {
        self.gaps.iter()
    }

    /// Takes what the store has.
    pub(super) fn load(&mut self, key: MemberKey, row: PresenceRow, until: Timestamp) {
        let gap = Gap {
            cluster: row.cluster,
            version: row.version,
            keyrings: row.keyrings.iter().filter_map(|k| k.parse().ok()).collect(),
            complete_until: row.complete_until,
            last_contact: row.last_contact,
            until,
        };
        self.gaps.insert(key, gap);
    }

    /// Adds a gap; returns those that have to make room for it.
    pub(super) fn add(&mut self, key: MemberKey, gap: Gap) -> Vec<MemberKey> {
        self.unsaved.insert(key.clone());
        let node = key.node.clone();
        self.gaps.insert(key, gap);
        let first_to_end = |of_node: bool| {
            self.gaps
                .iter()
                .filter(|(key, _)| !of_node || key.node == node)
                .min_by_key(|(_, gap)| gap.until)
                .map(|(key, _)| key.clone())
        };
        let of_node = self.gaps.keys().filter(|key| key.node == node).count();
        let surplus = if of_node > MAX_OF_NODE {
            first_to_end(true)
        } else if self.gaps.len() > MAX_GAPS {
            first_to_end(false)
        } else {
            None
        };
        surplus
            .into_iter()
            .inspect(|key| drop(self.close(key)))
            .collect()
    }

    /// The process is back, or forgotten.
    pub(super) fn close(&mut self, key: &MemberKey) -> Option<Gap> {
        self.unsaved.remove(key);
        self.gaps.remove(key)
    }

    /// Closes those that are too old to matter, and returns them.
    pub(super) fn forget_old(&mut self, now: Timestamp) -> Vec<MemberKey> {
        let old: Vec<MemberKey> = self
            .gaps
            .iter()
            .filter(|(_, gap)| gap.until.saturating_add(KEPT_FOR) < now)
            .map(|(key, _)| key.clone())
            .collect();
        for key in &old {
            self.close(key);
        }
        old
    }

    /// What the store does not have yet.
    pub(super) fn rows(&self) -> Vec<PresenceRow> {
        let unsaved = self.unsaved.iter();
        unsaved
            .filter_map(|key| Some(self.gaps.get(key)?.row(key)))
            .collect()
    }

    /// The store has `row` now.
    pub(super) fn saved(&mut self, row: &PresenceRow) {
        let key: MemberKey = row.key().into();
        if self.gaps.get(&key).is_some_and(|gap| gap.row(&key) == *row) {
            self.unsaved.remove(&key);
        }
    }
}

impl Gap {
    fn row(&self, key: &MemberKey) -> PresenceRow {
        let PresenceKey { node, run_id } = key.clone().into();
        PresenceRow {
            node,
            run_id,
            cluster: self.cluster.clone(),
            version: self.version.clone(),
            keyrings: self.keyrings.iter().map(ToString::to_string).collect(),
            last_contact: self.last_contact,
            complete_until: self.complete_until,
            gone_at: Some(self.until),
        }
    }
}
