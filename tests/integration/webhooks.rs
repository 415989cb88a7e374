//! The receivers of `docs/webhooks.md`, taken out of the page and run: they believe what relatch sends them, and nothing
//! else.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command, sync::Arc};

use http::Method;
use relatch::{
    clock::Clock,
    control::{
        catalog::Catalog,
        metrics::ControlMetrics,
        webhook::{Webhooks, metrics::WebhookMetrics},
    },
    key::{KeyringName, MasterPepper, PepperId, Prefix, Timestamp, Webhook, WebhookId, operation},
    outbound::{Limits, Outbound, OutboundUrl, Request},
    store::{SqliteOptions, SqliteStore},
};
use tempfile::TempDir;

use crate::support::{
    eventually::DEADLINE,
    page::{example, node},
    process::Process,
};

/// The page.
const PAGE: &str = include_str!("../../docs/webhooks.md");

/// A receiver of the page, named by the file that its first line names.
#[derive(Clone, Copy, Debug)]
enum Example {
    Python,
    TypeScript,
}

/// A receiver that runs, and a control plane's webhooks that tell it of things.
struct Scene {
    receiver: Process,
    url: String,
    webhooks: Webhooks,
    catalog: Arc<Catalog>,
    webhook: WebhookId,
    clock: Clock,
    _directory: TempDir,
}

impl Example {
    const fn file(self) -> &'static str {
        match self {
            Self::Python => "receive.py",
            Self::TypeScript => "receive.mts",
        }
    }

    fn program(self) -> PathBuf {
        match self {
            Self::Python => "python3".into(),
            Self::TypeScript => node(),
        }
    }

    /// Its text in the page.
    fn text(self) -> &'static str {
        example(PAGE, self.file())
    }
}

impl Scene {
    async fn new(example: Example) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let clock = Clock::system();
        let pepper = MasterPepper::generate(PepperId::new(1)).expect("the random source works");
        let catalog = open(&directory, &clock, &pepper).await;
        let webhooks = Webhooks::new(Arc::clone(&catalog), pepper, WebhookMetrics::default());
        let webhooks = webhooks.expect("they can be made");
        let webhook = WebhookId::generate().expect("the random source works");

        let path = |name: &str| directory.path().join(name);
        fs::write(path(example.file()), example.text()).expect("it can be written");
        let secret = webhooks.secret(webhook).expose();
        fs::write(path("secret"), secret.as_str()).expect("it can be written");
        let mut command = Command::new(example.program());
        command
            .arg(path(example.file()))
            .env("WEBHOOK_SECRET_FILE", path("secret"))
            .env("PORT", "0");
        let mut receiver = Process::start(&mut command);
        let line = receiver.wait_for_line("listening on port ").await;
        let port = line.rsplit(' ').next().expect("the port is last");
        let url = format!("http://127.0.0.1:{port}/events");

        let scene = Self {
            receiver,
            url,
            webhooks,
            catalog,
            webhook,
            clock,
            _directory: directory,
        };
        scene.add_webhook(webhook).await;
        scene
    }

    async fn add_webhook(&self, id: WebhookId) {
        let webhook = Webhook {
            id,
            url: self.url.clone(),
            consumer: None,
            events: BTreeSet::new(),
            allow_private: true,
            created_at: self.clock.wall(),
        };
        let served = self.catalog.get(&keyring()).expect("it exists");
        let added = self
            .catalog
            .commit(&served, "test", |keyring, _| {
                Ok((keyring.add_webhook(webhook.clone())?, ()))
            })
            .await;
        added.expect("a possible webhook");
    }

    /// Tries a webhook out, and returns the status.
    async fn test(&self, webhook: WebhookId) -> Option<u16> {
        let tried = self.webhooks.test(&keyring(), webhook).await;
        tried.expect("it exists").status
    }

    /// Sends what somebody signed with the webhook's secret for `signed`, with `body`.
    async fn send(&self, id: &str, at: Timestamp, signed: &str, body: &str) -> u16 {
        let secret = self.webhooks.secret(self.webhook);
        let limits = Limits {
            connect: DEADLINE,
            total: DEADLINE,
        };
        let client = Outbound::guarded(limits).expect("a client");
        let request = Request {
            method: Method::POST,
            url: OutboundUrl::parse(&self.url).expect("a URL"),
            headers: secret.headers(id, at, signed.as_bytes()),
            body: body.to_owned().into(),
            allow_private: true,
        };
        let answer = client.send(request).await.expect("it answers");
        answer.status.as_u16()
    }
}

async fn open(directory: &TempDir, clock: &Clock, pepper: &MasterPepper) -> Arc<Catalog> {
    let options = SqliteOptions {
        create: true,
        ..SqliteOptions::default()
    };
    let path = directory.path().join("relatch.db");
    let store = SqliteStore::open(&path, options).await.expect("it opens");
    let catalog = Catalog::open(
        Arc::new(store),
        clock.clone(),
        pepper.clone(),
        ControlMetrics::default(),
    )
    .await;
    let catalog = catalog.expect("it can be followed");
    let first = operation::create_keyring(keyring(), Prefix::default(), false, None);
    let first = first.expect("a possible keyring");
    catalog
        .create_keyring("test", keyring(), &first)
        .await
        .expect("a new keyring");
    Arc::new(catalog)
}

fn keyring() -> KeyringName {
    "payments".parse().expect("a name")
}

async fn believes_only_what_is_signed(example: Example) {
    let mut scene = Scene::new(example).await;
    assert_eq!(scene.test(scene.webhook).await, Some(204));
    let told = scene
        .receiver
        .wait_for_line("dev.relatch.webhook.test")
        .await;
    assert!(told.contains(scene.webhook.as_str()), "{told}");

    // Another webhook that leads to the same place has another secret.
    let stranger = WebhookId::generate().expect("the random source works");
    scene.add_webhook(stranger).await;
    assert_eq!(scene.test(stranger).await, Some(401));
    scene.receiver.wait_for_line("its signature is wrong").await;

    let now = scene.clock.wall();
    let body = r#"{"type": "first", "data": {}}"#;
    let other = r#"{"type": "other", "data": {}}"#;
    assert_eq!(scene.send("a", now, body, other).await, 401, "the body");
    let minutes = |minutes: i64| Timestamp::from_millis(now.as_millis() + minutes * 60_000);
    for off in [-6, 6] {
        let status = scene.send("a", minutes(off), body, body).await;
        assert_eq!(status, 401, "{off} minutes off");
    }
    scene.receiver.wait_for_line("its time is wrong").await;
    assert_eq!(scene.send("a", minutes(-4), body, body).await, 204);
    assert_eq!(
        scene.send("a", now, other, other).await,
        204,
        "it came before"
    );
    let last = r#"{"type": "last", "data": {}}"#;
    assert_eq!(scene.send("b", now, last, last).await, 204);
    scene.receiver.wait_for_line("last").await;
    let lines = scene.receiver.lines();
    let told: Vec<_> = lines.iter().filter(|line| line.ends_with("{}")).collect();
    assert_eq!(told, ["first {}", "last {}"]);
}

#[tokio::test]
async fn the_receiver_in_python_believes_only_what_is_signed() {
    believes_only_what_is_signed(Example::Python).await;
}

#[tokio::test]
async fn the_receiver_in_typescript_believes_only_what_is_signed() {
    believes_only_what_is_signed(Example::TypeScript).await;
}
