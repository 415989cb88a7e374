//! What a control plane counts as it happens.
//!
//! What is true at the moment of a scrape is in [`key_collector`](super::key_collector).

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

/// What became of a lookup by a sidecar that holds a keyring on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LookupOutcome {
    /// There is such a key.
    Found,
    /// There is none.
    Unknown,
    /// The stream had too many that waited.
    Dropped,
}

/// In seconds: from a millisecond, which a sidecar beside the control plane needs, to a minute, after which commands stop
/// waiting.
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
    /// Registers the instruments.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "relatch_propagation_seconds",
            "From a commit to the last acknowledgement of it, where somebody waited for it",
            metrics.propagation.clone(),
        );
        registry.register(
            "relatch_commits",
            "Commits of changes to keyrings, by what became of them",
            metrics.commits.clone(),
        );
        registry.register(
            "relatch_spans_dropped",
            "Spans that were not exported",
            metrics.spans_dropped.clone(),
        );
        registry.register(
            "relatch_lookups",
            "Keys that sidecars which hold a keyring on demand asked for, by what became of it",
            metrics.lookups.clone(),
        );
        for outcome in LookupOutcome::ALL {
            let _ = metrics.lookups.get_or_create(&outcome.labels());
        }
        for outcome in CommitOutcome::ALL {
            let _ = metrics.commits.get_or_create(&labels(outcome));
        }
        metrics
    }

    /// Counts a change that every sidecar that may serve has.
    pub(crate) fn propagated(&self, took: std::time::Duration) {
        self.propagation.observe(took.as_secs_f64());
    }

    /// The counter of spans that were not exported.
    #[must_use]
    pub(crate) const fn spans_dropped(&self) -> &Counter {
        &self.spans_dropped
    }

    /// Counts a lookup.
    pub(crate) fn looked_up(&self, outcome: LookupOutcome) {
        self.lookups.get_or_create(&outcome.labels()).inc();
    }

    /// Counts a commit.
    pub(crate) fn committed(&self, outcome: CommitOutcome) {
        self.commits.get_or_create(&labels(outcome)).inc();
    }
}

impl LookupOutcome {
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
