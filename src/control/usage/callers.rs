//! The callers of versions that their consumers should no longer use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ledger::Boot;
use crate::{
    key::{KeyringName, Timestamp, VersionRef},
    printable,
    proto::discovery,
    store::{CallersRow, UsageRow},
};

/// A source of requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReportedCaller {
    /// The address that Envoy names as the request's source; empty when it names none.
    pub(crate) source: String,
    /// The `user-agent` of the request, shortened.
    pub(crate) user_agent: String,
    /// The host and the beginning of the path, without the query.
    pub(crate) route: String,
    /// The number of requests, approximately.
    pub(crate) requests: u64,
    /// The time of the last request.
    pub(crate) last_used: Timestamp,
}

/// The callers of each version, from the last report of each process.
#[derive(Debug, Default)]
pub(super) struct Callers {
    held: BTreeMap<(KeyringName, VersionRef), BTreeMap<Boot, Vec<ReportedCaller>>>,
    /// The number of the last change of each entry. With it, a change during a write to the store
    /// stays unsaved.
    unsaved: BTreeMap<(KeyringName, VersionRef, Boot), u64>,
    changes: u64,
}

/// The rows to save, and the last change that they contain.
#[derive(Debug, Default)]
pub(super) struct UnsavedCallers {
    pub(super) rows: Vec<CallersRow>,
    changes: u64,
}

/// The most callers of a version, those with the most requests: enough to find a deployment that
/// was forgotten.
pub(super) const MAX_CALLERS: usize = 16;
/// The longest stored text of a caller, in bytes: most user agents fit.
const MAX_TEXT: usize = 256;

impl Callers {
    /// Creates the callers from the rows of the store.
    pub(super) fn load(rows: Vec<CallersRow>) -> Self {
        let mut callers = Self::default();
        for row in rows {
            match serde_json::from_slice(&row.payload) {
                Ok(list) => {
                    let boots = callers.held.entry((row.keyring, row.version));
                    boots.or_default().insert(row.run_id.into(), list);
                }
                Err(error) => tracing::warn!(
                    auth.keyring = %row.keyring,
                    auth.key.id = %row.version.key_id,
                    error = &error as &dyn std::error::Error,
                    "the callers of an old version cannot be read from the store; they are reported again with its next use"
                ),
            }
        }
        callers
    }

    /// Replaces the callers in the previous report of a process.
    pub(super) fn tell(
        &mut self,
        keyring: &KeyringName,
        version: VersionRef,
        boot: &Boot,
        told: Vec<ReportedCaller>,
    ) {
        let boots = self.held.entry((keyring.clone(), version)).or_default();
        if boots.get(boot) != Some(&told) {
            boots.insert(boot.clone(), told);
            self.note_change(keyring, version, boot);
        }
    }

    /// Returns the callers of a version, those with the most requests first.
    pub(super) fn of(&self, keyring: &KeyringName, version: VersionRef) -> Vec<ReportedCaller> {
        let boots = self.held.get(&(keyring.clone(), version));
        top(boots.into_iter().flat_map(BTreeMap::values).flatten())
    }

    /// Returns the versions of a keyring that have callers.
    pub(super) fn versions(&self, keyring: &KeyringName) -> Vec<VersionRef> {
        let all = self.held.keys();
        all.filter(|(name, _)| name == keyring)
            .map(|(_, version)| *version)
            .collect()
    }

    pub(super) fn forget(&mut self, keyring: &KeyringName, version: VersionRef) {
        let boots = self.held.remove(&(keyring.clone(), version));
        for boot in boots.into_iter().flat_map(BTreeMap::into_keys) {
            self.note_change(keyring, version, &boot);
        }
    }

    /// Adds the callers of an ended process to those of all ended processes.
    pub(super) fn fold(&mut self, boot: &Boot) {
        let folded = Boot::from(UsageRow::FOLDED);
        let mut changed = Vec::new();
        for ((keyring, version), boots) in &mut self.held {
            if let Some(told) = boots.remove(boot) {
                let sum = boots.entry(folded.clone()).or_default();
                *sum = top(sum.iter().chain(&told));
                changed.push((keyring.clone(), *version));
            }
        }
        for (keyring, version) in changed {
            self.note_change(&keyring, version, boot);
            self.note_change(&keyring, version, &folded);
        }
    }

    /// Returns the rows that are not in the store yet.
    pub(super) fn unsaved(&self) -> UnsavedCallers {
        let rows = self
            .unsaved
            .keys()
            .map(|(keyring, version, boot)| {
                let boots = self.held.get(&(keyring.clone(), *version));
                let callers = boots.and_then(|boots| boots.get(boot));
                CallersRow {
                    keyring: keyring.clone(),
                    version: *version,
                    run_id: boot.to_string(),
                    payload: callers
                        .map(|list| serde_json::to_vec(list).expect("texts and numbers are JSON"))
                        .unwrap_or_default(),
                }
            })
            .collect();
        UnsavedCallers {
            rows,
            changes: self.changes,
        }
    }

    /// Records that the store holds `saved`.
    pub(super) fn saved(&mut self, saved: &UnsavedCallers) {
        self.unsaved.retain(|_, change| *change > saved.changes);
    }

    fn note_change(&mut self, keyring: &KeyringName, version: VersionRef, boot: &Boot) {
        self.changes += 1;
        let key = (keyring.clone(), version, boot.clone());
        self.unsaved.insert(key, self.changes);
    }
}

impl ReportedCaller {
    /// Returns the caller that a sidecar reported at `now`, within bounds and without characters
    /// that a terminal interprets.
    pub(super) fn from_wire(told: &discovery::Caller, now: Timestamp) -> Self {
        Self {
            source: plain(&told.source),
            user_agent: plain(&told.user_agent),
            route: plain(&told.route),
            requests: told.requests.min(UsageRow::MAX_COUNT),
            last_used: Timestamp::from_millis(told.last_used_ms).min(now),
        }
    }

    const fn key(&self) -> (&String, &String, &String) {
        (&self.source, &self.user_agent, &self.route)
    }
}

/// Adds up equal callers, and returns those with the most requests.
fn top<'a>(callers: impl Iterator<Item = &'a ReportedCaller>) -> Vec<ReportedCaller> {
    let mut sums: BTreeMap<_, ReportedCaller> = BTreeMap::new();
    for caller in callers {
        sums.entry(caller.key())
            .and_modify(|sum| {
                sum.requests = sum.requests.saturating_add(caller.requests);
                sum.last_used = sum.last_used.max(caller.last_used);
            })
            .or_insert_with(|| caller.clone());
    }
    let mut all: Vec<ReportedCaller> = sums.into_values().collect();
    all.sort_by_key(|caller| std::cmp::Reverse(caller.requests));
    all.truncate(MAX_CALLERS);
    all
}

fn plain(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_TEXT);
    printable::line(&text[..end])
}
