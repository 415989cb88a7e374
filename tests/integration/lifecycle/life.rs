//! The whole life of a rotation under steady load, judged answer by answer: switched over, stalled, taken back, and in an
//! emergency.

use relatch::clock::Clock;
use serde_json::Value;

use super::{
    deployment::{CONSUMER, IssuedKey, KEYRING, Verdict, time},
    traffic::{Mesh, Outcome, ROUTE, assert_all_right, with_version},
};
use crate::support::eventually::eventually;

/// Requests between two things that happen.
const A_WHILE: usize = 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_nobody_uses_any_more_retires_by_itself() {
    let (mesh, old) = Mesh::start("").await;
    let control = &mesh.control;
    control
        .set_policy(&["--overlap", "4s", "--idle-for", "2s"])
        .await;
    let other = control.create_key().await;
    mesh.sidecars[2].reaches(other.revision).await;
    let programs = ["web", "batch", "cron"].map(|name| mesh.caller(name, &old));
    programs[2].answered(A_WHILE).await;

    let handed_over = control.json(&["rotate", "start", &old.id]).await;
    let new = IssuedKey::from_json(&handed_over);
    for program in &programs {
        program.switch(&new);
        program.answered(A_WHILE).await;
    }
    let drained = control.noted(&old.id, 1, "drained").await;
    let retired = control.retired(&old.id, 1).await;
    mesh.reaches(&retired).await;
    programs[0].answered(A_WHILE).await;

    let mut answers = Vec::new();
    for program in programs {
        answers.extend(program.stop().await);
    }
    assert_all_right(&answers);
    let deadline = time(&handed_over["old_until"]);
    assert!(
        deadline <= time(&retired["at"]),
        "before {deadline}: {retired}"
    );
    assert!(drained["revision"].as_u64() < retired["revision"].as_u64());
    assert_eq!(retired["actor"], "reconciler");
    let reason = retired["payload"]["reason"].as_str().expect("a reason");
    let unused = &drained["payload"]["note"]["unused_since"];
    let unused = unused.as_str().expect("a time");
    assert!(
        reason.contains("no request has used it since") && reason.contains(unused),
        "{reason}"
    );

    // Who was left behind is told so, and counted.
    for _ in 0..3 {
        assert_eq!(mesh.ask(&old).await, Outcome::denied("retired"));
    }
    let usage = control.usage_until(&old.id, Clock::system().wall()).await;
    let [first, second] = [0, 1].map(|at| &usage["versions"][at]);
    let sent = with_version(&answers, 1);
    assert_eq!(first["state"], "retired");
    assert_eq!(
        (&first["requests"], &first["denied"]),
        (&(sent + 3).into(), &3.into())
    );
    assert_eq!(second["requests"], with_version(&answers, 2));
    let key = format!("key_id=\"{}\"", old.id);
    let labels = [key.as_str(), "version=\"1\"", "state=\"retired\""];
    let counted = control.metric("relatch_key_requests_total", &labels).await;
    assert_eq!(
        counted.map(|count| count.to_string()),
        Some((sent + 3).to_string())
    );
    for sidecar in &mesh.sidecars {
        let page = sidecar.daemon.get("/metrics").await.text();
        let allowed = page.lines().find(|line| {
            line.starts_with("relatch_checks_total{") && line.contains("decision=\"allow\"")
        });
        assert!(allowed.is_some(), "a sidecar was not asked: {page}");
    }
    assert_eq!(mesh.ask(&other).await, Outcome::Allowed(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_somebody_goes_on_to_use_is_held_until_it_is_forced() {
    let (mesh, old) = Mesh::start("").await;
    let control = &mesh.control;
    control
        .set_policy(&["--overlap", "2s", "--idle-for", "1s"])
        .await;
    let [quick, slow] = ["web", "batch/2.1"].map(|name| mesh.caller(name, &old));
    slow.answered(A_WHILE).await;
    let new = control.rotate(&old.id).await;
    quick.switch(&new);

    control.noted(&old.id, 1, "held").await;
    slow.answered(A_WHILE).await;
    let status = eventually("the slow caller is named", async || {
        let status = control.json(&["rotate", "status", &old.id]).await;
        let caller = &status["versions"][0]["callers"][0];
        (caller["user_agent"] == "batch/2.1").then_some(status)
    })
    .await;
    let rotation = &status["rotations"][0];
    assert_eq!(
        (&rotation["phase"], &rotation["version"]),
        (&"held".into(), &1.into())
    );
    let waits_for = rotation["waits_for"].as_str().expect("a sentence");
    assert!(waits_for.contains("it was last used at"), "{waits_for}");
    let caller = &status["versions"][0]["callers"][0];
    assert_eq!(
        (&caller["source"], &caller["route"]),
        (&"127.0.0.1".into(), &ROUTE.into())
    );
    let refused = control.run(&["rotate", "retire", &old.id]).await;
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    for named in ["127.0.0.1", "batch/2.1", ROUTE] {
        assert!(refused.stderr.contains(named), "{}", refused.stderr);
    }
    slow.answered(A_WHILE).await;
    assert_all_right(&slow.answers());

    let begun = Clock::system().boot();
    let force = [
        "rotate",
        "retire",
        &old.id,
        "--force",
        "--reason",
        "told twice",
    ];
    let forced = control.json(&force).await;
    mesh.reaches(&forced).await;
    let everywhere = Clock::system().boot();
    slow.answered(A_WHILE).await;

    assert_all_right(&quick.stop().await);
    for answer in slow.stop().await {
        let is_right = match answer.outcome {
            Outcome::Denied(ref reason) => reason == "retired" && begun <= answer.answered,
            Outcome::Allowed(_) => answer.is_right() && answer.sent < everywhere,
            Outcome::Failed(_) => false,
        };
        assert!(is_right, "{begun:?} to {everywhere:?}: {answer:?}");
    }
    let change = control.retired(&old.id, 1).await;
    assert_eq!(change["payload"]["forced"], true);
    let reason = change["payload"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("by force: told twice"), "{reason}");
    let actor = change["actor"].as_str().expect("an actor");
    assert!(actor.contains("first admin"), "{actor}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_roll_back_half_way_fails_no_request() {
    let (mesh, old) = Mesh::start("").await;
    let control = &mesh.control;
    control
        .set_policy(&["--overlap", "3s", "--idle-for", "1s"])
        .await;
    let programs = ["web", "batch", "cron", "report"].map(|name| mesh.caller(name, &old));
    programs[3].answered(A_WHILE).await;
    let new = control.rotate(&old.id).await;
    for program in &programs[..2] {
        program.switch(&new);
        program.answered(A_WHILE).await;
    }

    let back = [
        "rotate",
        "rollback",
        &old.id,
        "--reason",
        "acme cannot deploy",
        "--wait",
    ];
    let back = control.json(&back).await;

    assert_eq!((&back["applied"], &back["total"]), (&3.into(), &3.into()));
    for program in &programs[..2] {
        program.answered(A_WHILE).await;
        program.switch(&old);
    }
    let retired = control.retired(&old.id, 2).await;
    mesh.reaches(&retired).await;
    programs[0].answered(A_WHILE).await;
    let mut answers = Vec::new();
    for program in programs {
        answers.extend(program.stop().await);
    }
    assert_all_right(&answers);
    assert!(with_version(&answers, 2) >= 2 * A_WHILE);
    let rolled_back = control
        .change("the roll-back", |change| change["kind"] == "rolled_back")
        .await;
    let replaced_until = &rolled_back["payload"]["replaced"]["until"];
    assert!(
        time(replaced_until) <= time(&retired["at"]),
        "{rolled_back} {retired}"
    );
    assert!(retired["payload"]["forced"].is_null(), "{retired}");
    let shown = control.show_key(&old.id).await;
    let states: Vec<&Value> = [0, 1].map(|at| &shown["versions"][at]["state"]).into();
    assert_eq!(states, ["active", "retired"]);
    assert_eq!(mesh.ask(&new).await, Outcome::denied("retired"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_an_emergency_the_old_version_is_accepted_until_it_begins_and_not_once_it_is_over() {
    let (mesh, old) = Mesh::start("").await;
    let control = &mesh.control;
    let clock = Clock::system();
    let callers = ["web", "thief"].map(|name| mesh.caller(name, &old));
    callers[1].answered(A_WHILE).await;

    let begun = clock.boot();
    let (done, revocation) = control.emergency(&old.id).await;
    let over = clock.boot();

    let new = IssuedKey::from_json(&done);
    assert_eq!(
        (&done["consumer"], &done["keyring"]),
        (&CONSUMER.into(), &KEYRING.into())
    );
    assert_eq!(
        (&revocation["applied"], &revocation["total"]),
        (&3.into(), &3.into())
    );
    for sidecar in &mesh.sidecars {
        assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));
        assert_eq!(
            sidecar.check(&old.secret).await,
            Verdict::denied("revoked", 1)
        );
    }
    let [web, thief] = callers;
    web.switch(&new);
    for caller in [&web, &thief] {
        caller.answered(A_WHILE).await;
    }
    let (web, thief) = (web.stop().await, thief.stop().await);
    assert!(with_version(&web, 2) >= A_WHILE - 1);
    for answer in web.iter().chain(&thief) {
        let is_right = match answer.outcome {
            Outcome::Allowed(2) => answer.is_right(),
            Outcome::Allowed(_) => answer.is_right() && answer.sent < over,
            Outcome::Denied(ref reason) => {
                answer.version == Some(1) && reason == "revoked" && begun <= answer.answered
            }
            Outcome::Failed(_) => false,
        };
        assert!(is_right, "{begun:?} to {over:?}: {answer:?}");
    }
}
