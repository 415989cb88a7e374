//! For any messages of a sidecar, the control plane does not panic and stores no more of them than its bounds. It never
//! records a revision as applied that does not exist, and it acks only what the sidecar has sent.

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prost::Message as _;
use relatch::{
    clock::Clock,
    control::{
        catalog::Catalog,
        fleet::Fleet,
        metrics::ControlMetrics,
        pace::Pace,
        stream::{server::DiscoveryServer, session::Terms},
        usage::UsageBook,
    },
    key::{
        AllowedSources, KeyId, KeyringName, MasterPepper, Pepper, PepperId, Prefix, Scopes, Secret,
        Timestamp, Window,
        operation::{self, KeySpec, Which},
    },
    proto::discovery::{
        self, control_message::Kind as Told, keyring_discovery_client::KeyringDiscoveryClient,
        sidecar_message::Kind,
    },
    serving::Run,
    store::{SqliteOptions, SqliteStore, Store},
};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroizing;

use super::input::Input;

/// The first byte selects what the others are. Even: serialized messages, each after its length of two bytes. Odd: actions of
/// a sidecar, byte by byte. The first message is a hello.
pub(crate) fn holds(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else {
        return;
    };
    let mut input = Input(bytes);
    let mut said = Vec::new();
    if mode % 2 == 1 {
        said.push(Kind::Hello(hello(&mut input)));
    }
    while !input.is_empty() && said.len() < MAX_SAID {
        let kind = if mode % 2 == 0 {
            serialized(&mut input)
        } else {
            act(&mut input)
        };
        said.extend(kind);
    }
    runtime().block_on(async {
        let stream = Stream::open(said.first().cloned()).await;
        stream.play(said).await;
    });
}

/// The most messages: enough for every order of two kinds.
const MAX_SAID: usize = 100;
/// The most bytes that are stored about a sidecar.
const MAX_OF_NODE: usize = 8 << 10;
/// The most bytes that are stored about the items of a keyring that it refused.
const MAX_REJECTED: usize = 100 * 1_024;
/// The most answers to one message: for each keyring of a hello its settings, or that it is not served.
const MAX_ANSWERS: usize = 2_048;
/// The only keyring that is served.
const KEYRING: &str = "payments";
const KEYS: u8 = 4;

/// The catalog of a control plane, in which nothing changes.
struct World {
    catalog: Arc<Catalog>,
    store: Arc<dyn Store>,
    clock: Clock,
    _dir: TempDir,
}

/// One stream of a sidecar.
struct Stream {
    fleet: Arc<Fleet>,
    usage: Arc<UsageBook>,
    tasks: TaskTracker,
    say: mpsc::UnboundedSender<discovery::SidecarMessage>,
    /// None if the control plane has refused the stream.
    told: Option<tonic::Streaming<discovery::ControlMessage>>,
    /// The sequences of the reports.
    reported: BTreeSet<u64>,
    /// The numbers of the beats.
    beats: BTreeSet<u64>,
}

impl World {
    fn get() -> &'static Self {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(|| {
            let made = std::thread::spawn(|| runtime().block_on(Self::make()));
            made.join().expect("a catalog can be made")
        })
    }

    async fn make() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&dir.path().join("relatch.db"), options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("a new store"));
        let (clock, _) = Clock::manual(Timestamp::from_millis(1_000_000_000_000));
        let pepper = MasterPepper::new(PepperId::new(1), &[7; Pepper::LEN]).expect("32 bytes");
        let metrics = ControlMetrics::default();
        let catalog = Catalog::open(Arc::clone(&store), clock.clone(), pepper, metrics).await;
        let catalog = catalog.expect("an empty store");
        let first = operation::create_keyring(name(), Prefix::default(), true, None);
        let first = first.expect("a valid keyring");
        let served = catalog.create_keyring("fuzz", name(), &first).await;
        let served = served.expect("a new keyring");
        catalog
            .commit(&served, "fuzz", |keyring, _| {
                let consumer = "checkout".parse().expect("a consumer");
                Ok((keyring.create_consumer(consumer, String::new())?, ()))
            })
            .await
            .expect("a new consumer");
        for number in 0..KEYS {
            catalog
                .commit(&served, "fuzz", |keyring, now| {
                    let secret = Zeroizing::new(format!("imported-key-{number}"));
                    let secret = Secret::import(secret).expect("a key");
                    let pepper = served.pepper();
                    let key = spec(number);
                    Ok((
                        keyring.create_key(key, &secret.presented(), pepper, now)?,
                        (),
                    ))
                })
                .await
                .expect("a new key");
        }
        catalog
            .commit(&served, "fuzz", |keyring, _| {
                Ok((keyring.revoke(key_id(0), Which::All, "fuzz")?, ()))
            })
            .await
            .expect("it is active");
        Self {
            catalog: Arc::new(catalog),
            store,
            clock,
            _dir: dir,
        }
    }
}

impl Stream {
    async fn open(first: Option<Kind>) -> Self {
        let world = World::get();
        let max_serve_for = Duration::from_hours(1);
        let fleet = Fleet::new(world.clock.clone(), max_serve_for, Vec::new());
        let fleet = Arc::new(fleet.expect("no rows"));
        let pace = Arc::new(Pace::new(world.clock.clone()));
        let store = Arc::clone(&world.store);
        let usage = UsageBook::open(store, world.clock.clone(), pace, &[]).await;
        let usage = Arc::new(usage.expect("the store can be read"));
        let tasks = TaskTracker::new();
        let server = DiscoveryServer::new(
            Arc::clone(&world.catalog),
            Arc::clone(&fleet),
            Arc::clone(&usage),
            Terms {
                beat_every: Duration::from_secs(5),
                max_serve_for: Duration::from_hours(1),
            },
            tasks.clone(),
            CancellationToken::new(),
        );
        let (say, said) = mpsc::unbounded_channel();
        if let Some(kind) = first {
            say.send(message(kind)).expect("the stream is open");
        }
        let said = UnboundedReceiverStream::new(said);
        let mut client = KeyringDiscoveryClient::new(server.into_service());
        let told = client.subscribe(said).await.ok();
        Self {
            fleet,
            usage,
            tasks,
            say,
            told: told.map(tonic::Response::into_inner),
            reported: BTreeSet::new(),
            beats: BTreeSet::new(),
        }
    }

    async fn play(mut self, said: Vec<Kind>) {
        for (at, kind) in said.into_iter().enumerate() {
            if let Kind::Usage(usage) = &kind {
                self.reported.insert(usage.sequence);
            }
            if let Kind::Beat(beat) = &kind {
                self.beats.insert(beat.number);
            }
            let is_flush = matches!(&kind, Kind::Ack(ack) if ack.nonce % 4 == 3);
            // The first message has opened the stream. The answers show whether the control plane has closed it.
            if at > 0 {
                let _ = self.say.send(message(kind));
            }
            self.listen().await;
            if is_flush {
                // The control plane now answers the beats that have arrived.
                let catalog = &World::get().catalog;
                catalog.refresh().await.expect("the store works");
                self.usage
                    .flush(&self.fleet)
                    .await
                    .expect("the store works");
            }
            self.check();
        }
        self.leave().await;
    }

    /// Receives the answers until no more arrive.
    async fn listen(&mut self) {
        let mut told = 0;
        while let Some(stream) = &mut self.told {
            // The clock moves only when nothing else can run.
            match tokio::time::timeout(Duration::from_millis(1), stream.message()).await {
                Err(_) => return,
                Ok(Ok(Some(message))) => {
                    told += 1;
                    assert!(told <= MAX_ANSWERS, "no end of answers");
                    self.check_told(message);
                }
                Ok(Ok(None) | Err(_)) => self.told = None,
            }
        }
    }

    fn check_told(&self, message: discovery::ControlMessage) {
        let newest = newest();
        match message
            .kind
            .expect("a control plane says nothing without content")
        {
            Told::Snapshot(chunk) => {
                let chunk = discovery::SnapshotChunk::decode(chunk).expect("it is serialized");
                assert_eq!(chunk.revision, newest);
            }
            Told::Delta(delta) => {
                let delta = discovery::Delta::decode(delta).expect("it is serialized");
                assert!(delta.prev_revision < delta.revision && delta.revision <= newest);
            }
            Told::Revocations(message) => {
                let message = discovery::Revocations::decode(message).expect("it is serialized");
                assert!(message.revision <= newest);
            }
            Told::UsageAck(ack) => {
                assert!(self.reported.contains(&ack.sequence), "an ack of nothing");
            }
            Told::Start(start) => assert_eq!(start.revision, newest),
            Told::LookupResult(result) => {
                assert_eq!(result.revision, newest);
                assert_eq!(result.digest.len(), 32);
            }
            Told::Settings(_) | Told::NotServed(_) | Told::Drain(_) => {}
            Told::Listing(listing) => assert_eq!(listing.keyrings, [KEYRING]),
            Told::BeatAnswer(answer) => {
                assert!(self.beats.contains(&answer.beat), "an answer to nothing");
                for pulse in answer.keyrings {
                    assert_eq!(pulse.revision, newest);
                }
            }
        }
    }

    fn check(&self) {
        let members = self.fleet.members();
        assert!(members.len() <= 1, "one stream is one sidecar");
        for (key, run) in members {
            assert!(key.node.len() <= 253 && key.run_id.len() <= 253);
            check_run(&run);
        }
        let coverage = self.fleet.coverage(&name(), World::get().clock.wall());
        assert!(coverage.complete_until <= Some(World::get().clock.wall()));
    }

    /// Ends the sidecar, and verifies that everything of its stream ends with it.
    async fn leave(self) {
        let Self {
            fleet,
            usage,
            tasks,
            say,
            told,
            reported: _,
            beats: _,
        } = self;
        drop((say, told));
        tasks.close();
        // A task that panicked has not recorded the end of its stream.
        tasks.wait().await;
        for (_, run) in fleet.members() {
            assert_eq!(run.streams(), 0, "a stream outlives its connection");
        }
        usage.flush(&fleet).await.expect("the store works");
    }
}

impl Input<'_> {
    /// A name: mostly short, sometimes as long as a message can be, sometimes not valid.
    fn text(&mut self) -> String {
        match self.byte() {
            0xff => "long ".repeat(8 << 10),
            0xfe => String::from_utf8_lossy(self.bytes(8)).into_owned(),
            byte => format!("name-{}", byte % 4),
        }
    }

    /// A number around `held`.
    fn number(&mut self, held: u64) -> u64 {
        match self.byte() {
            0xff => u64::MAX,
            byte @ 0x80..0xff => held.saturating_add(u64::from(byte % 4)),
            byte => held.saturating_sub(u64::from(byte % 16)),
        }
    }

    /// A keyring: mostly the one that is served.
    fn keyring(&mut self) -> String {
        match self.byte() {
            0xf0.. => self.text(),
            0xe0..0xf0 => "elsewhere".to_owned(),
            _ => KEYRING.to_owned(),
        }
    }

    fn epoch(&mut self) -> u64 {
        let served = World::get().catalog.get(&name()).expect("it is served");
        match self.byte() {
            0xe0.. => 1,
            _ => served.epoch().get(),
        }
    }
}

fn serialized(input: &mut Input<'_>) -> Option<Kind> {
    let len = usize::from(u16::from_be_bytes([input.byte(), input.byte()]));
    let message = discovery::SidecarMessage::decode(input.bytes(len)).ok()?;
    message.kind
}

fn hello(input: &mut Input<'_>) -> discovery::Hello {
    let labels = input.byte();
    let labels = (0..labels % 4).map(|_| (input.text(), input.text()));
    let labels = labels.collect();
    let node = discovery::Node {
        id: input.text(),
        cluster: input.text(),
        labels,
        version: input.text(),
    };
    let subscriptions = input.byte() % 4;
    let subscriptions = (0..subscriptions).map(|_| subscription(input));
    let subscriptions = subscriptions.collect();
    discovery::Hello {
        node: Some(node),
        run_id: input.text(),
        subscriptions,
        protocol: discovery::PROTOCOL,
        stream: 1,
        ..Default::default()
    }
}

fn subscription(input: &mut Input<'_>) -> discovery::Subscription {
    let (keyring, epoch) = (input.keyring(), input.epoch());
    let revision = input.number(newest());
    let digest = input.byte();
    discovery::Subscription {
        keyring,
        epoch,
        revision,
        set_digest: u64::from(digest),
        mode: i32::from(input.byte() % 3),
        revoked_through: revision.wrapping_sub(u64::from(digest % 4)),
        deny_after_ms: input.number(60_000),
        partial: (digest >= 0x80).then(|| discovery::PartialSnapshot {
            id: u64::from(digest % 2),
            chunks: u32::from(digest),
        }),
    }
}

fn act(input: &mut Input<'_>) -> Option<Kind> {
    let kind = match input.byte() % 10 {
        0 | 1 => Kind::Ack(discovery::Ack {
            keyring: input.keyring(),
            epoch: input.epoch(),
            nonce: u64::from(input.byte()),
            applied_revision: input.number(newest()),
            durable_revision: input.number(newest()),
            revoked_through: input.number(newest()),
            ..Default::default()
        }),
        2 => {
            let count = input.byte() % 8;
            let item = discovery::RejectedItem {
                name: input.text(),
                reason: input.text(),
            };
            let numbered = |number: usize| discovery::RejectedItem {
                name: format!("{number} {}", item.name),
                reason: item.reason.clone(),
            };
            Kind::Nack(discovery::Nack {
                keyring: input.keyring(),
                epoch: input.epoch(),
                nonce: 1,
                items: (0..usize::from(count) * usize::from(count))
                    .map(numbered)
                    .collect(),
                applied_revision: input.number(newest()),
                revoked_through: input.number(newest()),
                ..Default::default()
            })
        }
        3 => Kind::Resync(discovery::Resync {
            keyring: input.keyring(),
            reason: i32::from(input.byte() % 8),
        }),
        4 => Kind::Lookup(discovery::Lookup {
            keyring: input.keyring(),
            digest: match input.byte() {
                0xf0.. => b"short".to_vec().into(),
                byte => vec![byte; 32].into(),
            },
        }),
        5 | 6 => Kind::Usage(usage(input)),
        7 => Kind::Hello(hello(input)),
        8 => Kind::Beat(discovery::Beat {
            number: input.number(8),
        }),
        _ => match input.byte() {
            0x80.. => return serialized(input),
            0x60.. => Kind::Find(discovery::Find {
                patterns: vec!["*".to_owned(), input.text()],
            }),
            0x40.. => {
                let count = input.byte() % 4;
                Kind::Subscribe(discovery::Subscribe {
                    subscriptions: (0..count).map(|_| subscription(input)).collect(),
                })
            }
            0x20.. => Kind::Unsubscribe(discovery::Unsubscribe {
                keyring: input.keyring(),
            }),
            _ => Kind::Goodbye(discovery::Goodbye {
                ..Default::default()
            }),
        },
    };
    Some(kind)
}

fn usage(input: &mut Input<'_>) -> discovery::Usage {
    let sequence = input.number(8);
    let end = input.byte();
    let versions = input.byte() % 4;
    let versions = (0..versions).map(|_| discovery::VersionUsage {
        key_id: match input.byte() {
            0xf0.. => input.text(),
            byte => key_id(byte % (KEYS + 1)).to_string(),
        },
        version: u32::from(input.byte() % 3),
        requests: input.number(100),
        denied: input.number(100),
        first_used_ms: input.number(1_000_000_000_000).cast_signed(),
        last_used_ms: input.number(1_000_000_000_000).cast_signed(),
        callers: (0..input.byte() % 32)
            .map(|_| discovery::Caller {
                source: input.text(),
                user_agent: input.text(),
                route: input.text(),
                requests: input.number(100),
                last_used_ms: input.number(1_000_000_000_000).cast_signed(),
            })
            .collect(),
    });
    let versions = versions.collect();
    discovery::Usage {
        sequence,
        complete_until_beat: match end {
            0x40.. => u64::from(end % 8),
            _ => 0,
        },
        is_final: end >= 0xf0,
        keyrings: vec![discovery::KeyringUsage {
            keyring: input.keyring(),
            versions,
        }],
    }
}

fn check_run(run: &Run) {
    let about = &run.about;
    let labels = about.labels.iter();
    let labels: usize = labels.map(|(name, value)| name.len() + value.len()).sum();
    let of_node = about.cluster.len() + about.version.len() + labels;
    assert!(of_node <= MAX_OF_NODE, "{of_node} bytes are kept of a node");
    let served = World::get().catalog.get(&name()).expect("it is served");
    for (keyring, holding) in &run.keyrings {
        let progress = &holding.progress;
        let rejected = progress.rejected.iter();
        let rejected: usize = rejected
            .map(|(name, reason)| name.len() + reason.len())
            .sum();
        assert!(
            rejected <= MAX_REJECTED,
            "{rejected} bytes are kept of what is refused"
        );
        if *keyring == name() && progress.epoch == served.epoch() {
            let newest = served.revision();
            assert!(progress.applied <= newest, "more is applied than there is");
            assert!(
                progress.revoked_through <= newest,
                "more is revoked than there is"
            );
            assert!(progress.durable <= newest, "more is on disk than there is");
            assert!(
                progress.durable_revoked_through <= newest,
                "more is revoked on disk than there is"
            );
        }
    }
}

fn message(kind: Kind) -> discovery::SidecarMessage {
    discovery::SidecarMessage { kind: Some(kind) }
}

fn newest() -> u64 {
    let served = World::get().catalog.get(&name()).expect("it is served");
    served.revision().get()
}

fn name() -> KeyringName {
    KEYRING.parse().expect("a name")
}

fn key_id(number: u8) -> KeyId {
    format!("0123456789a{number}").parse().expect("an id")
}

fn spec(number: u8) -> KeySpec {
    KeySpec {
        key_id: key_id(number),
        consumer: "checkout".parse().expect("a consumer"),
        name: String::new(),
        scopes: Scopes::default(),
        allowed_sources: AllowedSources::default(),
        window: Window::default(),
        imported: true,
    }
}

/// A runtime with one thread, and with a clock that moves when everything waits for it.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}
