//! Usage as sidecars report it, over streams that lose and repeat, to control planes that die.

use std::time::Duration;

use relatch::{clock::Clock, key::Timestamp};
use rustix::process::Signal;
use serde_json::Value;

use super::deployment::{Control, IssuedKey, KEYRING};
use crate::support::{
    eventually::eventually,
    scripted_sidecar::{ScriptedRun, ScriptedSidecar, Until},
};

const NODE: &str = "edge-1";

async fn connect(control: &Control, run: &mut ScriptedRun) -> ScriptedSidecar {
    ScriptedSidecar::connect(control.plane.discovery(), run, KEYRING).await
}

/// What `key show` tells of version 1.
async fn version(control: &Control, key: &IssuedKey) -> Value {
    control.show_key(&key.id).await["versions"][0].clone()
}

async fn requests(control: &Control, key: &IssuedKey) -> Option<u64> {
    version(control, key).await["requests"].as_u64()
}

/// A moment that is over by any clock of this test.
fn now() -> Timestamp {
    Clock::system().wall()
}

#[tokio::test]
async fn counts_end_exact_whatever_streams_and_control_planes_do() {
    let mut control = Control::start().await;
    let key = control.create_key().await;
    assert_eq!(requests(&control, &key).await, Some(0), "nobody can use it");

    let mut run = ScriptedRun::new(NODE, "a");
    let mut sidecar = connect(&control, &mut run).await;
    assert_eq!(requests(&control, &key).await, None, "nothing was told yet");
    // The second message is lost at first, then late; the third comes twice.
    sidecar.report(1, &key.id, 5, Until::Open).await;
    sidecar.report(3, &key.id, 9, Until::Open).await;
    sidecar.report(2, &key.id, 7, Until::Open).await;
    sidecar.report(3, &key.id, 9, Until::Open).await;
    let (beat, _) = sidecar.beat().await;
    sidecar.report(4, &key.id, 10, Until::Beat(beat)).await;
    let (beat, before) = sidecar.beat().await;
    sidecar.report(5, &key.id, 12, Until::Beat(beat)).await;
    sidecar.until_acked(5).await;
    let shown = version(&control, &key).await;
    assert_eq!(shown["requests"], 12);
    // Its clock is decades behind, and it was used all the same.
    let used_at = shown["last_used_at"].as_str().map(str::parse);
    let used_at: Timestamp = used_at.expect("it is used").expect("RFC 3339");
    assert!(before <= used_at && used_at <= now(), "{used_at}");

    // An orderly stop, which the sidecar survives.
    control.plane.process.signal(Signal::TERM);
    control.plane.restart().await;
    drop(sidecar);
    assert_eq!(requests(&control, &key).await, Some(12));
    let mut sidecar = connect(&control, &mut run).await;
    sidecar.report(5, &key.id, 12, Until::Open).await;
    sidecar.report(6, &key.id, 15, Until::Open).await;
    sidecar.until_acked(6).await;
    assert_eq!(requests(&control, &key).await, Some(15));

    // A sudden end between a report and its ack: it is counted or it is not, and never half.
    sidecar.report(7, &key.id, 20, Until::Open).await;
    control.plane.kill().await;
    drop(sidecar);
    control.plane.restart().await;
    let after = requests(&control, &key).await;
    assert!(matches!(after, Some(15 | 20)), "{after:?}");
    let mut sidecar = connect(&control, &mut run).await;
    sidecar.report(8, &key.id, 21, Until::Open).await;
    sidecar.until_acked(8).await;
    assert_eq!(requests(&control, &key).await, Some(21));

    // After its Goodbye it counts once, in this life and in the next.
    sidecar.report(9, &key.id, 22, Until::End).await;
    sidecar.goodbye().await;
    eventually("the sidecar is gone", async || {
        control.fleet().await.is_empty().then_some(())
    })
    .await;
    assert_eq!(control.json(&["fleet"]).await, Value::Array(Vec::new()));
    let mut sidecar = connect(&control, &mut ScriptedRun::new(NODE, "b")).await;
    sidecar.report(1, &key.id, 4, Until::Open).await;
    sidecar.until_acked(1).await;
    assert_eq!(requests(&control, &key).await, Some(26));
    control.plane.kill().await;
    control.plane.restart().await;
    assert_eq!(requests(&control, &key).await, Some(26));
}

#[tokio::test]
async fn a_sidecar_that_went_without_its_last_report_is_a_gap_for_every_later_control_plane() {
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let mut sidecar = connect(&control, &mut ScriptedRun::new(NODE, "a")).await;
    let before = now();
    let (beat, sent_at) = sidecar.beat().await;
    sidecar.report(1, &key.id, 1, Until::Beat(beat)).await;
    sidecar.until_acked(1).await;
    drop(sidecar);
    eventually("the broken stream is noticed", async || {
        let fleet = control.json(&["fleet"]).await;
        (fleet[0]["connected"] == false).then_some(())
    })
    .await;
    let successor = connect(&control, &mut ScriptedRun::new(NODE, "b")).await;
    for restarted in [false, true] {
        if restarted {
            control.plane.kill().await;
            control.plane.restart().await;
        }
        let fleet = control.json(&["fleet"]).await;
        let lines = fleet.as_array().expect("a list");
        let gap = lines.iter().find(|line| line["run_id"] == "a");
        let gap = gap.unwrap_or_else(|| panic!("no gap: {fleet}"));
        assert_eq!(gap["node"], NODE);
        assert_eq!(gap["keyrings"][0]["keyring"], KEYRING);
        let complete = gap["complete_until"].as_str().map(str::parse);
        let complete: Timestamp = complete.expect("it has reported").expect("RFC 3339");
        let answered = complete.saturating_add(Duration::from_secs(1));
        assert!(before <= answered && answered <= sent_at, "{answered}");
        assert!(gap["gap_until"].is_string(), "{gap}");
        assert_eq!(control.fleet().await, [NODE]);
    }
    drop(successor);
}
