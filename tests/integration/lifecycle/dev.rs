//! `relatch dev`, the first thing that a new user runs, the second time.

use std::{fs, os::unix::process::ExitStatusExt, path::Path, process::Command, time::SystemTime};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{
    eventually::eventually,
    process::{Process, RELATCH, relatch, run},
    relatch::{Relatch, text},
};

#[tokio::test]
async fn it_starts_again_on_its_data_with_the_same_key() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let mut first = dev(data.path());
    first.wait_for_line("Press Ctrl-C to stop").await;
    let shown = first.wait_for_line("(shown only once)").await;
    let key = shown.split_whitespace().nth(1).expect("a key").to_owned();
    assert!(allows(data.path(), &key).await);
    first.signal(Signal::INT);
    assert_eq!(first.exit().await.code(), Some(0));

    let mut second = dev(data.path());
    second.wait_for_line("Press Ctrl-C to stop").await;

    assert!(allows(data.path(), &key).await);
    let printed = second.stop().await;
    assert!(!printed.has(&key), "{printed}");
}

#[tokio::test]
async fn the_commands_that_it_prints_work_at_every_start() {
    let parent = tempfile::tempdir().expect("a directory can be made");
    let data = parent.path().join("it's my data");
    for start in ["first", "second", "third"] {
        let mut daemon = dev(&data);
        daemon.wait_for_line("Press Ctrl-C to stop").await;

        let commands = commands(&daemon);
        let output = run(Command::new("sh").args(["-euxc", &commands]), "").await;

        assert!(output.status.success(), "{start}: {output:?}");
        let printed = &output.stdout;
        for part in [
            r#""decision":"allow""#,
            r#""event":"handed_over""#,
            r#""phase":"overlap""#,
            r#""versions":[1]"#,
        ] {
            assert!(printed.contains(part), "{start}: no {part} in {printed}");
        }
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.exit().await.code(), Some(0));
    }
}

#[tokio::test]
async fn data_without_its_token_file_is_refused() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let mut first = dev(data.path());
    first.wait_for_line("Press Ctrl-C to stop").await;
    first.signal(Signal::INT);
    first.exit().await;
    let token = data.path().join("admin.token");
    fs::remove_file(&token).expect("it is there");

    let mut second = dev(data.path());

    assert_eq!(second.exit().await.code(), Some(4));
    let said = second.lines().join("\n");
    assert!(
        said.contains("admin.token") && said.contains("--data-dir"),
        "{said}"
    );
    assert!(!token.exists());
}

#[tokio::test]
async fn a_second_one_in_the_same_directory_is_told_where_the_first_one_is() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let mut first = dev(data.path());
    first.wait_for_line("Press Ctrl-C to stop").await;
    let before = files(data.path());
    let json: Value = serde_json::from_slice(&before[0].1).expect("endpoints.json is JSON");

    let mut second = dev(data.path());

    assert_eq!(second.exit().await.code(), Some(4));
    let said = second.lines().join("\n");
    let process = format!("`relatch dev`, process {} on ", first.id());
    let [ext_authz, admin] = ["ext_authz", "admin"].map(|name| json[name].as_str());
    for part in [
        &process,
        "since 20",
        ext_authz.expect("an address"),
        admin.expect("an address"),
        "endpoints.json",
        "--data-dir",
        "--ephemeral-ports",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(files(data.path()) == before, "it has written");
    first.signal(Signal::TERM);
    assert_eq!(first.exit().await.code(), Some(0));
}

#[tokio::test]
async fn data_without_its_pepper_is_refused() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let mut first = dev(data.path());
    first.wait_for_line("Press Ctrl-C to stop").await;
    first.signal(Signal::INT);
    first.exit().await;
    let pepper = data.path().join("pepper.json");
    fs::remove_file(&pepper).expect("it is there");

    let mut second = dev(data.path());

    assert_eq!(second.exit().await.code(), Some(4));
    let said = second.lines().join("\n");
    assert!(said.contains("restore the file from its copy"), "{said}");
    assert!(!pepper.exists());
}

/// The files that `dev` keeps beside its store, with their contents and when they were written.
fn files(data_dir: &Path) -> [(SystemTime, Vec<u8>); 5] {
    [
        "endpoints.json",
        "envoy.yaml",
        "admin.token",
        "pepper.json",
        "relatch.db.lock",
    ]
    .map(|name| {
        let path = data_dir.join(name);
        let written = fs::metadata(&path).and_then(|metadata| metadata.modified());
        (
            written.expect("it is there"),
            fs::read(path).expect("it is there"),
        )
    })
}

/// The commands among what it printed, but for those that need an Envoy.
fn commands(daemon: &Process) -> String {
    let lines = daemon.lines();
    let is_heading = |line: &&String| line.ends_with(':') && !line.starts_with(' ');
    let begin = lines.iter().position(|line| is_heading(&line));
    let lines = &lines[begin.expect("a heading is above the commands")..];
    let commands = lines.iter().filter_map(|line| line.strip_prefix("  "));
    let commands: Vec<&str> = commands
        .filter(|line| !line.starts_with("envoy ") && !line.starts_with("curl "))
        .collect();
    commands.join("\n")
}

fn dev(data_dir: &Path) -> Process {
    Process::relatch(&["dev", "--ephemeral-ports", "--data-dir", text(data_dir)])
}

/// Whether the sidecar of `data_dir` lets `key` through.
async fn allows(data_dir: &Path, key: &str) -> bool {
    let json = fs::read(data_dir.join("endpoints.json")).expect("it is there");
    let endpoints: Value = serde_json::from_slice(&json).expect("it is JSON");
    let address = endpoints["ext_authz"].as_str().expect("an address");
    let checked = relatch(&["check", "--endpoint", address], key).await;
    checked.status.code() == Some(0)
}

/// Unless it is told to ignore hangups, as `nohup` does: the tests may run under it.
#[tokio::test]
async fn a_hangup_ends_it() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let dev = ["dev", "--ephemeral-ports", "--data-dir", text(data.path())];
    let mut program = Command::new("env");
    program.args(["--default-signal=HUP", RELATCH]).args(dev);
    let mut daemon = Process::start(&mut program);
    daemon.wait_for_line("Press Ctrl-C to stop").await;
    daemon.signal(Signal::HUP);
    let ended = daemon.exit().await;
    assert_eq!(ended.signal(), Some(1), "{ended}");
}

#[tokio::test]
async fn it_serves_a_keyring_that_is_created_in_it() {
    let relatch = Relatch::dev().await;
    let create = ["key", "create", "--consumer", "acme", "--create-missing"];
    let create = [&create[..], &["--keyring", "partners"]].concat();
    let key = relatch.cli_json(&create).await;
    let secret = key["secret"].as_str().expect("a secret");
    let endpoint = format!("http://{}", relatch.ext_authz());
    let check = ["check", "--endpoint", &endpoint, "--keyring", "partners"];
    eventually("the key passes", async || {
        let output = relatch.cli_reading(&check, secret).await;
        (output.status.code() == Some(0)).then_some(())
    })
    .await;
}
