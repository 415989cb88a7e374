//! The counters of a cache, which a scrape of the metrics reads.

use std::{
    array,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use prometheus_client::metrics::histogram::Histogram;

use super::LookupRefusal;

/// The counters of one cache.
#[derive(Debug)]
pub struct CacheStats {
    reads: [AtomicU64; ReadOutcome::ALL.len()],
    lookups: [AtomicU64; LookupOutcome::ALL.len()],
    refusals: [AtomicU64; LookupRefusal::ALL.len()],
    timeouts: AtomicU64,
    refreshes: AtomicU64,
    evictions: AtomicU64,
    durations: Histogram,
}

/// The result of a check's search in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadOutcome {
    /// An entry that has not expired.
    Hit,
    /// The key is held as unknown.
    Unknown,
    /// No entry, or an entry that has expired.
    Miss,
}

/// The result of a lookup that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LookupOutcome {
    /// The control plane holds the key.
    Found,
    /// The control plane holds no such key.
    Unknown,
    /// The answer is older than what this sidecar has seen.
    Outdated,
    /// The record cannot be read by this version of relatch.
    Unreadable,
    /// The stream ended before the answer.
    Lost,
}

/// The bounds of the buckets, in seconds. They range from a tenth of a millisecond, which a control
/// plane beside the sidecar needs, to a quarter of a second, when most proxies no longer wait.
const BUCKETS: [f64; 11] = [
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
];

impl CacheStats {
    /// Returns how many checks had this result.
    #[must_use]
    pub(crate) fn reads(&self, outcome: ReadOutcome) -> u64 {
        self.reads[outcome as usize].load(Ordering::Relaxed)
    }

    /// Returns how many lookups had this result.
    #[must_use]
    pub(crate) fn lookups(&self, outcome: LookupOutcome) -> u64 {
        self.lookups[outcome as usize].load(Ordering::Relaxed)
    }

    /// Returns how many checks were denied without a lookup for this reason.
    #[must_use]
    pub(crate) fn refusals(&self, refusal: LookupRefusal) -> u64 {
        self.refusals[refusal as usize].load(Ordering::Relaxed)
    }

    /// Returns how many checks were denied because no answer arrived in time.
    #[must_use]
    pub(crate) fn timeouts(&self) -> u64 {
        self.timeouts.load(Ordering::Relaxed)
    }

    /// Returns how many entries were looked up ahead of their expiry.
    #[must_use]
    pub(crate) fn refreshes(&self) -> u64 {
        self.refreshes.load(Ordering::Relaxed)
    }

    /// Returns how many versions were evicted or not admitted because the cache had no room.
    #[must_use]
    pub fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Relaxed)
    }

    /// Returns the durations of lookups until their answers, in seconds.
    #[must_use]
    pub(crate) const fn durations(&self) -> &Histogram {
        &self.durations
    }

    pub(super) fn read(&self, outcome: ReadOutcome) {
        add(&self.reads[outcome as usize], 1);
    }

    pub(super) fn answered(&self, outcome: LookupOutcome, count: u64) {
        add(&self.lookups[outcome as usize], count);
    }

    pub(super) fn refused(&self, refusal: LookupRefusal) {
        add(&self.refusals[refusal as usize], 1);
    }

    pub(super) fn timed_out(&self) {
        add(&self.timeouts, 1);
    }

    pub(super) fn refreshed(&self) {
        add(&self.refreshes, 1);
    }

    pub(super) fn evicted(&self, versions: u64) {
        add(&self.evictions, versions);
    }

    pub(super) fn took(&self, duration: Duration) {
        self.durations.observe(duration.as_secs_f64());
    }
}

impl Default for CacheStats {
    fn default() -> Self {
        Self {
            reads: zeros(),
            lookups: zeros(),
            refusals: zeros(),
            timeouts: AtomicU64::new(0),
            refreshes: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            durations: Histogram::new(BUCKETS),
        }
    }
}

impl ReadOutcome {
    /// Every outcome, in the order of their numbers.
    pub(crate) const ALL: [Self; 3] = [Self::Hit, Self::Unknown, Self::Miss];

    /// Returns its name in metrics.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Unknown => "unknown",
            Self::Miss => "miss",
        }
    }
}

impl LookupOutcome {
    /// Every outcome, in the order of their numbers.
    pub(crate) const ALL: [Self; 5] = [
        Self::Found,
        Self::Unknown,
        Self::Outdated,
        Self::Unreadable,
        Self::Lost,
    ];

    /// Returns its name in metrics.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Unknown => "unknown",
            Self::Outdated => "outdated",
            Self::Unreadable => "unreadable",
            Self::Lost => "lost",
        }
    }
}

fn zeros<const N: usize>() -> [AtomicU64; N] {
    array::from_fn(|_| AtomicU64::new(0))
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
