//! The metrics of a sidecar.
//!
//! A check counts in the slot of its keyring, without a lock, an allocation, or a label that a request could choose. The
//! state of keyrings is read at a scrape.

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
    authz::{CheckEvent, DenyReason, Dialect, Outcome},
    clock::Clock,
    key::{KeyState, Timestamp},
    keyring::{HeldKey, Keyrings, Slot, Tally},
    trace::TraceParent,
};

/// The metrics of a sidecar; cheap to clone.
#[derive(Clone, Debug)]
pub struct SidecarMetrics {
    checks: Arc<Checks>,
    connected: Family<[(&'static str, String); 1], Gauge>,
    reconnects: Counter,
    spans_dropped: Counter,
    connections_refused: Counter,
    worker_delays: Histogram,
    clock_skew: Gauge<f64, AtomicU64>,
    keyrings_left_out: Gauge,
    config_reload_successful: Gauge,
    config_reload_success: Gauge<f64, AtomicU64>,
}

/// The counts and durations of checks.
#[derive(Debug)]
struct Checks {
    /// The keyrings, whose slots have the counters of their checks.
    keyrings: Keyrings,
    /// For requests that were answered without a keyring.
    without_keyring: Tally,
    /// For each dialect, the checks that were allowed and denied.
    dialects: [[AtomicU64; 2]; Dialect::ALL.len()],
    allowed: Durations,
    denied: Durations,
}

/// A histogram with a lock, which is uncontended and held for a few additions: the client library supports exemplars in its
/// own histogram only.
type Durations = HistogramWithExemplars<[(&'static str, String); 1]>;

/// Reads the keyrings at a scrape.
#[derive(Debug)]
struct KeyringCollector {
    keyrings: Keyrings,
    clock: Clock,
}

#[derive(Debug)]
struct CheckCollector(Arc<Checks>);

/// The number of outcomes: every reason of a denial, enforced and not, and those without a denial.
const OUTCOMES: usize = 2 * DenyReason::ALL.len() + 3;
/// The number of states of a key, with one for a key that was not verified.
const KEY_STATES: usize = KeyState::ALL.len() + 1;
/// The buckets of a check's duration, in seconds: from 5 µs, since checks are hardly faster, to 50 ms, since a check of
/// that time is slow however much longer it takes.
const BUCKETS: [f64; 13] = [
    5e-6, 1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4, 1.28e-3, 2.56e-3, 5.12e-3, 1e-2, 5e-2,
];

/// The buckets of the delay of workers, in seconds: from a tick of the runtime's clock to 1 s, when no client waits any
/// longer.
const DELAY_BUCKETS: [f64; 10] = [1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0];

impl SidecarMetrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry, keyrings: &Keyrings, clock: Clock) -> Self {
        let metrics = Self {
            checks: Arc::new(Checks::new(keyrings)),
            connected: Family::default(),
            reconnects: Counter::default(),
            spans_dropped: Counter::default(),
            connections_refused: Counter::default(),
            worker_delays: Histogram::new(DELAY_BUCKETS),
            clock_skew: Gauge::default(),
            keyrings_left_out: Gauge::default(),
            config_reload_successful: Gauge::default(),
            config_reload_success: Gauge::default(),
        };
        registry.register_collector(Box::new(CheckCollector(Arc::clone(&metrics.checks))));
        registry.register_collector(Box::new(KeyringCollector {
            keyrings: keyrings.clone(),
            clock,
        }));
        registry.register_collector(Box::new(CacheCollector::new(keyrings.clone())));
        registry.register(
            "relatch_discovery_connected",
            "1 while the stream to the endpoint of a control plane is open, else 0",
            metrics.connected.clone(),
        );
        registry.register(
            "relatch_discovery_reconnects",
            "Number of times that the stream to the control plane was lost or could not be opened",
            metrics.reconnects.clone(),
        );
        registry.register(
            "relatch_spans_dropped",
            "Number of spans that were not exported",
            metrics.spans_dropped.clone(),
        );
        registry.register(
            "relatch_connections_refused",
            "Number of connections of proxies that were closed at once because too many were open",
            metrics.connections_refused.clone(),
        );
        registry.register(
            "relatch_worker_delay_seconds",
            "Scheduling delay of the threads that answer checks, in seconds: the time that arriving checks wait",
            metrics.worker_delays.clone(),
        );
        registry.register(
            "relatch_clock_skew_seconds",
            "Wall clock of the control plane minus the wall clock of this sidecar, in seconds",
            metrics.clock_skew.clone(),
        );
        registry.register(
            "relatch_keyrings_left_out",
            "Number of keyrings that a pattern of the sidecar matches and that it does not hold, because they are too many",
            metrics.keyrings_left_out.clone(),
        );
        // Until a file is read again, the settings are those of the start.
        metrics.config_reload_successful.set(1);
        registry.register(
            "relatch_config_last_reload_successful",
            "1 if the configuration file as it was last read is applied, else 0",
            metrics.config_reload_successful.clone(),
        );
        registry.register(
            "relatch_config_last_reload_success_timestamp_seconds",
            "Time at which the settings in use were applied, in seconds since the Unix epoch",
            metrics.config_reload_success.clone(),
        );
        metrics
    }

    /// Counts a check and its duration.
    pub(crate) fn check(&self, event: &CheckEvent<'_>) {
        let decision = event.decision;
        let outcome = decision.outcome();
        let state = decision.key().map(HeldKey::state);
        let tally = event.slot.map_or(&self.checks.without_keyring, Slot::tally);
        tally.count(counter(outcome, state));
        let [allowed, denied] = &self.checks.dialects[event.dialect as usize];
        let (durations, count) = match outcome {
            Outcome::Allowed | Outcome::Anonymous | Outcome::Preflight => {
                (&self.checks.allowed, allowed)
            }
            Outcome::WouldDeny(_) | Outcome::Denied(_) => (&self.checks.denied, denied),
        };
        if event.dialect != Dialect::Envoy {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let exemplar = event
            .parent
            .filter(TraceParent::is_sampled)
            .map(|parent| [("trace_id", parent.trace_id().to_string())]);
        let ended = exemplar.is_some().then(|| event.started + event.duration);
        durations.observe(event.duration.as_secs_f64(), exemplar, ended);
    }

    /// Records whether the stream to an endpoint is open. Endpoints come from the configuration, so there are few.
    pub(crate) fn discovery_connected(&self, endpoint: &str, is_connected: bool) {
        self.connected
            .get_or_create(&[("endpoint", endpoint.to_owned())])
            .set(i64::from(is_connected));
    }

    /// Counts a stream that was lost or could not be opened.
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

    /// The scheduling delay of the threads that answer checks, in seconds.
    #[must_use]
    pub(crate) const fn worker_delays(&self) -> &Histogram {
        &self.worker_delays
    }

    /// Records whether the file as it was last read is applied, and when the settings in use were.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a time of this century is exact to the millisecond"
    )]
    pub(crate) fn config_reloaded(&self, is_applied: bool, applied_at: Timestamp) {
        self.config_reload_successful.set(i64::from(is_applied));
        self.config_reload_success
            .set(applied_at.as_millis() as f64 / 1_000.0);
    }

    /// Records how many keyrings that a pattern matches are not held.
    pub(crate) fn keyrings_left_out(&self, count: usize) {
        self.keyrings_left_out
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Records by how many seconds the wall clock of the control plane is ahead.
    pub(crate) fn clock_skew(&self, seconds: f64) {
        self.clock_skew.set(seconds);
    }
}

impl Checks {
    fn new(keyrings: &Keyrings) -> Self {
        Self {
            keyrings: keyrings.clone(),
            without_keyring: Tally::default(),
            dialects: Default::default(),
            allowed: HistogramWithExemplars::new(BUCKETS.into_iter()),
            denied: HistogramWithExemplars::new(BUCKETS.into_iter()),
        }
    }
}

/// Returns every count of `tally` that is not zero.
fn counts(tally: &Tally) -> impl Iterator<Item = (Outcome, Option<KeyState>, u64)> {
    let outcomes = DenyReason::ALL
        .into_iter()
        .map(Outcome::Denied)
        .chain([Outcome::Allowed, Outcome::Anonymous, Outcome::Preflight])
        .chain(DenyReason::ALL.into_iter().map(Outcome::WouldDeny));
    let counters = outcomes.flat_map(|outcome| {
        let states = KeyState::ALL.into_iter().map(Some).chain([None]);
        states.map(move |state| (outcome, state))
    });
    counters
        .map(|(outcome, state)| (outcome, state, tally.get(counter(outcome, state))))
        .filter(|(_, _, count)| *count > 0)
}

impl Collector for CheckCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut checks = encoder.encode_descriptor(
            "relatch_checks",
            "Number of checks by keyring, decision, reason and state of the key; an allow has the reason ok, anonymous or preflight, and would_deny is a denial that is not enforced",
            None,
            MetricType::Counter,
        )?;
        let slots = self.0.keyrings.load();
        let named = slots
            .iter()
            .map(|slot| (slot.name().as_str(), slot.tally()));
        for (keyring, tally) in named.chain([("", &self.0.without_keyring)]) {
            for (outcome, state, count) in counts(tally) {
                let labels = [
                    ("keyring", keyring),
                    ("decision", outcome.decision()),
                    ("reason", outcome.reason()),
                    ("key_state", state.map_or("", KeyState::as_str)),
                ];
                ConstCounter::new(count).encode(checks.encode_family(&labels)?)?;
            }
        }
        let mut over_http = encoder.encode_descriptor(
            "relatch_http_authz_checks",
            "Number of checks of proxies that ask over HTTP, by dialect and decision; relatch_checks has them too",
            None,
            MetricType::Counter,
        )?;
        for (dialect, counts) in Dialect::ALL.into_iter().zip(&self.0.dialects) {
            for (decision, count) in ["allow", "deny"].into_iter().zip(counts) {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    let labels = [("dialect", dialect.as_str()), ("decision", decision)];
                    ConstCounter::new(count).encode(over_http.encode_family(&labels)?)?;
                }
            }
        }
        let mut durations = encoder.encode_descriptor(
            "relatch_check_duration_seconds",
            "Duration of a check, in seconds",
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
        let slots = self.keyrings.load();
        let mut revisions = encoder.encode_descriptor(
            "relatch_keyring_revision",
            "Revision of the keyring that checks use",
            None,
            MetricType::Gauge,
        )?;
        for slot in slots.iter() {
            if let Some(view) = slot.load().as_ref() {
                let labels = [("keyring", slot.name().as_str())];
                ConstGauge::new(view.revision().get()).encode(revisions.encode_family(&labels)?)?;
            }
        }
        let now = self.clock.reading();
        let mut ages = encoder.encode_descriptor(
            "relatch_keyring_age_seconds",
            "Age of the keyring, in seconds: the time since the sidecar asked the question that the control plane last confirmed",
            None,
            MetricType::Gauge,
        )?;
        for slot in slots.iter() {
            if let Some(age) = slot.age(now) {
                let labels = [("keyring", slot.name().as_str())];
                ConstGauge::new(seconds(age)).encode(ages.encode_family(&labels)?)?;
            }
        }
        let mut keys = encoder.encode_descriptor(
            "relatch_keyring_keys",
            "Number of key versions in the keyring by state; not for keyrings on demand",
            None,
            MetricType::Gauge,
        )?;
        // The view of a keyring on demand has no versions.
        for slot in slots.iter().filter(|slot| slot.cache().is_none()) {
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

/// Returns the counter of an outcome and a state of the key.
const fn counter(outcome: Outcome, state: Option<KeyState>) -> usize {
    outcome_index(outcome) * KEY_STATES + state_index(state)
}

const _: () = assert!(OUTCOMES * KEY_STATES <= Tally::LEN);

const fn outcome_index(outcome: Outcome) -> usize {
    match outcome {
        Outcome::Denied(reason) => reason as usize,
        Outcome::Allowed => DenyReason::ALL.len(),
        Outcome::Anonymous => DenyReason::ALL.len() + 1,
        Outcome::Preflight => DenyReason::ALL.len() + 2,
        Outcome::WouldDeny(reason) => DenyReason::ALL.len() + 3 + reason as usize,
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
