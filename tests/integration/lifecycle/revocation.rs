//! The immediate end of keys.

use super::deployment::{Control, IssuedKey, Sidecar, Verdict, last_line};

#[tokio::test]
async fn a_revocation_that_was_waited_for_denies_the_very_next_request_everywhere() {
    let control = Control::start().await;
    let old = control.create_key().await;
    let sidecars = [
        Sidecar::start(&control, "edge-1").await,
        Sidecar::start(&control, "edge-2").await,
    ];
    let done = control.json(&["rotate", "start", &old.id]).await;
    let new = IssuedKey::from_json(&done);
    let revoke = ["revoke", &old.id, "--version", "1", "--reason", "leaked"];

    let revoked = control.json(&[&revoke[..], &["--wait"]].concat()).await;

    for sidecar in &sidecars {
        assert_eq!(
            sidecar.check(&old.secret).await,
            Verdict::denied("revoked", 1)
        );
        assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));
    }
    assert_eq!(revoked["event"], "revoked");
    assert_eq!(revoked["versions"], serde_json::json!([1]));
    assert_eq!(
        (&revoked["applied"], &revoked["total"]),
        (&2.into(), &2.into())
    );
    assert!(revoked["propagation_seconds"].is_f64(), "{revoked}");
    let again = control.json(&[&revoke[..], &["--wait"]].concat()).await;
    assert_eq!(again["versions"], revoked["versions"]);
    assert_eq!(
        again["revision"], revoked["revision"],
        "it was committed twice"
    );
    let missing = ["revoke", &old.id, "--version", "9", "--reason", "leaked"];
    assert_eq!(control.run(&missing).await.status.code(), Some(3));
}

#[tokio::test]
async fn revoking_all_versions_ends_the_key() {
    let control = Control::start().await;
    let old = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let new = control.json(&["rotate", "start", &old.id]).await;
    let new = IssuedKey::from_json(&new);
    let other = control.create_key().await;
    let revoke = ["revoke", &old.id, "--all", "--reason", "contract ended"];

    let revoked = control.json(&[&revoke[..], &["--wait"]].concat()).await;

    assert_eq!(revoked["versions"], serde_json::json!([1, 2]));
    assert_eq!(
        sidecar.check(&old.secret).await,
        Verdict::denied("revoked", 1)
    );
    assert_eq!(
        sidecar.check(&new.secret).await,
        Verdict::denied("revoked", 2)
    );
    assert_eq!(sidecar.check(&other.secret).await, Verdict::allowed(1));
    let shown = control.show_key(&old.id).await;
    for version in shown["versions"].as_array().expect("versions") {
        assert_eq!(version["state"], "revoked");
        assert_eq!(version["reason"], "contract ended");
    }
    let again = control.json(&revoke).await;
    assert_eq!(
        again["revision"], revoked["revision"],
        "it was committed twice"
    );
}

#[tokio::test]
async fn a_revocation_stands_although_a_sidecar_does_not_confirm_it() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let good = Sidecar::start(&control, "edge-1").await;
    let frozen = Sidecar::start(&control, "edge-2").await;
    frozen.daemon.process.signal(rustix::process::Signal::STOP);
    let revoke = ["revoke", &key.id, "--all", "--reason", "leaked", "--wait"];

    let late = control
        .run(&[&revoke[..], &["--timeout", "1s"]].concat())
        .await;

    assert_eq!(late.status.code(), Some(5), "{}", late.stderr);
    assert!(
        late.stderr.contains("the revocation is committed"),
        "{}",
        late.stderr
    );
    assert!(
        late.stderr.contains("edge-2 is 1 revision behind"),
        "{}",
        late.stderr
    );
    assert_eq!(last_line(&late)["event"], "barrier");
    let revision = last_line(&late)["revision"].as_u64().expect("a revision");
    good.reaches(revision).await;
    assert_eq!(good.check(&key.secret).await, Verdict::denied("revoked", 1));
    frozen.daemon.process.signal(rustix::process::Signal::CONT);
    frozen.reaches(revision).await;
    assert_eq!(
        frozen.check(&key.secret).await,
        Verdict::denied("revoked", 1)
    );
}

#[tokio::test]
async fn a_revocation_needs_a_reason_and_a_choice_of_versions() {
    let control = Control::start().await;
    let key = control.create_key().await;
    for args in [
        &["revoke", &key.id, "--all"][..],
        &["revoke", &key.id, "--all", "--reason", ""],
        &["revoke", &key.id, "--reason", "leaked"],
        &[
            "revoke",
            &key.id,
            "--version",
            "1",
            "--all",
            "--reason",
            "leaked",
        ],
        &["revoke", &key.id, "--version", "0", "--reason", "leaked"],
    ] {
        let refused = control.run(args).await;
        assert_eq!(
            refused.status.code(),
            Some(2),
            "{args:?}: {}",
            refused.stderr
        );
    }
    let absent = ["revoke", &key.id, "--version", "7", "--reason", "leaked"];
    let refused = control.run(&absent).await;
    assert_eq!(refused.status.code(), Some(3), "{}", refused.stderr);
    assert_eq!(control.show_key(&key.id).await["state"], "active");
}
