use futures_util::FutureExt;
use prost::Message;

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::{
    admission::{Admission, AdmissionRule, KeyringGrant, NodePattern},
    clock::Clock,
    control::{
        fleet::{Believed, Fleet, GrantError},
        pace::Pace,
    },
    follow::receiver::Receiver,
    key::{
        Change, KeyId, MasterPepper, PepperId, Prefix,
        operation::{self, Which},
        testing,
    },
    keyring::{Keyrings, Staleness},
    proto::discovery::sidecar_message::Kind as Said,
    store::{LogName, SqliteOptions, SqliteStore, Store, StoreError},
    tls::Peer,
    wire::testing::spec,
};

/// Longer than every wait in these tests: only a hung test reaches it.
const DEADLINE: Duration = Duration::from_mins(2);
const TERMS: Terms = Terms {
    beat_every: Duration::from_secs(5),
    max_serve_for: Duration::from_mins(15),
};
/// The `deny_after` of the sidecars in these tests.
const DENY_AFTER: Duration = Duration::from_hours(1);

/// A control plane's catalog and the session of one sidecar, whose messages the test asks for.
struct Pair {
    dir: tempfile::TempDir,
    store: Arc<dyn Store>,
    catalog: Arc<Catalog>,
    fleet: Arc<Fleet>,
    shutdown: CancellationToken,
    expired: CancellationToken,
    admission: Admission,
    /// The message up to which all usage is in the store.
    usage: watch::Sender<u64>,
    /// The streams of the sidecar so far.
    streams: AtomicU64,
}

struct Reader {
    session: Session,
    resyncs: mpsc::Sender<discovery::Resync>,
    lookups: mpsc::Sender<discovery::Lookup>,
    beats: Beats,
    changes: mpsc::Sender<SubscriptionChange>,
    not_served: Arc<NotServedBook>,
    catalog: Arc<Catalog>,
}

impl Pair {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&dir.path().join("relatch.db"), options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("a new store"));
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        let catalog = Catalog::open(
            Arc::clone(&store),
            Clock::system(),
            pepper,
            crate::control::metrics::ControlMetrics::default(),
        )
        .await;
        Self {
            dir,
            store,
            fleet: Arc::new(
                Fleet::new(Clock::system(), TERMS.max_serve_for, Vec::new()).expect("no rows"),
            ),
            catalog: Arc::new(catalog.expect("an empty store")),
            shutdown: CancellationToken::new(),
            expired: CancellationToken::new(),
            admission: Admission::Local,
            usage: watch::Sender::new(0),
            streams: AtomicU64::new(0),
        }
    }

    async fn with_keys(count: usize) -> Self {
        let pair = Self::new().await;
        pair.create_keyring().await;
        pair.add_keys(count).await;
        pair
    }

    async fn create_keyring(&self) {
        let name = testing::keyring_name();
        let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
        let first = first.expect("a valid keyring");
        let served = self.catalog.create_keyring("test", name, &first).await;
        served.expect("a new keyring");
        self.commit(|keyring, _| {
            let consumer = "checkout".parse().expect("a valid id");
            keyring
                .create_consumer(consumer, String::new())
                .expect("a new consumer")
        })
        .await;
    }

    async fn add_keys(&self, count: usize) {
        self.commit(|keyring, now| {
            (0..count)
                .flat_map(|_| {
                    let key_id = KeyId::generate().expect("the random source works");
                    let secret = testing::secret(key_id);
                    keyring
                        .create_key(spec(key_id), &secret.presented(), &testing::pepper(), now)
                        .expect("a new key")
                })
                .collect()
        })
        .await;
    }

    async fn revoke_one(&self) {
        self.commit(|keyring, _| {
            let key = keyring.keys().values().find(|key| key.active().is_some());
            let key_id = key.expect("a key that is active").id;
            keyring
                .revoke(key_id, Which::All, "test")
                .expect("it is active")
        })
        .await;
    }

    async fn commit(
        &self,
        plan: impl Fn(&crate::key::Keyring, crate::key::Timestamp) -> Vec<Change>,
    ) {
        let served = self.served();
        self.catalog
            .commit(&served, "test", |keyring, now| Ok((plan(keyring, now), ())))
            .await
            .expect("it is committed");
    }

    fn served(&self) -> Arc<ServedKeyring> {
        let served = self.catalog.get(&testing::keyring_name());
        served.expect("the keyring exists")
    }

    fn reader(&self, held: ClaimedState) -> Reader {
        self.reader_in(discovery::Mode::Full, held)
    }

    fn reader_in(&self, mode: discovery::Mode, held: ClaimedState) -> Reader {
        self.reader_of(&discovery::Subscription {
            keyring: testing::keyring_name().to_string(),
            epoch: held.epoch.get(),
            revision: held.revision.get(),
            set_digest: held.set_digest,
            mode: mode.into(),
            revoked_through: held.revoked_through.get(),
            partial: held.partial,
            deny_after_ms: DENY_AFTER.as_millis().try_into().expect("short"),
        })
    }

    fn reader_of(&self, subscription: &discovery::Subscription) -> Reader {
        let (resyncs, asked_resyncs) = mpsc::channel(1);
        let (lookups, asked_lookups) = mpsc::channel(MAX_LOOKUPS);
        let (beats, asked_beats) = Beats::new();
        let (changes, asked_changes) = mpsc::channel(4);
        let asked = Asked {
            resyncs: asked_resyncs,
            lookups: asked_lookups,
            beats: asked_beats,
            changes: asked_changes,
        };
        let usage = UsageAcks {
            durable: self.usage.subscribe(),
            answers: Answers::new(Arc::new(Pace::new(Clock::system()))),
        };
        let hello = discovery::Hello {
            node: Some(discovery::Node {
                id: "edge-1".to_owned(),
                ..discovery::Node::default()
            }),
            run_id: "a".to_owned(),
            stream: self.streams.fetch_add(1, Ordering::Relaxed) + 1,
            subscriptions: vec![subscription.clone()],
            ..discovery::Hello::default()
        };
        let admitted = Believed::from([(testing::keyring_name(), true)]);
        let opened = self.fleet.connected(&hello, &admitted, None);
        let grantor = Grantor {
            fleet: Arc::clone(&self.fleet),
            member: opened.expect("its streams are counted").run,
            terms: TERMS,
        };
        let not_served = Arc::new(NotServedBook::default());
        let sidecar = Subscriber {
            audience: Audience {
                admission: Arc::new(self.admission.clone()),
                peer: Peer {
                    identity: "spiffe://mesh/edge-1".parse().ok(),
                    not_after: None,
                },
                node: "edge-1".to_owned(),
            },
            not_served: Arc::clone(&not_served),
            grantor,
        };
        let session = Session::new(
            Arc::clone(&self.catalog),
            sidecar,
            std::slice::from_ref(subscription),
            asked,
            usage,
            Arc::new(Semaphore::new(1)),
            Drains {
                stop: self.shutdown.clone(),
                expired: self.expired.clone(),
            },
        );
        Reader {
            session,
            resyncs,
            lookups,
            beats,
            changes,
            not_served,
            catalog: Arc::clone(&self.catalog),
        }
    }

    /// Records the streams of the readers, as the server does before it sends anything.
    async fn record(&self) {
        let recorded = self.fleet.record_news(&*self.store).await;
        recorded.expect("it is written");
    }

    fn new_reader(&self) -> Reader {
        self.reader(ClaimedState::default())
    }

    fn reader_at_head(&self) -> Reader {
        self.reader(self.head())
    }

    fn head(&self) -> ClaimedState {
        let served = self.served();
        ClaimedState {
            epoch: served.epoch(),
            revision: served.revision(),
            set_digest: served.journal().state().feed.set_digest(),
            revoked_through: served.revision(),
            partial: None,
        }
    }
}

/// The other end: a sidecar that holds the keyring in full.
struct Sidecar {
    keyrings: Keyrings,
    receiver: Receiver,
}

impl Sidecar {
    fn new() -> Self {
        let keyrings = Keyrings::new([(testing::keyring_name(), Staleness::default())]);
        let receiver = Receiver::new(&keyrings, Clock::system());
        Self { keyrings, receiver }
    }

    /// Opens a stream.
    fn connect(&mut self, pair: &Pair) -> Reader {
        pair.reader_of(&self.receiver.subscriptions().remove(0))
    }

    /// Applies a message, and returns its ack, if there is one.
    fn take(&mut self, kind: Kind) -> Option<discovery::Ack> {
        let message = discovery::ControlMessage { kind: Some(kind) };
        let outcome = self.receiver.receive(message).expect("the stream goes on");
        let answer = outcome.answers.into_iter().next()?;
        match answer.kind {
            Some(Said::Ack(ack)) => Some(ack),
            other => panic!("{other:?} is no ack"),
        }
    }

    fn len(&self) -> Option<usize> {
        let slot = self.keyrings.get(&testing::keyring_name());
        let view = slot.expect("it is configured").load();
        view.as_ref().map(|view| view.len())
    }
}

impl Reader {
    async fn next(&mut self) -> Option<Kind> {
        tokio::time::timeout(DEADLINE, self.session.next())
            .await
            .expect("a message comes")
    }

    /// Returns the next message of a stream that has not ended.
    async fn news(&mut self) -> Kind {
        self.next().await.expect("the stream goes on")
    }

    /// Returns the message that the session has now; none when it waits.
    fn now(&mut self) -> Option<Kind> {
        self.session
            .next()
            .now_or_never()
            .map(|kind| kind.expect("the stream goes on"))
    }

    fn beat(&self, number: u64) {
        self.beats.arrive(number, &self.catalog);
    }

    /// Sends a beat, reads the store for it, and returns its answer.
    async fn answer(&mut self, number: u64) -> discovery::BeatAnswer {
        self.beat(number);
        self.catalog.refresh().await.expect("readable");
        match self.news().await {
            Kind::BeatAnswer(answer) => answer,
            other => panic!("{other:?} is no answer"),
        }
    }

    /// Reads settings and a snapshot; returns how many items it had.
    async fn read_snapshot(&mut self) -> usize {
        let mut items = 0;
        loop {
            match self.news().await {
                Kind::Settings(_) => {}
                Kind::Snapshot(chunk) => {
                    let chunk = discovery::SnapshotChunk::decode(chunk).expect("a chunk");
                    items += chunk.items.len();
                    if chunk.last {
                        return items;
                    }
                }
                other => panic!("{other:?} came before the end of the snapshot"),
            }
        }
    }
}

fn delta(kind: Kind) -> discovery::Delta {
    match kind {
        Kind::Delta(delta) => discovery::Delta::decode(delta).expect("a delta"),
        other => panic!("{other:?} is no delta"),
    }
}

#[tokio::test]
async fn a_new_sidecar_gets_settings_a_snapshot_and_an_answer() {
    let pair = Pair::with_keys(3).await;
    let mut reader = pair.new_reader();
    assert_eq!(reader.read_snapshot().await, 3);
    let answer = reader.answer(1).await;
    assert_eq!((answer.beat, answer.beat_every_ms), (1, 5_000));
    let head = pair.head();
    let pulse = &answer.keyrings[0];
    assert_eq!(pulse.epoch, head.epoch.get());
    assert_eq!(pulse.revision, head.revision.get());
    assert_eq!(pulse.set_digest, head.set_digest);
    assert_eq!(pulse.serve_for_ms, 900_000);
}

#[tokio::test]
async fn a_sidecar_is_granted_no_more_than_its_own_limit_and_ours() {
    let pair = Pair::with_keys(1).await;
    for (deny_after_ms, granted) in [(4_000, 4_000), (900_001, 900_000), (u64::MAX, 900_000)] {
        let head = pair.head();
        let mut reader = pair.reader_of(&discovery::Subscription {
            keyring: testing::keyring_name().to_string(),
            epoch: head.epoch.get(),
            revision: head.revision.get(),
            set_digest: head.set_digest,
            deny_after_ms,
            ..Default::default()
        });
        assert!(matches!(reader.news().await, Kind::Settings(_)));
        let answer = reader.answer(1).await;
        assert_eq!(answer.keyrings[0].serve_for_ms, granted);
    }
}

#[tokio::test]
async fn what_a_sidecar_has_not_been_sent_whole_is_not_confirmed() {
    // Two chunks.
    let pair = Pair::with_keys(120).await;
    let mut reader = pair.new_reader();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(matches!(reader.news().await, Kind::Snapshot(_)));
    assert_eq!(reader.answer(1).await.keyrings, []);
    assert!(matches!(reader.news().await, Kind::Snapshot(_)));
    assert_eq!(reader.answer(2).await.keyrings.len(), 1);
}

#[tokio::test]
async fn an_answer_comes_behind_the_changes_that_it_speaks_of() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    reader.beat(1);
    pair.add_keys(1).await;
    pair.revoke_one().await;
    pair.catalog.refresh().await.expect("readable");
    assert!(matches!(reader.news().await, Kind::Revocations(_)));
    assert!(matches!(reader.news().await, Kind::Delta(_)));
    assert!(matches!(reader.news().await, Kind::Delta(_)));
    let Kind::BeatAnswer(answer) = reader.news().await else {
        panic!("it is not answered");
    };
    assert_eq!(answer.keyrings[0].revision, pair.head().revision.get());
}

#[tokio::test]
async fn a_beat_that_arrives_during_a_read_waits_for_the_next_one() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    pair.record().await;
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let under_way = pair.catalog.reads().begin();
    reader.beat(1);
    assert_eq!(reader.now(), None);
    pair.catalog.reads().succeeded(under_way);
    assert_eq!(reader.now(), None, "it was read before the beat");
    pair.catalog.refresh().await.expect("readable");
    assert!(matches!(reader.now(), Some(Kind::BeatAnswer(answer)) if answer.beat == 1));
}

#[tokio::test]
async fn no_beat_is_answered_while_the_store_cannot_be_read() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    pair.record().await;
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let (path, aside) = (
        pair.dir.path().join("relatch.db"),
        pair.dir.path().join("aside"),
    );
    std::fs::rename(&path, &aside).expect("it is there");
    reader.beat(1);
    assert!(pair.catalog.refresh().await.is_err());
    reader.beat(2);
    assert!(pair.catalog.refresh().await.is_err());
    assert_eq!(reader.now(), None);
    std::fs::rename(&aside, &path).expect("it is there");
    pair.catalog.refresh().await.expect("readable");
    let answers: Vec<_> = std::iter::from_fn(|| reader.now())
        .map(|kind| match kind {
            Kind::BeatAnswer(answer) => answer.beat,
            other => panic!("{other:?} is no answer"),
        })
        .collect();
    assert_eq!(answers.last(), Some(&2));
}

#[tokio::test]
async fn an_answer_whose_grant_cannot_be_recorded_does_not_leave() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let granted = Granted {
        beat: 1,
        serve_for: vec![(testing::keyring_name(), DENY_AFTER)],
    };
    let failed = std::future::ready((granted, Err(GrantError::from(StoreError::Closing))));
    reader.session.answering.recording = Some(Box::pin(failed));
    assert_eq!(reader.now(), None);
    assert_eq!(reader.answer(2).await.beat, 2);
}

#[tokio::test]
async fn beats_that_wait_for_the_same_read_are_answered_by_the_newest_and_older_ones_never() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    pair.record().await;
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    for number in [3, 4, 4, 2, 5, 1] {
        reader.beat(number);
    }
    assert_eq!(reader.now(), None);
    reader.beat(6);
    pair.catalog.refresh().await.expect("readable");
    assert!(matches!(reader.now(), Some(Kind::BeatAnswer(answer)) if answer.beat == 6));
    reader.beat(5);
    pair.catalog.refresh().await.expect("readable");
    assert_eq!(reader.now(), None, "a newer one was answered");
}

#[tokio::test]
async fn a_beat_is_answered_however_many_newer_ones_come_during_its_read() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    pair.record().await;
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    for number in 1..10 {
        reader.beat(number);
        assert_eq!(reader.now(), None);
        let read = pair.catalog.reads().begin();
        reader.beat(number + 1);
        pair.catalog.reads().succeeded(read);
        assert!(matches!(reader.now(), Some(Kind::BeatAnswer(answer)) if answer.beat == number));
    }
}

#[tokio::test]
async fn the_answers_of_a_control_plane_that_reads_by_itself_take_a_fraction_of_a_second() {
    let pair = Pair::with_keys(1).await;
    let reading = Arc::clone(&pair.catalog).read_for_those_who_ask(pair.shutdown.clone());
    let reading = tokio::spawn(reading);
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    for number in 1..=3 {
        reader.beat(number);
        assert!(matches!(reader.news().await, Kind::BeatAnswer(answer) if answer.beat == number));
    }
    pair.shutdown.cancel();
    reading.await.expect("it ends");
}

#[tokio::test]
async fn a_sidecar_that_was_away_resumes_by_deltas() {
    let pair = Pair::with_keys(1).await;
    let held = pair.head();
    pair.add_keys(2).await;
    let mut reader = pair.reader(held);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    for expected in 1..=2 {
        let delta = delta(reader.news().await);
        assert_eq!(delta.revision, held.revision.get() + expected);
        assert_eq!(delta.prev_revision, delta.revision - 1);
    }
}

#[tokio::test]
async fn a_sidecar_that_could_not_use_an_item_gets_a_snapshot_when_it_comes_back() {
    let pair = Pair::with_keys(2).await;
    let held = ClaimedState {
        set_digest: 1,
        ..pair.head()
    };
    assert_eq!(pair.reader(held).read_snapshot().await, 2);
}

#[tokio::test]
async fn a_sidecar_that_could_not_use_an_item_gets_a_snapshot_when_it_is_behind_too() {
    let pair = Pair::with_keys(2).await;
    let former = pair.head();
    pair.add_keys(1).await;
    let held = ClaimedState {
        set_digest: former.set_digest + 1,
        ..former
    };
    assert_eq!(pair.reader(held).read_snapshot().await, 3);
    // With the digest of its revision, it continues from there.
    let mut reader = pair.reader(former);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(matches!(reader.news().await, Kind::Delta(_)));
}

#[tokio::test]
async fn a_sidecar_is_sent_the_revocations_that_it_does_not_say_it_has() {
    let pair = Pair::with_keys(2).await;
    let before = pair.head();
    pair.revoke_one().await;
    // It could not read the revocation of the revision that it is at.
    let refused = ClaimedState {
        revoked_through: before.revision,
        ..pair.head()
    };
    let mut reader = pair.reader(refused);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(matches!(reader.news().await, Kind::Revocations(_)));
    // It has the revocation, and not the delta.
    let overtaken = ClaimedState {
        revoked_through: pair.head().revision,
        ..before
    };
    let mut reader = pair.reader(overtaken);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(matches!(reader.news().await, Kind::Delta(_)));
}

#[tokio::test]
async fn a_sidecar_that_was_away_too_long_claims_no_revocation_that_it_missed() {
    let pair = Pair::with_keys(3).await;
    let mut sidecar = Sidecar::new();
    let mut reader = sidecar.connect(&pair);
    while sidecar.take(reader.news().await).is_none() {}
    drop(reader);
    let held = pair.head().revision;
    pair.revoke_one().await;
    let missed = pair.head().revision;
    // More than the feed keeps.
    pair.add_keys(9_000).await;
    pair.revoke_one().await;
    let newest = pair.head().revision;
    let mut reader = sidecar.connect(&pair);
    assert_eq!(
        sidecar.take(reader.news().await),
        None,
        "settings are no news"
    );
    let overtaking = reader.news().await;
    assert!(matches!(overtaking, Kind::Revocations(_)));
    let ack = sidecar.take(overtaking).expect("it is answered");
    assert_eq!(ack.revoked_through, held.get());
    assert!(ack.revoked_through < missed.get());
    let whole = loop {
        if let Some(ack) = sidecar.take(reader.news().await) {
            break ack;
        }
    };
    assert_eq!(
        (whole.revoked_through, whole.is_whole),
        (newest.get(), true)
    );
}

#[tokio::test]
async fn a_snapshot_over_a_stream_that_breaks_every_few_chunks_completes() {
    let pair = Pair::with_keys(700).await;
    let served = pair.served();
    let chunks = served.snapshot(Revision::default()).chunks.len();
    assert!(chunks > 6, "{chunks} chunks are few");
    let mut sidecar = Sidecar::new();
    let mut sent = 0;
    while sidecar.len().is_none() {
        let mut reader = sidecar.connect(&pair);
        assert!(matches!(reader.news().await, Kind::Settings(_)));
        sidecar.take(Kind::Settings(served.settings()));
        for _ in 0..2 {
            let chunk = reader.news().await;
            if !matches!(chunk, Kind::Snapshot(_)) {
                break;
            }
            sent += 1;
            sidecar.take(chunk);
        }
        drop(reader);
        // Some seconds pass until the next stream opens, and the keyring changes meanwhile.
        (0..10).for_each(|_| served.drop_idle_snapshot());
        pair.add_keys(1).await;
        assert!(sent <= chunks, "a chunk is sent again");
    }
    assert_eq!((sent, sidecar.len()), (chunks, Some(700)));
    let mut reader = sidecar.connect(&pair);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    for more in 1..=chunks.div_ceil(2) {
        let ack = sidecar.take(reader.news().await).expect("it is answered");
        assert_eq!(sidecar.len(), Some(700 + more));
        assert!(!ack.is_whole);
    }
}

#[tokio::test]
async fn a_snapshot_that_is_encoded_anew_is_not_mixed_with_its_beginnings() {
    let pair = Pair::with_keys(200).await;
    let mut sidecar = Sidecar::new();
    let mut reader = sidecar.connect(&pair);
    sidecar.take(reader.news().await);
    sidecar.take(reader.news().await);
    let subscription = sidecar.receiver.subscriptions().remove(0);
    assert_eq!(subscription.partial.map(|partial| partial.chunks), Some(1));
    drop(reader);
    pair.served().confirm_items(7);
    let mut reader = sidecar.connect(&pair);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let whole = loop {
        let chunk = reader.news().await;
        if let Kind::Snapshot(chunk) = &chunk {
            let chunk = discovery::SnapshotChunk::decode(chunk.clone()).expect("a chunk");
            assert_ne!(
                Some(chunk.id),
                subscription.partial.map(|partial| partial.id)
            );
        }
        if let Some(ack) = sidecar.take(chunk) {
            break ack;
        }
    };
    assert!(whole.is_whole);
    assert_eq!(sidecar.len(), Some(200));
    assert_eq!(sidecar.receiver.subscriptions()[0].partial, None);
    // A claim with a wrong number of chunks is not resumed either.
    let kept = pair.served().snapshot(Revision::default());
    for chunks in [kept.chunks.len(), usize::MAX] {
        let partial = discovery::PartialSnapshot {
            id: kept.id,
            chunks: u32::try_from(chunks).unwrap_or(u32::MAX),
        };
        let held = ClaimedState {
            partial: Some(partial),
            ..ClaimedState::default()
        };
        assert_eq!(pair.reader(held).read_snapshot().await, 200);
    }
}

#[tokio::test]
async fn what_came_of_a_snapshot_is_forgotten_where_the_next_stream_goes_on_by_deltas() {
    let pair = Pair::with_keys(200).await;
    let mut sidecar = Sidecar::new();
    let mut reader = sidecar.connect(&pair);
    while sidecar.take(reader.news().await).is_none() {}
    let resync = discovery::Resync {
        keyring: testing::keyring_name().to_string(),
        reason: ResyncReason::DigestMismatch.into(),
    };
    reader.resyncs.send(resync).await.expect("it is heard");
    sidecar.take(reader.news().await);
    assert!(sidecar.receiver.subscriptions()[0].partial.is_some());
    pair.add_keys(1).await;
    let mut reader = sidecar.connect(&pair);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(sidecar.take(reader.news().await).is_some());
    assert_eq!(sidecar.receiver.subscriptions()[0].partial, None);
    assert_eq!(sidecar.len(), Some(201));
}

#[tokio::test]
async fn what_is_not_served_is_numbered_within_the_stream() {
    let pair = Pair::new().await;
    for (before, number) in [(0, 1), (2, 3)] {
        let mut reader = pair.new_reader();
        for _ in 0..before {
            reader.not_served.forbidden("other", String::new());
        }
        let Kind::NotServed(told) = reader.news().await else {
            panic!("it is served");
        };
        assert_eq!((told.number, told.is_forbidden), (number, false));
    }
}

#[tokio::test]
async fn a_snapshot_that_is_a_few_deltas_old_is_shared_unless_a_sidecar_would_go_back() {
    let pair = Pair::with_keys(3).await;
    assert_eq!(pair.new_reader().read_snapshot().await, 3);
    let old = pair.head().revision;
    let mut at_head = pair.reader_at_head();
    pair.add_keys(1).await;
    let mut reader = pair.new_reader();
    assert_eq!(
        reader.read_snapshot().await,
        3,
        "the snapshot is encoded anew"
    );
    let next = delta(reader.news().await);
    assert_eq!(next.prev_revision, old.get());
    assert_eq!(next.revision, pair.head().revision.get());
    // A sidecar that is ahead of the old snapshot gets a new one.
    assert!(matches!(at_head.news().await, Kind::Settings(_)));
    assert_eq!(delta(at_head.news().await).revision, next.revision);
    let resync = discovery::Resync {
        keyring: testing::keyring_name().to_string(),
        reason: ResyncReason::DigestMismatch.into(),
    };
    at_head
        .resyncs
        .send(resync)
        .await
        .expect("the session is there");
    assert_eq!(at_head.read_snapshot().await, 4);
    assert_eq!(pair.new_reader().read_snapshot().await, 4);
}

#[tokio::test]
async fn a_snapshot_that_nobody_asks_for_is_dropped() {
    let pair = Pair::with_keys(3).await;
    let served = pair.served();
    let snapshot = Arc::downgrade(&served.snapshot(Revision::default()));
    served.drop_idle_snapshot();
    assert!(snapshot.upgrade().is_some(), "it was asked for just now");
    served.drop_idle_snapshot();
    assert!(snapshot.upgrade().is_none());
}

#[tokio::test]
async fn a_stream_is_woken_by_its_own_keyrings_alone() {
    let pair = Pair::with_keys(1).await;
    let others: KeyringName = "others".parse().expect("a valid name");
    let first = operation::create_keyring(others.clone(), Prefix::default(), false, None);
    let first = first.expect("a valid keyring");
    let others = pair.catalog.create_keyring("test", others, &first).await;
    let others = others.expect("a new keyring");
    let mut reader = pair.reader_at_head();
    let bell = Arc::clone(&reader.session.bell);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    // Earlier rings do not matter.
    let _ = bell.notified().now_or_never();
    pair.catalog
        .commit(&others, "test", |keyring, _| {
            let consumer = "checkout".parse().expect("a valid id");
            Ok((keyring.create_consumer(consumer, String::new())?, ()))
        })
        .await
        .expect("it is committed");
    assert!(bell.notified().now_or_never().is_none());
    pair.add_keys(1).await;
    assert!(bell.notified().now_or_never().is_some());
    bell.notify_one();
    assert_eq!(delta(reader.news().await).upserts.len(), 1);
}

#[tokio::test]
async fn a_keyring_that_begins_to_be_served_is_noticed_by_who_waits_for_it() {
    let pair = Pair::new().await;
    let mut reader = pair.new_reader();
    assert!(matches!(reader.news().await, Kind::NotServed(_)));
    let (news, ()) = tokio::join!(reader.news(), pair.create_keyring());
    assert!(matches!(news, Kind::Settings(_)));
}

#[tokio::test]
async fn a_revocation_overtakes_the_chunks_of_a_snapshot() {
    // Two chunks.
    let pair = Pair::with_keys(120).await;
    let mut reader = pair.new_reader();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(matches!(reader.news().await, Kind::Snapshot(_)));
    pair.revoke_one().await;
    let Kind::Revocations(revocations) = reader.news().await else {
        panic!("the revocation waits behind the snapshot");
    };
    let revocations = discovery::Revocations::decode(revocations).expect("revocations");
    assert_eq!(revocations.items.len(), 1);
    assert_eq!(revocations.revision, pair.served().revision().get());
    assert!(matches!(reader.news().await, Kind::Snapshot(_)));
    // The delta with the revocation follows in order.
    let delta = delta(reader.news().await);
    assert_eq!(delta.revocations, revocations.items);
}

#[tokio::test]
async fn a_revocation_overtakes_deltas() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    pair.add_keys(5).await;
    pair.revoke_one().await;
    assert!(matches!(reader.news().await, Kind::Revocations(_)));
    for _ in 0..5 {
        assert_eq!(delta(reader.news().await).upserts.len(), 1);
    }
    assert_eq!(delta(reader.news().await).revocations.len(), 1);
}

#[tokio::test]
async fn a_reader_that_is_too_slow_gets_a_snapshot_instead_of_what_it_missed() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    // More than the feed keeps for sidecars that resume.
    pair.add_keys(9_000).await;
    assert_eq!(reader.read_snapshot().await, 9_001);
}

#[tokio::test]
async fn a_sidecar_that_asks_for_a_snapshot_gets_one() {
    let pair = Pair::with_keys(2).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let resync = discovery::Resync {
        keyring: testing::keyring_name().to_string(),
        reason: ResyncReason::DigestMismatch.into(),
    };
    reader.resyncs.send(resync).await.expect("it is heard");
    assert_eq!(reader.read_snapshot().await, 2);
}

#[tokio::test]
async fn a_keyring_that_is_made_later_is_served_on_the_open_stream() {
    let pair = Pair::new().await;
    let mut reader = pair.new_reader();
    assert!(matches!(reader.news().await, Kind::NotServed(_)));
    pair.create_keyring().await;
    assert_eq!(reader.read_snapshot().await, 0);
}

#[tokio::test]
async fn a_new_epoch_is_followed_on_the_open_stream() {
    let pair = Pair::with_keys(2).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let log = LogName::Keyring(testing::keyring_name());
    let head = pair.store.rotate_epoch(&log).await.expect("writable");
    pair.catalog.refresh().await.expect("readable");
    let Kind::Settings(settings) = reader.news().await else {
        panic!("the new epoch is not followed");
    };
    assert_eq!(settings.epoch, head.epoch.get());
    assert_eq!(reader.read_snapshot().await, 2);
}

#[tokio::test]
async fn usage_is_acked_once_it_is_in_the_store_and_only_the_newest() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    for (durable, acked) in [(&[3][..], 3), (&[4, 9], 9)] {
        for sequence in durable {
            pair.usage.send_replace(*sequence);
        }
        let Kind::UsageAck(ack) = reader.news().await else {
            panic!("usage is not acked");
        };
        assert_eq!(ack.sequence, acked);
    }
    // A sequence that is already acked causes no message and does not end the stream.
    pair.usage.send_replace(9);
    pair.add_keys(1).await;
    assert!(matches!(reader.news().await, Kind::Delta(_)));
}

#[tokio::test]
async fn a_stream_is_drained_at_the_shutdown() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    pair.shutdown.cancel();
    let drain = drained(&mut reader).await;
    assert_eq!(drain.reason(), discovery::DrainReason::Stopping);
    assert!(drain.retry_after.is_some());
    assert_eq!(reader.next().await, None);
}

#[tokio::test]
async fn a_stream_whose_certificate_has_expired_is_told_that_it_may_come_back_at_once() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    pair.expired.cancel();
    let drain = drained(&mut reader).await;
    assert_eq!(drain.reason(), discovery::DrainReason::CertificateExpired);
    assert_eq!(drain.retry_after, None);
    assert!(reader.next().await.is_none());
}

/// Returns the drain that ends the stream.
async fn drained(reader: &mut Reader) -> discovery::Drain {
    match reader.next().await {
        Some(Kind::Drain(drain)) => drain,
        other => panic!("no drain: {other:?}"),
    }
}

#[tokio::test]
async fn a_stream_ends_when_its_sidecar_is_gone() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let Reader {
        mut session,
        resyncs,
        lookups,
        ..
    } = reader;
    drop((resyncs, lookups));
    let ended = async { while session.next().await.is_some() {} };
    tokio::time::timeout(DEADLINE, ended)
        .await
        .expect("it ends");
}

fn on_demand(pair: &Pair, held: ClaimedState) -> Reader {
    pair.reader_in(discovery::Mode::OnDemand, held)
}

fn lookup(digest: &[u8]) -> discovery::Lookup {
    discovery::Lookup {
        keyring: testing::keyring_name().to_string(),
        digest: digest.to_vec().into(),
    }
}

/// Returns the digest of any version.
fn any_digest(pair: &Pair) -> KeyDigest {
    let served = pair.served();
    let state = served.journal().state();
    state.keyring.records().next().expect("a key").digest
}

#[tokio::test]
async fn a_sidecar_that_holds_keys_on_demand_is_told_from_where_it_follows_and_gets_no_snapshot() {
    let pair = Pair::with_keys(3).await;
    let mut reader = on_demand(&pair, ClaimedState::default());
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let Kind::Start(start) = reader.news().await else {
        panic!("no start came");
    };
    assert_eq!(start.epoch, pair.head().epoch.get());
    assert_eq!(start.revision, pair.head().revision.get());
    pair.add_keys(1).await;
    assert_eq!(delta(reader.news().await).prev_revision, start.revision);
}

#[tokio::test]
async fn a_sidecar_that_holds_keys_on_demand_resumes_where_it_was() {
    let pair = Pair::with_keys(3).await;
    let held = ClaimedState {
        set_digest: 0,
        ..pair.head()
    };
    pair.add_keys(1).await;
    let mut reader = on_demand(&pair, held);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let first = delta(reader.news().await);
    assert_eq!(first.prev_revision, held.revision.get());
}

#[tokio::test]
async fn a_sidecar_on_demand_that_could_not_read_a_revocation_starts_anew() {
    let pair = Pair::with_keys(1).await;
    let before = pair.head().revision;
    pair.revoke_one().await;
    let held = ClaimedState {
        set_digest: 0,
        revoked_through: before,
        ..pair.head()
    };
    let mut reader = on_demand(&pair, held);
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(matches!(reader.news().await, Kind::Revocations(_)));
    assert!(matches!(reader.news().await, Kind::Start(_)));
}

#[tokio::test]
async fn a_resync_of_a_sidecar_that_holds_keys_on_demand_is_a_start() {
    let pair = Pair::with_keys(1).await;
    let mut reader = on_demand(&pair, ClaimedState::default());
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(matches!(reader.news().await, Kind::Start(_)));
    let resync = discovery::Resync {
        keyring: testing::keyring_name().to_string(),
        reason: ResyncReason::Gap.into(),
    };
    reader.resyncs.send(resync).await.expect("it is heard");
    assert!(matches!(reader.news().await, Kind::Start(_)));
}

#[tokio::test]
async fn a_lookup_is_answered_from_the_newest_state_and_behind_what_made_it() {
    let pair = Pair::with_keys(1).await;
    let digest = any_digest(&pair);
    let mut reader = on_demand(&pair, ClaimedState::default());
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    assert!(matches!(reader.news().await, Kind::Start(_)));
    for digest in [&digest.as_bytes()[..], &[0; 32], b"no digest"] {
        let lookup = lookup(digest);
        reader.lookups.send(lookup).await.expect("it is heard");
    }
    pair.revoke_one().await;
    assert!(matches!(reader.news().await, Kind::Revocations(_)));
    assert!(matches!(reader.news().await, Kind::Delta(_)));
    let Kind::LookupResult(result) = reader.news().await else {
        panic!("it is not answered");
    };
    assert_eq!(result.revision, pair.head().revision.get());
    assert_eq!(&result.digest[..], digest.as_bytes());
    let record = crate::wire::item::decode(&result.item.expect("it is found"));
    let state = record.expect("a record").state;
    assert_eq!(state, crate::key::KeyState::Revoked);
    let Kind::LookupResult(result) = reader.news().await else {
        panic!("it is not answered");
    };
    assert_eq!(result.item, None);
    pair.add_keys(1).await;
    assert!(matches!(reader.news().await, Kind::Delta(_)));
}

#[tokio::test]
async fn who_holds_a_keyring_in_full_looks_nothing_up() {
    let pair = Pair::with_keys(1).await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    let digest = any_digest(&pair);
    let lookup = lookup(digest.as_bytes());
    reader.lookups.send(lookup).await.expect("it is heard");
    pair.add_keys(1).await;
    assert!(matches!(reader.news().await, Kind::Delta(_)));
}

/// What the sidecar of `edge-1` may have.
fn rules(keyrings: &[&str]) -> Admission {
    let names = keyrings.iter().map(|name| name.parse().expect("a name"));
    Admission::Rules(vec![AdmissionRule {
        identity: "spiffe://mesh/edge-1".parse().expect("a pattern"),
        keyrings: KeyringGrant::Of(names.collect()),
        nodes: NodePattern::default(),
    }])
}

impl Pair {
    /// Creates an empty keyring.
    async fn create(&self, keyring: &str) -> Arc<ServedKeyring> {
        let name: KeyringName = keyring.parse().expect("a valid name");
        let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
        let first = first.expect("a valid keyring");
        let created = self.catalog.create_keyring("test", name, &first).await;
        created.expect("a new keyring")
    }
}

impl Reader {
    async fn find(&mut self, patterns: &[&str]) {
        let patterns = patterns.iter().map(|text| text.parse().expect("a pattern"));
        let find = SubscriptionChange::Find(patterns.collect());
        self.changes.send(find).await.expect("it is heard");
    }

    async fn listing(&mut self) -> Vec<String> {
        match self.news().await {
            Kind::Listing(listing) => {
                assert_eq!(listing.total, listing.keyrings.len() as u64);
                listing.keyrings
            }
            other => panic!("no list: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_sidecar_with_patterns_is_sent_the_list_of_what_it_may_have_whenever_it_changes() {
    let mut pair = Pair::with_keys(1).await;
    pair.admission = rules(&["payments-eu", "payments-us", "partners"]);
    for keyring in ["payments-eu", "payments-asia", "partners"] {
        pair.create(keyring).await;
    }
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    reader.find(&["payments*", "x-*"]).await;
    assert_eq!(reader.listing().await, ["payments-eu"]);
    // A keyring that the sidecar may not have, or that no pattern matches, causes no list.
    pair.create("payments-la").await;
    pair.create("x-1").await;
    let (listing, _created) = tokio::join!(reader.listing(), pair.create("payments-us"));
    assert_eq!(listing, ["payments-eu", "payments-us"]);
    reader.find(&["partners"]).await;
    assert_eq!(reader.listing().await, ["partners"]);
    reader.find(&["nothing"]).await;
    assert_eq!(reader.listing().await, [""; 0]);
}

#[tokio::test]
async fn a_list_is_bounded_and_says_how_many_there_are() {
    let pair = Pair::new().await;
    let mut finding = Finding::new(Audience {
        admission: Arc::default(),
        peer: Peer::default(),
        node: "edge-1".to_owned(),
    });
    finding.find(vec!["*".parse().expect("a pattern")]);
    assert_eq!(
        finding.next(&pair.catalog),
        Some(discovery::Listing::default())
    );
    assert_eq!(finding.next(&pair.catalog), None);
    finding.list_again();
    assert_eq!(
        finding.next(&pair.catalog),
        Some(discovery::Listing::default())
    );
}

#[tokio::test]
async fn a_keyring_can_be_subscribed_to_and_ended_on_the_open_stream() {
    let pair = Pair::with_keys(1).await;
    pair.create("later").await;
    let mut reader = pair.reader_at_head();
    assert!(matches!(reader.news().await, Kind::Settings(_)));
    reader.find(&["later"]).await;
    assert_eq!(reader.listing().await, ["later"]);
    let asked = discovery::Subscription {
        keyring: "later".to_owned(),
        deny_after_ms: 60_000,
        ..Default::default()
    };
    for _ in 0..2 {
        // The second time, it begins anew.
        let begin = SubscriptionChange::Begin(vec![asked.clone()]);
        reader.changes.send(begin).await.expect("it is heard");
        let Kind::Settings(settings) = reader.news().await else {
            panic!("no settings");
        };
        assert_eq!(settings.keyring, "later");
        let Kind::Snapshot(chunk) = reader.news().await else {
            panic!("no snapshot");
        };
        let chunk = discovery::SnapshotChunk::decode(chunk).expect("a chunk");
        assert!(chunk.keyring == "later" && chunk.last);
    }
    let end = SubscriptionChange::End(Ending {
        keyring: "later".to_owned(),
        reason: "why".to_owned(),
    });
    reader.changes.send(end).await.expect("it is heard");
    let Kind::NotServed(ended) = reader.news().await else {
        panic!("it is not ended");
    };
    assert!(ended.is_forbidden && ended.keyring == "later");
    let dropped = discovery::Dropped {
        keyring: ended.keyring,
        not_served: ended.number,
    };
    assert!(reader.not_served.erased(&dropped).is_some());
    // The sidecar may find it again.
    assert_eq!(reader.listing().await, ["later"]);
    // The session still serves the other keyring.
    pair.add_keys(1).await;
    assert_eq!(delta(reader.news().await).upserts.len(), 1);
}

#[tokio::test]
async fn a_change_does_not_wait_for_the_end_of_a_snapshot() {
    let pair = Pair::with_keys(700).await;
    let mut reader = pair.reader(ClaimedState::default());
    let is_last = |message| match message {
        Kind::Settings(_) => false,
        Kind::Snapshot(chunk) => {
            let chunk = discovery::SnapshotChunk::decode(chunk).expect("a chunk");
            chunk.last
        }
        other => panic!("neither settings nor a chunk: {other:?}"),
    };
    for _ in 0..2 {
        assert!(
            !is_last(reader.news().await),
            "the snapshot has more chunks"
        );
    }
    reader.find(&["*"]).await;
    assert_eq!(reader.listing().await, ["payments"]);
    assert!(
        !is_last(reader.news().await),
        "the list came before the end"
    );
}
