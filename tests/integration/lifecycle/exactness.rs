//! Counts that are exact in the end whatever becomes of reports, and what is said of a sidecar that cannot report.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use relatch::{clock::Clock, key::Timestamp};
use rustix::process::Signal;
use serde_json::json;
use tokio::task::JoinHandle;

use super::deployment::{Control, IssuedKey, Sidecar, Verdict, time};
use crate::support::eventually::eventually;

/// Checks of a sidecar, one after the other with each of two versions in turn.
struct Checks {
    sidecar: Arc<Sidecar>,
    run: Arc<Run>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Run {
    stopping: AtomicBool,
    /// Answers with the first version and with the second.
    answered: [AtomicU64; 2],
}

/// Checks between two things that happen.
const SOME: u64 = 200;

impl Checks {
    async fn start(control: &Control, node: &str, keys: [&IssuedKey; 2]) -> Self {
        let sidecar = Arc::new(Sidecar::start(control, node).await);
        let run = Arc::new(Run::default());
        let keys = keys.map(Clone::clone);
        let task = tokio::spawn(work(Arc::clone(&sidecar), keys, Arc::clone(&run)));
        Self { sidecar, run, task }
    }

    /// Waits for [`SOME`] more answers.
    async fn go_on(&self) {
        let wanted = self.run.total() + SOME;
        eventually("answers to checks", async || {
            (self.run.total() >= wanted).then_some(())
        })
        .await;
    }

    /// Ends them after the one in flight. The sidecar, and how many checks were answered with each version.
    async fn stop(self) -> (Sidecar, [u64; 2]) {
        self.run.stopping.store(true, Ordering::SeqCst);
        self.task.await.expect("every verdict is right");
        let answered = self.run.counts();
        let sidecar = Arc::into_inner(self.sidecar).expect("nobody else asks it");
        (sidecar, answered)
    }
}

impl Run {
    fn counts(&self) -> [u64; 2] {
        let [first, second] = &self.answered;
        [first, second].map(|count| count.load(Ordering::SeqCst))
    }

    fn total(&self) -> u64 {
        self.counts().into_iter().sum()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_check_is_counted_once_whatever_becomes_of_reports() {
    let mut control = Control::with_file("heartbeat: 1s\n").await;
    let old = control.create_key().await;
    let new = control.rotate(&old.id).await;
    let keys = [&old, &new];
    let first = Checks::start(&control, "edge-1", keys).await;
    let second = Checks::start(&control, "edge-2", keys).await;
    let third = Checks::start(&control, "edge-3", keys).await;
    for checks in [&first, &second, &third] {
        checks.go_on().await;
    }

    // Reports are lost, or their acks are, and then they come again.
    for _ in 0..2 {
        control.plane.kill().await;
        first.go_on().await;
        control.plane.restart().await;
        reported(&control, &old.id).await;
    }
    // Reports wait in the streams of a control plane that hangs.
    control.plane.process.signal(Signal::STOP);
    for checks in [&first, &second, &third] {
        checks.go_on().await;
    }
    control.plane.process.signal(Signal::CONT);
    second.go_on().await;
    // One sidecar stops in order.
    let (mut stopped, of_third) = third.stop().await;
    assert!(stopped.daemon.stop().await.success());
    assert_eq!(stopped.logged("did not confirm the last usage report"), 0);
    first.go_on().await;
    // The control plane stops in order, and its streams are cut.
    control.plane.process.signal(Signal::TERM);
    second.go_on().await;
    control.plane.restart().await;
    first.go_on().await;
    let (first, of_first) = first.stop().await;
    let (second, of_second) = second.stop().await;

    let usage = control.usage_until(&old.id, Clock::system().wall()).await;
    for at in [0, 1] {
        let asked = of_first[at] + of_second[at] + of_third[at];
        let version = &usage["versions"][at];
        assert_eq!(
            (&version["requests"], &version["denied"]),
            (&asked.into(), &0.into()),
            "version {}: {usage}",
            at + 1
        );
    }
    assert_eq!((&usage["gaps"], &usage["silent"]), (&json!([]), &json!([])));
    assert_eq!(control.fleet().await, ["edge-1", "edge-2"]);
    drop((first, second));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_was_killed_holds_a_retirement_until_its_bound_and_for_the_idle_time() {
    // The bound outlives the overlap by what a busy machine needs to look at the gap.
    let control = Control::with_file("heartbeat: 1s\nmax_serve_for: 20s\n").await;
    let old = control.create_key().await;
    control
        .set_policy(&["--overlap", "8s", "--idle-for", "8s"])
        .await;
    let stays = Sidecar::start(&control, "edge-1").await;
    let killed = Sidecar::start(&control, "edge-2").await;
    let new = control.rotate(&old.id).await;
    assert_eq!(killed.check(&old.secret).await, Verdict::allowed(1));
    killed.daemon.process.signal(Signal::KILL);
    let gone = Clock::system().wall();
    drop(killed);

    control.noted(&old.id, 1, "held").await;
    let gap = eventually("the gap is shown", async || {
        let usage = control.json(&["usage", &old.id]).await;
        let gap = usage["gaps"].as_array()?.first()?;
        Some(gap.clone())
    })
    .await;
    assert_eq!(gap["node"], "edge-2");
    let until = time(&gap["until"]);
    let fleet = control.json(&["fleet"]).await;
    let mut lines = fleet.as_array().expect("a list of sidecars").iter();
    let line = lines.find(|line| line["node"] == "edge-2");
    assert_eq!(line.map(|line| &line["gap_until"]), Some(&gap["until"]));
    let status = control.json(&["rotate", "status", &old.id]).await;
    let rotation = &status["rotations"][0];
    let waits_for = rotation["waits_for"].as_str().expect("a sentence");
    assert_eq!(rotation["phase"], "held");
    assert!(
        waits_for.contains("vanished without its last report"),
        "{waits_for}"
    );
    let refused = control.run(&["rotate", "retire", &old.id]).await;
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    assert_eq!(stays.check(&old.secret).await, Verdict::allowed(1));
    let used = Clock::system().wall();

    let retired = control.retired(&old.id, 1).await;
    let at = time(&retired["at"]);
    assert!(
        until >= after(gone, 19),
        "it may serve for twenty seconds: {gone} to {until}"
    );
    assert!(
        at >= after(until, 8),
        "{retired}, and the gap was until {until}"
    );
    assert!(used < at);
    let said = retired["payload"]["reason"].as_str().expect("a reason");
    assert!(said.contains("no request has used it since"), "{said}");
    assert_eq!(stays.check(&new.secret).await, Verdict::allowed(2));
}

/// Waits until a control plane that has restarted knows of something.
async fn reported(control: &Control, key_id: &str) {
    eventually("sidecars report again", async || {
        let usage = control.json(&["usage", key_id]).await;
        usage["complete_until"].is_string().then_some(())
    })
    .await;
}

fn after(moment: Timestamp, seconds: i64) -> Timestamp {
    Timestamp::from_millis(moment.as_millis() + 1_000 * seconds)
}

async fn work(sidecar: Arc<Sidecar>, keys: [IssuedKey; 2], run: Arc<Run>) {
    while !run.stopping.load(Ordering::SeqCst) {
        for (key, answered) in keys.iter().zip(&run.answered) {
            let verdict = sidecar.check(&key.secret).await;
            assert_eq!(verdict, Verdict::allowed(key.version));
            answered.fetch_add(1, Ordering::SeqCst);
        }
    }
}
