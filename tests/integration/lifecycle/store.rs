//! Control planes that find something wrong when they start: they say what, and change nothing.

use std::{fs, net::TcpListener, path::Path};

use rusqlite::Connection;
use tempfile::TempDir;

use crate::support::{
    process::{Output, relatch},
    relatch::{sidecar_yaml, text},
};

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
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("pepper.json"), "{}", refused.stderr);
    assert!(
        !pepper.exists(),
        "another pepper would make every key unknown"
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
