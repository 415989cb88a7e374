use std::pin::Pin;

use futures_util::Stream as AnyStream;
use tokio::{
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::*;
use crate::{
    clock::{Clock, LatestWall},
    config::sidecar::{NodeSettings, SnapshotSettings},
    key::{Epoch, KeyId, KeyRecord, KeyState, Secret, Timestamp, VersionRef, testing},
    keyring::{Keyrings, Slot, Staleness},
    proto::discovery::{
        control_message::Kind as Tell,
        keyring_discovery_server::{KeyringDiscovery, KeyringDiscoveryServer},
    },
    sidecar::begin::{self, Empty},
    snapshot::{SnapshotKey, read},
    wire::{
        item,
        testing::{Torrent, settings},
    },
};

/// A control plane that does what the test says: every stream that a sidecar opens comes out of a channel.
#[derive(Debug)]
struct Control(mpsc::UnboundedSender<Opened>);

/// The control plane's side of a stream.
#[derive(Debug)]
struct Opened {
    said: Streaming<discovery::SidecarMessage>,
    tell: mpsc::UnboundedSender<Result<discovery::ControlMessage, Status>>,
    hello: discovery::Hello,
    revision: u64,
    /// The newest beat that was read, and the newest that was answered.
    beat: u64,
    answered: u64,
}

/// A client with its keyring, its control plane, and a key.
struct World {
    opened: mpsc::UnboundedReceiver<Opened>,
    slot: Arc<Slot>,
    secret: Secret,
    link: Arc<Link>,
    shutdown: CancellationToken,
    checks: TaskTracker,
    client: JoinHandle<()>,
    server: JoinSet<()>,
}

/// The bytes that a sidecar may send before they are read: few, so that the rest waits in the
/// sidecar.
const SERVERS_WINDOW: u32 = 64 << 10;
/// Often, so that no test waits for a beat.
const BEAT_EVERY_MS: u32 = 50;
/// Far above the duration of any step, so that only a failing test reaches it.
const DEADLINE: Duration = Duration::from_mins(2);

#[tonic::async_trait]
impl KeyringDiscovery for Control {
    type SubscribeStream =
        Pin<Box<dyn AnyStream<Item = Result<discovery::ControlMessage, Status>> + Send>>;

    async fn subscribe(
        &self,
        request: Request<Streaming<discovery::SidecarMessage>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let (tell, told) = mpsc::unbounded_channel();
        let opened = Opened {
            said: request.into_inner(),
            tell,
            hello: discovery::Hello::default(),
            revision: 0,
            beat: 0,
            answered: 0,
        };
        self.0.send(opened).expect("the test listens");
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(told))))
    }
}

impl World {
    async fn start() -> Self {
        Self::start_with(|_, _| Hold::default()).await
    }

    /// A client that shows what `hold` makes of its keyrings and its receiver.
    async fn start_with(hold: impl FnOnce(&Keyrings, &mut Receiver) -> Hold) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (control, opened) = mpsc::unbounded_channel();
        let mut server = JoinSet::new();
        let serving = Server::builder()
            .initial_stream_window_size(SERVERS_WINDOW)
            .add_service(KeyringDiscoveryServer::new(Control(control)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        server.spawn(async move { serving.await.expect("it serves") });

        let keyrings = Keyrings::new([(testing::keyring_name(), Staleness::default())]);
        let slot = keyrings.get(&testing::keyring_name()).expect("it was made");
        let mut receiver = Receiver::new(&keyrings, Clock::system());
        let hold = hold(&keyrings, &mut receiver);
        let endpoint = format!("http://{address}").parse().expect("a URI");
        let client = Client::new(discovery::Node::default(), vec![endpoint], receiver);
        let client = client.expect("the random source works").with_hold(hold);
        let (shutdown, checks) = (CancellationToken::new(), TaskTracker::new());
        Self {
            opened,
            slot,
            secret: testing::secret(KeyId::generate().expect("the random source works")),
            link: Arc::clone(client.link()),
            client: tokio::spawn(client.run(shutdown.clone(), checks.clone())),
            shutdown,
            checks,
            server,
        }
    }

    /// The next stream, on which the keyring has come in `state`.
    async fn stream(&mut self, state: KeyState) -> Opened {
        let opened = timeout(DEADLINE, self.opened.recv()).await;
        let mut opened = opened.expect("in time").expect("it listens");
        opened.hello = match opened.next().await {
            Some(Kind::Hello(hello)) => hello,
            other => panic!("no hello: {other:?}"),
        };
        opened.tell(Tell::Settings(settings(Epoch::new(1))));
        let held = self
            .slot
            .load()
            .as_ref()
            .map_or(0, |view| view.revision().get());
        opened.revision = held + 1;
        let record = KeyRecord {
            state,
            ..testing::record_of(&self.secret)
        };
        let item = item::encode(&record);
        let chunk = discovery::SnapshotChunk {
            keyring: testing::keyring_name().to_string(),
            epoch: 1,
            revision: opened.revision,
            nonce: 1,
            index: 0,
            last: true,
            total_items: 1,
            set_digest: item::hash(&item),
            items: vec![item],
            confirmed_items: 0,
            id: 0,
        };
        let chunk = prost::Message::encode_to_vec(&chunk);
        opened.tell(Tell::Snapshot(chunk.into()));
        let ack = opened.next().await;
        assert!(matches!(ack, Some(Kind::Ack(_))), "{ack:?}");
        opened
    }

    fn state(&self) -> KeyState {
        let view = self.slot.load();
        let view = view.as_ref().expect("it has come");
        let held = view.find(&self.secret.presented());
        held.expect("it is held").state()
    }

    fn version(&self) -> VersionRef {
        testing::record_of(&self.secret).version_ref()
    }

    fn count(&self, uses: u64) {
        let usage = self.slot.usage().of_version(self.version());
        for _ in 0..uses {
            let now = Clock::system().wall();
            self.slot.usage().count(usage, now, false);
        }
    }

    /// Counts a use of each of `versions` other versions.
    fn count_others(&self, versions: usize) {
        let now = Clock::system().wall();
        for _ in 0..versions {
            let version = VersionRef {
                key_id: KeyId::generate().expect("the random source works"),
                ..self.version()
            };
            let usage = self.slot.usage().of_version(version);
            self.slot.usage().count(usage, now, false);
        }
    }

    async fn ended(self) {
        let ended = timeout(DEADLINE, self.client).await;
        ended.expect("in time").expect("it does not panic");
    }
}

impl Opened {
    fn tell(&self, kind: Tell) {
        let message = discovery::ControlMessage { kind: Some(kind) };
        // If the client has gone, the test sees it from the messages that do not come.
        let _ = self.tell.send(Ok(message));
    }

    fn ack(&self, usage: &discovery::Usage) {
        let sequence = usage.sequence;
        self.tell(Tell::UsageAck(discovery::UsageAck { sequence }));
    }

    /// Returns the next message that is not a beat; none at the end of the stream.
    async fn next(&mut self) -> Option<Kind> {
        loop {
            match self.said().await? {
                Kind::Beat(beat) => self.beat = beat.number,
                other => return Some(other),
            }
        }
    }

    async fn said(&mut self) -> Option<Kind> {
        let message = timeout(DEADLINE, self.said.message()).await;
        message.expect("in time").ok().flatten()?.kind
    }

    /// Waits for a beat that is not answered.
    async fn until_beat(&mut self) {
        while self.beat <= self.answered {
            match self.said().await {
                Some(Kind::Beat(beat)) => self.beat = beat.number,
                other => panic!("no beat: {other:?}"),
            }
        }
    }

    async fn usage(&mut self) -> discovery::Usage {
        match self.next().await {
            Some(Kind::Usage(usage)) => usage,
            other => panic!("no usage: {other:?}"),
        }
    }

    async fn answer_beat(&mut self) {
        self.until_beat().await;
        self.answered = self.beat;
        self.tell(Tell::BeatAnswer(discovery::BeatAnswer {
            beat: self.beat,
            sent_at: Some(Clock::system().wall().to_wire()),
            beat_every_ms: BEAT_EVERY_MS,
            keyrings: Vec::new(),
        }));
    }

    /// Returns the report that replies to the answer to a beat.
    async fn report(&mut self) -> discovery::Usage {
        self.answer_beat().await;
        self.usage().await
    }
}

/// Returns the drain of a control plane that continues, after a certificate has expired.
fn expired() -> Tell {
    Tell::Drain(discovery::Drain {
        retry_after: None,
        reason: discovery::DrainReason::CertificateExpired.into(),
    })
}

fn requests(usage: &discovery::Usage) -> Vec<u64> {
    let versions = usage.keyrings.iter().flat_map(|keyring| &keyring.versions);
    versions.map(|version| version.requests).collect()
}

#[tokio::test]
async fn every_answer_to_a_beat_is_replied_to_with_what_was_not_acked() {
    let mut world = World::start().await;
    let mut stream = world.stream(KeyState::Active).await;
    world.count(3);
    let first = stream.report().await;
    assert_eq!((first.sequence, requests(&first)), (1, vec![3]));
    assert_eq!(first.complete_until_beat, stream.answered);
    assert!(!first.is_final);
    world.count(1);
    let second = stream.report().await;
    assert_eq!(requests(&second), [4]);
    assert_eq!(requests(&stream.report().await), [4]);
    stream.ack(&second);
    // The count is reported once more before the ack of the last message has arrived.
    let last = stream.report().await;
    stream.ack(&last);
    assert!(requests(&stream.report().await).is_empty());
    let progress = ReportProgress {
        acked: last.sequence,
        unacked: 0,
    };
    assert_eq!(world.link.usage(), progress);
}

#[tokio::test]
async fn a_control_plane_that_does_not_read_usage_is_listened_to_and_gets_all_of_it_later() {
    const VERSIONS: usize = 50_000;
    let mut world = World::start().await;
    let mut stream = world.stream(KeyState::Active).await;
    world.count_others(VERSIONS);
    stream.answer_beat().await;
    // The second report is not begun before the first has left.
    stream.answer_beat().await;
    stream.tell(Tell::UsageAck(discovery::UsageAck { sequence: 1 }));
    let taken = async {
        while world.link.usage().acked == 0 {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(DEADLINE, taken).await.expect("what came behind it");

    let (mut told, mut messages) = (0, 0);
    loop {
        let usage = stream.usage().await;
        messages += 1;
        assert_eq!(usage.sequence, messages);
        told += requests(&usage).len();
        if usage.complete_until_beat > 0 {
            break;
        }
    }
    assert_eq!(told, VERSIONS);
}

#[tokio::test]
async fn a_sidecar_asks_behind_its_hello_after_a_snapshot_and_after_each_pause() {
    let mut world = World::start().await;
    let mut stream = world.stream(KeyState::Active).await;
    assert_eq!(stream.beat, 1, "it stands behind the hello");
    let second = stream.said().await;
    let is_second = matches!(&second, Some(Kind::Beat(beat)) if beat.number == 2);
    assert!(
        is_second,
        "{second:?} stands behind the ack of the snapshot"
    );
    stream.beat = 2;
    for _ in 0..3 {
        let usage = stream.report().await;
        assert_eq!(usage.complete_until_beat, stream.answered);
    }
    assert!(stream.answered >= 4, "the others come after the pause");
}

#[tokio::test]
async fn usage_leaves_where_no_answer_waits() {
    let (answers, outbound) = mpsc::channel(MAX_ANSWERS);
    let (usage, reports) = mpsc::channel(MAX_USAGE);
    let message = |kind| discovery::SidecarMessage { kind: Some(kind) };
    let report = message(Kind::Usage(discovery::Usage::default()));
    usage.send(report.clone()).await.expect("it has room");
    let lookup = message(Kind::Lookup(discovery::Lookup::default()));
    let ack = message(Kind::Ack(discovery::Ack::default()));
    for answer in [&lookup, &ack] {
        answers.send(answer.clone()).await.expect("it has room");
    }
    drop((answers, usage));
    let sent: Vec<_> = answers_first(outbound, reports).collect().await;
    assert_eq!(sent, [lookup, ack, report]);
}

#[tokio::test]
async fn counts_go_on_over_a_lost_stream_and_a_change_of_the_record() {
    let mut world = World::start().await;
    let mut stream = world.stream(KeyState::Active).await;
    world.count(5);
    let lost = stream.report().await;
    assert_eq!(requests(&lost), [5]);
    drop(stream);

    let mut stream = world.stream(KeyState::Retiring).await;
    assert_eq!(world.state(), KeyState::Retiring);
    world.count(2);
    let told = stream.report().await;
    assert_eq!(requests(&told), [7]);
    assert!(told.sequence > lost.sequence, "it is the same process");
    stream.ack(&told);
    drop(stream);

    let mut stream = world.stream(KeyState::Retired).await;
    world.count(1);
    assert_eq!(requests(&stream.report().await), [8]);
}

#[tokio::test]
async fn a_stop_serves_the_stream_until_checks_are_answered_and_reports_them_before_the_goodbye() {
    let mut world = World::start().await;
    let mut stream = world.stream(KeyState::Active).await;
    let (slot, version) = (Arc::clone(&world.slot), world.version());
    let (answer, asked) = tokio::sync::oneshot::channel::<()>();
    // A check that is answered after the sidecar was told to stop.
    world.checks.spawn(async move {
        asked.await.expect("the test answers");
        let usage = slot.usage().of_version(version);
        slot.usage().count(usage, Timestamp::from_millis(1), false);
    });
    world.checks.close();
    world.shutdown.cancel();
    for _ in 0..3 {
        assert!(requests(&stream.report().await).is_empty());
    }
    answer.send(()).expect("the check waits");

    let report = stream.usage().await;

    assert_eq!(requests(&report), [1]);
    assert!(report.is_final);
    // Before the ack, the sidecar sends nothing but answers.
    let while_waiting = stream.report().await;
    assert_eq!(requests(&while_waiting), [1]);
    stream.ack(&while_waiting);
    let goodbye = stream.next().await;
    assert!(matches!(goodbye, Some(Kind::Goodbye(_))), "{goodbye:?}");
    assert!(
        !world.client.is_finished(),
        "it waits for the end of the stream"
    );
    drop(stream);
    world.ended().await;
}

/// A client with a file that is to be erased; its keeper runs until `stop`, if it runs at all.
async fn with_file(dir: &std::path::Path, stop: Option<CancellationToken>) -> World {
    let settings = SnapshotSettings {
        path: dir.join("keyring.snap"),
        key_file: dir.join("snapshot.key"),
        erase_on_stop: true,
    };
    SnapshotKey::make(&settings.key_file).expect("it is made");
    World::start_with(|keyrings, receiver| {
        let empty = Empty {
            node: &NodeSettings::named("edge-1".parse().expect("a name")),
            keyrings,
            receiver,
            latest: &LatestWall::default(),
            clock: &Clock::system(),
        };
        let begun = begin::begin(&settings, empty).expect("it starts");
        let kept = begun.kept.expect("nobody else uses the file");
        match stop {
            Some(stop) => drop(tokio::spawn(kept.keeper.run(stop))),
            None => std::mem::forget(kept.keeper),
        }
        Hold {
            lock: Some(discovery::Lock {
                acquired_ns: 17,
                ..discovery::Lock::default()
            }),
            snapshot_file: Some(discovery::SnapshotFile {
                id: kept.id.as_bytes().to_vec().into(),
                begun_from_write: kept.begun_from_write,
            }),
            closer: Some(kept.closer),
        }
    })
    .await
}

/// Returns the Goodbye of a stream, and the acks before it.
async fn farewell(stream: &mut Opened) -> (discovery::Goodbye, Vec<discovery::Ack>) {
    let mut acks = Vec::new();
    loop {
        match stream.next().await {
            Some(Kind::Goodbye(goodbye)) => return (goodbye, acks),
            Some(Kind::Usage(usage)) => stream.ack(&usage),
            Some(Kind::Ack(ack)) => acks.push(ack),
            other => panic!("no goodbye: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_goodbye_says_that_the_file_is_erased_once_it_is() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let stop = CancellationToken::new();
    let mut world = with_file(dir.path(), Some(stop.clone())).await;
    let mut stream = world.stream(KeyState::Active).await;
    assert_eq!(
        stream.hello.lock.as_ref().map(|lock| lock.acquired_ns),
        Some(17)
    );
    let file = stream.hello.snapshot_file.clone().expect("it keeps one");
    assert_eq!((file.id.len(), file.begun_from_write), (16, 0));
    match stream.next().await {
        Some(Kind::Ack(ack)) => assert_eq!(
            (ack.durable_revision, ack.durable_revoked_through),
            (stream.revision, stream.revision)
        ),
        other => panic!("no ack: {other:?}"),
    }
    let file = dir.path().join("keyring.snap");
    assert!(file.exists());
    // A check is under way: until it is answered the file stays.
    let (answer, asked) = tokio::sync::oneshot::channel::<()>();
    world
        .checks
        .spawn(async move { asked.await.expect("the test answers") });
    world.checks.close();
    world.shutdown.cancel();
    assert!(requests(&stream.report().await).is_empty());
    assert!(file.exists());
    answer.send(()).expect("the check waits");
    let (goodbye, _) = farewell(&mut stream).await;
    assert!(goodbye.has_erased_file);
    assert!(!file.exists());
    drop(stream);
    world.ended().await;
    stop.cancel();
}

#[tokio::test]
async fn a_goodbye_does_not_wait_for_a_disk_that_does_not_answer() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut world = with_file(dir.path(), None).await;
    let mut stream = world.stream(KeyState::Active).await;
    world.checks.close();
    world.shutdown.cancel();
    let (goodbye, acks) = farewell(&mut stream).await;
    assert!(!goodbye.has_erased_file);
    assert!(acks.is_empty(), "nothing is on the disk");
    drop(stream);
    world.ended().await;
}

#[tokio::test]
async fn a_keyring_is_reported_as_dropped_once_the_disk_does_not_have_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut world = with_file(dir.path(), Some(CancellationToken::new())).await;
    let mut stream = world.stream(KeyState::Active).await;
    world.count(3);
    stream.tell(Tell::NotServed(discovery::NotServed {
        keyring: testing::keyring_name().to_string(),
        reason: "the rule was removed".to_owned(),
        number: 4,
        is_forbidden: true,
    }));
    let mut last = Vec::new();
    let dropped = loop {
        match stream.next().await {
            Some(Kind::Dropped(dropped)) => break dropped,
            Some(Kind::Usage(usage)) => last.push(requests(&usage)),
            Some(Kind::Ack(_)) => {}
            other => panic!("not dropped: {other:?}"),
        }
    };
    assert_eq!(dropped.not_served, 4);
    assert_eq!(last, [[3]], "its last counts come before");
    assert!(world.slot.load().is_none());
    let key = SnapshotKey::read(&dir.path().join("snapshot.key")).expect("it is there");
    let bytes = std::fs::read(dir.path().join("keyring.snap")).expect("it is there");
    let contents = read::read(&bytes[..], bytes.len() as u64, &key).expect("it is whole");
    assert_eq!(contents.keyrings.len(), 0);
}

#[tokio::test]
async fn a_stop_is_not_held_up_by_a_control_plane_that_acks_nothing() {
    let mut world = World::start().await;
    let mut stream = world.stream(KeyState::Active).await;
    world.count(1);
    world.checks.close();
    let began = Clock::system().boot();
    world.shutdown.cancel();
    assert_eq!(requests(&stream.usage().await), [1]);
    let goodbye = stream.next().await;
    assert!(matches!(goodbye, Some(Kind::Goodbye(_))), "{goodbye:?}");
    world.ended().await;
    let took = Clock::system().boot().saturating_since(began);
    assert!(took >= REPORT_TIMEOUT, "{took:?}");
}

#[tokio::test]
async fn a_sidecar_without_a_stream_stops_at_once() {
    let mut world = World::start().await;
    let stream = world.stream(KeyState::Active).await;
    world.server.shutdown().await;
    drop(stream);
    // A check is under way forever: without a stream, nothing can be reported about it.
    world.checks.spawn(std::future::pending::<()>());
    world.checks.close();
    world.shutdown.cancel();
    world.ended().await;
}

#[tokio::test]
async fn a_stream_that_ends_with_its_certificate_is_replaced_at_the_same_control_plane_and_not_counted()
 {
    let mut world = World::start().await;
    for _ in 0..3 {
        let stream = world.stream(KeyState::Active).await;
        stream.tell(expired());
    }
    let open = world.stream(KeyState::Active).await;
    assert_eq!(world.link.reconnects(), 0);
    assert_eq!(world.link.problems().collect::<Vec<_>>(), [None]);
    // One that breaks is counted.
    drop(open);
    let _open = world.stream(KeyState::Active).await;
    assert_eq!(world.link.reconnects(), 1);
}

#[test]
fn planned_ends_wait_no_longer_than_their_jitter_however_many_there_are() {
    let mut backoff = Backoff::default();
    let end = StreamEnd::Left(Leave::Drain {
        reason: DrainReason::CertificateExpired,
        retry_after: None,
    });
    for _ in 0..100 {
        let next = end.next(false, &mut backoff, u32::MAX);
        assert_eq!(next.wait, Backoff::PLANNED);
        assert!(next.is_same_endpoint);
    }
    // Planned ends are no failures: the first failure after them waits as the first.
    let lost = StreamEnd::Closed.next(false, &mut backoff, u32::MAX);
    assert_eq!(lost.wait, Backoff::FIRST);
    assert!(!lost.is_same_endpoint);
}

#[test]
fn a_stop_of_the_control_plane_is_spread_and_backs_off_until_a_stream_was_of_use() {
    let mut backoff = Backoff::default();
    let after = Duration::from_millis(200);
    let stop = StreamEnd::Left(Leave::Drain {
        reason: DrainReason::Stopping,
        retry_after: Some(after),
    });
    let mut waits = |was_of_use| stop.next(was_of_use, &mut backoff, u32::MAX).wait;
    assert_eq!(waits(true), after + Backoff::FIRST);
    assert_eq!(waits(false), after + 2 * Backoff::FIRST);
    assert_eq!(waits(true), after + Backoff::FIRST);
}

#[test]
fn a_stream_that_was_of_use_ends_the_series_of_failures_however_short_it_was() {
    let mut backoff = Backoff::default();
    let mut waits = |was_of_use| {
        let next = StreamEnd::Silent.next(was_of_use, &mut backoff, u32::MAX);
        next.wait
    };
    // A control plane that accepts streams and then fails.
    for failures in 0..5 {
        assert_eq!(waits(false), (1 << failures) * Backoff::FIRST);
    }
    for _ in 0..5 {
        assert_eq!(waits(true), Backoff::FIRST);
    }
}

#[test]
fn a_stream_is_of_use_once_each_keyring_was_confirmed_or_refused() {
    let other: crate::key::KeyringName = "partners".parse().expect("a name");
    let names = [testing::keyring_name(), other.clone()];
    let keyrings = Keyrings::new(names.map(|name| (name, Staleness::default())));
    let mut receiver = Receiver::new(&keyrings, Clock::system());
    let tell = |receiver: &mut Receiver, kind| {
        let message = discovery::ControlMessage { kind: Some(kind) };
        receiver.receive(message).expect("the stream goes on");
    };
    let confirm = |receiver: &mut Receiver, revision| {
        let Some(Kind::Beat(beat)) = receiver.next_beat().kind else {
            panic!("it asks for nothing");
        };
        let answer = discovery::BeatAnswer {
            beat: beat.number,
            sent_at: Some(Clock::system().wall().to_wire()),
            beat_every_ms: BEAT_EVERY_MS,
            keyrings: vec![discovery::KeyringPulse {
                keyring: testing::keyring_name().to_string(),
                epoch: 1,
                revision,
                set_digest: 0,
                serve_for_ms: 60_000,
            }],
        };
        tell(receiver, Tell::BeatAnswer(answer));
    };
    let empty = discovery::SnapshotChunk {
        keyring: testing::keyring_name().to_string(),
        epoch: 1,
        revision: 1,
        last: true,
        ..discovery::SnapshotChunk::default()
    };
    let empty = prost::Message::encode_to_vec(&empty);
    tell(&mut receiver, Tell::Settings(settings(Epoch::new(1))));
    // The sidecar is behind the control plane: it requests a snapshot.
    confirm(&mut receiver, 1);
    tell(&mut receiver, Tell::Snapshot(empty.into()));
    let refused = discovery::NotServed {
        keyring: other.to_string(),
        reason: "there is no such keyring".to_owned(),
        ..Default::default()
    };
    tell(&mut receiver, Tell::NotServed(refused));
    assert!(!receiver.is_answered(), "nothing was confirmed");
    confirm(&mut receiver, 1);
    assert!(receiver.is_answered());
    // The next stream has to bring it anew.
    receiver.disconnected();
    assert!(!receiver.is_answered());
}

#[tokio::test]
async fn little_is_on_its_way_to_a_sidecar_that_does_not_read() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let torrent = Torrent::default();
    let serving = Server::builder()
        .add_service(KeyringDiscoveryServer::new(torrent.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let mut server = JoinSet::new();
    server.spawn(async move { serving.await.expect("it serves") });
    let uri = format!("http://{address}").parse().expect("a URI");
    let channel = endpoint(uri).connect().await.expect("it listens");
    let opened = KeyringDiscoveryClient::new(channel)
        .subscribe(tokio_stream::pending())
        .await;
    let _unread = opened.expect("it is open");

    let sent = torrent.has_sent().await;

    // The bound includes what was gathered for one write.
    let bound = 128 << 10;
    assert!(sent <= bound, "{sent} bytes are on their way");
}
