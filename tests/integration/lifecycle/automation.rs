//! Rotations that nobody starts: their secrets come to a file that the consumer reads, and not while that cannot be written.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use serde_json::Value;

use super::{
    deployment::{Control, KEYRING},
    traffic::{Answer, Caller, HeldKey, Mesh, Outcome, assert_all_right},
};
use crate::support::{eventually::eventually, relatch::text};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_reads_its_key_anew_goes_through_scheduled_rotations() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = text(directory.path());
    let sinks = format!("sinks:\n  - {{ name: files, file: {{ directory: {path} }} }}\n");
    let (mut mesh, first) = Mesh::start(&sinks).await;
    let control = &mesh.control;
    let current = directory
        .path()
        .join(KEYRING)
        .join(&first.id)
        .join("current");
    let initial = first.secret.clone();
    let program = Caller::start(mesh.envoy.addr(), "web", move || {
        // There is no file before the first rotation.
        let secret = fs::read_to_string(&current).unwrap_or_else(|_| initial.clone());
        HeldKey::anonymous(secret.trim_end().to_owned())
    });
    program.answered(1).await;

    control
        .set_policy(&[
            "--rotate-every",
            "4s",
            "--overlap",
            "2s",
            "--idle-for",
            "1s",
            "--sink",
            "files",
        ])
        .await;
    for version in [2, 3] {
        handed_over(control, version).await;
    }
    // Others could take a secret from such a directory, so that none is written to it.
    permit(directory.path(), 0o777);
    let held = control.noted(&first.id, 4, "held").await;
    let reason = held["payload"]["note"]["reason"]
        .as_str()
        .expect("a reason");
    assert!(
        reason.contains("sink files") && reason.contains("chmod go-w"),
        "{reason}"
    );
    let status = control.json(&["rotate", "status", &first.id]).await;
    let mut rotations = status["rotations"].as_array().expect("rotations").iter();
    let rotation = rotations.find(|rotation| rotation["version"] == 4);
    let rotation = rotation.unwrap_or_else(|| panic!("no rotation to version 4: {status}"));
    assert_eq!(
        (
            &rotation["phase"],
            &rotation["state"],
            &rotation["waits_for"]
        ),
        (
            &"held".into(),
            &"pending".into(),
            &"sink files to accept the secret".into()
        )
    );
    let key = format!("key_id=\"{}\"", first.id);
    let labels = [key.as_str(), "version=\"4\"", "phase=\"held\""];
    let phase = control.metric("relatch_rotation_phase", &labels).await;
    assert_eq!(phase.map(|phase| phase > 0.5), Some(true));
    program.answered(50).await;
    assert_eq!(last(&program.answers()), Outcome::Allowed(3));

    permit(directory.path(), 0o700);
    eventually("version 4 is used", async || {
        (last(&program.answers()) == Outcome::Allowed(4)).then_some(())
    })
    .await;
    let handed_over = handed_over(control, 4).await;
    assert!(held["revision"].as_u64() < handed_over["revision"].as_u64());
    assert_eq!(handed_over["actor"], "schedule");
    let metric = control.metric("relatch_rotation_phase", &labels).await;
    assert_eq!(metric, None);
    for version in [1, 2] {
        let retired = control.retired(&first.id, version).await;
        assert!(retired["payload"]["forced"].is_null(), "{retired}");
    }

    let answers = program.stop().await;
    assert_all_right(&answers);
    let mut versions: Vec<&Outcome> = answers.iter().map(|answer| &answer.outcome).collect();
    versions.dedup();
    let all = [1, 2, 3, 4].map(Outcome::Allowed);
    assert_eq!(
        versions,
        all.iter().collect::<Vec<_>>(),
        "each for once, in order"
    );
    let shown: Value = control.show_key(&first.id).await;
    assert_eq!(shown["version"], 4);
    let log = mesh.control.plane.process.stop().await;
    assert!(!log.has(&secret_part(&first.secret)), "{log}");
}

async fn handed_over(control: &Control, version: u64) -> Value {
    control
        .change("a hand-over", |change| {
            change["kind"] == "handed_over" && change["version"] == version
        })
        .await
}

fn permit(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
}

fn last(answers: &[Answer]) -> Outcome {
    let last = answers.last().expect("something was asked");
    last.outcome.clone()
}

/// What of a key is no identifier.
fn secret_part(key: &str) -> String {
    let (_, secret) = key.rsplit_once('_').expect("a token has three parts");
    secret.to_owned()
}
