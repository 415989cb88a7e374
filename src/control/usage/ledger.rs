//! The counts: per version and process, merged by maximum, summed on reading.

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

/// Names one process of a sidecar.
pub(super) type Boot = Arc<str>;

/// Names the count of one version by one process.
pub(super) type CountName = (KeyringName, VersionRef, Boot);

/// How often each version was used, and what of it the store does not have yet.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    keyrings: BTreeMap<KeyringName, HashMap<VersionRef, Counts>>,
    /// The processes that have ended for good, and when. Their counts are in the sums, or about to be.
    ended: HashMap<Boot, Timestamp>,
    unsaved: BTreeSet<CountName>,
}

/// What a process reports of a version, counted since the process began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReportedUse {
    pub(super) requests: u64,
    pub(super) denied: u64,
    /// By the clock of the sidecar.
    pub(super) first_used: Timestamp,
}

/// When it was received, by the clocks of the control plane.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receipt {
    pub(super) wall: Timestamp,
    pub(super) boot: BootTime,
}

#[derive(Debug, Default)]
struct Counts {
    /// [`UsageRow::FOLDED`] for the sum of all that have ended.
    boots: BTreeMap<Boot, Use>,
    marks: RateMarks,
}

/// The totals at two moments, about a minute apart, from which the rate is computed.
#[derive(Clone, Copy, Debug, Default)]
struct RateMarks {
    former: Option<Mark>,
    latest: Option<Mark>,
    /// When the total grew last.
    grew_at: Option<BootTime>,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    at: BootTime,
    requests: u64,
}

/// The time over which a rate is taken: long enough to hold a dozen reports of each sidecar, short enough to be of now.
const RATE_OVER: Duration = Duration::from_mins(1);

impl Ledger {
    /// A ledger of what the store has.
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

    /// Merges what a process tells of a version since its begin. A count that grew is a use at its receipt, whatever the clock
    /// of the sidecar says: it came since the report before. What did not grow changes nothing, so that to merge it again, or
    /// late, does not either.
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
        // The counts of a process that has ended are in the sum already. Whether these have grown since nobody knows, and so
        // they have, so that no use is ever overlooked.
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

    /// How often a version was used; none when nothing was told of it.
    pub(super) fn total(&self, keyring: &KeyringName, version: VersionRef) -> Option<Use> {
        let counts = self.keyrings.get(keyring)?.get(&version)?;
        Some(counts.total())
    }

    /// The versions of which anything was told.
    pub(super) fn versions(&self, keyring: &KeyringName) -> impl Iterator<Item = &VersionRef> {
        self.keyrings
            .get(keyring)
            .into_iter()
            .flat_map(HashMap::keys)
    }

    /// Requests per second that were told of in the last minute.
    pub(super) fn rate(&self, keyring: &KeyringName, version: VersionRef, now: BootTime) -> f64 {
        let counts = self.keyrings.get(keyring).and_then(|all| all.get(&version));
        counts.map_or(0.0, |counts| {
            counts.marks.rate(counts.total().requests, now)
        })
    }

    /// The processes of which anything is counted apart.
    pub(super) fn boots(&self) -> BTreeSet<Boot> {
        let counts = self.keyrings.values().flat_map(HashMap::values);
        counts
            .flat_map(|counts| counts.boots.keys())
            .filter(|boot| &***boot != UsageRow::FOLDED)
            .cloned()
            .collect()
    }

    /// What the store does not have yet, in the order of the entries: the first `most` of them, or those that come after
    /// `last`.
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

    /// The store has `rows` now.
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

    /// A process has ended for good: it counts nothing more.
    pub(super) fn end(&mut self, boot: &Boot, now: Timestamp) {
        let remembered = |at: Timestamp| now <= at.saturating_add(FOLDED_FOR);
        self.ended.retain(|_, at| remembered(*at));
        self.ended.insert(Arc::clone(boot), now);
    }

    /// The store has folded a process that has ended.
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
    /// The total begins to grow from `requests` at `now`.
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
        // Shorter times would make a rate of a single request.
        let elapsed = now.saturating_since(since.at).max(RATE_OVER);
        let grown = u32::try_from(requests.saturating_sub(since.requests)).unwrap_or(u32::MAX);
        f64::from(grown) / elapsed.as_secs_f64()
    }
}

/// What a row is of.
pub(super) fn count_name_of(row: &UsageRow) -> CountName {
    let boot = row.run_id.as_str().into();
    (row.keyring.clone(), row.version, boot)
}

/// What is known of two processes together.
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
