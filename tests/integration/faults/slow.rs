//! A slow link: what is large arrives, and what is urgent does not wait for it.

use std::time::Duration;

use relatch::proto::admin::{self, revoke_request};
use serde_json::Value;
use tokio::{task::JoinSet, time::Instant};

use super::{
    asker::{check_request, checks, outcome},
    fleet::{KEYRING, admin_of},
    history::Outcome,
};
use crate::support::{
    eventually::eventually,
    proxy::{Fault, FaultProxy},
    relatch::{Control, Sidecar, sidecar_yaml},
};

/// More revisions than are kept, so that a sidecar which has missed them needs a snapshot.
const KEYS: usize = 8_500;
const WRITERS: usize = 50;
/// What makes an item some 400 bytes long, and the snapshot 3.2 MB.
const SCOPES: usize = 5;

fn key(scopes: usize) -> admin::CreateKeyRequest {
    admin::CreateKeyRequest {
        keyring: KEYRING.to_owned(),
        consumer: "acme".to_owned(),
        scopes: (0..scopes)
            .map(|number| format!("{number}-{}", "x".repeat(60)))
            .collect(),
        create_missing: true,
        ..admin::CreateKeyRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it takes a minute, and measures time: run it with --nocapture when the transport has changed"]
async fn a_revocation_overtakes_a_snapshot_on_a_slow_link_and_the_snapshot_arrives() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let control = Control::start(data.path()).await;
    let mut admin = admin_of(&control);
    let old = admin
        .create_key(key(0))
        .await
        .expect("a new key")
        .into_inner();
    let proxy = FaultProxy::start(control.discovery()).await;
    let yaml = sidecar_yaml("edge-1", proxy.address(), &[KEYRING]);
    let sidecar = Sidecar::start(&yaml).await.until_ready().await;
    let mut client = checks(&sidecar.ext_authz());
    let mut check = async || {
        let answer = client.check(check_request(&old.secret)).await;
        outcome(answer.expect("the sidecar answers").into_inner())
    };
    assert_eq!(check().await, Outcome::Allowed);
    proxy.cut().await;
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let mut admin = admin.clone();
        writers.spawn(async move {
            for _ in 0..KEYS / WRITERS {
                admin.create_key(key(SCOPES)).await.expect("a new key");
            }
        });
    }
    writers.join_all().await;
    let newest = admin.create_key(key(0)).await.expect("a new key");
    let newest = newest.into_inner().revision;
    let revision = async || {
        let status: Value = sidecar.get("/status").await.json();
        status["keyrings"][0]["revision"].as_u64()
    };

    proxy.set(Fault::Throttled(150_000));
    let before = proxy.carried();
    eventually("the snapshot is on its way", async || {
        (proxy.carried() - before > 300_000).then_some(())
    })
    .await;
    let revoke = admin::RevokeRequest {
        key_id: old.key_id.clone(),
        which: Some(revoke_request::Which::All(true)),
        reason: "leaked".to_owned(),
        ..admin::RevokeRequest::default()
    };
    let began = Instant::now();
    admin.revoke(revoke).await.expect("it is revoked");
    let denied = Outcome::Denied("revoked".to_owned());
    while check().await != denied {
        assert!(began.elapsed() < Duration::from_mins(2), "it is in force");
    }
    let took = began.elapsed();

    assert!(
        revision().await < Some(newest),
        "the snapshot is on its way"
    );
    println!("in force after {took:?}");
    // Three times what it takes.
    assert!(took < Duration::from_secs(3), "in force after {took:?}");
    proxy.set(Fault::Throttled(100_000));
    let connected = proxy.connections();
    eventually("the snapshot arrives", async || {
        (revision().await? >= newest).then_some(())
    })
    .await;
    let carried = proxy.carried() - before;
    println!("{carried} bytes carried");
    assert!(carried > 3_200_000, "{carried} bytes carried");
    assert_eq!(proxy.connections(), connected, "the stream broke");
}
