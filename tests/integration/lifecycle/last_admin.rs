//! The last admin token: nobody can delete it by mistake, and an operator who has lost it gets another one on the machine of
//! the store.

use std::fs;

use rustix::process::{Signal, getuid};

use super::deployment::Control;
use crate::support::{
    process::relatch,
    relatch::{TOKEN_FILE, text},
};

#[tokio::test]
async fn the_last_admin_token_that_does_not_expire_cannot_be_ended() {
    let control = Control::start().await;
    let tokens = control.json(&["token", "list"]).await;
    let first = tokens[0]["id"].as_str().expect("an id").to_owned();
    control
        .create_token("admin", &["--expires-in", "90d"])
        .await;

    let refused = control.run(&["token", "end", &first]).await;

    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    for part in [&first, "relatch token create --role admin", "recover-admin"] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
    let (second, file) = control.create_token("admin", &[]).await;
    control.json(&["token", "end", &first]).await;
    let end = ["token", "end", &second];
    let refused = control.plane.cli_as(&file, &end).await;
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
}

#[tokio::test]
async fn whoever_has_lost_every_admin_token_gets_another_one_beside_the_store() {
    let mut control = Control::start().await;
    let dir = text(control.data_dir()).to_owned();
    let recover = ["control", "recover-admin", "--data-dir", &dir, "-o", "json"];
    let refused = relatch(&recover, "").await;
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    assert_eq!(refused.stdout, "");
    let process = format!("process {} on ", control.plane.process.id());
    assert!(refused.stderr.contains(&process), "{}", refused.stderr);
    let former = fs::read_to_string(control.plane.token_file()).expect("it is there");
    control.plane.process.signal(Signal::TERM);
    control.plane.process.exit().await;

    let recovered = relatch(&recover, "").await;

    let shown = recovered.json();
    let token = shown["admin_token"].as_str().expect("it is shown");
    let id = shown["token_id"].as_str().expect("it is shown");
    assert!(token.contains(id), "{id}");
    assert_eq!(recovered.stdout.matches(token).count(), 1);
    assert!(!recovered.stderr.contains(token));
    fs::write(control.data_dir().join(TOKEN_FILE), token).expect("the directory is the test's");
    control.plane.restart().await;
    let tokens = control.json(&["token", "list"]).await;
    let found = tokens.as_array().expect("a list").iter();
    let found = found.filter(|token| token["id"] == id);
    let found: Vec<_> = found.collect();
    assert_eq!(found.len(), 1, "{tokens}");
    assert_eq!(found[0]["role"], "admin");
    assert!(found[0]["expires_at"].is_null(), "{tokens}");
    let log = control.json(&["audit", "list"]).await;
    let newest = log.as_array().and_then(|log| log.last()).expect("a log");
    assert_eq!(newest["kind"], "token_created");
    let actor = newest["actor"].as_str().expect("an actor");
    let who = format!("relatch control recover-admin (user {}", getuid().as_raw());
    assert!(actor.starts_with(&who), "{actor}");
    // Nobody else was shut out.
    let file = control.data_dir().join("former.token");
    fs::write(&file, former).expect("the directory is the test's");
    let listed = control.plane.cli_as(&file, &["token", "list"]).await;
    assert_eq!(listed.status.code(), Some(0), "{}", listed.stderr);
}
