//! Many writers at once: the log has no gap, and a sidecar has everything.

use std::collections::BTreeSet;

use relatch::proto::admin::{CreateKeyRequest, IssuedKey, admin_client::AdminClient};
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinSet};
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use super::deployment::{CONSUMER, Control, KEYRING, Sidecar, Verdict};
use crate::support::eventually::{DEADLINE, within};

const WRITERS: usize = 8;
const KEYS_EACH: usize = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writers_leave_no_gap_and_sidecars_miss_nothing() {
    let control = Control::start().await;
    let first = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let uri = format!("http://{}", control.plane.admin());
    let token = std::fs::read_to_string(control.plane.token_file()).expect("it is there");
    let token: MetadataValue<Ascii> = format!("Bearer {token}").parse().expect("ASCII");

    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        writers.spawn(write(uri.clone(), token.clone()));
    }
    let keys: Vec<IssuedKey> = writers.join_all().await.concat();

    let revisions: BTreeSet<u64> = keys.iter().map(|key| key.revision).collect();
    let written = (WRITERS * KEYS_EACH) as u64;
    let expected = first.revision + 1..=first.revision + written;
    assert_eq!(revisions, expected.clone().collect());
    let list = ["audit", "list", "--keyring", KEYRING, "--limit", "1000"];
    let log = control.json(&list).await;
    let logged = log.as_array().expect("entries").iter();
    let logged: Vec<u64> = logged
        .filter_map(|entry| entry["revision"].as_u64())
        .collect();
    assert_eq!(logged, (1..=*expected.end()).collect::<Vec<_>>());
    assert_eq!(control.json(&["audit", "verify"]).await[1]["intact"], true);

    sidecar.reaches(*expected.end()).await;
    let held = sidecar.keyring().await;
    assert_eq!(held["revision"], *expected.end());
    assert_eq!(held["keys"]["active"], written + 1);
    for key in &keys {
        assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    }
    let keyring: Value = control.json(&["keyring", "show", KEYRING]).await;
    assert_eq!(keyring["keys"], written + 1);
    let log = sidecar.stopped().await;
    assert_eq!(log.count("snapshot applied"), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_in_the_middle_of_a_storm_of_commits_loses_none_that_was_answered() {
    const KILLS: usize = 3;
    /// Enough that several transactions of several commits each are behind.
    const ANSWERED: usize = 40;
    let mut control = Control::start().await;
    control.create_key().await;
    let token = std::fs::read_to_string(control.plane.token_file()).expect("it is there");
    let token: MetadataValue<Ascii> = format!("Bearer {token}").parse().expect("ASCII");
    let mut answered = Vec::new();
    for _ in 0..KILLS {
        let uri = format!("http://{}", control.plane.admin());
        let (tell, mut told) = mpsc::unbounded_channel();
        let mut writers = JoinSet::new();
        for _ in 0..WRITERS {
            writers.spawn(write_until_it_fails(
                uri.clone(),
                token.clone(),
                tell.clone(),
            ));
        }
        drop(tell);
        for _ in 0..ANSWERED {
            let key = within(DEADLINE, "an answer", told.recv()).await;
            answered.push(key.expect("the writers go on"));
        }
        control.plane.kill().await;
        writers.join_all().await;
        while let Ok(key) = told.try_recv() {
            answered.push(key);
        }
        control.plane.restart().await;
    }
    assert_eq!(control.json(&["audit", "verify"]).await[1]["intact"], true);
    let revisions: BTreeSet<u64> = answered.iter().map(|key| key.revision).collect();
    assert_eq!(
        revisions.len(),
        answered.len(),
        "two commits were answered alike"
    );
    let list = ["audit", "list", "--keyring", KEYRING, "--limit", "1000"];
    let log = control.json(&list).await;
    let log = log.as_array().expect("entries");
    for key in &answered {
        let entry = log.iter().find(|entry| entry["revision"] == key.revision);
        let entry = entry.expect("what was answered is in the log");
        assert_eq!(entry["payload"]["key_id"], key.key_id, "{entry}");
    }
}

/// Makes keys one after another, and tells of each that was answered, until the control plane is gone.
async fn write_until_it_fails(
    uri: String,
    token: MetadataValue<Ascii>,
    tell: mpsc::UnboundedSender<IssuedKey>,
) {
    let channel = Channel::from_shared(uri).expect("an address");
    let mut admin = AdminClient::new(channel.connect().await.expect("it listens"));
    loop {
        let mut request = Request::new(CreateKeyRequest {
            keyring: KEYRING.to_owned(),
            consumer: CONSUMER.to_owned(),
            ..CreateKeyRequest::default()
        });
        request
            .metadata_mut()
            .insert("authorization", token.clone());
        let Ok(answer) = admin.create_key(request).await else {
            return;
        };
        // Who listened has seen enough.
        let _ = tell.send(answer.into_inner());
    }
}

/// Makes keys one after another on a connection of its own.
async fn write(uri: String, token: MetadataValue<Ascii>) -> Vec<IssuedKey> {
    let channel = Channel::from_shared(uri).expect("an address");
    let mut admin = AdminClient::new(channel.connect().await.expect("it listens"));
    let mut keys = Vec::new();
    for _ in 0..KEYS_EACH {
        let mut request = Request::new(CreateKeyRequest {
            keyring: KEYRING.to_owned(),
            consumer: CONSUMER.to_owned(),
            ..CreateKeyRequest::default()
        });
        request
            .metadata_mut()
            .insert("authorization", token.clone());
        keys.push(admin.create_key(request).await.expect("a key").into_inner());
    }
    keys
}
