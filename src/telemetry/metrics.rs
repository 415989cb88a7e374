//! The sidecar's instruments, all made here.
//!
//! A check counts into an array of its keyring: no lock, no allocation, and no label that a request could choose. What
//! can be read from the keyrings is read when it is scraped.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        exemplar::HistogramWithExemplars,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

use super::cache::CacheCollector;
use crate::{
    authz::{CheckEvent, DenyReason, Outcome},
    clock::Clock,
    key::{KeyState, KeyringName},
    keyring::{HeldKey, Keyrings},
    trace::TraceParent,
};

/// The sidecar's instruments; cheap to clone.
#[derive(Clone, Debug)]
pub struct SidecarMetrics {
    checks: Arc<Checks>,
    connected: Family<[(&'static str, String); 1], Gauge>,
    reconnects: Counter,
    spans_dropped: Counter,
    connections_refused: Counter,
    worker_delays: Histogram,
    clock_skew: Gauge<f64, AtomicU64>,
}

/// Counts and durations of checks.
#[derive(Debug)]
struct Checks {
    /// Sorted by name.
    keyrings: Box<[KeyringChecks]>,
    /// Of requests for which no keyring was asked.
    without_keyring: Cells,
    allowed: Durations,
    denied: Durations,
}

#[derive(Debug)]
struct KeyringChecks {
    name: KeyringName,
    cells: Cells,
}

/// A counter for every outcome and state of the key.
#[derive(Debug)]
struct Cells([[AtomicU64; KEY_STATES]; OUTCOMES]);

/// Takes an uncontended lock for a few additions: the client library makes exemplars of its own histogram only.
type Durations = HistogramWithExemplars<[(&'static str, String); 1]>;

/// Reads the keyrings when it is asked.
#[derive(Debug)]
struct KeyringCollector {
    keyrings: Keyrings,
    clock: Clock,
}

#[derive(Debug)]
struct CheckCollector(Arc<Checks>);

/// Every reason, allowed, and anonymous.
const OUTCOMES: usize = DenyReason::ALL.len() + 2;
/// Every state, and none where the key was not verified.
const KEY_STATES: usize = KeyState::ALL.len() + 1;
/// In seconds, from 5 µs, below which a check is hardly possible, to 50 ms, where Envoy's patience ends.
const BUCKETS: [f64; 13] = [
    5e-6, 1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4, 1.28e-3, 2.56e-3, 5.12e-3, 1e-2, 5e-2,
];

/// In seconds, from a tick of the runtime's clock to a second, when nobody waits any longer.
const DELAY_BUCKETS: [f64; 10] = [1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0];

impl SidecarMetrics {
    /// Registers the instruments.
    pub fn register(registry: &mut Registry, keyrings: &Keyrings, clock: Clock) -> Self {
        let metrics = Self {
            checks: Arc::new(Checks::new(keyrings)),
            connected: Family::default(),
            reconnects: Counter::default(),
            spans_dropped: Counter::default(),
            connections_refused: Counter::default(),
            worker_delays: Histogram::new(DELAY_BUCKETS),
            clock_skew: Gauge::default(),
        };
        registry.register_collector(Box::new(CheckCollector(Arc::clone(&metrics.checks))));
        registry.register_collector(Box::new(KeyringCollector {
            keyrings: keyrings.clone(),
            clock,
        }));
        registry.register_collector(Box::new(CacheCollector::new(keyrings.clone())));
        registry.register(
            "relatch_discovery_connected",
            "Whether the stream to an endpoint of the control plane is open",
            metrics.connected.clone(),
        );
        registry.register(
            "relatch_discovery_reconnects",
            "How often the stream to the control plane was opened again",
            metrics.reconnects.clone(),
        );
        registry.register(
            "relatch_spans_dropped",
            "Spans that were not exported",
            metrics.spans_dropped.clone(),
        );
        registry.register(
            "relatch_connections_refused",
            "Connections for checks that were closed at once because there were too many",
            metrics.connections_refused.clone(),
        );
        registry.register(
            "relatch_worker_delay_seconds",
            "How late the threads that answer checks serve their timers, which is how long what arrives waits",
            metrics.worker_delays.clone(),
        );
        registry.register(
            "relatch_clock_skew_seconds",
            "The control plane's wall clock less this one's",
            metrics.clock_skew.clone(),
        );
        metrics
    }

    /// Counts a check and its duration.
    pub(crate) fn check(&self, event: &CheckEvent<'_>) {
        let decision = event.decision;
        let outcome = decision.outcome();
        let state = decision.key().map(HeldKey::state);
        let keyring = decision.keyring().map(|keyring| keyring.name);
        self.checks.cells(keyring).count(outcome, state);
        let durations = match outcome {
            Outcome::Allowed | Outcome::Anonymous => &self.checks.allowed,
            Outcome::Denied(_) => &self.checks.denied,
        };
        let exemplar = event
            .parent
            .filter(TraceParent::is_sampled)
            .map(|parent| [("trace_id", parent.trace_id().to_string())]);
        let ended = exemplar.is_some().then(|| event.started + event.duration);
        durations.observe(event.duration.as_secs_f64(), exemplar, ended);
    }

    /// Notes whether the stream to an endpoint is open. Endpoints come from configuration, so that there are few.
    pub(crate) fn discovery_connected(&self, endpoint: &str, is_connected: bool) {
        self.connected
            .get_or_create(&[("endpoint", endpoint.to_owned())])
            .set(i64::from(is_connected));
    }

    /// Counts a stream that was opened again.
    pub(crate) fn discovery_reconnected(&self) {
        self.reconnects.inc();
    }

    /// The counter of spans that were not exported.
    #[must_use]
    pub(crate) const fn spans_dropped(&self) -> &Counter {
        &self.spans_dropped
    }

    /// The counter of connections for checks that were closed because there were too many.
    #[must_use]
    pub(crate) const fn connections_refused(&self) -> &Counter {
        &self.connections_refused
    }

    /// How late the threads that answer checks are, in seconds.
    #[must_use]
    pub(crate) const fn worker_delays(&self) -> &Histogram {
        &self.worker_delays
    }

    /// Notes by how much the control plane's wall clock is ahead, in seconds.
    pub(crate) fn clock_skew(&self, seconds: f64) {
        self.clock_skew.set(seconds);
    }
}

impl Checks {
    fn new(keyrings: &Keyrings) -> Self {
        let mut keyrings: Vec<KeyringChecks> = keyrings
            .iter()
            .map(|slot| KeyringChecks {
                name: slot.name().clone(),
                cells: Cells::default(),
            })
            .collect();
        keyrings.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Self {
            keyrings: keyrings.into(),
            without_keyring: Cells::default(),
            allowed: HistogramWithExemplars::new(BUCKETS.into_iter()),
            denied: HistogramWithExemplars::new(BUCKETS.into_iter()),
        }
    }

    fn cells(&self, keyring: Option<&KeyringName>) -> &Cells {
        keyring
            .and_then(|name| {
                let at = self.keyrings.binary_search_by(|held| held.name.cmp(name));
                at.ok().map(|at| &self.keyrings[at].cells)
            })
            .unwrap_or(&self.without_keyring)
    }

    /// All cells with their keyring's name, which is empty where no keyring was asked.
    fn all(&self) -> impl Iterator<Item = (&str, &Cells)> {
        let named = self
            .keyrings
            .iter()
            .map(|keyring| (keyring.name.as_str(), &keyring.cells));
        named.chain([("", &self.without_keyring)])
    }
}

impl Cells {
    fn count(&self, outcome: Outcome, state: Option<KeyState>) {
        self.0[outcome_index(outcome)][state_index(state)].fetch_add(1, Ordering::Relaxed);
    }

    /// Every count that is not zero.
    fn counts(&self) -> impl Iterator<Item = (Outcome, Option<KeyState>, u64)> {
        let outcomes = DenyReason::ALL
            .into_iter()
            .map(Outcome::Denied)
            .chain([Outcome::Allowed, Outcome::Anonymous]);
        let cells = outcomes.flat_map(|outcome| {
            let states = KeyState::ALL.into_iter().map(Some).chain([None]);
            states.map(move |state| (outcome, state))
        });
        cells
            .map(|(outcome, state)| {
                let cell = &self.0[outcome_index(outcome)][state_index(state)];
                (outcome, state, cell.load(Ordering::Relaxed))
            })
            .filter(|(_, _, count)| *count > 0)
    }
}

impl Default for Cells {
    fn default() -> Self {
        Self(std::array::from_fn(|_| {
            std::array::from_fn(|_| AtomicU64::new(0))
        }))
    }
}

impl Collector for CheckCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut checks = encoder.encode_descriptor(
            "relatch_checks",
            "Checks, by what became of them; an allow has the reason ok or anonymous",
            None,
            MetricType::Counter,
        )?;
        for (keyring, cells) in self.0.all() {
            for (outcome, state, count) in cells.counts() {
                let labels = [
                    ("keyring", keyring),
                    ("decision", outcome.decision()),
                    ("reason", outcome.reason()),
                    ("key_state", state.map_or("", KeyState::as_str)),
                ];
                ConstCounter::new(count).encode(checks.encode_family(&labels)?)?;
            }
        }
        let mut durations = encoder.encode_descriptor(
            "relatch_check_duration_seconds",
            "The time that a check takes, in seconds",
            None,
            MetricType::Histogram,
        )?;
        for (decision, histogram) in [("allow", &self.0.allowed), ("deny", &self.0.denied)] {
            histogram.encode(durations.encode_family(&[("decision", decision)])?)?;
        }
        Ok(())
    }
}

impl Collector for KeyringCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut revisions = encoder.encode_descriptor(
            "relatch_keyring_revision",
            "The revision that checks see",
            None,
            MetricType::Gauge,
        )?;
        for slot in self.keyrings.iter() {
            if let Some(view) = slot.load().as_ref() {
                let labels = [("keyring", slot.name().as_str())];
                ConstGauge::new(view.revision().get()).encode(revisions.encode_family(&labels)?)?;
            }
        }
        let now = self.clock.reading();
        let mut ages = encoder.encode_descriptor(
            "relatch_keyring_age_seconds",
            "The time since the control plane last confirmed the keyring",
            None,
            MetricType::Gauge,
        )?;
        for slot in self.keyrings.iter() {
            if let Some(age) = slot.age(now) {
                let labels = [("keyring", slot.name().as_str())];
                ConstGauge::new(seconds(age)).encode(ages.encode_family(&labels)?)?;
            }
        }
        let mut keys = encoder.encode_descriptor(
            "relatch_keyring_keys",
            "The key versions that the keyring holds",
            None,
            MetricType::Gauge,
        )?;
        // Of one that is held on demand, the view has none.
        for slot in self.keyrings.iter().filter(|slot| slot.cache().is_none()) {
            let view = slot.load();
            let Some(view) = view.as_ref() else { continue };
            for state in KeyState::ALL {
                let labels = [("keyring", slot.name().as_str()), ("state", state.as_str())];
                let count = u64::try_from(view.count(state)).unwrap_or(u64::MAX);
                ConstGauge::new(count).encode(keys.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

const fn outcome_index(outcome: Outcome) -> usize {
    match outcome {
        Outcome::Denied(reason) => reason as usize,
        Outcome::Allowed => DenyReason::ALL.len(),
        Outcome::Anonymous => DenyReason::ALL.len() + 1,
    }
}

const fn state_index(state: Option<KeyState>) -> usize {
    match state {
        Some(state) => state as usize,
        None => KeyState::ALL.len(),
    }
}

const fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

#[cfg(test)]
mod tests;
