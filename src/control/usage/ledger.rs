//! The counts of each version and process: merged by maximum, and added up when they are read.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use crate::{
    clock::BootTime,
    key::{KeyringName, Timestamp, Use, VersionRef},
    store::{FOLDED_FOR, UsageRow},
};

/// The run id of a process of a sidecar, or [`UsageRow::FOLDED`].
pub(super) type Boot = Arc<str>;

/// The key of the count of one version by one process.
pub(super) type CountName = (KeyringName, VersionRef, Boot);

/// The use of each version, and the counts that are not in the store yet.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    keyrings: BTreeMap<KeyringName, HashMap<VersionRef, Counts>>,
    /// The ended processes, and when they ended. Their counts are in the sums, or soon will be.
    ended: HashMap<Boot, Timestamp>,
    unsaved: BTreeSet<CountName>,
}

/// The use of a version that a process reports, counted since the process began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReportedUse {
    pub(super) requests: u64,
    pub(super) denied: u64,
    /// By the clock of the sidecar; the receipt limits it.
    pub(super) first_used: Timestamp,
}

/// The time of receipt, by the clocks of the control plane.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receipt {
    pub(super) wall: Timestamp,
    pub(super) boot: BootTime,
}

#[derive(Debug, Default)]
struct Counts {
    /// The count of each process; [`UsageRow::FOLDED`] has the sum of all ended processes.
    boots: BTreeMap<Boot, Use>,
    marks: RateMarks,
}

/// The totals at two moments, about a minute apart, from which the rate is computed.
#[derive(Clone, Copy, Debug, Default)]
struct RateMarks {
    former: Option<Mark>,
    latest: Option<Mark>,
    /// When the total last grew.
    grew_at: Option<BootTime>,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    at: BootTime,
    requests: u64,
}

/// The time over which a rate is computed: long enough for a dozen reports of each sidecar, and
/// short enough to be current.
const RATE_OVER: Duration = Duration::from_mins(1);

impl Ledger {
    /// Creates a ledger from the counts in the store.
    pub(super) fn load(rows: Vec<UsageRow>, folded: Vec<String>, now: Timestamp) -> Self {
        let folded = folded.into_iter().map(|boot| (boot.into(), now));
        let mut ledger = Self {
            ended: folded.collect(),
            ..Self::default()
        };
        for row in rows {
            let told = Use {
                requests: row.requests,
                denied: row.denied,
                first_used: row.first_used,
                last_used: row.last_used,
            };
            let versions = ledger.keyrings.entry(row.keyring).or_default();
            let counts = versions.entry(row.version).or_default();
            counts.boots.insert(row.run_id.into(), told);
        }
        ledger
    }

    /// Merges the use of a version that a process reports since it began. A count that has grown is
    /// a use at the time of its receipt, whatever the clock of the sidecar shows: the use happened
    /// since the previous report. A count that has not grown changes nothing, so that a repeated or
    /// late merge has no effect.
    pub(super) fn merge(
        &mut self,
        keyring: &KeyringName,
        version: VersionRef,
        boot: &Boot,
        told: ReportedUse,
        receipt: Receipt,
    ) {
        let versions = self.keyrings.entry(keyring.clone()).or_default();
        let counts = versions.entry(version).or_default();
        // The counts of an ended process are already in the sum. Whether these have grown since is
        // unknown. They are treated as grown, so that no use is overlooked.
        let has_ended = self.ended.contains_key(boot);
        let boot = if has_ended {
            Boot::from(UsageRow::FOLDED)
        } else {
            Arc::clone(boot)
        };
        let before = counts.total().requests;
        let held = counts.boots.entry(Arc::clone(&boot)).or_default();
        let has_grown = told.requests > if has_ended { 0 } else { held.requests };
        if !has_grown {
            return;
        }
        if !has_ended {
            held.requests = told.requests;
            held.denied = held.denied.max(told.denied);
        }
        held.first_used = earlier(held.first_used, Some(told.first_used.min(receipt.wall)));
        held.last_used = held.last_used.max(Some(receipt.wall));
        if counts.total().requests > before {
            counts.marks.grow(before, receipt.boot);
        }
        self.unsaved.insert((keyring.clone(), version, boot));
    }

    /// Returns the use of a version. None when no report names it.
    pub(super) fn total(&self, keyring: &KeyringName, version: VersionRef) -> Option<Use> {
        let counts = self.keyrings.get(keyring)?.get(&version)?;
        Some(counts.total())
    }

    /// Returns the versions that reports name.
    pub(super) fn versions(&self, keyring: &KeyringName) -> impl Iterator<Item = &VersionRef> {
        self.keyrings
            .get(keyring)
            .into_iter()
            .flat_map(HashMap::keys)
    }

    /// Returns the reported requests per second, as an average over the last 1 to 2 minutes. 0 when
    /// the count did not grow in the last minute.
    pub(super) fn rate(&self, keyring: &KeyringName, version: VersionRef, now: BootTime) -> f64 {
        let counts = self.keyrings.get(keyring).and_then(|all| all.get(&version));
        counts.map_or(0.0, |counts| {
            counts.marks.rate(counts.total().requests, now)
        })
    }

    /// Returns the processes with a count of their own.
    pub(super) fn boots(&self) -> BTreeSet<Boot> {
        let counts = self.keyrings.values().flat_map(HashMap::values);
        counts
            .flat_map(|counts| counts.boots.keys())
            .filter(|boot| &***boot != UsageRow::FOLDED)
            .cloned()
            .collect()
    }

    /// Returns the counts that are not in the store yet, in the order of the entries: the first
    /// `most`, or the first `most` after `last`.
    pub(super) fn unsaved(&self, last: Option<&CountName>, most: usize) -> Vec<UsageRow> {
        let begin = last.map_or(Bound::Unbounded, Bound::Excluded);
        let unsaved = self.unsaved.range((begin, Bound::Unbounded));
        unsaved
            .take(most)
            .filter_map(|(keyring, version, boot)| {
                let told = self.held(keyring, *version, boot)?;
                Some(UsageRow {
                    keyring: keyring.clone(),
                    version: *version,
                    run_id: boot.to_string(),
                    requests: told.requests,
                    denied: told.denied,
                    first_used: told.first_used,
                    last_used: told.last_used,
                })
            })
            .collect()
    }

    /// Records that the store holds `rows`. A count that has changed since stays unsaved.
    pub(super) fn saved(&mut self, rows: &[UsageRow]) {
        for row in rows {
            let entry = count_name_of(row);
            let saved = Use {
                requests: row.requests,
                denied: row.denied,
                first_used: row.first_used,
                last_used: row.last_used,
            };
            if self.held(&entry.0, entry.1, &entry.2) == Some(saved) {
                self.unsaved.remove(&entry);
            }
        }
    }

    /// Records that a process has ended: it counts nothing more.
    pub(super) fn end(&mut self, boot: &Boot, now: Timestamp) {
        let remembered = |at: Timestamp| now <= at.saturating_add(FOLDED_FOR);
        self.ended.retain(|_, at| remembered(*at));
        self.ended.insert(Arc::clone(boot), now);
    }

    /// Adds the counts of an ended process to the sums, as the store has done.
    pub(super) fn fold(&mut self, boot: &Boot) {
        for counts in self.keyrings.values_mut().flat_map(HashMap::values_mut) {
            if let Some(told) = counts.boots.remove(boot) {
                let sum = counts.boots.entry(UsageRow::FOLDED.into()).or_default();
                *sum = added(*sum, told);
            }
        }
        self.unsaved.retain(|(_, _, unsaved)| unsaved != boot);
    }

    fn held(&self, keyring: &KeyringName, version: VersionRef, boot: &Boot) -> Option<Use> {
        let counts = self.keyrings.get(keyring)?.get(&version)?;
        counts.boots.get(boot).copied()
    }
}

impl Counts {
    fn total(&self) -> Use {
        self.boots.values().copied().fold(Use::default(), added)
    }
}

impl RateMarks {
    /// Records that the total starts to grow from `requests` at `now`.
    fn grow(&mut self, requests: u64, now: BootTime) {
        let is_due = |mark: Mark| now.saturating_since(mark.at) >= RATE_OVER;
        if self.latest.is_none_or(is_due) {
            self.former = self.latest;
            self.latest = Some(Mark { at: now, requests });
        }
        self.grew_at = Some(now);
    }

    fn rate(&self, requests: u64, now: BootTime) -> f64 {
        let is_of_now = |at| now.saturating_since(at) < RATE_OVER;
        if !self.grew_at.is_some_and(is_of_now) {
            return 0.0;
        }
        let former = self
            .former
            .filter(|mark| now.saturating_since(mark.at) < 2 * RATE_OVER);
        let Some(since) = former.or(self.latest) else {
            return 0.0;
        };
        // A shorter time would turn a single request into a rate.
        let elapsed = now.saturating_since(since.at).max(RATE_OVER);
        let grown = u32::try_from(requests.saturating_sub(since.requests)).unwrap_or(u32::MAX);
        f64::from(grown) / elapsed.as_secs_f64()
    }
}

/// Returns the key of the count in a row.
pub(super) fn count_name_of(row: &UsageRow) -> CountName {
    let boot = row.run_id.as_str().into();
    (row.keyring.clone(), row.version, boot)
}

/// Returns the use of two processes together.
fn added(one: Use, other: Use) -> Use {
    Use {
        requests: one.requests.saturating_add(other.requests),
        denied: one.denied.saturating_add(other.denied),
        first_used: earlier(one.first_used, other.first_used),
        last_used: one.last_used.max(other.last_used),
    }
}

fn earlier(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    one.into_iter().chain(other).min()
}

#[cfg(test)]
mod tests;
