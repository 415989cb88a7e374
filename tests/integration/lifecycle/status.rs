//! What operators are told of a rotation that is under way: how far it is, who uses the old version, and its end.

use envoy_types::pb::envoy::{
    config::core::v3::{Address, SocketAddress, address},
    service::auth::v3::{CheckRequest, attribute_context::Peer},
};
use serde_json::{Value, json};

use super::deployment::{Control, IssuedKey, Sidecar, Verdict, check_request};
use crate::support::{
    eventually::eventually,
    process::{Process, relatch},
    relatch::text,
};

/// Who cannot be reached for the switch.
const STRAGGLER: (&str, &str) = ("10.1.2.3", "batch/2.1");

#[tokio::test]
async fn who_still_uses_the_old_version_is_named_and_keeps_it_from_retiring() {
    let control = Control::start().await;
    let old = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let new = IssuedKey::from_json(&control.json(&["rotate", "start", &old.id]).await);
    for _ in 0..3 {
        let verdict = sidecar.judge(straggler(&old.secret)).await;
        assert_eq!(verdict, Verdict::allowed(1));
    }
    assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));

    let usage = eventually("the sidecar has told of all requests", async || {
        let usage = control.json(&["usage", &old.id]).await;
        let requests = |at: usize| usage["versions"][at]["requests"].as_u64();
        (requests(0) == Some(3) && requests(1) == Some(1)).then_some(usage)
    })
    .await;

    let [first, second] = [0, 1].map(|at| &usage["versions"][at]);
    assert_eq!(
        (&first["state"], &first["denied"]),
        (&"retiring".into(), &0.into())
    );
    let (source, user_agent) = STRAGGLER;
    let caller = &first["callers"][0];
    assert_eq!(
        (
            &caller["source"],
            &caller["user_agent"],
            &caller["requests"]
        ),
        (&source.into(), &user_agent.into(), &3.into())
    );
    assert_eq!(
        (&second["state"], &second["callers"]),
        (&"active".into(), &json!([]))
    );
    assert!(first["last_used_at"].is_string(), "{usage}");
    assert!(usage["complete_until"].is_string(), "{usage}");
    assert_eq!((&usage["gaps"], &usage["silent"]), (&json!([]), &json!([])));

    let status = control.json(&["rotate", "status", &old.id]).await;
    let rotation = &status["rotations"][0];
    assert_eq!(
        (
            &rotation["version"],
            &rotation["replaced_by"],
            &rotation["phase"]
        ),
        (&1.into(), &2.into(), &"overlap".into())
    );
    assert_eq!(rotation["on_deadline"], "hold");
    let waits_for = rotation["waits_for"].as_str().expect("a sentence");
    assert!(waits_for.contains("last used"), "{waits_for}");
    let refused = control.run(&["rotate", "retire", &old.id]).await;
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    for named in [source, user_agent] {
        assert!(refused.stderr.contains(named), "{}", refused.stderr);
    }
    let table = table(&control, &["rotate", "status", &old.id]).await;
    for part in ["version 1 to version 2", "OVERLAP UNTIL", user_agent] {
        assert!(table.contains(part), "{part} is not in {table}");
    }
}

#[tokio::test]
async fn a_rotation_is_followed_over_a_restart_until_its_old_version_has_retired() {
    let mut control = Control::start().await;
    let old = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let set = [
        "policy",
        "set",
        &old.id,
        "--overlap",
        // Time enough to end the control plane before it ends the overlap.
        "12s",
        "--idle-for",
        "1s",
    ];
    control.json(&set).await;
    control.json(&["rotate", "start", &old.id]).await;
    assert_eq!(sidecar.check(&old.secret).await, Verdict::allowed(1));
    let watch = [
        "rotate",
        "status",
        &old.id,
        "--watch",
        "--interval",
        "100ms",
    ];
    let mut watch = control.plane.cli_started(&watch);
    watch.wait_for_line(r#""event":"status""#).await;

    control.plane.kill().await;
    watch.wait_for_line("cannot be reached").await;
    control.plane.restart().await;
    watch.wait_for_line("answers again").await;

    assert_eq!(watch.exit().await.code(), Some(0));
    let events = events(&watch);
    let (ended, before) = events.split_last().expect("it told of something");
    assert_eq!(ended["event"], "ended");
    assert_eq!(ended["rotations"], json!([]));
    assert_eq!(ended["versions"][0]["state"], "retired");
    assert!(before.iter().all(|event| event["event"] == "status"));
    assert!(
        events.windows(2).all(|pair| pair[0] != pair[1]),
        "a line without a change"
    );
    let verdict = eventually("the sidecar has heard of it", async || {
        let verdict = sidecar.check(&old.secret).await;
        (!verdict.allowed).then_some(verdict)
    })
    .await;
    assert_eq!(verdict, Verdict::denied("retired", 1));
}

#[tokio::test]
async fn to_watch_a_key_that_is_in_no_rotation_ends_at_once() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let watched = control.run(&["rotate", "status", &key.id, "--watch"]).await;
    assert_eq!(watched.json()["event"], "ended");
    assert!(
        watched.stderr.contains("has no rotation in progress"),
        "{}",
        watched.stderr
    );
    let unknown = control
        .run(&["rotate", "status", "000000000000", "--watch"])
        .await;
    assert_eq!(unknown.status.code(), Some(3), "{}", unknown.stderr);
    let unknown = control.run(&["usage", "000000000000"]).await;
    assert_eq!(unknown.status.code(), Some(3), "{}", unknown.stderr);
}

/// A request of somebody who goes on with an old key.
fn straggler(key: &str) -> CheckRequest {
    let (source, user_agent) = STRAGGLER;
    let mut request = check_request(key);
    let attributes = request.attributes.as_mut().expect("it has attributes");
    attributes.source = Some(Peer {
        address: Some(Address {
            address: Some(address::Address::SocketAddress(SocketAddress {
                address: source.to_owned(),
                ..SocketAddress::default()
            })),
        }),
        ..Peer::default()
    });
    let http = attributes.request.as_mut().and_then(|r| r.http.as_mut());
    let http = http.expect("it is an HTTP request");
    http.headers
        .insert("user-agent".to_owned(), user_agent.to_owned());
    request
}

/// What a command that watches has told, the first first.
fn events(process: &Process) -> Vec<Value> {
    let lines = process.lines();
    let events = lines.iter().filter(|line| line.starts_with('{'));
    events
        .map(|line| serde_json::from_str(line).expect("a line of JSON"))
        .collect()
}

/// What a command prints for people.
async fn table(control: &Control, args: &[&str]) -> String {
    let admin = format!("http://{}", control.plane.admin());
    let token = text(control.plane.token_file());
    let connection = ["-o", "table", "--admin", &admin, "--token-file", token];
    let output = relatch(&[args, &connection].concat(), "").await;
    assert!(output.status.success(), "{}", output.stderr);
    output.stdout
}
