//! Webhooks on the command line.

use serde_json::json;

use super::deployment::{CONSUMER, Control, KEYRING};
use crate::support::reserved::Reserved;

#[tokio::test]
async fn a_webhook_is_added_listed_tried_and_removed() {
    let control = Control::start().await;
    control.create_key().await;
    let nobody = Reserved::new();
    let url = format!("http://{}/t0ken", nobody.address());
    let add = [
        "webhook",
        "add",
        "--keyring",
        KEYRING,
        "--consumer",
        CONSUMER,
    ];
    let more = ["--url", &url, "--event", "key.revoked", "--allow-private"];

    let added = control.run(&[&add[..], &more].concat()).await;

    let webhook = added.json();
    let secret = webhook["signing_secret"].as_str().expect("a secret");
    assert_eq!(added.stdout.matches(secret).count(), 1);
    assert_eq!(
        (&webhook["url"], &webhook["consumer"], &webhook["events"]),
        (
            &url.as_str().into(),
            &CONSUMER.into(),
            &json!(["key.revoked"])
        )
    );
    let id = webhook["id"].as_str().expect("an id");
    let list = ["webhook", "list", "--keyring", KEYRING];
    let listed = control.run(&list).await;
    assert_eq!(listed.json()[0]["id"], id);
    assert!(!listed.stdout.contains(secret), "{}", listed.stdout);

    let tried = control.run(&["webhook", "test", id]).await;
    assert_eq!(tried.status.code(), Some(1), "{}", tried.stderr);
    let came: serde_json::Value = serde_json::from_str(&tried.stdout).expect("a document");
    assert_eq!(
        (&came["delivered"], &came["http_status"]),
        (&false.into(), &json!(null))
    );
    assert!(came["problem"].is_string(), "{came}");
    let deliveries = [
        "webhook",
        "deliveries",
        "--keyring",
        KEYRING,
        "--webhook",
        id,
    ];
    assert!(control.json(&deliveries).await.is_array());

    let remove = ["webhook", "remove", "--keyring", KEYRING, id];
    assert_eq!(control.json(&remove).await["id"], id);
    assert_eq!(control.json(&list).await, json!([]));
    let again = control.run(&remove).await;
    assert_eq!(again.status.code(), Some(3), "{}", again.stderr);
    let by_id = control.run(&["webhook", "remove", id]).await;
    assert_eq!(by_id.status.code(), Some(3), "{}", by_id.stderr);
    let newest = ["audit", "list", "--keyring", KEYRING, "--limit", "1"];
    let newest = control.json(&newest).await;
    let kinds: Vec<_> = newest.as_array().expect("a list").iter().collect();
    assert_eq!(kinds.len(), 1, "{newest}");
    assert_eq!(kinds[0]["kind"], "webhook_removed");
    let log = control.stopped().await;
    assert!(!log.has(secret), "{log}");
}

#[tokio::test]
async fn an_address_that_cannot_be_is_refused_and_not_repeated() {
    let control = Control::start().await;
    control.create_key().await;
    for url in ["hooks.example.com/t0ken", "http://hooks.example.com/t0ken"] {
        let add = ["webhook", "add", "--keyring", KEYRING, "--url", url];
        let refused = control.run(&add).await;
        assert_eq!(refused.status.code(), Some(2), "{url}: {}", refused.stderr);
        assert!(!refused.stderr.contains("t0ken"), "{}", refused.stderr);
    }
    let log = control.stopped().await;
    assert!(!log.has("t0ken"), "{log}");
}
