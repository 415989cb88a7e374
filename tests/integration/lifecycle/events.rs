//! Webhooks are told of every kind of event, by what operators and policies do, and under ids that outlive the control
//! plane.

use std::collections::{BTreeMap, BTreeSet};

use relatch::key::EventKind;
use serde_json::{Value, json};

use super::deployment::{CONSUMER, Control, KEYRING, time};
use crate::support::{
    eventually::eventually,
    receiver::{Received, Receiver},
};

/// A control plane whose webhook is told of everything.
struct Scene {
    control: Control,
    receiver: Receiver,
    webhook: String,
}

impl Scene {
    async fn new() -> Self {
        let sinks = "sinks: [{ name: shut, exec: { command: [/bin/false] } }]\n";
        let control = Control::start_brisk(sinks).await;
        let receiver = Receiver::start().await;
        let create = ["keyring", "create", KEYRING];
        control.json(&create).await;
        let url = receiver.url();
        let add = [
            "webhook",
            "add",
            "--keyring",
            KEYRING,
            "--url",
            &url,
            "--allow-private",
        ];
        let added = control.json(&add).await;
        let text = |name: &str| added[name].as_str().expect("it is told").to_owned();
        receiver.believe(&text("signing_secret"));
        Self {
            webhook: text("id"),
            control,
            receiver,
        }
    }

    /// Waits until an event of a kind about a key was delivered.
    async fn told(&self, kind: &str, key_id: &str) -> Value {
        let received = self.received(kind, key_id, |status| status == 204).await;
        received.event
    }

    async fn received(&self, kind: &str, key_id: &str, status: fn(u16) -> bool) -> Received {
        let kind = format!("dev.relatch.{kind}");
        eventually(&kind, async || {
            let received = self.receiver.received();
            received.into_iter().find(|received| {
                let event = &received.event;
                event["type"] == kind && event["subject"] == key_id && status(received.status)
            })
        })
        .await
    }

    async fn set_policy(&self, key_id: &str, settings: &[&str]) {
        let set = ["policy", "set", key_id];
        self.control.json(&[&set, settings].concat()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_event_is_delivered_signed_and_under_a_stable_id() {
    let mut scene = Scene::new().await;
    let test = ["webhook", "test", "--keyring", KEYRING, &scene.webhook];
    assert_eq!(scene.control.json(&test).await["delivered"], true);

    tokio::join!(
        a_rotation(&scene),
        a_stalled_rotation(&scene),
        a_key_without_a_rotation(&scene)
    );
    a_secret_that_is_lost_with_the_control_plane(&mut scene).await;
    let revoked = a_revocation_over_a_restart(&mut scene).await;

    assert_eq!(scene.receiver.refused(), Vec::<String>::new());
    let received = scene.receiver.received();
    let kinds: BTreeSet<&str> = received
        .iter()
        .filter_map(|received| {
            received.event["type"]
                .as_str()?
                .strip_prefix("dev.relatch.")
        })
        .collect();
    let all = EventKind::ALL.map(EventKind::as_str);
    assert_eq!(kinds, BTreeSet::from(all));
    ids_are_those_of_the_log(&scene, &received).await;
    let attempts = received.iter().filter(|received| received.id == revoked);
    let statuses: Vec<u16> = attempts.map(|received| received.status).collect();
    let (last, before) = statuses.split_last().expect("it was delivered");
    assert_eq!(*last, 204);
    assert!(!before.is_empty() && before.iter().all(|status| *status == 503));
}

/// Started, reminded of, drained and retired.
async fn a_rotation(scene: &Scene) {
    let key = scene.control.create_key().await;
    let times = [
        "--overlap",
        "8s",
        "--idle-for",
        "4s",
        // There is no reminder where the control plane gets no processor from here to the end.
        "--remind-before",
        "6s",
    ];
    scene.set_policy(&key.id, &times).await;
    let done = scene.control.json(&["rotate", "start", &key.id]).await;

    let started = scene.told("rotation.started", &key.id).await;
    let data = json!({
        "keyring": KEYRING,
        "consumer": CONSUMER,
        "key_id": key.id,
        "version": 1,
        "replaced_by": 2,
        "sunset": done["old_until"],
    });
    assert_eq!(started["data"], data);
    let reminder = scene.told("rotation.reminder", &key.id).await;
    assert_eq!(reminder["data"], data);
    assert!(time(&reminder["time"]) < time(&done["old_until"]));
    let drained = scene.told("rotation.drained", &key.id).await;
    assert_eq!(drained["data"]["version"], 1);
    assert!(time(&drained["data"]["unused_since"]) < time(&drained["time"]));
    let retired = scene.told("rotation.retired", &key.id).await;
    let data = &retired["data"];
    assert_eq!(
        (&data["version"], &data["replaced_by"]),
        (&1.into(), &2.into())
    );
    assert_eq!(data["forced"], Value::Null);
    assert!(time(&retired["time"]) >= time(&done["old_until"]));
}

/// Held, taken back, and ended by force.
async fn a_stalled_rotation(scene: &Scene) {
    let control = &scene.control;
    let key = control.create_key().await;
    scene
        .set_policy(&key.id, &["--overlap", "1h", "--idle-for", "1h"])
        .await;
    let start = ["rotate", "start", &key.id, "--overlap", "1s"];
    let done = control.json(&start).await;

    let held = scene.told("rotation.held", &key.id).await;
    let data = &held["data"];
    assert_eq!(
        (&data["version"], &data["sunset"]),
        (&1.into(), &done["old_until"])
    );
    let reason = data["reason"].as_str().expect("a reason");
    assert!(reason.contains("must be unused for 1h"), "{reason}");

    let reason = ["--reason", "acme cannot deploy"];
    let rollback = ["rotate", "rollback", &key.id];
    control.json(&[&rollback[..], &reason].concat()).await;
    let back = scene.told("rotation.rolled_back", &key.id).await;
    let data = &back["data"];
    assert_eq!(
        (&data["version"], &data["replaced_by"]),
        (&2.into(), &1.into())
    );
    assert_eq!(data["reason"], "acme cannot deploy");

    let force = ["rotate", "retire", &key.id, "--version", "2", "--force"];
    control.json(&[&force[..], &reason].concat()).await;
    let retired = scene.told("rotation.retired", &key.id).await;
    let data = &retired["data"];
    assert_eq!(
        (&data["version"], &data["forced"]),
        (&2.into(), &true.into())
    );
}

/// Due without a sink, and about to expire.
async fn a_key_without_a_rotation(scene: &Scene) {
    let control = &scene.control;
    let key = control.create_key().await;
    let often = [
        "--rotate-every",
        "1s",
        "--overlap",
        "0s",
        "--idle-for",
        "0s",
    ];
    scene.set_policy(&key.id, &often).await;
    let due = scene.told("rotation.due", &key.id).await;
    assert_eq!(due["data"]["version"], 1);
    assert!(time(&due["data"]["due_since"]) <= time(&due["time"]));

    let create = [
        "key",
        "create",
        "--keyring",
        KEYRING,
        "--consumer",
        CONSUMER,
    ];
    let key = control
        .json(&[&create[..], &["--expires-in", "1h"]].concat())
        .await;
    let key_id = key["key_id"].as_str().expect("an id");
    let expiring = scene.told("key.expiring", key_id).await;
    assert_eq!(expiring["data"]["expires_at"], key["expires_at"]);
}

/// Its sink does not confirm it before the control plane is killed.
async fn a_secret_that_is_lost_with_the_control_plane(scene: &mut Scene) {
    let key = scene.control.create_key().await;
    let often = [
        "--rotate-every",
        "1s",
        "--overlap",
        "0s",
        "--idle-for",
        "0s",
    ];
    scene
        .set_policy(&key.id, &[&often[..], &["--sink", "shut"]].concat())
        .await;
    scene.told("rotation.held", &key.id).await;
    scene.control.plane.kill().await;
    scene.control.plane.restart().await;

    let lost = scene.told("rotation.secret_lost", &key.id).await;

    let control = &scene.control;
    let status = control.json(&["rotate", "status", &key.id]).await;
    let rotation = &status["rotations"][0];
    assert_eq!(
        (&rotation["version"], &rotation["phase"]),
        (&2.into(), &"secret_lost".into())
    );
    assert_eq!(lost["data"]["reason"], rotation["waits_for"]);
    let waits_for = rotation["waits_for"].as_str().expect("a sentence");
    let abort = format!("relatch rotate abort {} --reason", key.id);
    assert!(waits_for.contains(&abort), "{waits_for}");
    let label = format!("key_id=\"{}\"", key.id);
    let labels = [label.as_str(), "version=\"2\"", "phase=\"secret_lost\""];
    let phase = control.metric("relatch_rotation_phase", &labels).await;
    assert_eq!(phase.map(|phase| phase > 0.5), Some(true));
    // The command that is named helps: the schedule begins anew.
    let abort = [
        "rotate",
        "abort",
        &key.id,
        "--reason",
        "the sink has no secret",
    ];
    control.json(&abort).await;
    let staged = |change: &Value| {
        change["kind"] == "delivery_begun" && change["version"] == 3 && change["key_id"] == *key.id
    };
    control.change("the rotation begins anew", staged).await;
    set_back(scene, &key.id).await;
}

/// Ends the rotations of a key, which nothing comes of.
async fn set_back(scene: &Scene, key_id: &str) {
    scene.set_policy(key_id, &["--sink", "none"]).await;
    let abort = ["rotate", "abort", key_id, "--reason", "it was only a test"];
    scene.control.json(&abort).await;
}

/// Its event fails before the control plane is killed, and comes after that. Returns its id.
async fn a_revocation_over_a_restart(scene: &mut Scene) -> String {
    let key = scene.control.create_key().await;
    scene.receiver.answer_with(503);
    let revoke = ["revoke", &key.id, "--all", "--reason", "leaked"];
    scene.control.json(&revoke).await;
    let failed = scene
        .received("key.revoked", &key.id, |status| status == 503)
        .await;
    // A control plane that dies before it has noted the answer leaves the delivery claimed for a minute.
    eventually("the attempt is noted", async || {
        let listed = ["webhook", "deliveries", "--keyring", KEYRING];
        let deliveries = scene.control.json(&listed).await;
        let deliveries = deliveries.as_array().expect("a list");
        let noted = |delivery: &&Value| {
            delivery["event_id"] == failed.id.as_str() && delivery["last_http_status"] == 503
        };
        deliveries.iter().find(noted).map(|_| ())
    })
    .await;
    scene.control.plane.kill().await;
    scene.receiver.answer_with(204);
    scene.control.plane.restart().await;

    let came = scene
        .received("key.revoked", &key.id, |status| status == 204)
        .await;

    assert_eq!((&came.id, &came.event), (&failed.id, &failed.event));
    let data = &came.event["data"];
    assert_eq!(
        (&data["version"], &data["versions"]),
        (&1.into(), &json!([1]))
    );
    assert_eq!(data["reason"], "leaked");
    came.id
}

/// Each is that of the change which it tells of, and no change is told of under two.
async fn ids_are_those_of_the_log(scene: &Scene, received: &[Received]) {
    let control = &scene.control;
    let keyring = control.json(&["keyring", "show", KEYRING]).await;
    let list = ["audit", "list", "--keyring", KEYRING, "--limit", "1000"];
    let log = control.json(&list).await;
    let at_revision: BTreeMap<String, &Value> = log
        .as_array()
        .expect("a list of changes")
        .iter()
        .map(|change| {
            let id = format!("{KEYRING}-{}-{}", keyring["epoch"], change["revision"]);
            (id, change)
        })
        .collect();
    for Received { id, event, .. } in received {
        assert_eq!(event["id"], *id);
        if event["type"] == "dev.relatch.webhook.test" {
            assert_eq!(event["data"]["webhook_id"], scene.webhook);
            continue;
        }
        let change = at_revision.get(id);
        let change = change.unwrap_or_else(|| panic!("{id} is not in the log: {event}"));
        assert_eq!(change["payload"]["key_id"], event["subject"], "{change}");
        assert_eq!(change["at"], event["time"], "{change}");
    }
}
