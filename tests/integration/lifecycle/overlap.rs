//! What operators can do while a rotation is under way: retire, extend, roll back, give up, and an emergency.

use relatch::key::Timestamp;
use rustix::process::Signal;
use serde_json::Value;

use super::deployment::{CONSUMER, Control, IssuedKey, KEYRING, Sidecar, Verdict, time};
use crate::support::{process::Output, relatch::text};

#[tokio::test]
async fn an_old_version_is_retired_without_evidence_only_by_force() {
    let control = Control::start().await;
    let old = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let new = IssuedKey::from_json(&control.json(&["rotate", "start", &old.id]).await);

    let refused = control.run(&["rotate", "retire", &old.id]).await;

    assert_code(4, &refused, "version 1");
    assert!(
        refused.stderr.contains("may be in use"),
        "{}",
        refused.stderr
    );
    assert!(
        refused.stderr.contains("relatch usage"),
        "{}",
        refused.stderr
    );
    assert_eq!(refused.stdout, "");
    assert_eq!(sidecar.check(&old.secret).await, Verdict::allowed(1));
    let active = [
        "rotate",
        "retire",
        &old.id,
        "--version",
        "2",
        "--force",
        "--reason",
        "x",
    ];
    assert_code(4, &control.run(&active).await, "not retiring");
    let missing = ["rotate", "retire", &old.id, "--version", "7"];
    assert_code(3, &control.run(&missing).await, "has no version 7");

    let force = [
        "rotate",
        "retire",
        &old.id,
        "--force",
        "--reason",
        "told twice",
    ];
    let retired = control.json(&force).await;

    assert_eq!(
        (&retired["version"], &retired["keyring"]),
        (&1.into(), &KEYRING.into())
    );
    let reason = retired["reason"].as_str().expect("a reason");
    assert!(reason.contains("by force: told twice"), "{reason}");
    sidecar
        .reaches(retired["revision"].as_u64().expect("a revision"))
        .await;
    assert_eq!(
        sidecar.check(&old.secret).await,
        Verdict::denied("retired", 1)
    );
    assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));
    assert_code(4, &control.run(&force).await, "no version of key");
}

#[tokio::test]
async fn an_overlap_is_moved_to_a_later_end_and_not_beyond_the_expiry() {
    let control = Control::start().await;
    let create = [
        "key",
        "create",
        "--keyring",
        KEYRING,
        "--consumer",
        CONSUMER,
    ];
    let more = ["--create-missing", "--expires-in", "30d"];
    let key = control.json(&[&create[..], &more].concat()).await;
    let expires_at = time(&key["expires_at"]);
    let key = IssuedKey::from_json(&key);
    let extend = async |to: [&str; 2]| {
        let extend = ["rotate", "extend", &key.id, "--reason", "freeze"];
        control.run(&[&extend[..], &to].concat()).await
    };
    assert_code(4, &extend(["--by", "1d"]).await, "no version of key");
    let done = control
        .json(&["rotate", "start", &key.id, "--overlap", "2d"])
        .await;
    let until = time(&done["old_until"]);

    let later = extend(["--by", "3d"]).await.json();
    assert_eq!(later["version"], 1);
    let day = 24 * 3_600 * 1_000;
    assert_eq!(
        time(&later["until"]).as_millis(),
        until.as_millis() + 3 * day
    );
    let shown = control.show_key(&key.id).await;
    let old = &shown["versions"][0];
    assert_eq!(time(&old["expires_at"]), expires_at);
    assert_eq!(old["ends_at"], later["until"]);
    assert_eq!(shown["versions"][1]["ends_at"], Value::Null);
    let earlier = extend(["--until", &until.to_string()]).await;
    assert_code(2, &earlier, "give a later end");

    let beyond = expires_at.as_millis() + day;
    let beyond = Timestamp::from_millis(beyond).to_string();
    let clamped = extend(["--until", &beyond]).await;
    assert_eq!(time(&clamped.json()["until"]), expires_at);
    assert!(
        clamped.stderr.contains("its overlap cannot end later"),
        "{}",
        clamped.stderr
    );
    assert_code(4, &extend(["--by", "1d"]).await, "cannot outlast");
}

#[tokio::test]
async fn a_roll_back_disturbs_nobody_who_has_switched() {
    let control = Control::start().await;
    let old = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let rollback = [
        "rotate",
        "rollback",
        &old.id,
        "--reason",
        "acme cannot deploy",
    ];
    assert_code(4, &control.run(&rollback).await, "no former version");
    let new = IssuedKey::from_json(&control.json(&["rotate", "start", &old.id]).await);

    let waited = [&rollback[..], &["--wait"]].concat();
    let back = control.json(&waited).await;

    assert_eq!(back["event"], "rolled_back");
    assert_eq!(
        (&back["version"], &back["replaced_version"]),
        (&1.into(), &2.into())
    );
    assert_eq!((&back["applied"], &back["total"]), (&1.into(), &1.into()));
    assert!(back["propagation_seconds"].is_number(), "{back}");
    assert_eq!(states(&control, &old.id).await, ["active", "retiring"]);
    assert_eq!(sidecar.check(&old.secret).await, Verdict::allowed(1));
    assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));

    // For people it says so in words.
    control
        .json(&["rotate", "rollback", &old.id, "--reason", "forward"])
        .await;
    let admin = format!("http://{}", control.plane.admin());
    let token = text(control.plane.token_file());
    let table = ["-o", "table", "--admin", &admin, "--token-file", token];
    let again = crate::support::process::relatch(&[&rollback[..], &table].concat(), "").await;
    assert_code(0, &again, "version 2 stays accepted and retires");
    assert!(
        again.stdout.contains("ACTIVE AGAIN   1"),
        "{}",
        again.stdout
    );
}

#[tokio::test]
async fn a_rotation_that_waits_for_a_frozen_sidecar_can_be_given_up() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let abort = [
        "rotate",
        "abort",
        &key.id,
        "--reason",
        "edge-1 is being replaced",
    ];
    assert_code(4, &control.run(&abort).await, "no version of key");
    sidecar.daemon.process.signal(Signal::STOP);
    let mut rotation = control.plane.cli_started(&["rotate", "start", &key.id]);
    rotation.wait_for_line(r#""event":"barrier""#).await;

    let aborted = control.json(&abort).await;

    assert_eq!(
        (&aborted["version"], &aborted["key_id"]),
        (&2.into(), &key.id.as_str().into())
    );
    let code = rotation.exit().await.code();
    sidecar.daemon.process.signal(Signal::CONT);
    let said = rotation.lines().join("\n");
    assert_eq!(code, Some(4), "{said}");
    assert!(!said.contains("\"secret\""), "{said}");
    let shown = control.show_key(&key.id).await;
    assert_eq!(shown["versions"][1]["state"], "revoked");
    assert_eq!(shown["versions"][1]["reason"], "edge-1 is being replaced");
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    let done = control.json(&["rotate", "start", &key.id]).await;
    assert_eq!(done["version"], 3);
    let late = control.run(&abort).await;
    assert_code(4, &late, "relatch rotate rollback");
}

#[tokio::test]
async fn in_an_emergency_the_old_version_is_revoked_as_the_new_one_is_handed_out() {
    let control = Control::start().await;
    let old = control.create_key().await;
    let sidecars = [
        Sidecar::start(&control, "edge-1").await,
        Sidecar::start(&control, "edge-2").await,
    ];
    let (done, revocation) = control.emergency(&old.id).await;
    let new = IssuedKey::from_json(&done);
    assert_eq!(
        (&done["event"], &done["old_version"]),
        (&"handed_over".into(), &1.into())
    );
    assert_eq!(
        (&revocation["event"], &revocation["done"]),
        (&"old_revoked".into(), &true.into())
    );
    assert_eq!(
        (&revocation["applied"], &revocation["total"]),
        (&2.into(), &2.into())
    );
    assert!(
        revocation["propagation_seconds"].is_number(),
        "{revocation}"
    );
    for sidecar in &sidecars {
        assert_eq!(
            sidecar.check(&old.secret).await,
            Verdict::denied("revoked", 1)
        );
        assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));
    }
    let shown = control.show_key(&old.id).await;
    assert_eq!(shown["versions"][0]["reason"], "leaked");
    let back = ["rotate", "rollback", &old.id, "--reason", "a mistake"];
    assert_code(4, &control.run(&back).await, "no former version");
}

#[tokio::test]
async fn in_an_emergency_the_secret_does_not_wait_for_a_sidecar_that_hangs() {
    let control = Control::start().await;
    let old = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let mut emergency = control.plane.cli_started(&[
        "rotate",
        "start",
        &old.id,
        "--emergency",
        "--reason",
        "leaked",
        "--timeout",
        "30s",
    ]);
    // It has confirmed the new version, and freezes before it hears of the end of the old one, or just after.
    let said = emergency.wait_for_line(r#""event":"handed_over""#).await;
    sidecar.daemon.process.signal(Signal::STOP);
    assert!(said.contains("\"secret\""), "{said}");
    sidecar.daemon.process.signal(Signal::CONT);
    assert_eq!(emergency.exit().await.code(), Some(0));
}

fn assert_code(code: i32, output: &Output, said: &str) {
    let Output { status, stderr, .. } = output;
    assert_eq!(status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(said), "{said:?} is not in {stderr}");
}

/// The states of a key's versions, the oldest first.
async fn states(control: &Control, key_id: &str) -> Vec<String> {
    let shown = control.show_key(key_id).await;
    let versions = shown["versions"].as_array().expect("versions").iter();
    versions
        .filter_map(|version| version["state"].as_str().map(str::to_owned))
        .collect()
}
