//! The way from one key version to the next, under load and against sidecars that do not answer.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use relatch::{clock::Clock, key::Timestamp};
use rustix::process::Signal;
use serde_json::Value;

use super::deployment::{CONSUMER, Control, IssuedKey, KEYRING, Sidecar, Verdict, last_line, time};
use crate::support::{
    client::Request,
    envoy::{Envoy, EnvoyOptions},
    eventually::{DEADLINE, eventually, within},
    load::Load,
    upstream::Upstream,
};

/// A consumer that switches from one key to the next while it sends.
#[derive(Debug)]
struct Consumer {
    old: String,
    /// Unknown before the hand-over.
    new: OnceLock<String>,
    phase: AtomicU8,
    requests: AtomicU64,
}

/// With which key a [`Consumer`] sends.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
enum Phase {
    Old,
    /// Both in turn.
    Mixed,
    New,
}

/// One Check, and when it was answered.
#[derive(Debug)]
struct Probe {
    answered: Timestamp,
    verdict: Verdict,
}

/// Long enough for a few hundred requests of each phase on a loaded machine, short enough to wait for its end.
const OVERLAP: &str = "4s";
/// How long checks are watched beyond a deadline.
const AROUND: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_under_load_fails_no_request() {
    let control = Control::start_brisk("").await;
    let old = control.create_key().await;
    set_policy(
        &control,
        &old.id,
        &["--overlap", OVERLAP, "--idle-for", "1s"],
    )
    .await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let upstream = Upstream::start().await;
    let envoy = Envoy::start(EnvoyOptions::new(
        sidecar.daemon.ext_authz(),
        upstream.addr(),
    ))
    .await;

    let consumer = Arc::new(Consumer::new(&old.secret));
    let sender = Arc::clone(&consumer);
    let load = Load::start(envoy.addr(), move || sender.request(), 4);
    load.answered(100).await;

    let done = control.json(&["rotate", "start", &old.id]).await;
    let new = IssuedKey::from_json(&done);
    let first = Request::get("/first").header("x-api-key", &new.secret);
    let first = first.send(envoy.addr()).await;

    assert_eq!(first.seen().values("x-relatch-key-version"), ["2"]);
    assert_eq!(done["event"], "handed_over");
    assert_eq!((&done["old_version"], new.version), (&Value::from(1), 2));
    consumer.new.set(new.secret).expect("it is set once");
    consumer.enter(Phase::Mixed);
    load.answered(100).await;
    consumer.enter(Phase::New);
    load.answered(100).await;
    // The load goes on over the end of the old version.
    retired(&control, &old.id).await;
    load.answered(20).await;
    let totals = load.stop().await;

    assert_eq!(totals.failed, 0, "{:?}", totals.samples);
    let versions: Vec<&str> = totals.by_key_version.keys().map(String::as_str).collect();
    assert_eq!(versions, ["1", "2"]);
    assert!(
        totals.by_key_version.values().all(|count| *count >= 100),
        "{totals:?}"
    );
    let late = Request::get("/late").header("x-api-key", &old.secret);
    let late = late.send(envoy.addr()).await;
    assert_eq!(late.status, 401);
    assert_eq!(late.json::<Value>()["reason"], "retired");
}

#[tokio::test]
async fn a_rotation_keeps_the_lifetime_of_its_key_unless_told_otherwise() {
    const DAY: Duration = Duration::from_hours(24);
    let control = Control::start().await;
    let create = [
        "key",
        "create",
        "--keyring",
        KEYRING,
        "--consumer",
        CONSUMER,
    ];
    let lives = ["--create-missing", "--expires-in", "90d"];
    let key = IssuedKey::from_json(&control.json(&[&create[..], &lives].concat()).await);
    let lifetime = async |args: &[&str]| {
        let start = [&["rotate", "start", &key.id, "--overlap", "0s"], args].concat();
        let done = control.json(&start).await;
        let version = done["version"].to_string();
        let shown = control.show_key(&key.id).await;
        let versions = shown["versions"].as_array().expect("versions").iter();
        let mut new = versions.filter(|shown| shown["version"] == done["version"]);
        let new = new.next().expect("the new version");
        let until = (!new["expires_at"].is_null()).then(|| time(&new["expires_at"]));
        let retire = ["rotate", "retire", &key.id, "--force", "--reason", "next"];
        control.json(&retire).await;
        (
            version,
            until.map(|until| until.saturating_since(time(&new["created_at"]))),
        )
    };

    assert_eq!(lifetime(&[]).await, ("2".to_owned(), Some(90 * DAY)));
    assert_eq!(lifetime(&[]).await, ("3".to_owned(), Some(90 * DAY)));
    let shorter = lifetime(&["--expires-in", "30d"]).await;
    assert_eq!(shorter, ("4".to_owned(), Some(30 * DAY)));
    assert_eq!(lifetime(&[]).await, ("5".to_owned(), Some(30 * DAY)));
    let never = lifetime(&["--expires-in", "never"]).await;
    assert_eq!(never, ("6".to_owned(), None));
    assert_eq!(lifetime(&[]).await, ("7".to_owned(), None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_version_is_accepted_until_the_control_plane_retires_it() {
    let control = Control::start().await;
    let old = control.create_key().await;
    set_policy(&control, &old.id, &["--on-deadline", "retire"]).await;
    let sidecars = [
        Sidecar::start(&control, "edge-1").await,
        Sidecar::start(&control, "edge-2").await,
    ];
    let done = control
        .json(&["rotate", "start", &old.id, "--overlap", "3s"])
        .await;
    let new = IssuedKey::from_json(&done);
    for sidecar in &sidecars {
        assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));
    }
    let until = done["old_until"].as_str().expect("the old version ends");
    let until: Timestamp = until.parse().expect("RFC 3339");

    let [one, other] = &sidecars;
    let (one, other) = tokio::join!(
        probes_until_denied(one, &old.secret),
        probes_until_denied(other, &old.secret)
    );

    for probes in [one, other] {
        let (last, accepted) = probes.split_last().expect("there are probes");
        for probe in accepted {
            assert_eq!(probe.verdict, Verdict::allowed(1), "{probe:?}");
        }
        assert_eq!(last.verdict, Verdict::denied("retired", 1));
        assert!(last.answered >= until, "before {until}: {last:?}");
    }
    for sidecar in &sidecars {
        assert_eq!(
            sidecar.check(&old.secret).await,
            Verdict::denied("retired", 1)
        );
    }
}

#[tokio::test]
async fn a_sidecar_does_not_end_an_overlap_by_its_own_clock() {
    let mut control = Control::start().await;
    let old = control.create_key().await;
    set_policy(&control, &old.id, &["--on-deadline", "retire"]).await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let done = control
        .json(&["rotate", "start", &old.id, "--overlap", "6s"])
        .await;
    let until = done["old_until"].as_str().expect("the old version ends");
    let until: Timestamp = until.parse().expect("RFC 3339");
    control.plane.kill().await;

    let clock = Clock::system();
    let beyond = until.saturating_add(AROUND);
    while clock.wall() < beyond {
        assert_eq!(sidecar.check(&old.secret).await, Verdict::allowed(1));
    }

    control.plane.restart().await;
    eventually("the control plane ends the overlap", async || {
        let verdict = sidecar.check(&old.secret).await;
        (verdict == Verdict::denied("retired", 1)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_sidecar_that_does_not_confirm_keeps_the_new_version_from_being_handed_out() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let good = Sidecar::start(&control, "edge-1").await;
    let frozen = Sidecar::start(&control, "edge-2").await;
    frozen.daemon.process.signal(Signal::STOP);

    // Time for the good one to confirm on a busy machine.
    let refused = control
        .run(&["rotate", "start", &key.id, "--timeout", "10s"])
        .await;

    assert_eq!(refused.status.code(), Some(5), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("edge-2 is 1 revision behind"),
        "{}",
        refused.stderr
    );
    assert!(!refused.stderr.contains("edge-1 "), "{}", refused.stderr);
    assert!(!refused.stdout.contains("secret"), "{}", refused.stdout);
    let progress = last_line(&refused);
    assert_eq!(progress["event"], "barrier");
    assert_eq!(
        (&progress["applied"], &progress["total"]),
        (&1.into(), &2.into())
    );
    assert_eq!(progress["laggards"][0]["node"], "edge-2");
    let shown = control.show_key(&key.id).await;
    assert_eq!(
        (&shown["version"], &shown["state"]),
        (&1.into(), &"active".into())
    );
    assert_eq!(shown["versions"][1]["state"], "revoked");
    let reason = shown["versions"][1]["reason"].as_str().expect("a reason");
    assert!(
        reason.contains("confirmed by 1 of 2 sidecars") && reason.contains("edge-2"),
        "{reason}"
    );
    assert_eq!(good.check(&key.secret).await, Verdict::allowed(1));

    frozen.daemon.process.signal(Signal::CONT);
    let done = control.json(&["rotate", "start", &key.id]).await;

    assert_eq!((&done["version"], &done["total"]), (&3.into(), &2.into()));
    let new = IssuedKey::from_json(&done);
    for sidecar in [&good, &frozen] {
        assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(3));
        assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    }
}

#[tokio::test]
async fn ctrl_c_before_the_hand_over_withdraws_the_new_version() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    sidecar.daemon.process.signal(Signal::STOP);
    let mut rotation = control.plane.cli_started(&["rotate", "start", &key.id]);
    rotation.wait_for_line(r#""event":"barrier""#).await;

    rotation.signal(Signal::INT);

    assert_eq!(rotation.exit().await.code(), Some(5));
    let said = rotation.lines().join("\n");
    assert!(said.contains("interrupted before the hand-over"), "{said}");
    assert!(!said.contains("\"secret\""), "{said}");
    let reason = eventually("the version is withdrawn", async || {
        let shown = control.show_key(&key.id).await;
        let version = &shown["versions"][1];
        (version["state"] == "revoked").then(|| version["reason"].to_string())
    })
    .await;
    assert!(reason.contains("disconnected"), "{reason}");
    sidecar.daemon.process.signal(Signal::CONT);
    let done = control.json(&["rotate", "start", &key.id]).await;
    assert_eq!(done["version"], 3);
}

#[tokio::test]
async fn a_second_rotation_waits_its_turn() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    sidecar.daemon.process.signal(Signal::STOP);
    let mut first = control.plane.cli_started(&["rotate", "start", &key.id]);
    first.wait_for_line(r#""event":"barrier""#).await;

    let second = control.run(&["rotate", "start", &key.id]).await;

    assert_eq!(second.status.code(), Some(4), "{}", second.stderr);
    assert!(second.stderr.contains("version 2"), "{}", second.stderr);
    sidecar.daemon.process.signal(Signal::CONT);
    assert_eq!(first.exit().await.code(), Some(0));
}

impl Consumer {
    fn new(old: &str) -> Self {
        Self {
            old: old.to_owned(),
            new: OnceLock::new(),
            phase: AtomicU8::new(Phase::Old as u8),
            requests: AtomicU64::new(0),
        }
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    fn request(&self) -> Request {
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        let phase = self.phase.load(Ordering::SeqCst);
        let sends_old =
            phase == Phase::Old as u8 || (phase == Phase::Mixed as u8 && number.is_multiple_of(2));
        let key = if sends_old {
            &self.old
        } else {
            self.new.get().expect("the phase follows the hand-over")
        };
        Request::get("/orders").header("x-api-key", key)
    }
}

/// Checks `key` without a pause until it is denied.
async fn probes_until_denied(sidecar: &Sidecar, key: &str) -> Vec<Probe> {
    let clock = Clock::system();
    let mut probes = Vec::new();
    let denied = async {
        loop {
            let verdict = sidecar.check(key).await;
            let allowed = verdict.allowed;
            probes.push(Probe {
                answered: clock.wall(),
                verdict,
            });
            if !allowed {
                return;
            }
        }
    };
    within(DEADLINE, "the key is denied", denied).await;
    probes
}

async fn set_policy(control: &Control, key_id: &str, settings: &[&str]) {
    let set = ["policy", "set", key_id];
    control.json(&[&set, settings].concat()).await;
}

/// Waits until version 1 of a key is retired.
async fn retired(control: &Control, key_id: &str) {
    eventually("the old version is retired", async || {
        let shown = control.show_key(key_id).await;
        (shown["versions"][0]["state"] == "retired").then_some(())
    })
    .await;
}
