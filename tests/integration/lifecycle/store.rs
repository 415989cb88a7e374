//! Control planes that find something wrong when they start: they say what, and change nothing.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use rusqlite::Connection;
use rustix::process::Signal;
use tempfile::TempDir;

use super::deployment::{Control, Sidecar};
use crate::support::{
    process::{Output, Process, relatch},
    relatch::{sidecar_yaml, text},
};

/// Each file and directory below a directory, with what changes when it is written to.
type Contents = BTreeMap<PathBuf, (i64, i64, Vec<u8>)>;

const ANY_PORT: &str = "127.0.0.1:0";

#[tokio::test]
async fn a_database_that_cannot_be_used_is_left_as_it_is() {
    let data = initialized().await;
    let database = data.path().join("relatch.db");
    let good = fs::read(&database).expect("it is there");
    let newer = {
        let connection = Connection::open(&database).expect("it opens");
        let version: u32 = connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .expect("it has a version");
        connection
            .pragma_update(None, "user_version", version + 1)
            .expect("it can be written to");
        drop(connection);
        fs::read(&database).expect("it is there")
    };
    let mut cut = good.clone();
    cut.truncate(good.len() - 4096);
    for (content, said) in [
        (b"node: { id: edge-1 }\n".repeat(400), "not"),
        (Vec::new(), "empty"),
        (newer, "upgrade relatch"),
        (cut, "restore the last backup"),
    ] {
        fs::write(&database, &content).expect("the test's directory can be written to");
        for args in [&[][..], &["--new-epoch"]] {
            let refused = start(data.path(), args).await;
            assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
            assert!(refused.stderr.contains(said), "{said}: {}", refused.stderr);
            assert!(refused.stderr.contains("relatch.db"), "{}", refused.stderr);
            assert!(
                fs::read(&database).expect("it is there") == content,
                "{said}: it was changed"
            );
        }
    }
}

#[tokio::test]
async fn what_init_makes_is_asked_for_where_it_is_missing() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let refused = start(data.path(), &[]).await;
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("relatch control init"),
        "{}",
        refused.stderr
    );
    assert_eq!(fs::read_dir(data.path()).expect("it reads").count(), 0);

    let data = initialized().await;
    let pepper = data.path().join("pepper.json");
    fs::rename(&pepper, data.path().join("aside")).expect("it moves");
    let refused = start(data.path(), &[]).await;
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    assert!(refused.stderr.contains("pepper.json"), "{}", refused.stderr);
    assert!(
        !pepper.exists(),
        "another pepper would make every key unknown"
    );
}

#[tokio::test]
async fn a_second_control_plane_is_refused_and_told_who_owns_the_store() {
    let control = Control::start().await;
    control.create_key().await;
    let database = control.data_dir().join("relatch.db");
    let epochs = epochs(&database);
    let elsewhere = tempfile::tempdir().expect("a directory can be made");
    let link = elsewhere.path().join("data");
    symlink(control.data_dir(), &link).expect("the directory is the test's");
    let process = format!("process {} on ", control.plane.process.id());
    for dir in [control.data_dir(), &link] {
        for args in [&[][..], &["--new-epoch"]] {
            let refused = start(dir, args).await;
            assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
            for part in ["`relatch control`", &process, "since 20"] {
                assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
            }
        }
    }
    assert_eq!(self::epochs(&database), epochs);
    control.create_key().await;
}

#[tokio::test]
async fn the_store_of_a_control_plane_that_was_killed_is_free() {
    let mut control = Control::start().await;
    control.plane.process.signal(Signal::KILL);
    // Its end is not waited for.
    let mut next = started(control.data_dir());
    next.wait_for_line("control plane started").await;
    control.plane.process.exit().await;
    next.signal(Signal::TERM);
    assert_eq!(next.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_control_plane_that_stops_is_waited_for() {
    let mut control = Control::start().await;
    control.create_key().await;
    let frozen = Sidecar::start(&control, "edge-1").await;
    // It does not answer, which holds the stop up.
    frozen.daemon.process.signal(Signal::STOP);
    control.plane.process.signal(Signal::TERM);
    let mut next = started(control.data_dir());
    next.wait_for_line("waiting for the end of `relatch control`")
        .await;
    next.wait_for_line("control plane started").await;
    assert!(control.plane.process.exit().await.success());
}

#[tokio::test]
async fn the_pepper_of_another_store_is_refused_and_both_are_named() {
    let [data, other] = [initialized().await, initialized().await];
    let [pepper, foreign] = [&data, &other].map(|data| data.path().join("pepper.json"));
    let own = fs::read(&pepper).expect("it is there");
    let epochs = epochs(&data.path().join("relatch.db"));
    let [expected, found] = [&data, &other].map(|data| recorded_check(data.path()));
    fs::copy(&foreign, &pepper).expect("the directory is the test's");
    let recover = ["control", "recover-admin", "--data-dir", text(data.path())];
    for refused in [
        start(data.path(), &[]).await,
        start(data.path(), &["--new-epoch"]).await,
        relatch(&recover, "").await,
    ] {
        assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
        for part in [
            "pepper.json",
            &format!("expects pepper 1 (check value {expected})"),
            &format!("the file has pepper 1 (check value {found})"),
            "restore the pepper file",
        ] {
            assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
        }
        assert!(!refused.stderr.contains("init"), "{}", refused.stderr);
    }
    assert_eq!(self::epochs(&data.path().join("relatch.db")), epochs);
    fs::write(&pepper, own).expect("the directory is the test's");
    let mut control = started(data.path());
    control.wait_for_line("control plane started").await;
}

#[tokio::test]
async fn a_store_that_does_not_know_its_pepper_adopts_it_by_an_explicit_word() {
    let mut control = Control::start().await;
    control.create_key().await;
    control.plane.process.signal(Signal::TERM);
    control.plane.process.exit().await;
    let data = control.data_dir();
    let database = Connection::open(data.join("relatch.db")).expect("it opens");
    // As a store from before check values that has a keyring.
    database
        .execute_batch(
            "PRAGMA foreign_keys = OFF;
             DROP TRIGGER entries_are_never_deleted;
             DELETE FROM entries WHERE log = '_control';
             DELETE FROM states WHERE log = '_control';
             DELETE FROM logs WHERE name = '_control';",
        )
        .expect("the test's store can be changed");
    drop(database);

    let refused = start(data, &["--new-epoch"]).await;

    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    for part in ["pepper.json", "check value", "--adopt-pepper"] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
    let mut all = vec!["control", "--adopt-pepper", "--data-dir", text(data)];
    for flag in ["--discovery", "--admin-listen", "--http"] {
        all.extend([flag, ANY_PORT]);
    }
    let mut adopting = Process::relatch(&all);
    adopting.wait_for_line("control plane started").await;
    adopting.signal(Signal::TERM);
    assert_eq!(adopting.exit().await.code(), Some(0));
    let mut next = started(data);
    next.wait_for_line("control plane started").await;
}

#[tokio::test]
async fn init_writes_nothing_where_a_store_or_a_pepper_is() {
    let both = initialized().await;
    let only_store = initialized().await;
    fs::remove_file(only_store.path().join("pepper.json")).expect("it is there");
    let only_pepper = tempfile::tempdir().expect("a directory can be made");
    let pepper = both.path().join("pepper.json");
    fs::copy(pepper, only_pepper.path().join("pepper.json")).expect("it is the test's");
    let only_log = tempfile::tempdir().expect("a directory can be made");
    fs::write(only_log.path().join("relatch.db-wal"), "lost").expect("it is the test's");
    for (data, code, said) in [
        (&both, 4, &["is already initialized", "recover-admin"][..]),
        (&only_store, 4, &["no pepper file", "restore the file"]),
        (&only_pepper, 4, &["no store", "restore the store"]),
        (&only_log, 1, &["put the database back"]),
    ] {
        let before = contents(data.path());
        let init = ["control", "init", "--data-dir", text(data.path())];

        let refused = relatch(&init, "").await;

        assert_eq!(refused.status.code(), Some(code), "{}", refused.stderr);
        assert_eq!(refused.stdout, "");
        for part in said {
            assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
        }
        assert!(contents(data.path()) == before, "{said:?}: it has written");
    }
    // A start says the same of what is missing, and writes as little.
    for (data, part) in [
        (&only_store, "restore the file from its copy"),
        (&only_pepper, "restore the store from a backup"),
    ] {
        let before = contents(data.path());
        let refused = start(data.path(), &["--new-epoch"]).await;
        assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
        assert!(contents(data.path()) == before, "{part}: it has written");
    }
}

#[tokio::test]
async fn what_another_process_is_creating_is_not_called_missing() {
    let data = initialized().await;
    fs::remove_file(data.path().join("relatch.db")).expect("it is there");
    // As `init` holds it between its pepper and its store, with the name that it wrote.
    let lock = data.path().join("relatch.db.lock");
    let held = fs::File::open(&lock).expect("it is there");
    held.try_lock().expect("nobody runs");
    let before = contents(data.path());
    let dir = ["--data-dir", text(data.path())];
    let init = [&["control", "init"][..], &dir].concat();
    let dev = [&["dev", "--ephemeral-ports"][..], &dir].concat();
    for refused in [
        relatch(&init, "").await,
        relatch(&dev, "").await,
        start(data.path(), &[]).await,
    ] {
        assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
        let owner = "in use by `relatch control init`, process ";
        assert!(refused.stderr.contains(owner), "{}", refused.stderr);
        assert!(
            !refused.stderr.contains("move the pepper"),
            "{}",
            refused.stderr
        );
    }
    assert!(contents(data.path()) == before, "one of them has written");
    held.unlock().expect("it is held");
    let refused = start(data.path(), &[]).await;
    assert!(
        refused.stderr.contains("restore the store"),
        "{}",
        refused.stderr
    );
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_with_its_setting() {
    let data = initialized().await;
    let holder = TcpListener::bind(ANY_PORT).expect("a port is free");
    let taken = holder.local_addr().expect("it is bound").to_string();
    for (flag, setting) in [
        ("--discovery", "discovery"),
        ("--admin-listen", "admin"),
        ("--http", "http"),
    ] {
        let refused = start(data.path(), &[flag, &taken]).await;
        assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
        let said = format!("{setting}: cannot listen on {taken}");
        assert!(refused.stderr.contains(&said), "{}", refused.stderr);
    }
    let discovery = "127.0.0.1:9010".parse().expect("an address");
    let yaml = sidecar_yaml("edge-1", discovery, &["payments"]);
    let file = data.path().join("sidecar.yaml");
    for setting in ["listen", "http"] {
        let line = format!("{setting}: {ANY_PORT}");
        let yaml = yaml.replace(&line, &format!("{setting}: {taken}"));
        fs::write(&file, yaml).expect("the test's directory can be written to");
        let refused = relatch(&["sidecar", "--config", text(&file)], "").await;
        assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
        let said = format!("{setting}: cannot listen on {taken}");
        assert!(refused.stderr.contains(&said), "{}", refused.stderr);
    }
}

/// A data directory on which nobody runs.
async fn initialized() -> TempDir {
    let data = tempfile::tempdir().expect("a directory can be made");
    let init = ["control", "init", "--data-dir", text(data.path())];
    let made = relatch(&init, "").await;
    assert_eq!(made.status.code(), Some(0), "{}", made.stderr);
    data
}

/// What is below `dir`, and `dir` itself.
fn contents(dir: &Path) -> Contents {
    let mut found = Contents::new();
    let mut paths = vec![dir.to_owned()];
    while let Some(path) = paths.pop() {
        let metadata = fs::symlink_metadata(&path).expect("it is there");
        let mut bytes = Vec::new();
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).expect("it reads");
            paths.extend(entries.map(|entry| entry.expect("it reads").path()));
        } else {
            bytes = fs::read(&path).expect("it reads");
        }
        found.insert(path, (metadata.mtime(), metadata.mtime_nsec(), bytes));
    }
    found
}

/// The epoch of every log.
fn epochs(database: &Path) -> Vec<(String, i64)> {
    let database = Connection::open(database).expect("it opens");
    let mut logs = database
        .prepare("SELECT name, epoch FROM logs ORDER BY name")
        .expect("it has logs");
    let rows = logs.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
    rows.expect("it reads")
        .collect::<Result<_, _>>()
        .expect("it reads")
}

/// The beginning of the check value of its pepper that a store holds.
fn recorded_check(data_dir: &Path) -> String {
    let database = Connection::open(data_dir.join("relatch.db")).expect("it opens");
    let payload: Vec<u8> = database
        .query_row(
            "SELECT payload FROM entries WHERE log = '_control' AND kind = 'pepper_added'",
            [],
            |row| row.get(0),
        )
        .expect("it has one");
    let payload: serde_json::Value = serde_json::from_slice(&payload).expect("JSON");
    payload["check"].as_str().expect("a check value")[..8].to_owned()
}

/// Starts a control plane that is expected to serve.
fn started(data_dir: &Path) -> Process {
    let mut all = vec!["control", "--data-dir", text(data_dir)];
    for flag in ["--discovery", "--admin-listen", "--http"] {
        all.extend([flag, ANY_PORT]);
    }
    Process::relatch(&all)
}

/// Starts a control plane that is expected to end by itself. What `args` say of a port counts.
async fn start(data_dir: &Path, args: &[&str]) -> Output {
    let mut all = vec!["control", "--data-dir", text(data_dir)];
    for flag in ["--discovery", "--admin-listen", "--http"] {
        if !args.contains(&flag) {
            all.extend([flag, ANY_PORT]);
        }
    }
    all.extend(args);
    relatch(&all, "").await
}
