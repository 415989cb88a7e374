//! Sinks against what they deliver to: a real OpenBao. Files and programs are real in the unit tests.

use std::path::PathBuf;

use relatch::{
    config::{
        SinkSettings,
        sink::SinkTarget,
        vault::{VaultMount, VaultSettings},
    },
    control::sink::{SecretDelivery, Sinks},
    key::{
        ConsumerId, KeyId, KeyringName, Prefix, RotationId, Secret, SinkName, VersionNumber,
        VersionRef, Window,
    },
};
use serde_json::{Value, json};

use super::support::openbao::OpenBao;

/// A key, and the sink that its secrets go to.
struct Scene {
    bao: OpenBao,
    settings: VaultSettings,
    root: PathBuf,
    keyring: KeyringName,
    consumer: ConsumerId,
    key_id: KeyId,
}

impl Scene {
    async fn new() -> Self {
        let bao = OpenBao::start().await;
        let settings = VaultSettings {
            address: bao.address().parse().expect("on loopback"),
            mount: VaultMount::default(),
            path: "relatch/{keyring}/{consumer}/{key_id}"
                .parse()
                .expect("a path"),
            token_file: bao.root_token_file(),
            namespace: None,
            ca_file: None,
        };
        Self {
            bao,
            root: settings.token_file.clone(),
            settings,
            keyring: "payments".parse().expect("a name"),
            consumer: "team/checkout@eu:1".parse().expect("a name"),
            key_id: KeyId::generate().expect("the random source works"),
        }
    }

    fn sinks(&self) -> Sinks {
        let name = name();
        let target = SinkTarget::Vault(self.settings.clone());
        Sinks::new(&[SinkSettings { name, target }]).expect("it needs no certificates")
    }

    fn secret(&self) -> Secret {
        Secret::generate(&Prefix::default(), self.key_id).expect("the random source works")
    }

    async fn deliver(&self, number: u32, secret: &Secret) -> Result<(), String> {
        let delivery = SecretDelivery {
            keyring: &self.keyring,
            consumer: &self.consumer,
            version: VersionRef {
                key_id: self.key_id,
                version: VersionNumber::new(number).expect("counted from 1"),
            },
            rotation: RotationId::generate().expect("the random source works"),
            window: Window::default(),
            secret,
        };
        let sinks = self.sinks();
        let sink = sinks.get(&name()).expect("it is declared");
        sink.deliver(&delivery).await.map_err(|error| {
            let text = format!("{error} {error:?} {delivery:?} {sink:?}");
            let (_, hidden) = secret.expose().rsplit_once('_').expect("a token");
            assert!(!text.contains(hidden), "the secret is in {text}");
            for token in [&self.root, &self.settings.token_file] {
                let token = std::fs::read_to_string(token).expect("it is the test's");
                assert!(!text.contains(&token), "a token is in {text}");
            }
            error.to_string()
        })
    }

    /// Where the secrets go, within the mount.
    fn path(&self) -> String {
        format!("relatch/payments/team~checkout@eu:1/{}", self.key_id)
    }

    /// The secret that is there, and the version by which OpenBao counts it.
    async fn found(&self, mount: &str) -> (Value, u64) {
        let path = format!("{mount}/data/{}", self.path());
        let mut read = self.bao.read(&path).await;
        let revision = read["data"]["metadata"]["version"].as_u64();
        (read["data"]["data"].take(), revision.unwrap_or(0))
    }

    fn expected(&self, number: u32, secret: &Secret, previous: Option<&Secret>) -> Value {
        let mut data = json!({
            "key": secret.expose(),
            "key_id": self.key_id.as_str(),
            "version": number,
            "consumer": "team/checkout@eu:1",
        });
        if let Some(previous) = previous {
            data["previous"] = previous.expose().into();
        }
        data
    }
}

fn name() -> SinkName {
    "vault".parse().expect("a name")
}

#[tokio::test]
async fn openbao_holds_the_new_secret_and_the_one_before() {
    let scene = Scene::new().await;
    let [one, two] = [scene.secret(), scene.secret()];
    scene.deliver(1, &one).await.expect("it is delivered");
    assert_eq!(
        scene.found("secret").await,
        (scene.expected(1, &one, None), 1)
    );
    // Again and again: a delivery of which nobody knows whether it arrived.
    for _ in 0..3 {
        scene.deliver(2, &two).await.expect("it is delivered");
        assert_eq!(
            scene.found("secret").await,
            (scene.expected(2, &two, Some(&one)), 2)
        );
    }
}

#[tokio::test]
async fn what_was_deleted_from_openbao_is_written_anew() {
    let scene = Scene::new().await;
    let [one, two] = [scene.secret(), scene.secret()];
    scene.deliver(1, &one).await.expect("it is delivered");
    let path = format!("secret/delete/{}", scene.path());
    scene.bao.write(&path, &json!({ "versions": [1] })).await;
    assert_eq!(scene.found("secret").await, (Value::Null, 0));
    scene.deliver(2, &two).await.expect("it is delivered");
    assert_eq!(
        scene.found("secret").await,
        (scene.expected(2, &two, None), 2)
    );
}

#[tokio::test]
async fn control_planes_that_deliver_at_once_write_once() {
    let scene = Scene::new().await;
    let [one, two] = [scene.secret(), scene.secret()];
    scene.deliver(1, &one).await.expect("it is delivered");
    let delivered = tokio::join!(
        scene.deliver(2, &two),
        scene.deliver(2, &two),
        scene.deliver(2, &two),
        scene.deliver(2, &two),
    );
    assert_eq!(delivered, (Ok(()), Ok(()), Ok(()), Ok(())));
    assert_eq!(
        scene.found("secret").await,
        (scene.expected(2, &two, Some(&one)), 2)
    );
}

#[tokio::test]
async fn a_token_needs_read_create_and_update() {
    let mut scene = Scene::new().await;
    let [one, two] = [scene.secret(), scene.secret()];
    let place = format!("secret/data/{}", scene.path());
    let needed = ["read", "create", "update"];
    for (at, missing) in needed.iter().enumerate() {
        let given: Vec<&str> = needed
            .iter()
            .copied()
            .filter(|one| one != missing)
            .collect();
        scene.settings.token_file = scene.bao.limited_token_file(&place, &given).await;
        // The first version is created, the second one updates it.
        let refusal = if *missing == "update" {
            scene.deliver(1, &one).await.expect("it is created");
            scene.deliver(2, &two).await
        } else {
            scene.deliver(1, &one).await
        };
        let refusal = refusal.expect_err("the token may not");
        let expected = format!(
            "{place}: status 403, \"1 error occurred:\\n\\t* permission denied\\n\\n\"; the token must be valid, and \
             its policy must allow `read`, `create` and `update` on {place}"
        );
        assert!(refusal.ends_with(&expected), "{at}: {refusal}");
    }
    scene.settings.token_file = scene.bao.limited_token_file(&place, &needed).await;
    scene.deliver(2, &two).await.expect("it is delivered");
    assert_eq!(
        scene.found("secret").await,
        (scene.expected(2, &two, Some(&one)), 2)
    );
}

#[tokio::test]
async fn a_mount_may_demand_check_and_set() {
    let mut scene = Scene::new().await;
    let mount = json!({ "type": "kv", "options": { "version": "2" } });
    scene.bao.write("sys/mounts/team-a/kv", &mount).await;
    let config = json!({ "cas_required": true });
    scene.bao.write("team-a/kv/config", &config).await;
    scene.settings.mount = "team-a/kv".parse().expect("a mount");
    let [one, two] = [scene.secret(), scene.secret()];
    scene.deliver(1, &one).await.expect("it is delivered");
    scene.deliver(2, &two).await.expect("it is delivered");
    assert_eq!(
        scene.found("team-a/kv").await,
        (scene.expected(2, &two, Some(&one)), 2)
    );
}

#[tokio::test]
async fn a_namespace_has_secrets_of_its_own() {
    let mut scene = Scene::new().await;
    scene.bao.write("sys/namespaces/team-a", &json!({})).await;
    let mount = json!({ "type": "kv", "options": { "version": "2" } });
    scene.bao.write("team-a/sys/mounts/secret", &mount).await;
    scene.settings.namespace = Some("team-a".parse().expect("a namespace"));
    let one = scene.secret();
    scene.deliver(1, &one).await.expect("it is delivered");
    assert_eq!(
        scene.found("team-a/secret").await,
        (scene.expected(1, &one, None), 1)
    );
    assert_eq!(scene.found("secret").await, (Value::Null, 0));
}

#[tokio::test]
async fn what_openbao_refuses_is_told_with_what_to_do() {
    let mut scene = Scene::new().await;
    let secret = scene.secret();
    let token_file = scene.bao.token_file("hvs.unknown");
    scene.settings.token_file = token_file;
    let refusal = scene.deliver(1, &secret).await.expect_err("no such token");
    assert!(
        refusal.contains("status 403") && refusal.contains("the token must be valid"),
        "{refusal}"
    );
    scene.settings.token_file.clone_from(&scene.root);

    scene.settings.mount = "absent".parse().expect("a mount");
    let refusal = scene.deliver(1, &secret).await.expect_err("no such mount");
    assert!(
        refusal.ends_with("check `mount` and `namespace`"),
        "{refusal}"
    );

    scene
        .bao
        .write("sys/mounts/old", &json!({ "type": "kv" }))
        .await;
    scene.settings.mount = "old".parse().expect("a mount");
    let refusal = scene.deliver(1, &secret).await.expect_err("version 1");
    assert!(
        refusal.contains("as a KV version 2 mount does"),
        "{refusal}"
    );

    scene.settings.mount = VaultMount::default();
    scene.bao.write("sys/seal", &json!({})).await;
    let refusal = scene.deliver(1, &secret).await.expect_err("sealed");
    assert!(
        refusal.contains("status 503") && refusal.contains("unseal"),
        "{refusal}"
    );
}
