//! How often key versions were used: counters that only grow, from the begin of the process.
//!
//! A version has one set of counters from its first use for as long as the process lives, whatever becomes of its record:
//! the views that hold it change, the counters stay. So what is told of them can be merged by taking the larger number.

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
    /// The uses that have come since [`Ledger::take_used`] are announced in its list.
    announced: AtomicBool,
    requests: AtomicU64,
    denied: AtomicU64,
    /// Milliseconds since the Unix epoch; the largest number before the first use.
    first_used: AtomicI64,
    last_used: AtomicI64,
    /// Only while somebody uses the version who should not any more.
    callers: Mutex<Option<Box<Callers>>>,
}

/// The counters of a keyring's versions, and which of them have moved.
///
/// Only versions that were used have counters, of a hundred bytes each: what a sidecar takes in memory for the use of keys
/// goes by the keys that are used through it, not by those that it holds.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Only ever appended to, so that a check finds counters without a lock.
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

    /// Whose counters these are.
    #[must_use]
    pub(crate) const fn version(&self) -> VersionRef {
        self.version
    }

    /// The counts now. Counting goes on meanwhile: they are never less than at an earlier look, and hold at least every
    /// use that was counted before this one.
    #[must_use]
    pub(crate) fn read(&self) -> Use {
        let requests = self.requests.load(Ordering::SeqCst);
        if requests == 0 {
            return Use::default();
        }
        // A check that is being counted may have noted its denial already.
        let denied = self.denied.load(Ordering::Relaxed).min(requests);
        let time = |millis: &AtomicI64| Timestamp::from_millis(millis.load(Ordering::Relaxed));
        Use {
            requests,
            denied,
            first_used: Some(time(&self.first_used)),
            last_used: Some(time(&self.last_used)),
        }
    }

    /// Who uses the version most, the most requests first.
    #[must_use]
    pub(crate) fn callers(&self) -> Vec<CallerUse> {
        let callers = self.lock_callers();
        callers.as_deref().map_or_else(Vec::new, Callers::ranked)
    }

    /// Counts one request of a caller that should use the version no more.
    pub(crate) fn note_caller(&self, caller: &Caller, now: Timestamp) {
        let mut callers = self.lock_callers();
        callers.get_or_insert_default().note(caller, now);
    }

    /// Forgets who used the version, for which there is no reason any more.
    pub(super) fn forget_callers(&self) {
        *self.lock_callers() = None;
    }

    /// `denied` and the times come before `requests`: who sees a request by it sees all of that request.
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
    /// The counters of a version that is held, made at the first call and the same at every one. Without a lock after the
    /// first call for the version and the view that it is held by.
    #[must_use]
    pub(crate) fn of(&self, key: &HeldKey<'_>) -> UsageIndex {
        if let Some(index) = key.usage().get() {
            return index;
        }
        let index = self.of_version(key.version_ref());
        key.usage().set(index);
        index
    }

    /// The same of a version by its name.
    pub(crate) fn of_version(&self, version: VersionRef) -> UsageIndex {
        *self.lock_book().entry(version).or_insert_with(|| {
            let index = self.usages.push(VersionUsage::new(version));
            UsageIndex(u32::try_from(index).expect("memory ends before"))
        })
    }

    /// The counters at an index of this ledger.
    #[must_use]
    pub(crate) fn get(&self, UsageIndex(index): UsageIndex) -> &VersionUsage {
        let index = usize::try_from(index).expect("an address has 32 bits");
        self.usages.get(index).expect("counters are never removed")
    }

    /// The counters of a version; none before its first use.
    #[must_use]
    pub(crate) fn find(&self, version: VersionRef) -> Option<&VersionUsage> {
        let index = self.lock_book().get(&version).copied();
        index.map(|index| self.get(index))
    }

    /// Counts a check at `now` that presented the version.
    ///
    /// No use is missed: a check adds, then looks whether the version is announced; [`Ledger::take_used`] takes the
    /// announcement back, then its caller reads. All four are sequentially consistent, so that one order holds for both
    /// sides. If the check still finds the announcement, that look comes before it is taken back, and the addition before
    /// the reading. If it does not, it announces the version anew, for the next taking. With a weaker order both could
    /// look before the other has written (store buffering), and the use would wait for another one to be told of.
    pub(crate) fn count(&self, index: UsageIndex, now: Timestamp, denied: bool) {
        let usage = self.get(index);
        usage.add(now, denied);
        let is_announced =
            usage.announced.load(Ordering::SeqCst) || usage.announced.swap(true, Ordering::SeqCst);
        if !is_announced {
            self.lock_used().push(index);
        }
    }

    /// The versions that were used since they were last taken. Their counters are to be read after this.
    #[must_use]
    pub(crate) fn take_used(&self) -> Vec<UsageIndex> {
        // Collected anew, so that the list keeps its room and checks do not make it grow again.
        let used: Vec<_> = self.lock_used().drain(..).collect();
        for index in &used {
            self.get(*index).announced.store(false, Ordering::SeqCst);
        }
        used
    }

    /// How many versions wait to be taken.
    #[must_use]
    pub(crate) fn waiting(&self) -> usize {
        self.lock_used().len()
    }

    /// Every version that was used since the process began.
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
