//! Which checks leave a span or a line, and what these hold.

use std::{
    io,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use opentelemetry::{Value, trace::TracerProvider as _};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use prometheus_client::registry::Registry;
use tracing::level_filters::LevelFilter;

use super::*;
use crate::{
    authz::{
        Decision, DenyReason, Dialect,
        client_address::ClientAddress,
        decision::Denial,
        testing::{CONFIRMED_AT, Message, decided, keyrings, settings},
    },
    clock::ManualClock,
    config::{LogFormat, LogSettings},
    key::{KeyRecord, RotationId, Secret, Timestamp, testing},
    keyring::Keyrings,
    telemetry::logs,
    trace::TraceParent,
};

const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
const NOW: Timestamp = Timestamp::from_millis(5_000);

/// Between two milliseconds.
fn started() -> SystemTime {
    SystemTime::from(NOW) + Duration::from_micros(321)
}

/// Keeps the spans that it is given.
#[derive(Clone, Debug, Default)]
struct Exporter(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().expect("no test panics here").extend(batch);
        Ok(())
    }
}

/// Keeps the lines that it is given.
#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no test panics here").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Observed {
    telemetry: CheckTelemetry,
    exporter: Exporter,
    hands: ManualClock,
    keyrings: Keyrings,
    secret: Secret,
    _provider: SdkTracerProvider,
}

impl Observed {
    fn new(change: impl FnOnce(&mut KeyRecord)) -> Self {
        let secret = testing::secret("7Qm2Xc91TbKe".parse().expect("an id"));
        let mut record = testing::record_of(&secret);
        change(&mut record);
        let keyrings = keyrings(vec![record], true);
        let (clock, hands) = Clock::manual(NOW);
        let exporter = Exporter::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build();
        let mut registry = Registry::default();
        let metrics = SidecarMetrics::register(&mut registry, &keyrings, clock.clone());
        let tracer = Some(provider.tracer("relatch"));
        Self {
            telemetry: CheckTelemetry::new(metrics, tracer, clock),
            exporter,
            hands,
            keyrings,
            secret,
            _provider: provider,
        }
    }

    fn active() -> Self {
        Self::new(|_| {})
    }

    fn used(&self) -> Decision<'static> {
        let key = self.secret.expose().to_owned();
        let request = Message::get("/?secret=query").header("x-api-key", key);
        decided(
            &settings(),
            &self.keyrings,
            &request.raw(),
            NOW,
            CONFIRMED_AT,
        )
        .0
    }

    fn observe(&self, decision: &Decision<'_>, traceparent: &str) {
        self.telemetry.observe(&CheckEvent {
            dialect: Dialect::Envoy,
            decision,
            slot: None,
            client: Some(ClientAddress::of_peer([192, 0, 2, 1].into())),
            error: None,
            parent: TraceParent::parse(traceparent.as_bytes()),
            started: started(),
            duration: Duration::from_micros(7),
        });
    }

    fn spans(&self) -> Vec<SpanData> {
        self.exporter.0.lock().expect("no test panics here").clone()
    }

    fn count(&self) -> usize {
        self.spans().len()
    }
}

fn attribute<'a>(span: &'a SpanData, name: &str) -> Option<&'a Value> {
    let mut attributes = span.attributes.iter();
    let found = attributes.find(|attribute| attribute.key.as_str() == name);
    found.map(|attribute| &attribute.value)
}

#[test]
fn the_parent_decides_over_an_active_version() {
    let observed = Observed::active();
    let allowed = observed.used();
    observed.observe(&allowed, "");
    observed.observe(&allowed, UNSAMPLED);
    assert_eq!(observed.count(), 0);
    observed.observe(&allowed, SAMPLED);
    observed.observe(&allowed, SAMPLED);
    assert_eq!(observed.count(), 2);
}

#[test]
fn versions_that_are_not_active_are_sampled_once_a_second() {
    let observed = Observed::new(|record| record.state = KeyState::Retiring);
    let allowed = observed.used();
    for _ in 0..3 {
        observed.observe(&allowed, UNSAMPLED);
    }
    assert_eq!(observed.count(), 1);
    observed.hands.advance(Duration::from_millis(999));
    observed.observe(&allowed, "");
    assert_eq!(observed.count(), 1);
    observed.hands.advance(Duration::from_millis(1));
    observed.observe(&allowed, "");
    assert_eq!(observed.count(), 2);
}

#[test]
fn denials_are_sampled_once_a_second() {
    let observed = Observed::active();
    let unknown = Denial::of(DenyReason::UnknownKey, None).into();
    for _ in 0..3 {
        observed.observe(&unknown, "");
    }
    assert_eq!(observed.count(), 1);
}

#[test]
fn every_version_has_a_rate_of_its_own() {
    let rate = RateLimit::default();
    let key: KeyId = "7Qm2Xc91TbKe".parse().expect("an id");
    let passed = |now| {
        (1..=100)
            .filter_map(VersionNumber::new)
            .filter(|version| rate.passes(&Subject::Version(key, *version), now))
            .count()
    };
    // Of a hundred in 4096 cells, one or two share theirs.
    assert!(passed(BootTime::from_millis(0)) > 85);
    assert_eq!(passed(BootTime::from_millis(999)), 0);
    assert!(passed(BootTime::from_millis(1_001)) > 85);
}

#[test]
fn a_span_has_the_documented_shape() {
    let rotation: RotationId = "Rm2Xc91TbKe7".parse().expect("an id");
    let observed = Observed::new(|record| {
        record.state = KeyState::Retiring;
        record.rotation = Some(rotation);
    });
    observed.observe(&observed.used(), SAMPLED);
    let spans = observed.spans();
    let span = &spans[0];
    assert_eq!(span.name, METHOD);
    assert_eq!(span.span_kind, SpanKind::Server);
    assert_eq!(span.status, opentelemetry::trace::Status::Unset);
    assert_eq!(span.parent_span_id.to_string(), "b7ad6b7169203331");
    assert_eq!(
        span.span_context.trace_id().to_string(),
        "0af7651916cd43dd8448eb211c80319c"
    );
    assert_eq!(span.start_time, started());
    let lasted = span.end_time.duration_since(span.start_time);
    assert_eq!(lasted.ok(), Some(Duration::from_micros(7)));
    for (name, value) in [
        ("rpc.system.name", Value::from("grpc")),
        ("rpc.method", METHOD.into()),
        ("rpc.response.status_code", "OK".into()),
        ("auth.dialect", "envoy".into()),
        ("auth.decision", "allow".into()),
        ("auth.keyring", "payments".into()),
        ("auth.keyring.revision", 7.into()),
        ("auth.keyring.age_ms", 0.into()),
        ("auth.consumer.id", "checkout".into()),
        ("auth.key.id", "7Qm2Xc91TbKe".into()),
        ("auth.key.version", 1.into()),
        ("auth.key.state", "retiring".into()),
        ("client.address", "192.0.2.1".into()),
        ("auth.client_address_from", "source.address".into()),
        ("auth.rotation.id", "Rm2Xc91TbKe7".into()),
        ("auth.rotation.phase", "drain".into()),
    ] {
        assert_eq!(attribute(span, name), Some(&value), "{name}");
    }
    assert_eq!(attribute(span, "auth.deny.reason"), None);
    assert_eq!(attribute(span, "error.type"), None);
}

#[test]
fn the_phase_of_a_rotation_is_what_the_version_does_in_it() {
    let rotation: RotationId = "Rm2Xc91TbKe7".parse().expect("an id");
    for (state, phase) in [
        (KeyState::Pending, Some("stage")),
        (KeyState::Active, Some("overlap")),
        (KeyState::Retiring, Some("drain")),
        (KeyState::Retired, None),
        (KeyState::Revoked, None),
    ] {
        for runs in [true, false] {
            let observed = Observed::new(|record| {
                record.state = state;
                record.rotation = runs.then_some(rotation);
            });
            observed.observe(&observed.used(), SAMPLED);
            let spans = observed.spans();
            let expected = phase.filter(|_| runs).map(Value::from);
            assert_eq!(
                attribute(&spans[0], "auth.rotation.phase"),
                expected.as_ref(),
                "{state:?}"
            );
            let id = attribute(&spans[0], "auth.rotation.id");
            assert_eq!(id.is_some(), expected.is_some(), "{state:?}");
        }
    }
}

#[test]
fn a_denial_is_no_error_unless_the_fault_is_ours() {
    let observed = Observed::active();
    observed.observe(
        &Denial::unread(DenyReason::MalformedRequest).into(),
        SAMPLED,
    );
    observed.observe(&Denial::internal().into(), SAMPLED);
    let spans = observed.spans();
    let reasons: Vec<_> = spans
        .iter()
        .map(|span| attribute(span, "auth.deny.reason"))
        .collect();
    let (malformed, internal) = (
        Value::from("malformed_request"),
        Value::from("internal_error"),
    );
    assert_eq!(reasons, [Some(&malformed), Some(&internal)]);
    assert_eq!(attribute(&spans[0], "error.type"), None);
    assert_eq!(attribute(&spans[1], "error.type"), Some(&internal));
    assert!(
        spans
            .iter()
            .all(|span| attribute(span, "auth.key.id").is_none())
    );
}

#[test]
fn denials_are_logged_within_a_rate_and_without_secrets() {
    let observed = Observed::new(|record| record.state = KeyState::Revoked);
    let lines = Lines::default();
    let writer = lines.clone();
    let settings = LogSettings {
        format: LogFormat::Json,
        level: LevelFilter::INFO,
    };
    let (subscriber, _level) = logs::subscriber(settings, move || writer.clone(), false);
    tracing::subscriber::with_default(subscriber, || {
        for _ in 0..3 {
            observed.observe(&observed.used(), SAMPLED);
        }
    });
    let text = lines.0.lock().expect("no test panics here").clone();
    let text = String::from_utf8(text).expect("text");
    assert_eq!(text.lines().count(), 1, "{text}");
    let line: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for (name, value) in [
        ("auth.decision", "deny"),
        ("auth.deny.reason", "revoked"),
        ("auth.keyring", "payments"),
        ("auth.consumer.id", "checkout"),
        ("auth.key.id", "7Qm2Xc91TbKe"),
        ("auth.key.state", "revoked"),
        ("trace_id", "0af7651916cd43dd8448eb211c80319c"),
    ] {
        assert_eq!(line[name], value, "{name}");
    }
    assert_eq!(line["level"], "INFO");
    assert!(!text.contains(observed.secret.expose()));
    assert!(!text.contains("query"));
}

#[test]
fn allows_are_logged_at_debug_only() {
    let observed = Observed::active();
    let count = |level| {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            observed.observe(&observed.used(), "");
        });
        let bytes = lines.0.lock().expect("no test panics here");
        String::from_utf8_lossy(&bytes).lines().count()
    };
    assert_eq!(count(tracing::Level::INFO), 0);
    assert_eq!(count(tracing::Level::DEBUG), 1);
}

#[test]
fn addresses_are_logged_at_debug_only() {
    let logged = |level, decision: &dyn Fn(&Observed) -> Decision<'static>| {
        let observed = Observed::active();
        let lines = Lines::default();
        let writer = lines.clone();
        let settings = LogSettings {
            format: LogFormat::Json,
            level,
        };
        let (subscriber, _level) = logs::subscriber(settings, move || writer.clone(), false);
        tracing::subscriber::with_default(subscriber, || {
            observed.observe(&decision(&observed), "");
        });
        let bytes = lines.0.lock().expect("no test panics here").clone();
        let line: serde_json::Value = serde_json::from_slice(&bytes).expect("a line of JSON");
        (
            line["client.address"].clone(),
            line["auth.client_address_from"].clone(),
        )
    };
    let denied = |_: &Observed| Decision::from(Denial::of(DenyReason::SourceNotAllowed, None));
    let shown = ("192.0.2.1".into(), "source.address".into());
    assert_eq!(logged(LevelFilter::DEBUG, &Observed::used), shown);
    assert_eq!(logged(LevelFilter::DEBUG, &denied), shown);
    let hidden = (serde_json::Value::Null, serde_json::Value::Null);
    assert_eq!(logged(LevelFilter::INFO, &denied), hidden);
}
