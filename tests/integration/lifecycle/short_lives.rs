//! Certificates that live for seconds, renewed while everything runs: a stream ends with the certificate that it began
//! with, which is planned and no failure.

use std::path::Path;

use serde_json::Value;
use time::Duration;
use tokio::time::{Instant, interval};

use crate::support::{
    authority::Authority,
    relatch::{Control, Sidecar, text},
};

/// Whole seconds, as the end of a certificate has them.
const LIFE: Duration = Duration::seconds(7);
/// Files are read every two seconds, so that no certificate is shown that has less than half of its life before it.
const RENEWED_EVERY: std::time::Duration = std::time::Duration::from_secs(1);
const EDGE: &str = "spiffe://mesh.example/relatch/edge-1";
/// Planned ends that the test waits for: the backoff of as many failures would be seconds.
const ENDS: usize = 4;

fn renew(mesh: &Authority, dir: &Path) {
    mesh.issue(dir, "edge-1", EDGE, LIFE);
}

#[tokio::test]
async fn a_stream_that_ends_with_its_certificate_is_back_at_once_and_without_a_warning() {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let at = text(dir.path());
    let mesh = Authority::new("mesh root");
    mesh.write(&dir.path().join("mesh.pem"));
    mesh.issue(
        dir.path(),
        "control",
        "spiffe://mesh.example/control",
        Duration::HOUR,
    );
    renew(&mesh, dir.path());
    let yaml = format!(
        "discovery:\n  tls: {{ cert: {at}/control.pem, key: {at}/control.key, client_ca: {at}/mesh.pem }}\n  \
         allow: [{{ identity: \"{EDGE}\", keyrings: [\"*\"] }}]\nheartbeat: 1s\n"
    );
    let control = Control::start_with(dir.path(), &yaml).await;
    control.cli_json(&["keyring", "create", "payments"]).await;
    let yaml = format!(
        "node: {{ id: edge-1 }}\nlisten: 127.0.0.1:0\nhttp: 127.0.0.1:0\n\
         control:\n  endpoints: [\"https://localhost:{port}\"]\n  \
         tls: {{ ca: {at}/mesh.pem, cert: {at}/edge-1.pem, key: {at}/edge-1.key }}\n\
         keyrings: [{{ name: payments }}]\n",
        port = control.discovery().port(),
    );
    let sidecar = Sidecar::start(&yaml).await;

    let mut renewal = interval(RENEWED_EVERY);
    let deadline = Instant::now() + std::time::Duration::from_mins(2);
    while opened(&sidecar) <= ENDS {
        renewal.tick().await;
        renew(&mesh, dir.path());
        assert!(Instant::now() < deadline, "{:?}", sidecar.process.lines());
    }

    let lines = sidecar.process.lines();
    let ends: Vec<&String> = lines
        .iter()
        .filter(|line| line.contains("retry_in_ms="))
        .collect();
    assert!(ends.len() >= ENDS, "{lines:?}");
    for end in ends {
        assert!(end.contains(" INFO "), "{end}");
        let reason = "the certificate that the stream began with has expired";
        assert!(end.contains(reason), "{end}");
        let (_, wait) = end.split_once("retry_in_ms=").expect("it was found");
        let wait = wait.split(' ').next().and_then(|wait| wait.parse().ok());
        assert!(wait.is_some_and(|wait: u64| wait <= 1_000), "{end}");
    }
    let status: Value = sidecar.get("/status").await.json();
    assert_eq!(status["control"][0]["problem"], Value::Null, "{status}");
    let metrics = sidecar.get("/metrics").await;
    let none = "relatch_discovery_reconnects_total 0";
    assert!(metrics.text().contains(none), "{}", metrics.text());
}

/// How many streams a sidecar has opened.
fn opened(sidecar: &Sidecar) -> usize {
    let lines = sidecar.process.lines();
    let is_open = |line: &&String| line.contains("stream to the control plane is open");
    lines.iter().filter(is_open).count()
}
