//! How often key versions were used: counters that only grow, from the begin of the process.
//!
//! A version has one set of counters for as long as the process lives, whatever becomes of its record: the views that
//! hold it change, the counters stay. So what is told of them can be merged by taking the larger number.

use std::{
    borrow::Borrow,
    collections::HashSet,
    fmt,
    hash::{Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
};

use super::callers::{Caller, CallerUse, Callers};
use crate::key::{Timestamp, Use, VersionRef};

/// The counters of one key version.
pub struct VersionUsage {
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
#[derive(Debug, Default)]
pub struct Ledger {
    book: Mutex<Book>,
    used: Mutex<Vec<Arc<VersionUsage>>>,
}

#[derive(Debug, Default)]
struct Book {
    versions: HashSet<Known>,
    /// How many versions were left when those without a record were last struck out.
    kept: usize,
}

/// The one `VersionUsage` of a version, found by its name.
#[derive(Debug)]
struct Known(Arc<VersionUsage>);

/// The book is not swept for fewer versions than these, which take a hundred kilobytes.
const MIN_SWEPT: usize = 1_024;

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

    /// Counters for tests of what is made of a record.
    #[cfg(test)]
    pub(crate) fn unused(version: VersionRef) -> Arc<Self> {
        Arc::new(Self::new(version))
    }

    /// Whose counters these are.
    #[must_use]
    pub const fn version(&self) -> VersionRef {
        self.version
    }

    /// The counts now. Counting goes on meanwhile: they are never less than at an earlier look, and hold at least every
    /// use that was counted before this one.
    #[must_use]
    pub fn read(&self) -> Use {
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

    /// Notes that the uses which were taken last did not come before `moment`.
    pub fn used_since(&self, moment: Timestamp) {
        self.last_used
            .fetch_max(moment.as_millis(), Ordering::Relaxed);
    }

    /// Who uses the version most, the most requests first.
    #[must_use]
    pub fn callers(&self) -> Vec<CallerUse> {
        let callers = self.lock_callers();
        callers.as_deref().map_or_else(Vec::new, Callers::ranked)
    }

    /// Counts one request of a caller that should use the version no more.
    pub fn note_caller(&self, caller: &Caller, now: Timestamp) {
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
    /// The counters of a version, the same at every call.
    #[must_use]
    pub fn of(&self, version: VersionRef) -> Arc<VersionUsage> {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Known(usage)) = book.versions.get(&version) {
            return Arc::clone(usage);
        }
        book.sweep_if_due();
        let usage = Arc::new(VersionUsage::new(version));
        book.versions.insert(Known(Arc::clone(&usage)));
        usage
    }

    /// Counts a check at `now` that presented the version, which is one of this ledger's.
    ///
    /// No use is missed: a check adds, then looks whether the version is announced; [`Ledger::take_used`] takes the
    /// announcement back, then its caller reads. All four are sequentially consistent, so that one order holds for both
    /// sides. If the check still finds the announcement, that look comes before it is taken back, and the addition before
    /// the reading. If it does not, it announces the version anew, for the next taking. With a weaker order both could
    /// look before the other has written (store buffering), and the use would wait for another one to be told of.
    pub fn count(&self, usage: &Arc<VersionUsage>, now: Timestamp, denied: bool) {
        usage.add(now, denied);
        let is_announced =
            usage.announced.load(Ordering::SeqCst) || usage.announced.swap(true, Ordering::SeqCst);
        if !is_announced {
            self.lock_used().push(Arc::clone(usage));
        }
    }

    /// The versions that were used since they were last taken. Their counters are to be read after this.
    #[must_use]
    pub fn take_used(&self) -> Vec<Arc<VersionUsage>> {
        // Collected anew, so that the list keeps its room and checks do not make it grow again.
        let used: Vec<_> = self.lock_used().drain(..).collect();
        for usage in &used {
            usage.announced.store(false, Ordering::SeqCst);
        }
        used
    }

    /// How many versions wait to be taken.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.lock_used().len()
    }

    /// Every version that was used since the process began.
    #[must_use]
    pub fn ever_used(&self) -> Vec<Arc<VersionUsage>> {
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let used = book.versions.iter().filter(|Known(usage)| usage.was_used());
        used.map(|Known(usage)| Arc::clone(usage)).collect()
    }

    fn lock_used(&self) -> MutexGuard<'_, Vec<Arc<VersionUsage>>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    /// Strikes out the versions that nobody holds and nobody has used, whenever the book has doubled: one that comes back
    /// begins at zero as well. A used one is kept for good, as its count must not start over.
    fn sweep_if_due(&mut self) {
        if self.versions.len() < (2 * self.kept).max(MIN_SWEPT) {
            return;
        }
        // Who holds one has it from here, and nobody is here now: a count of one stays one.
        let is_needed = |Known(usage): &Known| Arc::strong_count(usage) > 1 || usage.was_used();
        self.versions.retain(is_needed);
        self.kept = self.versions.len();
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

impl Hash for Known {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.version.hash(state);
    }
}

impl PartialEq for Known {
    fn eq(&self, other: &Self) -> bool {
        self.0.version == other.0.version
    }
}

impl Eq for Known {}

impl Borrow<VersionRef> for Known {
    fn borrow(&self) -> &VersionRef {
        &self.0.version
    }
}

#[cfg(test)]
mod tests;
