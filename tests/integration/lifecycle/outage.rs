//! Control planes and sidecars that die and come back: what goes on, what is kept, who is waited for.

use rustix::process::Signal;
use serde_json::Value;

use super::deployment::{Control, IssuedKey, KEYRING, Sidecar, Verdict};
use crate::support::{eventually::eventually, relatch::own_node};

#[tokio::test]
async fn checks_go_on_without_a_control_plane_and_its_return_costs_no_snapshot() {
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let revoked = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let revoke = [
        "revoke",
        &revoked.id,
        "--all",
        "--reason",
        "leaked",
        "--wait",
    ];
    control.json(&revoke).await;
    let kept = kept(&control).await;

    control.plane.kill().await;
    for _ in 0..20 {
        assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
        assert_eq!(
            sidecar.check(&revoked.secret).await,
            Verdict::denied("revoked", 1)
        );
    }
    // A change that the sidecar can only learn of when it connects again.
    sidecar.daemon.process.signal(Signal::STOP);
    control.plane.restart().await;
    assert_eq!(self::kept(&control).await, kept);
    let new = control.create_key_at_once().await;
    sidecar.daemon.process.signal(Signal::CONT);

    sidecar.reaches(new.revision).await;
    assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(1));
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    assert_eq!(
        sidecar.check(&revoked.secret).await,
        Verdict::denied("revoked", 1)
    );
    let next = control.create_key().await;
    sidecar.reaches(next.revision).await;
    assert!(sidecar.is_ready().await);
    let log = sidecar.stopped().await;
    assert_eq!(log.count("snapshot applied"), 1, "{log}");
    let opened = log.count("stream to the control plane is open");
    assert_eq!(opened, 2, "{log}");
}

#[tokio::test]
async fn a_sidecar_that_was_killed_comes_back_with_the_same_answers() {
    let control = Control::start().await;
    let node = own_node("edge");
    let old = control.create_key().await;
    let sidecar = Sidecar::start(&control, &node).await;
    let new = control.json(&["rotate", "start", &old.id]).await;
    let new = IssuedKey::from_json(&new);
    let gone = control.create_key().await;
    control
        .json(&["revoke", &gone.id, "--all", "--reason", "leaked", "--wait"])
        .await;
    let keys = [&old, &new, &gone];
    let before = verdicts(&sidecar, keys).await;

    drop(sidecar);
    let sidecar = Sidecar::start(&control, &node).await;

    assert_eq!(verdicts(&sidecar, keys).await, before);
    assert_eq!(
        before,
        [
            Verdict::allowed(1),
            Verdict::allowed(2),
            Verdict::denied("revoked", 1)
        ]
    );
    assert_eq!(control.fleet().await, [node]);
}

#[tokio::test]
async fn a_control_plane_that_restarts_waits_for_the_sidecars_of_its_former_life() {
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let good = Sidecar::start(&control, "edge-1").await;
    let frozen = Sidecar::start(&control, "edge-2").await;
    let node = own_node("edge-3");
    let killed = Sidecar::start(&control, &node).await;
    frozen.daemon.process.signal(Signal::STOP);
    control.plane.kill().await;
    drop(killed);

    control.plane.restart().await;
    let rotate = ["rotate", "start", &key.id, "--timeout", "2s"];
    let refused = control.run(&rotate).await;

    assert_eq!(refused.status.code(), Some(5), "{}", refused.stderr);
    assert!(refused.stderr.contains("edge-2"), "{}", refused.stderr);
    assert!(refused.stderr.contains(&node), "{}", refused.stderr);
    assert!(!refused.stdout.contains("\"secret\""), "{}", refused.stdout);
    assert_eq!(good.check(&key.secret).await, Verdict::allowed(1));
    frozen.daemon.process.signal(Signal::CONT);
    // The next process of the node proves the end of the one that was killed.
    let back = Sidecar::start(&control, &node).await;
    let done = control.json(&["rotate", "start", &key.id]).await;
    assert_eq!(done["total"], 3);
    let new = IssuedKey::from_json(&done);
    for sidecar in [&good, &frozen, &back] {
        assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(3));
    }
}

#[tokio::test]
async fn a_new_epoch_makes_sidecars_take_everything_anew_and_keeps_revocations() {
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let revoked = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    control
        .json(&[
            "revoke",
            &revoked.id,
            "--all",
            "--reason",
            "leaked",
            "--wait",
        ])
        .await;
    let before = sidecar.keyring().await;
    control.plane.process.signal(Signal::TERM);
    assert!(control.plane.process.exit().await.success());

    control.plane.restart_with(&["--new-epoch"]).await;

    let after = eventually("the sidecar is in the new epoch", async || {
        let keyring = sidecar.keyring().await;
        (keyring["epoch"] != before["epoch"]).then_some(keyring)
    })
    .await;
    assert_eq!(after["revision"], before["revision"]);
    assert_eq!(after["keys"], before["keys"]);
    // The line follows the keyring.
    sidecar.until_logged("the keyring has a new epoch", 1).await;
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    assert_eq!(
        sidecar.check(&revoked.secret).await,
        Verdict::denied("revoked", 1)
    );
    let done = control.json(&["rotate", "start", &key.id]).await;
    assert_eq!(done["total"], 1);
    assert_eq!(control.json(&["audit", "verify"]).await[0]["intact"], true);
    let log = sidecar.stopped().await;
    assert_eq!(log.count("the keyring has a new epoch"), 1, "{log}");
}

#[tokio::test]
async fn a_sidecar_that_starts_without_a_control_plane_denies_until_it_has_its_keyring() {
    let mut control = Control::start().await;
    let key = control.create_key().await;
    control.plane.kill().await;

    let sidecar = Sidecar::start_unready(&control, "edge-1").await;

    let verdict = sidecar.check(&key.secret).await;
    assert_eq!(
        (verdict.allowed, verdict.reason.as_str()),
        (false, "keyring_unavailable")
    );
    assert!(!sidecar.is_ready().await);
    control.plane.restart().await;
    sidecar.ready().await;
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
}

/// Everything that a control plane has to keep, as it tells of it.
async fn kept(control: &Control) -> Vec<Value> {
    let mut kept = Vec::new();
    for args in [
        &["key", "list"][..],
        &["token", "list"],
        &["keyring", "list"],
        &["consumer", "list", "--keyring", KEYRING],
        &["audit", "list", "--keyring", KEYRING],
    ] {
        let mut answer = control.json(args).await;
        forget_use(&mut answer);
        kept.push(answer);
    }
    let verdicts = control.json(&["audit", "verify"]).await;
    for verdict in verdicts.as_array().expect("verdicts") {
        assert_eq!(verdict["intact"], true, "{verdict}");
    }
    kept.push(verdicts);
    kept
}

/// Takes out how often versions were used, which sidecars tell whenever they are connected.
fn forget_use(answer: &mut Value) {
    for key in answer.as_array_mut().into_iter().flatten() {
        for version in key["versions"].as_array_mut().into_iter().flatten() {
            version["requests"] = Value::Null;
            version["last_used_at"] = Value::Null;
        }
    }
}

async fn verdicts(sidecar: &Sidecar, keys: [&IssuedKey; 3]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for key in keys {
        verdicts.push(sidecar.check(&key.secret).await);
    }
    verdicts
}
