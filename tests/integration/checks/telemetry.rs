//! What a check leaves behind: metrics, spans and log lines, none of which holds a credential.

use serde_json::Value;

use super::{Mesh, reason_of};
use crate::support::{
    client::Request,
    otlp::{OtlpReceiver, ReceivedSpan},
};

const CHECK: &str = "envoy.service.auth.v3.Authorization/Check";

#[tokio::test]
async fn known_traffic_is_counted_by_outcome() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let gate = mesh.newest().await;
    for _ in 0..3 {
        gate.send(key.get("/")).await.seen();
    }
    gate.send(Request::get("/optional")).await.seen();
    for (request, reason) in [
        (Request::get("/"), "missing_credential"),
        (Request::get("/"), "missing_credential"),
        (key.get("/orders"), "insufficient_scope"),
        (key.get("/partners"), "unknown_key"),
        (key.get("/elsewhere"), "unknown_keyring"),
    ] {
        assert_eq!(reason_of(&gate.send(request).await), reason);
    }
    let metrics = mesh.sidecar.get("/metrics").await;
    let kind = metrics.header("content-type").unwrap_or_default();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    let page = metrics.text();
    let mut checks: Vec<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("relatch_checks_total"))
        .collect();
    checks.sort_unstable();
    assert_eq!(
        checks,
        [
            r#"{keyring="",decision="deny",reason="unknown_keyring",key_state=""} 1"#,
            r#"{keyring="partners",decision="deny",reason="unknown_key",key_state=""} 1"#,
            r#"{keyring="payments",decision="allow",reason="anonymous",key_state=""} 1"#,
            r#"{keyring="payments",decision="allow",reason="ok",key_state="active"} 3"#,
            r#"{keyring="payments",decision="deny",reason="insufficient_scope",key_state="active"} 1"#,
            r#"{keyring="payments",decision="deny",reason="missing_credential",key_state=""} 2"#,
        ]
    );
    for line in [
        r#"relatch_check_duration_seconds_count{decision="allow"} 4"#,
        r#"relatch_check_duration_seconds_count{decision="deny"} 5"#,
        r#"relatch_keyring_keys{keyring="payments",state="active"} 1"#,
    ] {
        assert!(
            page.lines().any(|other| other == line),
            "no {line} in {page}"
        );
    }
    assert!(
        !page.contains(key.random_part()) && !page.contains(&key.id),
        "{page}"
    );
}

#[tokio::test]
async fn a_check_is_a_span_below_envoys_and_a_retiring_key_is_seen_unsampled() {
    let collector = OtlpReceiver::start().await;
    let telemetry = format!(
        "telemetry: {{ otlp_endpoint: \"http://{}\" }}\n",
        collector.addr()
    );
    let mut mesh = Mesh::start_with(&telemetry).await;
    let key = mesh.key(&[]).await;
    let old = mesh.key(&[]).await;
    mesh.issue(&["rotate", "start", &old.id, "--overlap", "1h"])
        .await;
    mesh.through_each_version(
        |options| options.tracing(collector.addr()),
        async |gate| {
            // Each Envoy with traces of its own.
            let version = gate.kind.version.to_string().replace('.', "0");
            let trace = |n: u8| format!("{n:02x}{version:0>30}");
            let parent = |n: u8, flags: u8| format!("00-{}-b7ad6b7169203331-{flags:02x}", trace(n));

            let request = key.get("/?a=geheim").header("traceparent", parent(1, 1));
            gate.send(request.header("cookie", "session=geheim"))
                .await
                .seen();
            let [ours, envoys] = pair(&collector, &trace(1)).await;
            assert_eq!(ours.service, "relatch-sidecar");
            assert_eq!(ours.span.parent_span_id, envoys.span.span_id);
            assert_eq!(ours.span.trace_id, envoys.span.trace_id);
            assert_eq!(ours.span.kind, 2, "a server's");
            assert_eq!(ours.text("auth.decision"), Some("allow"));
            assert_eq!(ours.text("auth.dialect"), Some("envoy"));
            assert_eq!(ours.text("client.address"), Some("127.0.0.1"));
            let origin = ours.text("auth.client_address_from");
            assert_eq!(origin, Some("source.address"));
            assert_eq!(ours.text("auth.deny.reason"), None);
            assert_eq!(ours.text("auth.keyring"), Some("payments"));
            assert_eq!(ours.text("auth.consumer.id"), Some("checkout"));
            assert_eq!(ours.text("auth.key.id"), Some(key.id.as_str()));
            assert_eq!(ours.int("auth.key.version"), Some(1));
            assert_eq!(ours.text("auth.key.state"), Some("active"));
            assert!(ours.int("auth.keyring.revision").is_some());

            // An ordinary use is as its parent says; what a rotation must see is not.
            gate.send(key.get("/").header("traceparent", parent(2, 0)))
                .await
                .seen();
            let response = gate
                .send(old.get("/").header("traceparent", parent(3, 0)))
                .await;
            let notice = response.header("api-key-rotation").unwrap_or_default();
            assert!(
                notice.starts_with("version=1, state=retiring, sunset=@"),
                "{notice}"
            );
            response.seen();
            let retiring = span(&collector, &trace(3)).await;
            assert_eq!(retiring.text("auth.key.id"), Some(old.id.as_str()));
            assert_eq!(retiring.int("auth.key.version"), Some(1));
            assert_eq!(retiring.text("auth.key.state"), Some("retiring"));
            assert_eq!(retiring.text("auth.rotation.phase"), Some("drain"));

            let denied = key.get("/orders").header("traceparent", parent(4, 0));
            let response = gate.send(denied).await;
            let problem: Value = response.json();
            assert_eq!(problem["trace_id"], trace(4));
            let denied = span(&collector, &trace(4)).await;
            assert_eq!(denied.text("auth.decision"), Some("deny"));
            assert_eq!(denied.text("auth.deny.reason"), Some("insufficient_scope"));
            assert_eq!(denied.int("auth.key.version"), Some(1));
            assert_eq!(
                denied.span.status.clone().unwrap_or_default().code,
                0,
                "unset"
            );
        },
    )
    .await;
    // At its end it has sent everything.
    assert!(mesh.sidecar.stop().await.success());
    let spans = collector.spans();
    let ours = spans
        .iter()
        .filter(|span| span.service == "relatch-sidecar");
    for span in ours {
        // The unsampled ordinary use has none.
        assert!(!trace_of(span).starts_with("02"), "{span:?}");
        let text = format!("{span:?}");
        for secret in [key.random_part(), old.random_part(), "geheim"] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

#[tokio::test]
async fn logs_tell_of_checks_and_hold_no_credential() {
    let mut mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        gate.send(key.get("/?a=geheim").header("cookie", "session=geheim"))
            .await
            .seen();
        gate.send(Request::get(&format!("/geheim?api_key={}", key.secret)))
            .await
            .seen();
        gate.send(Request::get("/").header("authorization", format!("Bearer {}", key.secret)))
            .await
            .seen();
        gate.send(Request::get("/").header("cookie", format!("api_key={}", key.secret)))
            .await
            .seen();
        for denied in [
            key.get("/orders"),
            key.get("/partners"),
            key.get("/odd"),
            key.get("/").header("x-api-key", &key.secret),
            Request::get("/").header("x-api-key", format!("{}x", key.secret)),
            Request::get("/").header("x-api-key", format!("{} x", key.secret)),
        ] {
            assert_ne!(gate.send(denied).await.status, 200);
        }
    })
    .await;
    // At its end it has written everything.
    assert!(mesh.sidecar.stop().await.success());
    let lines = mesh.sidecar.process.lines();
    let logged: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}")))
        .collect();
    let allowed = logged.iter().find(|line| line["auth.decision"] == "allow");
    let allowed = allowed.expect("an allow is logged at debug");
    assert_eq!(allowed["level"], "DEBUG");
    assert_eq!(allowed["auth.consumer.id"], "checkout");
    assert_eq!(allowed["auth.key.version"], 1);
    let denied = logged
        .iter()
        .find(|line| line["auth.deny.reason"] == "insufficient_scope");
    let denied = denied.expect("a denial is logged");
    assert_eq!(denied["level"], "INFO");
    assert_eq!(denied["auth.key.id"], key.id);
    for line in &lines {
        assert!(
            !line.contains(key.random_part()) && !line.contains("geheim"),
            "{line}"
        );
    }
}

/// Our span of a trace, and the span of Envoy's that is its parent.
async fn pair(collector: &OtlpReceiver, trace: &str) -> [ReceivedSpan; 2] {
    let ours = span(collector, trace).await;
    let parent = &ours.span.parent_span_id;
    let envoys = collector
        .span(|span| span.service == "envoy" && span.span.span_id == *parent)
        .await;
    [ours, envoys]
}

/// Our span of a trace.
async fn span(collector: &OtlpReceiver, trace: &str) -> ReceivedSpan {
    let ours = |span: &ReceivedSpan| span.span.name == CHECK && trace_of(span) == trace;
    collector.span(ours).await
}

fn trace_of(span: &ReceivedSpan) -> String {
    let hex = |text: String, byte| text + &format!("{byte:02x}");
    span.span.trace_id.iter().fold(String::new(), hex)
}
