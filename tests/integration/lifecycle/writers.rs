//! Many writers at once: the log has no gap, and a sidecar has everything.

use std::collections::BTreeSet;

use relatch::proto::admin::{CreateKeyRequest, IssuedKey, admin_client::AdminClient};
use serde_json::Value;
use tokio::task::JoinSet;
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use super::deployment::{CONSUMER, Control, KEYRING, Sidecar, Verdict};

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
    assert_eq!(sidecar.logged("snapshot applied"), 1);
    let keyring: Value = control.json(&["keyring", "show", KEYRING]).await;
    assert_eq!(keyring["keys"], written + 1);
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
