//! The counters of a control plane.
//!
//! [`key_collector`](super::key_collector) reads the other metrics at a scrape.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use super::journal::CommitOutcome;

/// The counters of a control plane; cheap to clone.
#[derive(Clone, Debug)]
pub struct ControlMetrics {
    propagation: Histogram,
    commits: Family<[(&'static str, &'static str); 1], Counter>,
    spans_dropped: Counter,
    lookups: Family<[(&'static str, &'static str); 1], Counter>,
}

/// The outcome of a lookup by a sidecar with a keyring on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LookupReply {
    /// The key exists.
    Found,
    /// The key does not exist.
    Unknown,
    /// The lookup was dropped, because too many lookups of the stream waited.
    Dropped,
}

/// The buckets of the propagation time, in seconds: from a millisecond, which a sidecar near the control plane needs, to a
/// minute, after which commands stop waiting.
const PROPAGATION_BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0,
];

impl Default for ControlMetrics {
    fn default() -> Self {
        Self {
            propagation: Histogram::new(PROPAGATION_BUCKETS),
            commits: Family::default(),
            spans_dropped: Counter::default(),
            lookups: Family::default(),
        }
    }
}

impl ControlMetrics {
    /// Registers the metrics.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "relatch_propagation_seconds",
            "Time from a commit until the last sidecar that may serve confirmed it or its time was up, in seconds, for commits with a wait",
            metrics.propagation.clone(),
        );
        registry.register(
            "relatch_commits",
            "Number of attempts to commit changes to keyrings by outcome",
            metrics.commits.clone(),
        );
        registry.register(
            "relatch_spans_dropped",
            "Number of spans that were not exported",
            metrics.spans_dropped.clone(),
        );
        registry.register(
            "relatch_lookups",
            "Number of keys that sidecars with a keyring on demand looked up, by outcome",
            metrics.lookups.clone(),
        );
        for outcome in LookupReply::ALL {
            let _ = metrics.lookups.get_or_create(&outcome.labels());
        }
        for outcome in CommitOutcome::ALL {
            let _ = metrics.commits.get_or_create(&labels(outcome));
        }
        metrics
    }

    /// Records the time from a commit until no sidecar that may serve was without it.
    pub(crate) fn propagated(&self, took: std::time::Duration) {
        self.propagation.observe(took.as_secs_f64());
    }

    /// Returns the counter of spans that were not exported.
    #[must_use]
    pub(crate) const fn spans_dropped(&self) -> &Counter {
        &self.spans_dropped
    }

    /// Counts a lookup.
    pub(crate) fn looked_up(&self, outcome: LookupReply) {
        self.lookups.get_or_create(&outcome.labels()).inc();
    }

    /// Counts a commit.
    pub(crate) fn committed(&self, outcome: CommitOutcome) {
        self.commits.get_or_create(&labels(outcome)).inc();
    }
}

impl LookupReply {
    const ALL: [Self; 3] = [Self::Found, Self::Unknown, Self::Dropped];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Unknown => "unknown",
            Self::Dropped => "dropped",
        }
    }

    const fn labels(self) -> [(&'static str, &'static str); 1] {
        [("outcome", self.as_str())]
    }
}

const fn labels(outcome: CommitOutcome) -> [(&'static str, &'static str); 1] {
    [("outcome", outcome.as_str())]
}
