use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{
    HeaderMap, StatusCode,
    header::{CONTENT_TYPE, LOCATION, RETRY_AFTER},
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

use super::{delivery::MAX_AGE, *};
use crate::{
    clock::{Clock, ManualClock},
    control::served::ServedKeyring,
    key::{
        Change, ConsumerId, KeyId, PepperId, Prefix, Revision, RotationId, Timestamp,
        VersionNumber,
        change::OldVersion,
        note::Note,
        operation::{self, KeySpec},
        testing,
        version::NewVersion,
    },
    store::{DeliveryState, LogName, SqliteOptions, SqliteStore},
};

/// Longer than every wait in these tests: only a hung test reaches it.
const DEADLINE: Duration = Duration::from_mins(2);
const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);
/// The longest wait between two attempts.
const HOUR: Duration = Duration::from_hours(1);

/// A keyring with a consumer, in a store of its own, and the webhooks of a control plane on it.
struct World {
    directory: tempfile::TempDir,
    catalog: Arc<Catalog>,
    hands: ManualClock,
    options: Options,
    registry: Arc<Registry>,
    metrics: WebhookMetrics,
}

/// Webhooks that run until they are dropped or stopped.
struct Running {
    webhooks: Arc<Webhooks>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// An endpoint that gives the answers of the test.
struct Endpoint {
    url: String,
    calls: mpsc::UnboundedReceiver<Call>,
}

/// A request that waits for its answer.
struct Call {
    path: String,
    headers: HeaderMap,
    body: Bytes,
    answer: oneshot::Sender<Response>,
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (clock, hands) = Clock::manual(NOW);
        let catalog = open(&directory, clock).await;
        let first = operation::create_keyring(
            testing::keyring_name(),
            Prefix::default(),
            false,
            Some("https://docs.example.com/keys".into()),
        );
        catalog
            .create_keyring(
                "test",
                testing::keyring_name(),
                &first.expect("a valid keyring"),
            )
            .await
            .expect("a new keyring");
        let mut registry = Registry::default();
        let metrics = WebhookMetrics::register(&mut registry);
        let world = Self {
            directory,
            catalog,
            hands,
            options: Options {
                limits: Limits {
                    connect: DEADLINE,
                    total: DEADLINE,
                },
                every: Duration::from_millis(5),
                random: || u32::MAX,
            },
            registry: Arc::new(registry),
            metrics,
        };
        for consumer in ["checkout", "billing"] {
            let consumer: ConsumerId = consumer.parse().expect("an id");
            let name = String::new();
            world
                .commit(|keyring| {
                    let made = keyring.create_consumer(consumer.clone(), name.clone());
                    made.expect("a new consumer")
                })
                .await;
        }
        world
    }

    fn served(&self) -> Arc<ServedKeyring> {
        self.catalog
            .get(&testing::keyring_name())
            .expect("it exists")
    }

    async fn commit(&self, mut plan: impl FnMut(&crate::key::Keyring) -> Vec<Change>) -> Revision {
        let committed = self
            .catalog
            .commit(&self.served(), "test", |keyring, _| Ok((plan(keyring), ())))
            .await;
        committed.expect("it commits").revision
    }

    async fn add_webhook(&self, url: &str, adapt: impl FnOnce(&mut Webhook)) -> WebhookId {
        let mut webhook = Webhook {
            id: WebhookId::generate().expect("the random source works"),
            url: url.into(),
            consumer: None,
            events: std::collections::BTreeSet::new(),
            allow_private: true,
            created_at: self.catalog.clock().wall(),
        };
        adapt(&mut webhook);
        self.commit(|keyring| {
            let added = keyring.add_webhook(webhook.clone());
            added.expect("a possible webhook")
        })
        .await;
        webhook.id
    }

    async fn add_key(&self, consumer: &str) -> KeyId {
        let key_id = KeyId::generate().expect("the random source works");
        let secret = testing::secret(key_id);
        let spec = KeySpec {
            key_id,
            consumer: consumer.parse().expect("an id"),
            name: String::new(),
            scopes: crate::key::Scopes::default(),
            allowed_sources: crate::key::AllowedSources::default(),
            window: crate::key::Window::default(),
            imported: false,
        };
        self.commit(|keyring| {
            let key = secret.presented();
            let made = keyring.create_key(spec.clone(), &key, &testing::pepper(), NOW);
            made.expect("a new key")
        })
        .await;
        key_id
    }

    /// Causes an event, the revocation of a new key. Returns the event's id.
    async fn revoke_one(&self, consumer: &str) -> String {
        let key_id = self.add_key(consumer).await;
        let revision = self.commit(|_| vec![revoked(key_id)]).await;
        self.event_at(revision)
    }

    fn event_at(&self, revision: Revision) -> String {
        format!("payments-{}-{revision}", self.served().epoch())
    }

    /// Opens the catalog of another control plane on the same store and clock.
    async fn another_catalog(&self) -> Arc<Catalog> {
        open(&self.directory, self.catalog.clock().clone()).await
    }

    fn start(&self) -> Running {
        self.start_on(&self.catalog)
    }

    fn start_on(&self, catalog: &Arc<Catalog>) -> Running {
        let webhooks = Arc::new(self.webhooks(catalog));
        let stop = CancellationToken::new();
        let task = tokio::spawn(Arc::clone(&webhooks).run(stop.clone()));
        Running {
            webhooks,
            stop,
            task,
        }
    }

    fn webhooks(&self, catalog: &Arc<Catalog>) -> Webhooks {
        let made = Webhooks::with_options(
            Arc::clone(catalog),
            pepper(),
            self.metrics.clone(),
            self.options,
        );
        made.expect("they can be made")
    }

    async fn deliveries(&self, webhook: WebhookId) -> Vec<Delivery> {
        let keyring = testing::keyring_name();
        let store = self.catalog.store();
        let listed = store.deliveries(&keyring, webhook.as_str(), 100);
        listed.await.expect("they are listed")
    }

    /// Waits until the newest delivery matches `wanted`, and returns it.
    async fn settled(&self, webhook: WebhookId, wanted: impl Fn(&Delivery) -> bool) -> Delivery {
        let found = async {
            let mut pause = tokio::time::interval(Duration::from_millis(2));
            loop {
                let newest = self.deliveries(webhook).await.into_iter().next();
                if let Some(delivery) = newest.filter(|delivery| wanted(delivery)) {
                    return delivery;
                }
                pause.tick().await;
            }
        };
        timeout(DEADLINE, found).await.expect("it is settled")
    }

    fn counted(&self, event: &str, outcome: &str) -> u64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("metrics are text");
        let series =
            format!("relatch_webhook_deliveries_total{{event=\"{event}\",outcome=\"{outcome}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&series));
        line.map_or(0, |count| count.parse().expect("a number"))
    }
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        timeout(DEADLINE, self.task)
            .await
            .expect("it ends")
            .expect("it does not panic");
    }

    /// Ends the webhooks as a killed process does.
    async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.is_err(), "it ended by itself");
    }
}

impl Endpoint {
    async fn start() -> Self {
        let (called, calls) = mpsc::unbounded_channel();
        let router = Router::new().fallback(take).with_state(called);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(async move { axum::serve(listener, router).await });
        let url = format!("http://127.0.0.1:{port}/hook?team=a");
        Self { url, calls }
    }

    async fn called(&mut self) -> Call {
        timeout(DEADLINE, self.calls.recv())
            .await
            .expect("it is called")
            .expect("it runs")
    }
}

impl Call {
    fn event(&self) -> String {
        let id = self.headers["webhook-id"].to_str().expect("text");
        assert_eq!(self.json()["id"], *id);
        id.to_owned()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    fn answer(self, status: u16) {
        self.answer_with(status, &[]);
    }

    fn answer_with(self, status: u16, headers: &[(http::HeaderName, &str)]) {
        let mut answer = Response::new(Body::from("never read"));
        *answer.status_mut() = StatusCode::from_u16(status).expect("a status");
        for (name, value) in headers {
            let value = value.parse().expect("a header");
            answer.headers_mut().insert(name.clone(), value);
        }
        // A killed client has closed the connection.
        let _ = self.answer.send(answer);
    }

    /// Checks the signature as a receiver does, which knows only the secret.
    fn assert_signed_with(&self, secret: &str) {
        let secret = secret.strip_prefix("whsec_").expect("the prefix");
        let secret = STANDARD.decode(secret).expect("base64");
        let text = |name: &str| self.headers[name].to_str().expect("text");
        let mut mac = Hmac::<Sha256>::new_from_slice(&secret).expect("any length");
        mac.update(format!("{}.{}.", text("webhook-id"), text("webhook-timestamp")).as_bytes());
        mac.update(&self.body);
        let expected = STANDARD.encode(mac.finalize().into_bytes());
        assert_eq!(text("webhook-signature"), format!("v1,{expected}"));
    }
}

async fn take(State(called): State<mpsc::UnboundedSender<Call>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
    let (answer, answered) = oneshot::channel();
    let call = Call {
        path: parts.uri.to_string(),
        headers: parts.headers,
        body,
        answer,
    };
    called.send(call).expect("the test listens");
    // A request without an answer hangs.
    match answered.await {
        Ok(answer) => answer,
        Err(_) => std::future::pending().await,
    }
}

async fn open(directory: &tempfile::TempDir, clock: Clock) -> Arc<Catalog> {
    let options = SqliteOptions {
        create: true,
        ..SqliteOptions::default()
    };
    let path = directory.path().join("relatch.db");
    let store = SqliteStore::open(&path, options).await.expect("it opens");
    let catalog = Catalog::open(
        Arc::new(store),
        clock,
        pepper(),
        crate::control::metrics::ControlMetrics::default(),
    )
    .await;
    Arc::new(catalog.expect("it can be followed"))
}

fn pepper() -> MasterPepper {
    MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes")
}

fn revoked(key_id: KeyId) -> Change {
    Change::VersionsRevoked {
        key_id,
        versions: vec![VersionNumber::FIRST],
        reason: "leaked".into(),
    }
}

fn is_over(delivery: &Delivery) -> bool {
    delivery.state != DeliveryState::Waiting
}

#[tokio::test]
async fn an_endpoint_is_told_in_a_signed_request() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let running = world.start();
    let event = world.revoke_one("checkout").await;

    let call = endpoint.called().await;
    assert_eq!(call.event(), event);
    assert_eq!(call.path, "/hook?team=a");
    let content_type = "application/cloudevents+json; charset=utf-8";
    assert_eq!(call.headers[CONTENT_TYPE], content_type);
    assert_eq!(call.headers["webhook-timestamp"], "1800000000");
    call.assert_signed_with(&running.webhooks.secret(webhook).expose());
    call.answer(204);

    let delivery = world.settled(webhook, is_over).await;
    assert_eq!(delivery.state, DeliveryState::Delivered);
    assert_eq!((delivery.attempts, delivery.last_status), (1, Some(204)));
    // The delivery is counted when it is over.
    running.stop().await;
    assert_eq!(world.counted("key.revoked", "delivered"), 1);
}

#[tokio::test]
async fn what_fails_is_tried_again_under_the_same_id_and_signed_anew() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let running = world.start();
    let event = world.revoke_one("checkout").await;
    let first = endpoint.called().await;
    assert_eq!(first.event(), event);
    first.answer(500);

    let failed = world.settled(webhook, |d| d.settled_at.is_some()).await;
    assert_eq!(failed.state, DeliveryState::Waiting);
    assert_eq!(failed.last_status, Some(500));
    let error = failed.last_error.as_deref();
    assert_eq!(error, Some("answered with status 500"));
    let wait = failed.next_attempt_at.saturating_since(NOW);
    assert_eq!(wait, Duration::from_secs(5));
    world
        .hands
        .advance(wait.saturating_sub(Duration::from_millis(1)));
    // Another event is sent immediately, which shows that the first one waits.
    let other = world.revoke_one("checkout").await;
    let call = endpoint.called().await;
    assert_eq!(call.event(), other);
    call.answer(200);
    world.hands.advance(Duration::from_millis(1));

    let second = endpoint.called().await;
    assert_eq!(second.event(), event);
    assert_eq!(second.headers["webhook-timestamp"], "1800000005");
    second.assert_signed_with(&running.webhooks.secret(webhook).expose());
    second.answer(200);
    let over = |id: &str| {
        let id = id.to_owned();
        move |all: &[Delivery]| {
            let of = |d: &&Delivery| d.what.event == id && is_over(d);
            all.iter().find(of).cloned()
        }
    };
    let find = over(&event);
    let delivery = timeout(DEADLINE, async {
        loop {
            if let Some(delivery) = find(&world.deliveries(webhook).await) {
                return delivery;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it is delivered");
    assert_eq!(delivery.state, DeliveryState::Delivered);
    assert_eq!(delivery.attempts, 2);
    // The delivery is counted when it is over.
    running.stop().await;
    assert_eq!(world.counted("key.revoked", "retried"), 1);
    assert_eq!(world.counted("key.revoked", "delivered"), 2);
}

#[tokio::test]
async fn one_that_hangs_does_not_delay_another_and_is_left_at_its_deadline() {
    let mut world = World::new().await;
    world.options.limits.total = Duration::from_secs(2);
    let (mut hanging, mut healthy) = (Endpoint::start().await, Endpoint::start().await);
    let slow = world.add_webhook(&hanging.url, |_| {}).await;
    let quick = world.add_webhook(&healthy.url, |_| {}).await;
    let running = world.start();
    let events = [
        world.revoke_one("checkout").await,
        world.revoke_one("checkout").await,
    ];
    let held = hanging.called().await;
    assert_eq!(held.event(), events[0]);
    for event in &events {
        let call = healthy.called().await;
        assert_eq!(call.event(), *event);
        call.answer(200);
    }
    world.settled(quick, is_over).await;

    let next = hanging.called().await;
    assert_eq!(next.event(), events[1], "one at a time");
    let first = world.deliveries(slow).await.pop().expect("the oldest");
    assert_eq!(first.state, DeliveryState::Waiting);
    assert_eq!(first.last_status, None);
    let error = first.last_error.unwrap_or_default();
    assert!(error.ends_with("did not answer within 2s"), "{error}");
    assert!(!error.contains("team"), "{error}");
    drop((held, next));
    running.stop().await;
}

#[tokio::test]
async fn a_redirect_is_a_failure_and_leads_nowhere() {
    let world = World::new().await;
    let (mut outside, mut inside) = (Endpoint::start().await, Endpoint::start().await);
    let webhook = world.add_webhook(&outside.url, |_| {}).await;
    let running = world.start();
    world.revoke_one("checkout").await;
    let call = outside.called().await;
    call.answer_with(307, &[(LOCATION, &inside.url)]);
    let failed = world.settled(webhook, |d| d.settled_at.is_some()).await;
    assert_eq!(failed.last_status, Some(307));
    assert_eq!(failed.state, DeliveryState::Waiting);
    running.stop().await;
    assert!(inside.calls.try_recv().is_err(), "it was followed");
}

#[tokio::test]
async fn private_addresses_are_not_called_unless_allowed() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let refused = |webhook: &mut Webhook| webhook.allow_private = false;
    let https = endpoint.url.replace("http:", "https:");
    let webhooks = [
        world.add_webhook(&https, refused).await,
        world
            .add_webhook(&https.replace("127.0.0.1", "localhost"), refused)
            .await,
    ];
    let running = world.start();
    world.revoke_one("checkout").await;
    for webhook in webhooks {
        let failed = world.settled(webhook, |d| d.settled_at.is_some()).await;
        let error = failed.last_error.unwrap_or_default();
        assert!(error.contains("has a private address"), "{error}");
        let tried = running
            .webhooks
            .test(&testing::keyring_name(), webhook)
            .await
            .expect("it exists");
        assert_eq!((tried.status, tried.error), (None, Some(error)));
    }
    running.stop().await;
    assert!(endpoint.calls.try_recv().is_err(), "it was called");
}

#[tokio::test]
async fn gone_is_given_up_at_once() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let running = world.start();
    world.revoke_one("checkout").await;
    endpoint.called().await.answer(410);
    let delivery = world.settled(webhook, is_over).await;
    assert_eq!(delivery.state, DeliveryState::GivenUp);
    assert_eq!((delivery.attempts, delivery.last_status), (1, Some(410)));
    // The delivery is counted when it is over.
    running.stop().await;
    assert_eq!(world.counted("key.revoked", "given_up"), 1);
}

#[tokio::test]
async fn an_endpoint_may_ask_to_be_left_alone_for_a_while() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let running = world.start();
    let event = world.revoke_one("checkout").await;
    let busy = endpoint.called().await;
    busy.answer_with(503, &[(RETRY_AFTER, "120")]);
    let failed = world.settled(webhook, |d| d.settled_at.is_some()).await;
    let wait = failed.next_attempt_at.saturating_since(NOW);
    assert_eq!(wait, Duration::from_mins(2));
    world.hands.advance(wait);
    let call = endpoint.called().await;
    assert_eq!(call.event(), event);
    call.answer(200);
    world.settled(webhook, is_over).await;
    running.stop().await;
}

#[tokio::test]
async fn what_is_never_taken_is_given_up_for_everybody_to_see() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let running = world.start();
    let event = world.revoke_one("checkout").await;
    // One an hour: the first at once, the last before the event is three days old.
    let attempts = u32::try_from(MAX_AGE.as_secs() / HOUR.as_secs()).expect("a few days");
    for attempt in 1..=attempts {
        let call = endpoint.called().await;
        assert_eq!(call.event(), event);
        call.answer(500);
        world
            .settled(webhook, |d| {
                d.attempts == attempt && d.settled_at.is_some_and(|at| at >= world_time(&world))
            })
            .await;
        world.hands.advance(HOUR);
    }
    let delivery = world.settled(webhook, is_over).await;
    assert_eq!(delivery.state, DeliveryState::GivenUp);
    assert_eq!(delivery.attempts, attempts);
    assert_eq!(delivery.last_status, Some(500));
    // The delivery is counted when it is over.
    running.stop().await;
    assert_eq!(world.counted("key.revoked", "given_up"), 1);
    let failed = u64::from(attempts) - 1;
    assert_eq!(world.counted("key.revoked", "retried"), failed);
}

fn world_time(world: &World) -> Timestamp {
    world.catalog.clock().wall()
}

#[tokio::test]
async fn what_waited_for_too_long_gets_one_more_chance() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    world.revoke_one("checkout").await;
    world.hands.advance(MAX_AGE);
    let running = world.start();
    endpoint.called().await.answer(500);
    let delivery = world.settled(webhook, is_over).await;
    assert_eq!(delivery.state, DeliveryState::GivenUp);
    assert_eq!(delivery.attempts, 1);
    running.stop().await;
}

#[tokio::test]
async fn a_kill_in_the_middle_loses_nothing() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let running = world.start();
    let first = world.revoke_one("checkout").await;
    // The delivery is sent, and neither answered nor settled.
    let lost = endpoint.called().await;
    assert_eq!(lost.event(), first);
    running.kill().await;
    // The change is committed while no webhooks run.
    let second = world.revoke_one("checkout").await;

    let catalog = world.another_catalog().await;
    let running = world.start_on(&catalog);
    // In the store, the webhook still has one delivery in progress.
    world
        .settled(webhook, |delivery| delivery.what.event == second)
        .await;
    assert!(endpoint.calls.try_recv().is_err(), "a claim was broken");
    world.hands.advance(Duration::from_mins(1));
    let mut told = Vec::new();
    for _ in 0..2 {
        let call = endpoint.called().await;
        told.push(call.event());
        call.answer(200);
    }
    assert_eq!(told, [first, second]);
    world.settled(webhook, is_over).await;
    running.stop().await;
    let deliveries = world.deliveries(webhook).await;
    assert!(deliveries.iter().all(is_over));
    assert_eq!(deliveries.len(), 2);
    assert!(endpoint.calls.try_recv().is_err(), "one was doubled");
}

#[tokio::test]
async fn a_stop_waits_for_what_is_under_way() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let running = world.start();
    world.revoke_one("checkout").await;
    let call = endpoint.called().await;
    running.stop.cancel();
    call.answer(200);
    running.stop().await;
    let delivery = &world.deliveries(webhook).await[0];
    assert_eq!(delivery.state, DeliveryState::Delivered);
}

#[tokio::test]
async fn two_control_planes_tell_each_event_once() {
    const EVENTS: usize = 12;
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let other = world.another_catalog().await;
    let running = [world.start(), world.start_on(&other)];
    let mut expected = Vec::new();
    let mut told = Vec::new();
    for _ in 0..EVENTS {
        expected.push(world.revoke_one("checkout").await);
        other.refresh().await.expect("readable");
    }
    for _ in 0..EVENTS {
        let call = endpoint.called().await;
        told.push(call.event());
        call.answer(200);
    }
    let newest = expected.last().cloned();
    world
        .settled(webhook, |d| {
            Some(&d.what.event) == newest.as_ref() && is_over(d)
        })
        .await;
    for one in running {
        one.stop().await;
    }
    assert_eq!(told, expected);
    assert_eq!(world.deliveries(webhook).await.len(), EVENTS);
    assert!(endpoint.calls.try_recv().is_err(), "one was doubled");
}

#[tokio::test]
async fn everybody_is_told_of_what_they_asked_for_and_only_from_then_on() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    world.revoke_one("checkout").await;
    let all = world.add_webhook(&endpoint.url, |_| {}).await;
    let url = &endpoint.url;
    let billing = world
        .add_webhook(url, |webhook| {
            webhook.consumer = Some("billing".parse().expect("an id"));
        })
        .await;
    let started = world
        .add_webhook(url, |webhook| {
            webhook.events.insert(EventKind::RotationStarted);
        })
        .await;
    let checkout = world.revoke_one("checkout").await;
    let late = world.add_webhook(url, |_| {}).await;
    let removed = world.add_webhook(url, |_| {}).await;
    let of_billing = world.revoke_one("billing").await;
    world
        .commit(|_| vec![Change::WebhookRemoved { id: removed }])
        .await;
    let running = world.start();
    for _ in 0..4 {
        endpoint.called().await.answer(200);
    }
    for webhook in [all, billing, late] {
        world.settled(webhook, is_over).await;
    }
    running.stop().await;
    for (webhook, expected) in [
        (all, vec![&of_billing, &checkout]),
        (billing, vec![&of_billing]),
        (started, vec![]),
        (late, vec![&of_billing]),
        (removed, vec![]),
    ] {
        let deliveries = world.deliveries(webhook).await;
        let told: Vec<_> = deliveries.iter().map(|d| &d.what.event).collect();
        assert_eq!(told, expected);
    }
    assert!(endpoint.calls.try_recv().is_err(), "somebody was told more");
}

#[tokio::test]
async fn a_webhook_that_is_removed_is_not_called_any_more() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let running = world.start();
    world.revoke_one("checkout").await;
    endpoint.called().await.answer(500);
    world.settled(webhook, |d| d.settled_at.is_some()).await;
    world
        .commit(|_| vec![Change::WebhookRemoved { id: webhook }])
        .await;
    world.hands.advance(HOUR);
    let delivery = world.settled(webhook, is_over).await;
    assert_eq!(delivery.state, DeliveryState::GivenUp);
    let error = delivery.last_error.as_deref();
    assert_eq!(error, Some("the webhook was removed"));
    running.stop().await;
    assert!(endpoint.calls.try_recv().is_err(), "it was called");
}

#[tokio::test]
async fn a_webhook_can_be_tried_out() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let webhooks = Arc::new(world.webhooks(&world.catalog));
    for (status, error) in [(200, None), (401, Some("answered with status 401".into()))] {
        let trying = tokio::spawn({
            let webhooks = Arc::clone(&webhooks);
            async move { webhooks.test(&testing::keyring_name(), webhook).await }
        });
        let call = endpoint.called().await;
        assert_eq!(call.json()["type"], "dev.relatch.webhook.test");
        let id = format!("payments-test-{webhook}-1800000000000");
        assert_eq!(call.event(), id);
        call.assert_signed_with(&webhooks.secret(webhook).expose());
        call.answer(status);
        let result = trying.await.expect("no panic").expect("it exists");
        let status = Some(status);
        assert_eq!(result, TestResult { status, error });
    }
    assert_eq!(world.counted("webhook.test", "delivered"), 1);
    assert_eq!(world.counted("webhook.test", "given_up"), 1);
    let keyring = testing::keyring_name();
    let listed = webhooks.deliveries(&keyring, webhook, 1).await;
    assert_eq!(listed.expect("it exists"), [], "a try was kept");
    let nobody = WebhookId::generate().expect("the random source works");
    let error = webhooks.test(&testing::keyring_name(), nobody).await;
    let error = error.expect_err("it does not exist").to_string();
    assert_eq!(error, format!("webhook \"{nobody}\" does not exist"));
}

#[tokio::test]
async fn without_webhooks_the_cursor_follows_seldom_and_still_nothing_old_is_told() {
    let world = World::new().await;
    let mut endpoint = Endpoint::start().await;
    let consumers = (0..1_100).map(|number| Change::ConsumerCreated {
        consumer: format!("c-{number}").parse().expect("an id"),
        name: String::new(),
    });
    let consumers: Vec<_> = consumers.collect();
    world.commit(|_| consumers.clone()).await;
    let log = LogName::Keyring(testing::keyring_name());
    let store = Arc::clone(world.catalog.store());
    let mut projector = Projector::new(Arc::clone(&world.catalog));
    projector.follow().await;
    let held = world.served().revision();
    assert_eq!(store.outbox_cursor(&log).await.expect("readable"), held);
    world.revoke_one("checkout").await;
    projector.follow().await;
    assert_eq!(store.outbox_cursor(&log).await.expect("readable"), held);

    let webhook = world.add_webhook(&endpoint.url, |_| {}).await;
    let event = world.revoke_one("checkout").await;
    let running = world.start();
    let call = endpoint.called().await;
    assert_eq!(call.event(), event);
    call.answer(200);
    world.settled(webhook, is_over).await;
    running.stop().await;
    assert_eq!(world.deliveries(webhook).await.len(), 1);
}

/// Tests every change that has an event, with the data of the event.
#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one event after the other")]
async fn every_event_tells_its_facts_and_no_secret() {
    let world = World::new().await;
    let key_id = world.add_key("checkout").await;
    let [one, two] = [VersionNumber::FIRST, VersionNumber::FIRST.next()];
    let rotation = RotationId::generate().expect("the random source works");
    let until = NOW.saturating_add(Duration::from_hours(24));
    let secret = testing::secret(key_id);
    let digest = testing::pepper().digest(&secret.presented());
    let note = |version, note| Change::Noted {
        key_id,
        version,
        note,
    };
    let day = "2027-01-16T08:00:00.000Z";
    let lost = format!(
        "an operator: the control plane stopped before sink files confirmed the secret of version 2, and relatch no longer has it; \
         if the sink holds it, the first use of version 2 completes the rotation; if not: relatch rotate abort {key_id} --reason TEXT"
    );
    let story = [
        (
            Change::VersionStaged {
                key_id,
                rotation,
                version: NewVersion {
                    number: two,
                    digest,
                    pepper: testing::pepper().id(),
                    window: crate::key::Window::default(),
                },
                withdraw_after: until,
            },
            None,
        ),
        (
            note(
                two,
                Note::Held {
                    deadline: until,
                    reason: "the sink is away".into(),
                },
            ),
            Some((
                "rotation.held",
                json!({"version": 2, "due_since": day, "reason": "the sink is away"}),
            )),
        ),
        (
            note(
                two,
                Note::SecretLost {
                    sink: "files".parse().expect("a name"),
                    since: until,
                },
            ),
            Some((
                "rotation.secret_lost",
                json!({"version": 2, "due_since": day, "reason": lost}),
            )),
        ),
        (
            Change::HandedOver {
                key_id,
                rotation,
                version: two,
                old: Some(OldVersion {
                    version: one,
                    until,
                }),
            },
            Some((
                "rotation.started",
                json!({"version": 1, "replaced_by": 2, "sunset": day}),
            )),
        ),
        (
            note(one, Note::Reminder { deadline: until }),
            Some((
                "rotation.reminder",
                json!({"version": 1, "replaced_by": 2, "sunset": day}),
            )),
        ),
        (
            note(
                one,
                Note::Drained {
                    unused_since: until,
                },
            ),
            Some((
                "rotation.drained",
                json!({"version": 1, "replaced_by": 2, "unused_since": day}),
            )),
        ),
        (
            note(
                one,
                Note::Held {
                    deadline: until,
                    reason: "it is used".into(),
                },
            ),
            Some((
                "rotation.held",
                json!({"version": 1, "replaced_by": 2, "sunset": day, "reason": "it is used"}),
            )),
        ),
        (
            Change::VersionRetired {
                key_id,
                version: one,
                reason: "the overlap is over".into(),
                forced: true,
            },
            Some((
                "rotation.retired",
                json!({"version": 1, "replaced_by": 2, "reason": "the overlap is over", "forced": true}),
            )),
        ),
        (
            Change::RolledBack {
                key_id,
                version: one,
                replaced: Some(OldVersion {
                    version: two,
                    until,
                }),
                reason: "it was too early".into(),
            },
            Some((
                "rotation.rolled_back",
                json!({"version": 2, "replaced_by": 1, "sunset": day, "reason": "it was too early"}),
            )),
        ),
        (
            note(one, Note::Expiring { expires_at: until }),
            Some(("key.expiring", json!({"version": 1, "expires_at": day}))),
        ),
        (
            note(one, Note::RotationDue { since: until }),
            Some(("rotation.due", json!({"version": 1, "due_since": day}))),
        ),
        (
            Change::VersionsRevoked {
                key_id,
                versions: vec![one, two],
                reason: "leaked".into(),
            },
            Some((
                "key.revoked",
                json!({"versions": [1, 2], "reason": "leaked"}),
            )),
        ),
    ];
    for (change, expected) in story {
        let revision = world.commit(|_| vec![change.clone()]).await;
        let served = world.served();
        let state = served.journal().state();
        let event = Event::of(&state.keyring, served.epoch(), revision, NOW, &change);
        let json = event.map(|event| {
            let text = event.to_json();
            assert!(!text.contains(&String::from(digest)), "{text}");
            serde_json::from_str::<Value>(&text).expect("JSON")
        });
        let expected = expected.map(|(kind, facts)| {
            let mut data = json!({
                "keyring": "payments",
                "consumer": "checkout",
                "key_id": key_id.as_str(),
                "help_url": "https://docs.example.com/keys",
            });
            let map = data.as_object_mut().expect("an object");
            map.extend(facts.as_object().expect("an object").clone());
            json!({
                "specversion": "1.0",
                "id": world.event_at(revision),
                "source": "/relatch/keyrings/payments",
                "type": format!("dev.relatch.{kind}"),
                "subject": key_id.as_str(),
                "time": "2027-01-15T08:00:00.000Z",
                "datacontenttype": "application/json",
                "data": data,
            })
        });
        assert_eq!(json, expected, "{change:?}");
    }
}
