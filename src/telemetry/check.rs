//! The telemetry of a check: always counters, a span if the check is sampled, and a log line within a rate.
//!
//! Sampling happens here, after the decision. A check is sampled if its parent is. Denials and uses of a version that is not
//! active are sampled too, up to one per second for each key version; denials of keys that were not verified share a rate
//! for each keyring and reason. The tracer should record every span that it receives, or follow the parent.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use opentelemetry::{
    Context, KeyValue,
    trace::{Span as _, SpanKind, TraceContextExt as _, Tracer as _},
};
use opentelemetry_sdk::trace::SdkTracer;

use super::metrics::SidecarMetrics;
use crate::{
    authz::{CheckEvent, DenyReason, Dialect, Observer, Outcome},
    clock::{BootTime, Clock},
    key::{KeyId, KeyState, KeyringName, RotationId, VersionNumber},
};

/// Writes a check as a log line. Its fields have the names of the attributes of its span.
macro_rules! log_line {
    ($level:ident, $event:expr, $message:literal) => {{
        let event: &CheckEvent<'_> = $event;
        let outcome = event.decision.outcome();
        let keyring = event.decision.keyring();
        let key = event.decision.key();
        let key_id = key.map(|key| key.key_id());
        let rotation = rotation(event);
        // An address can be that of a person.
        let client = event
            .client
            .filter(|_| tracing::enabled!(tracing::Level::DEBUG));
        tracing::event!(
            tracing::Level::$level,
            auth.dialect = event.dialect.as_str(),
            auth.decision = outcome.decision(),
            auth.deny.reason = outcome.denial().map(DenyReason::as_str),
            auth.keyring = keyring.map(|keyring| keyring.name.as_str()),
            auth.keyring.revision = revision(event),
            auth.keyring.age_ms = age_ms(event),
            auth.consumer.id = key.map(|key| key.consumer()),
            auth.key.id = key_id.as_ref().map(|id| id.as_str()),
            auth.key.version = key.map(|key| key.version().get()),
            auth.key.state = key.map(|key| key.state().as_str()),
            auth.rotation.id = rotation.as_ref().map(|(id, _)| id.as_str()),
            auth.rotation.phase = rotation.as_ref().map(|(_, phase)| *phase),
            client.address = client
                .and_then(|client| client.address())
                .map(tracing::field::display),
            auth.client_address_from =
                client.map(|client| tracing::field::display(client.origin())),
            trace_id = event.parent.map(|parent| parent.trace_id().to_string()),
            error = event.error.map(|error| error.to_string()),
            $message
        );
    }};
}

/// Reports checks as metrics, spans and log lines.
#[derive(Debug)]
pub struct CheckTelemetry {
    metrics: SidecarMetrics,
    tracer: Option<SdkTracer>,
    clock: Clock,
    spans: RateLimit,
    logs: RateLimit,
}

/// Lets one event per second pass for each subject.
///
/// Subjects that hash to the same cell share its rate. This bounds the memory for any number of consumers, and at worst too
/// few events pass.
#[derive(Debug)]
struct RateLimit {
    hasher: RandomState,
    /// The time at which an event last passed, in milliseconds since the boot.
    cells: Box<[AtomicU64]>,
}

/// The subject of a rate.
#[derive(Hash)]
enum Subject<'a> {
    Version(KeyId, VersionNumber),
    Unverified(Option<&'a KeyringName>, &'static str),
}

/// The name of the span of a check of Envoy, and the method of the call.
const METHOD: &str = "envoy.service.auth.v3.Authorization/Check";

impl CheckTelemetry {
    /// Reports to `metrics`, and creates spans with `tracer`; without one there are no spans.
    #[must_use]
    pub fn new(metrics: SidecarMetrics, tracer: Option<SdkTracer>, clock: Clock) -> Self {
        Self {
            metrics,
            tracer,
            clock,
            spans: RateLimit::default(),
            logs: RateLimit::default(),
        }
    }

    fn trace(&self, tracer: &SdkTracer, event: &CheckEvent<'_>) {
        if !self.samples(event) {
            return;
        }
        let parent = event.parent.map_or_else(Context::new, |parent| {
            Context::new().with_remote_span_context(parent.recording_context())
        });
        let builder = tracer
            .span_builder(span_name(event.dialect))
            .with_kind(SpanKind::Server)
            .with_start_time(event.started)
            .with_attributes(attributes(event));
        let mut span = tracer.build_with_context(builder, &parent);
        span.end_with_timestamp(event.started + event.duration);
    }

    fn samples(&self, event: &CheckEvent<'_>) -> bool {
        event.parent.is_some_and(|parent| parent.is_sampled())
            || (is_notable(event) && self.spans.passes(&subject(event), self.clock.boot()))
    }

    /// Whether the log level and the rate let a denial pass.
    fn logs_denial(&self, event: &CheckEvent<'_>) -> bool {
        tracing::enabled!(tracing::Level::INFO)
            && self.logs.passes(&subject(event), self.clock.boot())
    }

    fn log(&self, event: &CheckEvent<'_>) {
        match event.decision.outcome() {
            Outcome::Allowed | Outcome::Anonymous | Outcome::Preflight => {
                log_line!(DEBUG, event, "a check was allowed");
            }
            Outcome::WouldDeny(_) if self.logs_denial(event) => {
                log_line!(
                    INFO,
                    event,
                    "a check was allowed in a trial, and would be denied"
                );
            }
            Outcome::Denied(_) if self.logs_denial(event) => {
                log_line!(INFO, event, "a check was denied");
            }
            Outcome::WouldDeny(_) | Outcome::Denied(_) => {}
        }
    }
}

impl Observer for CheckTelemetry {
    fn observe(&self, event: &CheckEvent<'_>) {
        self.metrics.check(event);
        if let Some(tracer) = &self.tracer {
            self.trace(tracer, event);
        }
        self.log(event);
    }
}

impl RateLimit {
    /// The number of cells, 32 KiB. If more consumers have notable events in one second, some share a rate.
    const CELLS: usize = 4096;
    const INTERVAL: Duration = Duration::from_secs(1);

    fn passes(&self, subject: &Subject<'_>, now: BootTime) -> bool {
        let hash = self.hasher.hash_one(subject);
        let cell = &self.cells[usize::try_from(hash).unwrap_or(0) % Self::CELLS];
        let last = cell.load(Ordering::Relaxed);
        let is_due =
            last == 0 || now.saturating_since(BootTime::from_millis(last)) >= Self::INTERVAL;
        is_due
            && cell
                .compare_exchange(
                    last,
                    now.as_millis().max(1),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                )
                .is_ok()
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self {
            hasher: RandomState::new(),
            cells: (0..Self::CELLS).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

/// Whether the check is a denial, or the use of a version that is not active.
fn is_notable(event: &CheckEvent<'_>) -> bool {
    match event.decision.outcome() {
        Outcome::Denied(_) | Outcome::WouldDeny(_) => true,
        Outcome::Anonymous | Outcome::Preflight => false,
        Outcome::Allowed => event
            .decision
            .key()
            .is_some_and(|key| key.state() != KeyState::Active),
    }
}

const fn span_name(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Envoy => METHOD,
        Dialect::Traefik => "check for traefik",
        Dialect::Caddy => "check for caddy",
        Dialect::Nginx => "check for nginx",
    }
}

fn subject<'a>(event: &CheckEvent<'a>) -> Subject<'a> {
    match event.decision.key() {
        Some(key) => Subject::Version(key.key_id(), key.version()),
        None => Subject::Unverified(
            event.decision.keyring().map(|keyring| keyring.name),
            event.decision.outcome().reason(),
        ),
    }
}

fn attributes(event: &CheckEvent<'_>) -> Vec<KeyValue> {
    let outcome = event.decision.outcome();
    let mut attributes = vec![
        KeyValue::new("auth.dialect", event.dialect.as_str()),
        KeyValue::new("auth.decision", outcome.decision()),
    ];
    if event.dialect == Dialect::Envoy {
        attributes.extend([
            KeyValue::new("rpc.system.name", "grpc"),
            KeyValue::new("rpc.method", METHOD),
            // The status of the call, which always succeeds: a denial is an answer.
            KeyValue::new("rpc.response.status_code", "OK"),
        ]);
    }
    if let Some(reason) = outcome.denial() {
        attributes.push(KeyValue::new("auth.deny.reason", reason.as_str()));
        if reason.is_our_fault() {
            attributes.push(KeyValue::new("error.type", reason.as_str()));
        }
    }
    if let Some(keyring) = event.decision.keyring() {
        attributes.push(KeyValue::new("auth.keyring", keyring.name.to_string()));
    }
    if let Some(revision) = revision(event) {
        attributes.push(KeyValue::new("auth.keyring.revision", revision));
    }
    if let Some(age) = age_ms(event) {
        attributes.push(KeyValue::new("auth.keyring.age_ms", age));
    }
    if let Some(key) = event.decision.key() {
        attributes.extend([
            KeyValue::new("auth.consumer.id", key.consumer().to_owned()),
            KeyValue::new("auth.key.id", key.key_id().to_string()),
            KeyValue::new("auth.key.version", i64::from(key.version().get())),
            KeyValue::new("auth.key.state", key.state().as_str()),
        ]);
    }
    if let Some(client) = event.client {
        let address = client.address();
        attributes.extend(address.map(|it| KeyValue::new("client.address", it.to_string())));
        let origin = client.origin().to_string();
        attributes.push(KeyValue::new("auth.client_address_from", origin));
    }
    if let Some((id, phase)) = rotation(event) {
        attributes.extend([
            KeyValue::new("auth.rotation.id", id.to_string()),
            KeyValue::new("auth.rotation.phase", phase),
        ]);
    }
    attributes
}

fn revision(event: &CheckEvent<'_>) -> Option<i64> {
    let revision = event.decision.keyring()?.revision?;
    i64::try_from(revision.get()).ok()
}

fn age_ms(event: &CheckEvent<'_>) -> Option<i64> {
    let age = event.decision.keyring()?.age?;
    i64::try_from(age.as_millis()).ok()
}

/// The rotation of the version and its phase for this version: `stage` for a pending version, `overlap` for an active one
/// whose predecessor is still accepted, `drain` for a retiring one.
fn rotation(event: &CheckEvent<'_>) -> Option<(RotationId, &'static str)> {
    let key = event.decision.key()?;
    let phase = match key.state() {
        KeyState::Pending => "stage",
        KeyState::Active => "overlap",
        KeyState::Retiring => "drain",
        KeyState::Retired | KeyState::Revoked => return None,
    };
    Some((key.rotation()?, phase))
}

#[cfg(test)]
mod tests;
