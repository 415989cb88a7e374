use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    service::interceptor::InterceptedService,
    transport::{Endpoint, Server},
};

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::{
    clock::Clock,
    control::{metrics::ControlMetrics, pace::Pace, served::ServedKeyring},
    key::{MasterPepper, PepperId, Prefix, Revision, operation, testing},
    proto::discovery::{
        control_message::Kind as Told, keyring_discovery_client::KeyringDiscoveryClient,
    },
    store::{SqliteOptions, SqliteStore, Store},
};

/// Longer than every wait in these tests: only a hung test reaches it.
const DEADLINE: Duration = Duration::from_mins(2);

/// A control plane without keyrings, whose every client is `peer`.
struct World {
    catalog: Arc<Catalog>,
    fleet: Arc<Fleet>,
    usage: Arc<UsageBook>,
    endpoint: Endpoint,
    _server: JoinSet<()>,
    dir: tempfile::TempDir,
    /// The streams of the sidecar so far.
    streams: AtomicU64,
}

impl World {
    async fn start(peer: Peer) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&dir.path().join("relatch.db"), options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("a new store"));
        let clock = Clock::system();
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        let catalog = Catalog::open(
            Arc::clone(&store),
            clock.clone(),
            pepper,
            ControlMetrics::default(),
        );
        let pace = Arc::new(Pace::new(clock.clone()));
        let usage = UsageBook::open(store, clock.clone(), pace, &[]);
        let fleet = Fleet::new(clock, Duration::from_hours(1), Vec::new());
        let fleet = Arc::new(fleet.expect("no rows"));
        let catalog = Arc::new(catalog.await.expect("an empty store"));
        let usage = Arc::new(usage.await.expect("an empty store"));
        let discovery = DiscoveryServer::new(
            Arc::clone(&catalog),
            Arc::clone(&fleet),
            Arc::clone(&usage),
            Terms {
                beat_every: Duration::from_secs(5),
                max_serve_for: Duration::from_hours(1),
            },
            TaskTracker::new(),
            CancellationToken::new(),
        );
        let discovery =
            InterceptedService::new(discovery.into_service(), move |mut request: Request<()>| {
                request.extensions_mut().insert(peer.clone());
                Ok(request)
            });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let serving = Server::builder()
            .add_service(discovery)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let mut server = JoinSet::new();
        server.spawn(async move { serving.await.expect("it serves") });
        server.spawn(Arc::clone(&catalog).read_for_those_who_ask(CancellationToken::new()));
        Self {
            catalog,
            fleet,
            usage,
            endpoint: Endpoint::try_from(format!("http://{address}")).expect("a URI"),
            _server: server,
            dir,
            streams: AtomicU64::new(0),
        }
    }

    /// Creates the keyring of the tests.
    async fn create_keyring(&self) -> Arc<ServedKeyring> {
        let name = testing::keyring_name();
        let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
        let first = first.expect("a valid keyring");
        let served = self.catalog.create_keyring("test", name, &first).await;
        served.expect("a new keyring")
    }

    /// Opens the stream of a sidecar. It stays open on its side for as long as the sender lives.
    async fn subscribe(
        &self,
    ) -> (
        mpsc::Sender<discovery::SidecarMessage>,
        Streaming<discovery::ControlMessage>,
    ) {
        self.open(hello()).await.expect("it is admitted")
    }

    async fn open(
        &self,
        mut hello: discovery::Hello,
    ) -> Result<
        (
            mpsc::Sender<discovery::SidecarMessage>,
            Streaming<discovery::ControlMessage>,
        ),
        Status,
    > {
        let (say, said) = mpsc::channel(1);
        hello.stream = self.streams.fetch_add(1, Ordering::Relaxed) + 1;
        let hello = discovery::SidecarMessage {
            kind: Some(Kind::Hello(hello)),
        };
        say.send(hello).await.expect("there is room");
        let channel = self.endpoint.connect().await.expect("it listens");
        let opened = KeyringDiscoveryClient::new(channel)
            .subscribe(ReceiverStream::new(said))
            .await;
        Ok((say, opened?.into_inner()))
    }
}

fn hello() -> discovery::Hello {
    discovery::Hello {
        node: Some(discovery::Node {
            id: "edge-1".to_owned(),
            ..discovery::Node::default()
        }),
        run_id: "a".to_owned(),
        subscriptions: vec![discovery::Subscription {
            keyring: testing::keyring_name().to_string(),
            deny_after_ms: 3_600_000,
            ..discovery::Subscription::default()
        }],
        protocol: discovery::PROTOCOL,
        stream: 1,
        ..Default::default()
    }
}

async fn next(stream: &mut Streaming<discovery::ControlMessage>) -> Option<Told> {
    let next = tokio::time::timeout(DEADLINE, stream.message()).await;
    let message = next.expect("in time").ok().flatten()?;
    message.kind
}

#[tokio::test]
async fn a_stream_ends_with_the_certificate_that_it_began_with() {
    let peer = Peer {
        identity: "spiffe://mesh/edge-1".parse().ok(),
        not_after: Some(Clock::system().wall()),
    };
    let world = World::start(peer).await;
    let (say, mut stream) = world.subscribe().await;
    let told = next(&mut stream).await;
    assert!(matches!(told, Some(Told::NotServed(_))), "{told:?}");
    match next(&mut stream).await {
        Some(Told::Drain(drain)) => {
            assert_eq!(drain.reason(), discovery::DrainReason::CertificateExpired);
            assert_eq!(drain.retry_after, None);
        }
        other => panic!("no drain: {other:?}"),
    }
    assert!(next(&mut stream).await.is_none(), "nothing follows");
    // The sidecar does not leave, and the control plane ends the stream.
    let mut changes = world.fleet.watch();
    let left = async {
        while world
            .fleet
            .members()
            .iter()
            .any(|(_, run)| run.is_connected())
        {
            changes.changed().await.expect("the fleet lives");
        }
    };
    tokio::time::timeout(DEADLINE, left)
        .await
        .expect("it is left");
    drop(say);
}

#[tokio::test]
async fn a_sidecar_that_leaves_before_its_stream_is_open_is_counted_no_longer() {
    let world = World::start(Peer::default()).await;
    let path = world.dir.path().join("relatch.db");
    let lock = rusqlite::Connection::open(path).expect("it opens");
    lock.execute_batch("BEGIN IMMEDIATE").expect("it is free");
    let streams = || -> usize {
        let members = world.fleet.members();
        members.iter().map(|(_, run)| run.streams()).sum()
    };
    let mut changes = world.fleet.watch();
    let mut until = async |count: usize| {
        let counted = async {
            while streams() != count {
                changes.changed().await.expect("the fleet lives");
            }
        };
        let counted = tokio::time::timeout(DEADLINE, counted).await;
        counted.unwrap_or_else(|_| panic!("{} streams are counted", streams()));
    };
    {
        let opening = world.open(hello());
        tokio::pin!(opening);
        tokio::select! {
            opened = opening.as_mut() => panic!("it is not on record: {}", opened.is_ok()),
            () = until(1) => {}
        }
    }
    until(0).await;
    drop(lock);
}

#[tokio::test]
async fn no_sidecar_has_more_than_there_is() {
    let world = World::start(Peer::default()).await;
    let served = world.create_keyring().await;
    let (newest, epoch) = (served.revision(), served.epoch().get());
    let progress = || {
        let (_, run) = world.fleet.members().remove(0);
        run.keyrings[&testing::keyring_name()].progress.clone()
    };
    let nothing = Revision::default();
    let mut ahead = hello();
    ahead.subscriptions[0].epoch = epoch;
    ahead.subscriptions[0].revision = newest.get() + 8;
    let (say, _stream) = world.open(ahead).await.expect("it is admitted");
    assert_eq!(progress().applied, nothing);
    assert_eq!(progress().revoked_through, nothing);
    // Its state is not that of the keyring: nothing counts before it has a whole snapshot.
    assert!(progress().awaits_whole);

    let ack = discovery::Ack {
        keyring: testing::keyring_name().to_string(),
        epoch,
        nonce: 1,
        applied_revision: u64::MAX,
        durable_revision: u64::MAX,
        revoked_through: u64::MAX,
        durable_revoked_through: u64::MAX,
        is_whole: true,
    };
    let nack = discovery::Nack {
        keyring: ack.keyring.clone(),
        epoch,
        nonce: 1,
        items: Vec::new(),
        applied_revision: u64::MAX,
        revoked_through: u64::MAX,
        durable_revision: u64::MAX,
        durable_revoked_through: u64::MAX,
        is_whole: true,
        has_more: false,
    };
    let mut changes = world.fleet.watch();
    for kind in [Kind::Ack(ack), Kind::Nack(nack)] {
        changes.mark_unchanged();
        let message = discovery::SidecarMessage { kind: Some(kind) };
        say.send(message).await.expect("the stream is open");
        let noted = tokio::time::timeout(DEADLINE, changes.changed()).await;
        noted.expect("in time").expect("the fleet lives");
        assert_eq!(progress().applied, newest);
        assert_eq!(progress().revoked_through, newest);
        assert_eq!(progress().durable, newest);
        assert_eq!(progress().durable_revoked_through, newest);
    }
}

/// The hello of a sidecar that holds a keyring as it was at `revision`.
fn hello_of(served: &ServedKeyring, revision: Revision) -> discovery::Hello {
    let mut hello = hello();
    let subscription = &mut hello.subscriptions[0];
    let digest = served.journal().state().feed.digest_at(revision);
    subscription.epoch = served.epoch().get();
    subscription.revision = revision.get();
    subscription.set_digest = digest.expect("it is known");
    subscription.revoked_through = revision.get();
    hello
}

#[tokio::test]
async fn what_a_sidecar_holds_counts_by_its_digest_and_else_from_a_snapshot_on() {
    let world = World::start(Peer::default()).await;
    let served = world.create_keyring().await;
    let first = served.revision();
    world
        .catalog
        .commit(&served, "test", |keyring, _| {
            let consumer = "checkout".parse().expect("a valid id");
            Ok((keyring.create_consumer(consumer, String::new())?, ()))
        })
        .await
        .expect("it is committed");
    let second = served.revision();
    let progress = || {
        let (_, run) = world.fleet.members().remove(0);
        run.keyrings[&testing::keyring_name()].progress.clone()
    };
    let mut streams = Vec::new();
    for revision in [first, second] {
        let agrees = hello_of(&served, revision);
        streams.push(world.open(agrees).await.expect("it is admitted"));
        assert_eq!(progress().applied, revision);
        // It could not use an item, and has started again since.
        let mut differs = hello_of(&served, revision);
        differs.subscriptions[0].set_digest += 1;
        streams.push(world.open(differs).await.expect("it is admitted"));
        assert_eq!(progress().applied, Revision::default());
        assert_eq!(progress().revoked_through, Revision::default());
    }
    // On demand there is no digest.
    let mut on_demand = hello_of(&served, first);
    on_demand.subscriptions[0].set_digest = 0;
    on_demand.subscriptions[0].mode = discovery::Mode::OnDemand.into();
    streams.push(world.open(on_demand).await.expect("it is admitted"));
    assert_eq!(progress().applied, first);

    let mut differs = hello_of(&served, second);
    differs.subscriptions[0].set_digest += 1;
    let (say, _stream) = world.open(differs).await.expect("it is admitted");
    let ack = |is_whole| discovery::Ack {
        keyring: testing::keyring_name().to_string(),
        epoch: served.epoch().get(),
        nonce: 1,
        applied_revision: second.get(),
        durable_revision: second.get(),
        revoked_through: second.get(),
        is_whole,
        ..Default::default()
    };
    let mut changes = world.fleet.watch();
    let parts = [
        (false, Revision::default()),
        (true, second),
        (false, second),
    ];
    for (is_whole, counts) in parts {
        changes.mark_unchanged();
        let kind = Some(Kind::Ack(ack(is_whole)));
        let message = discovery::SidecarMessage { kind };
        say.send(message).await.expect("the stream is open");
        let noted = tokio::time::timeout(DEADLINE, changes.changed()).await;
        noted.expect("in time").expect("the fleet lives");
        assert_eq!(progress().applied, counts);
        assert_eq!(progress().revoked_through, counts);
        assert_eq!(progress().durable, counts);
    }
}

#[tokio::test]
async fn a_beat_is_answered_and_the_report_that_replies_is_complete_until_the_sending() {
    let world = World::start(Peer::default()).await;
    world.create_keyring().await;
    let (say, mut stream) = world.subscribe().await;
    let said = async |kind| {
        let message = discovery::SidecarMessage { kind: Some(kind) };
        say.send(message).await.expect("the stream is open");
    };
    said(Kind::Beat(discovery::Beat { number: 1 })).await;
    let before = Clock::system().wall();
    let answer = loop {
        match next(&mut stream).await {
            Some(Told::BeatAnswer(answer)) => break answer,
            Some(Told::Settings(_) | Told::Snapshot(_)) => {}
            other => panic!("no answer: {other:?}"),
        }
    };
    assert_eq!(answer.beat, 1);
    let after = Clock::system().wall();
    said(Kind::Usage(discovery::Usage {
        sequence: 1,
        complete_until_beat: 1,
        ..Default::default()
    }))
    .await;
    let complete = async {
        loop {
            world.usage.flush(&world.fleet).await.expect("writable");
            let (_, member) = world.fleet.members().remove(0);
            if let Some(until) = member.complete_until {
                return until;
            }
            tokio::task::yield_now().await;
        }
    };
    let complete = tokio::time::timeout(DEADLINE, complete)
        .await
        .expect("in time");
    let sent_at = complete.saturating_add(Duration::from_secs(1));
    assert!(before <= sent_at && sent_at <= after, "{sent_at}");
}

#[tokio::test]
async fn a_sidecar_that_says_too_much_of_itself_is_refused() {
    let world = World::start(Peer::default()).await;
    let long = "x".repeat(1_000);
    let labels = (0..100).map(|number| (number.to_string(), String::new()));
    let nodes = [
        discovery::Node {
            cluster: long.clone(),
            ..discovery::Node::default()
        },
        discovery::Node {
            version: long.clone(),
            ..discovery::Node::default()
        },
        discovery::Node {
            labels: [("zone".to_owned(), long)].into(),
            ..discovery::Node::default()
        },
        discovery::Node {
            labels: labels.collect(),
            ..discovery::Node::default()
        },
    ];
    for node in nodes {
        let node = discovery::Node {
            id: "edge-1".to_owned(),
            ..node
        };
        let refused = world.open(discovery::Hello {
            node: Some(node),
            ..hello()
        });
        let refusal = refused.await.expect_err("it is too much");
        assert_eq!(refusal.code(), tonic::Code::InvalidArgument);
    }
    assert!(world.fleet.members().is_empty());
}

#[tokio::test]
async fn a_subscription_on_an_open_stream_is_on_record_before_anything_is_sent() {
    let world = World::start(Peer::default()).await;
    world.create_keyring().await;
    let empty = discovery::Hello {
        subscriptions: Vec::new(),
        ..hello()
    };
    let (say, mut stream) = world.open(empty).await.expect("it is admitted");
    let find = Kind::Find(discovery::Find {
        patterns: vec!["pay*".to_owned(), "not a pattern".to_owned()],
    });
    let tell = async |kind| {
        let message = discovery::SidecarMessage { kind: Some(kind) };
        say.send(message).await.expect("the stream is open");
    };
    tell(find).await;
    match next(&mut stream).await {
        Some(Told::Listing(listing)) => assert_eq!(listing.keyrings, ["payments"]),
        other => panic!("no list: {other:?}"),
    }
    assert!(world.fleet.members()[0].1.keyrings.is_empty());

    let path = world.dir.path().join("relatch.db");
    let lock = rusqlite::Connection::open(path).expect("it opens");
    lock.execute_batch("BEGIN IMMEDIATE").expect("it is free");
    let mut changes = world.fleet.watch();
    let claimed = discovery::Subscription {
        epoch: 1,
        revision: 1,
        ..hello().subscriptions.remove(0)
    };
    tell(Kind::Subscribe(discovery::Subscribe {
        subscriptions: vec![claimed],
    }))
    .await;
    let counted = async {
        while world.fleet.members()[0].1.keyrings.is_empty() {
            changes.changed().await.expect("the fleet lives");
        }
    };
    let counted = tokio::time::timeout(DEADLINE, counted).await;
    counted.expect("it counts before it is on record");
    let waiting = tokio::time::timeout(Duration::from_millis(200), stream.message()).await;
    assert!(waiting.is_err(), "it is sent before it is on record");
    lock.execute_batch("ROLLBACK").expect("it is held");
    // Whatever the sidecar claims to hold, the keyring is sent from its start.
    assert!(matches!(next(&mut stream).await, Some(Told::Settings(_))));
    assert!(matches!(next(&mut stream).await, Some(Told::Snapshot(_))));

    let ended = Kind::Unsubscribe(discovery::Unsubscribe {
        keyring: "payments".to_owned(),
    });
    tell(ended).await;
    let Some(Told::NotServed(told)) = next(&mut stream).await else {
        panic!("it is not ended");
    };
    assert!(told.is_forbidden);
    assert!(!world.fleet.members()[0].1.keyrings.is_empty());
    tell(Kind::Dropped(discovery::Dropped {
        keyring: told.keyring,
        not_served: told.number,
    }))
    .await;
    let dropped = async {
        while !world.fleet.members()[0].1.keyrings.is_empty() {
            changes.changed().await.expect("the fleet lives");
        }
    };
    let dropped = tokio::time::timeout(DEADLINE, dropped).await;
    dropped.expect("it counts no longer");
}

/// A sidecar whose file names a keyring again subscribes to it before it says that it has erased what
/// it had before.
#[tokio::test]
async fn an_erasure_does_not_undo_a_later_subscription() {
    let world = World::start(Peer::default()).await;
    world.create_keyring().await;
    let (say, mut stream) = world.open(hello()).await.expect("it is admitted");
    let tell = async |kind| {
        let message = discovery::SidecarMessage { kind: Some(kind) };
        say.send(message).await.expect("the stream is open");
    };
    tell(Kind::Unsubscribe(discovery::Unsubscribe {
        keyring: "payments".to_owned(),
    }))
    .await;
    let told = loop {
        match next(&mut stream).await {
            Some(Told::NotServed(told)) => break told,
            Some(_) => {}
            None => panic!("the stream has ended"),
        }
    };
    tell(Kind::Subscribe(discovery::Subscribe {
        subscriptions: vec![hello().subscriptions.remove(0)],
    }))
    .await;
    tell(Kind::Dropped(discovery::Dropped {
        keyring: told.keyring,
        not_served: told.number,
    }))
    .await;
    // The list is the answer to a message that is read after both.
    tell(Kind::Find(discovery::Find {
        patterns: vec!["*".to_owned()],
    }))
    .await;
    while !matches!(next(&mut stream).await, Some(Told::Listing(_))) {}
    assert!(!world.fleet.members()[0].1.keyrings.is_empty());
}
