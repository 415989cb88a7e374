//! What a sidecar's process tells of the use of its keys: every check, over lost streams and to its very end.

use relatch::{key::KeyState, proto::discovery, proto::discovery::sidecar_message::Kind};
use rustix::process::Signal;
use serde_json::Value;

use super::deployment::{Control, KEYRING, Sidecar, Verdict};
use crate::support::{relatch::sidecar_yaml, scripted_control::ScriptedControl};

#[tokio::test]
async fn checks_are_counted_exactly_over_a_lost_stream_and_a_change_of_the_key() {
    let mut control = ScriptedControl::start().await;
    let yaml = sidecar_yaml("edge-1", control.address(), &[KEYRING]);
    let sidecar = Sidecar::with_config(&yaml).await;
    let mut stream = control.stream(1, KeyState::Active).await;
    drop(stream.report().await);
    checked(&sidecar, control.key(), 5, &Verdict::allowed(1)).await;
    let lost = stream.report().await;
    assert_eq!(counts(&lost), [(5, 0)]);
    assert_eq!(status(&sidecar).await["unacked_versions"], 1);
    drop(stream);

    let mut stream = control.stream(2, KeyState::Retiring).await;
    drop(stream.report().await);
    checked(&sidecar, control.key(), 3, &Verdict::allowed(1)).await;
    let told = stream.report().await;
    assert_eq!(counts(&told), [(8, 0)]);
    let callers = &told.keyrings[0].versions[0].callers;
    assert_eq!((callers.len(), callers[0].requests), (1, 3));
    assert_eq!(callers[0].route, "api.example");
    stream.ack(&told);
    drop(stream);

    let mut stream = control.stream(3, KeyState::Retired).await;
    drop(stream.report().await);
    checked(&sidecar, control.key(), 2, &Verdict::denied("retired", 1)).await;
    let told = stream.report().await;
    assert_eq!(counts(&told), [(10, 2)]);
    stream.ack(&told);
    assert!(counts(&stream.report().await).is_empty());
    let status = status(&sidecar).await;
    assert_eq!(status["acked_sequence"], told.sequence);
    assert_eq!(
        (&status["unacked_versions"], &status["unreported_versions"]),
        (&0.into(), &0.into())
    );
}

#[tokio::test]
async fn the_last_checks_are_reported_before_the_goodbye() {
    let mut control = ScriptedControl::start().await;
    let yaml = sidecar_yaml("edge-1", control.address(), &[KEYRING]);
    let mut sidecar = Sidecar::with_config(&yaml).await;
    let mut stream = control.stream(1, KeyState::Active).await;
    drop(stream.report().await);
    checked(&sidecar, control.key(), 7, &Verdict::allowed(1)).await;

    sidecar.daemon.process.signal(Signal::TERM);

    let last = stream.usage().await;
    assert_eq!(counts(&last), [(7, 0)]);
    assert!(last.is_final);
    stream.ack(&last);
    let goodbye = stream.next().await;
    assert!(matches!(goodbye, Some(Kind::Goodbye(_))), "{goodbye:?}");
    drop(stream);
    assert_eq!(sidecar.daemon.process.exit().await.code(), Some(0));
}

#[tokio::test]
async fn what_a_sidecar_has_counted_to_its_end_is_in_the_store() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let mut sidecar = Sidecar::start(&control, "edge-1").await;
    checked(&sidecar, &key.secret, 9, &Verdict::allowed(1)).await;

    assert!(sidecar.daemon.stop().await.success());

    let shown = control.show_key(&key.id).await;
    assert_eq!(shown["versions"][0]["requests"], 9);
    assert_eq!(sidecar.logged("did not confirm the last usage report"), 0);
}

async fn checked(sidecar: &Sidecar, key: &str, times: usize, expected: &Verdict) {
    for _ in 0..times {
        assert_eq!(&sidecar.check(key).await, expected);
    }
}

async fn status(sidecar: &Sidecar) -> Value {
    let status: Value = sidecar.daemon.get("/status").await.json();
    status["usage"].clone()
}

/// Requests and denials of each version that was told of.
fn counts(usage: &discovery::Usage) -> Vec<(u64, u64)> {
    let versions = usage.keyrings.iter().flat_map(|keyring| &keyring.versions);
    versions
        .map(|version| (version.requests, version.denied))
        .collect()
}
