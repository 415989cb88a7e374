//! What is counted, and how it reads.

use prometheus_client::encoding::text;

use super::*;
use crate::{
    authz::{
        Decision, Dialect,
        decision::Denial,
        testing::{CONFIRMED_AT, Message, decided, keyrings, settings},
    },
    key::{KeyId, Secret, Timestamp, testing},
};

struct Scraped {
    registry: Registry,
    metrics: SidecarMetrics,
    keyrings: Keyrings,
    secret: Secret,
}

impl Scraped {
    fn new() -> Self {
        let secret = testing::secret(KeyId::generate().expect("the random source works"));
        let keyrings = keyrings(vec![testing::record_of(&secret)], true);
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000));
        hands.advance(Duration::from_millis(2_500));
        let mut registry = Registry::default();
        let metrics = SidecarMetrics::register(&mut registry, &keyrings, clock);
        Self {
            registry,
            metrics,
            keyrings,
            secret,
        }
    }

    fn check(&self, decision: &Decision<'_>, traceparent: &str) {
        self.check_of(Dialect::Envoy, decision, traceparent);
    }

    fn check_of(&self, dialect: Dialect, decision: &Decision<'_>, traceparent: &str) {
        let slots = self.keyrings.load();
        let facts = decision.keyring();
        self.metrics.check(&CheckEvent {
            dialect,
            decision,
            slot: facts.and_then(|facts| slots.get(facts.name.as_str()).map(|slot| &**slot)),
            client: None,
            error: None,
            parent: TraceParent::parse(traceparent.as_bytes()),
            started: Timestamp::from_millis(5_000).into(),
            duration: Duration::from_micros(7),
        });
    }

    fn judged(&self, message: &Message) -> Decision<'static> {
        let now = Timestamp::from_millis(5_000);
        let request = message.joined();
        decided(&settings(), &self.keyrings, &request, now, CONFIRMED_AT).0
    }

    fn text(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("a string takes all");
        text
    }

    fn assert_line(&self, line: &str) {
        let text = self.text();
        assert!(
            text.lines().any(|found| found == line),
            "{line} is not in\n{text}"
        );
    }
}

#[test]
fn checks_are_counted_by_keyring_outcome_and_state() {
    let scraped = Scraped::new();
    let good = Message::get("/").header("x-api-key", scraped.secret.expose().to_owned());
    let allowed = scraped.judged(&good);
    scraped.check(&allowed, "");
    scraped.check(&allowed, "");
    scraped.check(
        &scraped.judged(&good.clone().extension("relatch.scopes", "x")),
        "",
    );
    scraped.check(&scraped.judged(&Message::get("/")), "");
    scraped.check(
        &scraped.judged(&good.extension("relatch.keyring", "made-up")),
        "",
    );
    scraped.check(&Denial::unread(DenyReason::MalformedRequest).into(), "");
    for (labels, count) in [
        (
            r#"keyring="payments",decision="allow",reason="ok",key_state="active""#,
            2,
        ),
        (
            r#"keyring="payments",decision="deny",reason="insufficient_scope",key_state="active""#,
            1,
        ),
        (
            r#"keyring="payments",decision="deny",reason="missing_credential",key_state="""#,
            1,
        ),
        (
            r#"keyring="",decision="deny",reason="unknown_keyring",key_state="""#,
            1,
        ),
        (
            r#"keyring="",decision="deny",reason="malformed_request",key_state="""#,
            1,
        ),
    ] {
        scraped.assert_line(&format!("relatch_checks_total{{{labels}}} {count}"));
    }
    assert!(!scraped.text().contains("made-up"));
}

#[test]
fn durations_carry_the_trace_of_a_sampled_check() {
    let scraped = Scraped::new();
    let denied = Denial::unread(DenyReason::MalformedRequest).into();
    scraped.check(
        &denied,
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
    );
    scraped.assert_line(r#"relatch_check_duration_seconds_count{decision="deny"} 1"#);
    assert!(!scraped.text().contains("trace_id"));
    scraped.check(
        &denied,
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    );
    let text = scraped.text();
    let exemplar = text.lines().find(|line| line.contains("trace_id"));
    let exemplar = exemplar.expect("an exemplar");
    assert!(exemplar.contains("0af7651916cd43dd8448eb211c80319c"));
    assert!(exemplar.contains(r#"le="0.00001""#), "{exemplar}");
}

#[test]
fn keyrings_are_read_when_they_are_scraped() {
    let scraped = Scraped::new();
    scraped.assert_line(r#"relatch_keyring_revision{keyring="payments"} 7"#);
    scraped.assert_line(r#"relatch_keyring_age_seconds{keyring="payments"} 2.5"#);
    scraped.assert_line(r#"relatch_keyring_keys{keyring="payments",state="active"} 1"#);
    scraped.assert_line(r#"relatch_keyring_keys{keyring="payments",state="revoked"} 0"#);
    assert!(!scraped.text().contains(r#"keyring="empty""#));
}

#[test]
fn the_other_instruments_have_their_names() {
    let scraped = Scraped::new();
    scraped.metrics.discovery_connected("https://a:1", true);
    scraped.metrics.discovery_reconnected();
    scraped.metrics.spans_dropped().inc_by(3);
    scraped.metrics.clock_skew(-0.25);
    scraped.assert_line(r#"relatch_discovery_connected{endpoint="https://a:1"} 1"#);
    scraped.assert_line("relatch_discovery_reconnects_total 1");
    scraped.assert_line("relatch_spans_dropped_total 3");
    scraped.assert_line("relatch_clock_skew_seconds -0.25");
}

#[test]
fn checks_over_http_are_counted_by_dialect_too() {
    let scraped = Scraped::new();
    let good = Message::get("/").header("x-api-key", scraped.secret.expose().to_owned());
    let (allowed, denied) = (scraped.judged(&good), scraped.judged(&Message::get("/")));
    scraped.check(&allowed, "");
    for (dialect, decision) in [
        (Dialect::Traefik, &allowed),
        (Dialect::Traefik, &allowed),
        (Dialect::Nginx, &denied),
    ] {
        scraped.check_of(dialect, decision, "");
    }
    for (labels, count) in [
        (r#"dialect="traefik",decision="allow""#, 2),
        (r#"dialect="nginx",decision="deny""#, 1),
    ] {
        scraped.assert_line(&format!(
            "relatch_http_authz_checks_total{{{labels}}} {count}"
        ));
    }
    let text = scraped.text();
    let lines = text.lines();
    let series = lines.filter(|line| line.starts_with("relatch_http_authz_checks_total"));
    assert_eq!(series.count(), 2, "{text}");
    let all = r#"keyring="payments",decision="allow",reason="ok",key_state="active""#;
    scraped.assert_line(&format!("relatch_checks_total{{{all}}} 3"));
}
