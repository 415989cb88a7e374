//! How often key versions were used: counters that only grow, from the start of the process.
//!
//! A version has one set of counters from its first use until the process ends, whatever happens to
//! its record: the views that hold the version change, the counters stay. So two reports of the
//! counters can be merged by choosing the larger numbers.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
};

use super::{
    callers::{Caller, CallerUse, Callers},
    held::HeldKey,
    usage_cell::UsageIndex,
};
use crate::key::{Timestamp, Use, VersionRef};

/// The counters of one key version.
pub(crate) struct VersionUsage {
    version: VersionRef,
    /// Whether the ledger's list of used versions contains this version, for its uses since the
    /// last [`Ledger::take_used`].
    announced: AtomicBool,
    requests: AtomicU64,
    denied: AtomicU64,
    /// In milliseconds since the Unix epoch; the largest number before the first use.
    first_used: AtomicI64,
    last_used: AtomicI64,
    /// Set only while callers use the version that should not use it any more.
    callers: Mutex<Option<Box<Callers>>>,
}

/// The counters of a keyring's versions, and which of them have changed.
///
/// Only versions that were used have counters, of about a hundred bytes each. So the memory for
/// counters depends on the keys that are used through a sidecar, not on the keys that it holds.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Only appended to, so that a check finds counters without a lock.
    usages: boxcar::Vec<VersionUsage>,
    book: Mutex<HashMap<VersionRef, UsageIndex>>,
    used: Mutex<Vec<UsageIndex>>,
}

impl VersionUsage {
    fn new(version: VersionRef) -> Self {
        Self {
            version,
            announced: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            first_used: AtomicI64::new(i64::MAX),
            last_used: AtomicI64::new(0),
            callers: Mutex::default(),
        }
    }

    /// Returns the version that the counters belong to.
    #[must_use]
    pub(crate) const fn version(&self) -> VersionRef {
        self.version
    }

    /// Reads the counts. Counting continues meanwhile: the counts are never smaller than at an
    /// earlier read, and include at least every use that was counted before this one.
    #[must_use]
    pub(crate) fn read(&self) -> Use {
        let requests = self.requests.load(Ordering::SeqCst);
        if requests == 0 {
            return Use::default();
        }
        // A check that is being counted may already have added its denial.
        let denied = self.denied.load(Ordering::Relaxed).min(requests);
        let time = |millis: &AtomicI64| Timestamp::from_millis(millis.load(Ordering::Relaxed));
        Use {
            requests,
            denied,
            first_used: Some(time(&self.first_used)),
            last_used: Some(time(&self.last_used)),
        }
    }

    /// Returns the callers that use the version most, those with the most requests first.
    #[must_use]
    pub(crate) fn callers(&self) -> Vec<CallerUse> {
        let callers = self.lock_callers();
        callers.as_deref().map_or_else(Vec::new, Callers::ranked)
    }

    /// Counts one request of a caller that should no longer use the version.
    pub(crate) fn note_caller(&self, caller: &Caller, now: Timestamp) {
        let mut callers = self.lock_callers();
        callers.get_or_insert_default().note(caller, now);
    }

    /// Drops the recorded callers, when there is no longer a reason to record them.
    pub(super) fn forget_callers(&self) {
        *self.lock_callers() = None;
    }

    /// Counts one request. `denied` and the times are written before `requests`: a reader that sees
    /// the request in `requests` sees all of that request.
    fn add(&self, now: Timestamp, denied: bool) {
        let now = now.as_millis();
        // Most requests come within a millisecond of the one before: reading is enough then.
        if now < self.first_used.load(Ordering::Relaxed) {
            self.first_used.fetch_min(now, Ordering::Relaxed);
        }
        if now > self.last_used.load(Ordering::Relaxed) {
            self.last_used.fetch_max(now, Ordering::Relaxed);
        }
        if denied {
            self.denied.fetch_add(1, Ordering::Relaxed);
        }
        self.requests.fetch_add(1, Ordering::SeqCst);
    }

    fn was_used(&self) -> bool {
        self.requests.load(Ordering::SeqCst) > 0
    }

    fn lock_callers(&self) -> MutexGuard<'_, Option<Box<Callers>>> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    /// Returns the counters of a held version, which the first call creates; every call returns the
    /// same ones. After the first call for a version and the view that holds it, this needs no
    /// lock.
    #[must_use]
    pub(crate) fn of(&self, key: &HeldKey<'_>) -> UsageIndex {
        if let Some(index) = key.usage().get() {
            return index;
        }
        let index = self.of_version(key.version_ref());
        key.usage().set(index);
        index
    }

    /// Returns the counters of a version by its name, and creates them if there are none. This
    /// locks the ledger's book.
    pub(crate) fn of_version(&self, version: VersionRef) -> UsageIndex {
        *self.lock_book().entry(version).or_insert_with(|| {
            let index = self.usages.push(VersionUsage::new(version));
            UsageIndex(u32::try_from(index).expect("fewer than 2^32 versions fit in memory"))
        })
    }

    /// Returns the counters at an index of this ledger.
    #[must_use]
    pub(crate) fn get(&self, UsageIndex(index): UsageIndex) -> &VersionUsage {
        let index = usize::try_from(index).expect("an address has 32 bits");
        self.usages.get(index).expect("counters are never removed")
    }

    /// Returns the counters of a version; none before its first use.
    #[must_use]
    pub(crate) fn find(&self, version: VersionRef) -> Option<&VersionUsage> {
        let index = self.lock_book().get(&version).copied();
        index.map(|index| self.get(index))
    }

    /// Counts a check at `now` that presented the version.
    ///
    /// No use is missed. A check adds its use, and then reads whether the version is announced.
    /// [`Ledger::take_used`] withdraws the announcement, and then its caller reads the counters.
    /// All four operations are sequentially consistent, so that one order holds for both sides. If
    /// the check still reads the announcement, this read precedes the withdrawal, and the addition
    /// precedes the reading of the counters. If it does not, the check announces the version again,
    /// for the next `take_used`. With a weaker order, both sides could read before the other's
    /// write is visible (store buffering), and the use would be reported only after another use.
    pub(crate) fn count(&self, index: UsageIndex, now: Timestamp, denied: bool) {
        let usage = self.get(index);
        usage.add(now, denied);
        let is_announced =
            usage.announced.load(Ordering::SeqCst) || usage.announced.swap(true, Ordering::SeqCst);
        if !is_announced {
            self.lock_used().push(index);
        }
    }

    /// Returns the versions that were used since the last call. The caller must read their counters
    /// after this call.
    #[must_use]
    pub(crate) fn take_used(&self) -> Vec<UsageIndex> {
        // Collected into a new vector, so that the list keeps its capacity and checks do not make
        // it grow again.
        let used: Vec<_> = self.lock_used().drain(..).collect();
        for index in &used {
            self.get(*index).announced.store(false, Ordering::SeqCst);
        }
        used
    }

    /// Returns the number of used versions that wait for [`take_used`](Self::take_used).
    #[must_use]
    pub(crate) fn waiting(&self) -> usize {
        self.lock_used().len()
    }

    /// Returns every version that was used since the process started.
    #[must_use]
    pub(crate) fn ever_used(&self) -> Vec<UsageIndex> {
        let book = self.lock_book();
        let used = book.values().filter(|index| self.get(**index).was_used());
        used.copied().collect()
    }

    fn lock_book(&self) -> MutexGuard<'_, HashMap<VersionRef, UsageIndex>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_used(&self) -> MutexGuard<'_, Vec<UsageIndex>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for VersionUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VersionUsage")
            .field("version", &self.version)
            .field("use", &self.read())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
