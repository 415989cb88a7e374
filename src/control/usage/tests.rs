use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::{
    clock::ManualClock,
    control::fleet::{Believed, OpenStream, Parting},
    key::{VersionNumber, testing},
    serving::Farewell,
    store::{SqliteOptions, SqliteStore},
};

const MAX_SERVE_FOR: Duration = Duration::from_hours(1);
const START: i64 = 1_000_000;
const KEY: &str = "7Qm2Xc91TbKe";

/// Versions 1 and 2 of one key; the callers of the first are kept.
struct TwoVersions;

impl KnownVersions for TwoVersions {
    fn known(
        &self,
        keyring: &KeyringName,
        versions: &[VersionRef],
        _now: Timestamp,
    ) -> Vec<Option<Known>> {
        let exists = |which: &VersionRef| {
            *keyring == testing::keyring_name()
                && which.key_id.as_str() == KEY
                && which.version.get() <= 2
        };
        let known = |which: &VersionRef| {
            exists(which).then_some(Known {
                keeps_callers: which.version == VersionNumber::FIRST,
            })
        };
        versions.iter().map(known).collect()
    }
}

/// A book on a database, and the fleet that it informs.
struct Plane {
    dir: tempfile::TempDir,
    clock: Clock,
    hands: ManualClock,
    book: Arc<UsageBook>,
    fleet: Fleet,
    /// The number of the next stream.
    streams: AtomicU64,
}

impl Plane {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (clock, hands) = Clock::manual(at(START));
        let (book, fleet) = Self::open(dir.path(), &clock).await;
        Self {
            dir,
            clock,
            hands,
            book,
            fleet,
            streams: AtomicU64::new(1),
        }
    }

    /// Reopens the book as after a crash: unwritten data is lost.
    async fn reopen(&mut self) {
        let (book, fleet) = Self::open(self.dir.path(), &self.clock).await;
        self.book = book;
        self.fleet = fleet;
    }

    async fn open(dir: &std::path::Path, clock: &Clock) -> (Arc<UsageBook>, Fleet) {
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&dir.join("relatch.db"), options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("it opens"));
        let known = store.load_presence().await.expect("it reads");
        let pace = Arc::new(Pace::new(clock.clone()));
        let book = UsageBook::open(store, clock.clone(), pace, &known).await;
        let fleet = Fleet::new(clock.clone(), MAX_SERVE_FOR, known);
        (
            Arc::new(book.expect("it reads")),
            fleet.expect("sound rows"),
        )
    }

    async fn connect(&self, run_id: &str) -> (OpenStream, UsageStream, UsageAcks) {
        let subscription = discovery::Subscription {
            keyring: testing::keyring_name().to_string(),
            ..discovery::Subscription::default()
        };
        let hello = discovery::Hello {
            node: Some(discovery::Node {
                id: format!("edge-{run_id}"),
                ..discovery::Node::default()
            }),
            run_id: run_id.to_owned(),
            subscriptions: vec![subscription],
            protocol: discovery::PROTOCOL,
            stream: self.streams.fetch_add(1, Ordering::Relaxed),
            ..Default::default()
        };
        let admitted = Believed::from([(testing::keyring_name(), false)]);
        let opened = self.fleet.connected(&hello, &admitted, None);
        let opened = opened.expect("nobody else is this node");
        self.record().await;
        let subscribed = BTreeSet::from([testing::keyring_name()]);
        let (stream, acks) = self.book.stream(&opened.run, subscribed);
        (opened, stream, acks)
    }

    async fn record(&self) {
        let gone = self.fleet.record(&*self.book.store).await;
        for member in gone.expect("it writes") {
            self.book.end(&member.run_id);
        }
    }

    async fn flush(&self) {
        self.book.flush(&self.fleet).await.expect("it writes");
    }

    fn requests(&self, number: u32) -> u64 {
        let used = self.book.use_of(&testing::keyring_name(), version(number));
        used.unwrap_or_default().requests
    }

    fn complete_until(&self) -> Option<i64> {
        let coverage = self
            .fleet
            .coverage(&testing::keyring_name(), self.clock.wall());
        coverage.complete_until.map(Timestamp::as_millis)
    }
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn version(number: u32) -> VersionRef {
    VersionRef {
        key_id: KEY.parse().expect("a key id"),
        version: VersionNumber::new(number).expect("not zero"),
    }
}

fn used(number: u32, requests: u64, last_used_ms: i64) -> discovery::VersionUsage {
    discovery::VersionUsage {
        key_id: KEY.to_owned(),
        version: number,
        requests,
        denied: 0,
        first_used_ms: START - 1_000,
        last_used_ms,
        callers: Vec::new(),
    }
}

/// A message of a report; the last one replies to the answer to a beat.
fn report(
    sequence: u64,
    beat: Option<u64>,
    versions: Vec<discovery::VersionUsage>,
) -> discovery::Usage {
    discovery::Usage {
        sequence,
        complete_until_beat: beat.unwrap_or(0),
        keyrings: vec![discovery::KeyringUsage {
            keyring: testing::keyring_name().to_string(),
            versions,
        }],
        ..Default::default()
    }
}

/// The last report of a process that stops.
fn last_report(sequence: u64, versions: Vec<discovery::VersionUsage>) -> discovery::Usage {
    discovery::Usage {
        is_final: true,
        ..report(sequence, None, versions)
    }
}

/// Returns until when a report is complete that replies to an answer sent at `sent`.
const fn complete(sent: i64) -> i64 {
    sent - 1_000
}

#[tokio::test]
async fn usage_is_acked_and_complete_only_when_it_is_in_the_store() {
    let plane = Plane::new().await;
    let (_, mut stream, acks) = plane.connect("a").await;
    acks.answers.sending(1);
    plane.hands.advance(Duration::from_secs(5));
    stream.note(
        &report(1, None, vec![used(1, 5, START - 500)]),
        &TwoVersions,
    );
    stream.note(
        &report(2, Some(1), vec![used(2, 1, START - 400)]),
        &TwoVersions,
    );
    assert_eq!((*acks.durable.borrow(), plane.complete_until()), (0, None));
    plane.flush().await;
    assert_eq!(
        (*acks.durable.borrow(), plane.complete_until()),
        (2, Some(complete(START)))
    );
    assert_eq!((plane.requests(1), plane.requests(2)), (5, 1));
}

#[tokio::test(start_paused = true)]
async fn the_last_report_of_a_sidecar_is_written_at_once() {
    let plane = Plane::new().await;
    let (_, mut stream, mut acks) = plane.connect("a").await;
    let end = CancellationToken::new();
    let fleet = Fleet::new(plane.clock.clone(), MAX_SERVE_FOR, Vec::new());
    let fleet = Arc::new(fleet.expect("no rows"));
    let writer = tokio::spawn(Arc::clone(&plane.book).run(fleet, end.clone()));
    let began = tokio::time::Instant::now();
    for sequence in 1..=4 {
        stream.note(
            &last_report(sequence, vec![used(1, sequence, START)]),
            &TwoVersions,
        );
        let is_durable = acks.durable.wait_for(|durable| *durable == sequence);
        is_durable.await.expect("the stream is open");
    }
    assert_eq!(began.elapsed(), Duration::ZERO);
    end.cancel();
    writer.await.expect("it does not panic");
}

#[tokio::test]
async fn a_store_that_fails_is_written_later_and_nothing_is_acked_before() {
    let mut plane = Plane::new().await;
    let (_, mut stream, acks) = plane.connect("a").await;
    let path = plane.dir.path().join("relatch.db");
    let aside = plane.dir.path().join("aside");
    std::fs::rename(&path, &aside).expect("it moves");
    acks.answers.sending(1);
    stream.note(&report(1, Some(1), vec![used(1, 5, START)]), &TwoVersions);
    assert!(plane.book.flush(&plane.fleet).await.is_err());
    stream.note(&last_report(2, Vec::new()), &TwoVersions);
    assert_eq!((*acks.durable.borrow(), plane.complete_until()), (0, None));
    assert!(!stream.settle(&plane.fleet).await);
    std::fs::rename(&aside, &path).expect("it moves");
    plane.flush().await;
    assert_eq!(
        (*acks.durable.borrow(), plane.complete_until()),
        (2, Some(complete(START)))
    );
    plane.reopen().await;
    assert_eq!(plane.requests(1), 5);
}

#[tokio::test]
async fn a_report_with_a_hole_is_counted_but_not_complete() {
    let plane = Plane::new().await;
    let (_, mut stream, acks) = plane.connect("a").await;
    acks.answers.sending(1);
    plane.hands.advance(Duration::from_secs(5));
    acks.answers.sending(2);
    stream.note(&report(4, None, vec![used(1, 5, START)]), &TwoVersions);
    stream.note(&report(6, Some(1), vec![used(2, 1, START)]), &TwoVersions);
    plane.flush().await;
    assert_eq!((*acks.durable.borrow(), plane.complete_until()), (4, None));
    assert_eq!((plane.requests(1), plane.requests(2)), (5, 1));
    assert!(!stream.settle(&plane.fleet).await);
    // The missing message comes late; the next report is whole and contains everything that was not acked.
    stream.note(&report(5, None, vec![used(1, 6, START)]), &TwoVersions);
    plane.flush().await;
    assert_eq!((*acks.durable.borrow(), plane.complete_until()), (4, None));
    stream.note(&report(7, Some(2), vec![used(1, 6, START)]), &TwoVersions);
    plane.flush().await;
    assert_eq!(
        (*acks.durable.borrow(), plane.complete_until()),
        (7, Some(complete(START + 5_000)))
    );
    assert_eq!(plane.requests(1), 6);
}

#[tokio::test]
async fn no_clock_of_a_sidecar_says_when_a_version_was_used() {
    const DAY: i64 = 86_400_000;
    let plane = Plane::new().await;
    let (_, mut stream, acks) = plane.connect("a").await;
    let last_used = || {
        let used = plane.book.use_of(&testing::keyring_name(), version(1));
        used.and_then(|used| used.last_used)
            .map(Timestamp::as_millis)
    };
    // A clock that is days behind would make the version look unused, and one that is ahead would keep it forever.
    for (sequence, requests, off) in [(1, 5, -3 * DAY), (2, 6, 3 * DAY), (3, 7, -3 * DAY)] {
        plane.hands.advance(Duration::from_secs(10));
        acks.answers.sending(sequence);
        let now = plane.clock.wall().as_millis();
        let told = used(1, requests, now + off);
        stream.note(&report(sequence, Some(sequence), vec![told]), &TwoVersions);
        assert_eq!(last_used(), Some(now));
        plane.flush().await;
        assert_eq!(plane.complete_until(), Some(complete(now)));
    }
    // A repeated report is not a use.
    plane.hands.advance(Duration::from_secs(10));
    acks.answers.sending(4);
    let told = used(1, 7, START + 3 * DAY);
    stream.note(&report(4, Some(4), vec![told]), &TwoVersions);
    plane.flush().await;
    assert_eq!(last_used(), Some(START + 30_000));
    assert_eq!(plane.complete_until(), Some(complete(START + 40_000)));
}

#[tokio::test]
async fn a_reply_to_no_answer_of_its_stream_completes_nothing() {
    let plane = Plane::new().await;
    let (_, mut stream, acks) = plane.connect("a").await;
    let (_, _other, others) = plane.connect("b").await;
    others.answers.sending(9);
    acks.answers.sending(1);
    stream.note(&report(1, Some(9), vec![used(1, 5, START)]), &TwoVersions);
    plane.flush().await;
    assert_eq!((*acks.durable.borrow(), plane.requests(1)), (1, 5));
    let (_, a) = plane.fleet.members().remove(0);
    assert_eq!(a.complete_until, None);
    assert!(!stream.settle(&plane.fleet).await, "it is not the last one");
    stream.note(&report(2, Some(1), Vec::new()), &TwoVersions);
    plane.flush().await;
    let (_, a) = plane.fleet.members().remove(0);
    assert_eq!(
        a.complete_until.map(Timestamp::as_millis),
        Some(complete(START))
    );
    // Only a final report shows that no other will come.
    assert!(!stream.settle(&plane.fleet).await);
    stream.note(&last_report(3, Vec::new()), &TwoVersions);
    assert!(stream.settle(&plane.fleet).await);
    // Another run may have begun from its snapshot file since.
    let (_, a) = plane.fleet.members().remove(0);
    assert_eq!(a.complete_until, Some(at(complete(START))));
}

#[tokio::test]
async fn a_clock_that_jumps_ahead_under_a_report_proves_nothing_once_it_is_set_right() {
    let plane = Plane::new().await;
    let (_, mut stream, acks) = plane.connect("a").await;
    let ahead = START + 3_600_000;
    plane.hands.set_wall(at(ahead));
    acks.answers.sending(1);
    stream.note(&report(1, Some(1), vec![used(1, 5, ahead)]), &TwoVersions);
    plane.flush().await;
    plane.hands.set_wall(at(START));
    plane.hands.advance(Duration::from_mins(10));
    assert_eq!(plane.complete_until(), Some(complete(START)));
    let used = plane.book.use_of(&testing::keyring_name(), version(1));
    assert_eq!(used.and_then(|used| used.last_used), Some(at(START)));
}

#[tokio::test]
async fn what_does_not_exist_is_dropped() {
    let plane = Plane::new().await;
    let (_, mut stream, acks) = plane.connect("a").await;
    let mut odd = report(
        1,
        None,
        vec![used(3, 5, START), used(0, 5, START), used(1, 2, START)],
    );
    odd.keyrings[0].versions[2].requests = u64::MAX;
    odd.keyrings.push(discovery::KeyringUsage {
        keyring: "elsewhere".to_owned(),
        versions: vec![used(1, 7, START)],
    });
    stream.note(&odd, &TwoVersions);
    plane.flush().await;
    assert_eq!(*acks.durable.borrow(), 1);
    let stored = plane.book.store.load_usage().await.expect("it reads");
    assert_eq!(stored.counts.len(), 1);
    assert_eq!(stored.counts[0].requests, UsageRow::MAX_COUNT);
}

#[tokio::test]
async fn an_orderly_end_folds_the_process_and_leaves_no_gap() {
    let mut plane = Plane::new().await;
    for run_id in ["a", "b", "c"] {
        let (opened, mut stream, _acks) = plane.connect(run_id).await;
        let last = last_report(1, vec![used(1, 5, START)]);
        stream.note(&last, &TwoVersions);
        let told_all = stream.settle(&plane.fleet).await;
        assert!(told_all);
        drop(stream);
        let farewell = Farewell {
            has_told_all: told_all,
            has_erased_file: false,
            last_write: 0,
        };
        let parting = Parting::Goodbye(farewell);
        plane.fleet.disconnected(&opened, parting);
        plane.record().await;
        if run_id == "c" {
            // The process dies before it has folded; the next one folds.
            plane.reopen().await;
        }
        plane.flush().await;
    }
    let stored = plane.book.store.load_usage().await.expect("it reads");
    assert_eq!(stored.counts.len(), 1);
    assert_eq!(stored.counts[0].run_id, UsageRow::FOLDED);
    assert_eq!(plane.requests(1), 15);
    assert_eq!(plane.fleet.gaps(None), []);
    assert!(plane.fleet.members().is_empty());
    // A copy of the last report that comes late.
    let (_, mut stream, _acks) = plane.connect("a").await;
    let again = report(1, None, vec![used(1, 5, START)]);
    stream.note(&again, &TwoVersions);
    plane.flush().await;
    assert_eq!(plane.requests(1), 15);
    plane.reopen().await;
    assert_eq!(plane.requests(1), 15);
}

#[tokio::test]
async fn callers_are_kept_while_the_version_should_not_be_used() {
    let mut plane = Plane::new().await;
    let keyring = testing::keyring_name();
    let caller = |source: &str, requests| discovery::Caller {
        source: source.to_owned(),
        user_agent: "curl\u{1b}[2J".to_owned(),
        route: "api.example.com/v1".to_owned(),
        requests,
        last_used_ms: START,
    };
    let with = |mut told: discovery::VersionUsage, callers: Vec<discovery::Caller>| {
        told.callers = callers;
        told
    };
    let many: Vec<_> = (0..40).map(|n| caller(&format!("10.0.1.{n}"), n)).collect();
    for (run_id, sequence, callers) in [
        ("a", 1, vec![caller("10.0.0.1", 9), caller("10.0.0.2", 1)]),
        ("a", 2, vec![caller("10.0.0.1", 50)]),
        ("b", 1, vec![caller("10.0.0.1", 60), caller("10.0.0.3", 70)]),
        ("b", 2, Vec::new()),
        ("c", 1, many),
    ] {
        let (_, mut stream, _acks) = plane.connect(run_id).await;
        let versions = vec![
            with(used(1, 99, START), callers.clone()),
            with(used(2, 99, START), callers),
        ];
        stream.note(&report(sequence, None, versions), &TwoVersions);
    }
    for reopened in [false, true] {
        plane.flush().await;
        if reopened {
            plane.reopen().await;
        }
        let callers = plane.book.callers(&keyring, version(1));
        assert_eq!(callers.len(), 16);
        let first = (callers[0].source.as_str(), callers[0].requests);
        assert_eq!(first, ("10.0.0.1", 110));
        assert_eq!(callers[1].source, "10.0.0.3");
        assert_eq!(callers[0].user_agent, "curl\u{fffd}[2J");
        assert_eq!(plane.book.callers(&keyring, version(2)), []);
    }
    // Folding a process keeps its callers.
    plane.book.end("b");
    plane.flush().await;
    plane.flush().await;
    assert_eq!(plane.book.callers(&keyring, version(1))[0].requests, 110);
    plane.reopen().await;
    assert_eq!(plane.book.callers(&keyring, version(1))[0].requests, 110);
    plane.book.forget_callers(&keyring, &[version(1)]);
    plane.flush().await;
    plane.reopen().await;
    assert_eq!(plane.book.callers(&keyring, version(1)), []);
    assert_eq!(plane.requests(1), 297);
}

#[tokio::test]
async fn the_task_writes_soon_and_what_is_left_at_its_end() {
    let plane = Plane::new().await;
    let fleet = Fleet::new(plane.clock.clone(), MAX_SERVE_FOR, Vec::new());
    let fleet = Arc::new(fleet.expect("no rows"));
    let end = CancellationToken::new();
    let task = tokio::spawn(Arc::clone(&plane.book).run(fleet, end.clone()));
    let (_, mut stream, mut acks) = plane.connect("a").await;
    stream.note(&report(1, None, vec![used(1, 1, START)]), &TwoVersions);
    acks.durable
        .wait_for(|acked| *acked == 1)
        .await
        .expect("it is acked");
    stream.note(&report(2, None, vec![used(1, 2, START)]), &TwoVersions);
    end.cancel();
    task.await.expect("it ends");
    assert_eq!(*acks.durable.borrow(), 2);
}

/// The events between three sidecars and a control plane that is killed at any moment.
#[derive(Clone, Debug)]
enum Event {
    Uses { boot: usize, number: u32 },
    Reports { boot: usize },
    Repeats { sent: prop::sample::Index },
    Flushes,
    Dies,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..3_usize, 1..=2_u32).prop_map(|(boot, number)| Event::Uses { boot, number }),
        3 => (0..3_usize).prop_map(|boot| Event::Reports { boot }),
        2 => any::<prop::sample::Index>().prop_map(|sent| Event::Repeats { sent }),
        2 => Just(Event::Flushes),
        1 => Just(Event::Dies),
    ]
}

async fn survive(events: Vec<Event>) {
    let names = ["a", "b", "c"];
    let mut plane = Plane::new().await;
    let mut saw = [[0_u64; 2]; 3];
    let mut sequence = [0_u64; 3];
    let mut sent: Vec<(usize, discovery::Usage)> = Vec::new();
    let last = (0..3).map(|boot| Event::Reports { boot });
    let last = last.chain([Event::Flushes, Event::Dies]);
    for event in events.into_iter().chain(last) {
        match event {
            Event::Uses { boot, number } => saw[boot][number as usize - 1] += 1,
            Event::Reports { boot } => {
                sequence[boot] += 1;
                let versions = (1..=2)
                    .map(|number| used(number, saw[boot][number as usize - 1], START))
                    .collect();
                sent.push((boot, report(sequence[boot], None, versions)));
                let (_, mut stream, _acks) = plane.connect(names[boot]).await;
                stream.note(&sent[sent.len() - 1].1, &TwoVersions);
            }
            Event::Repeats { sent: which } => {
                if !sent.is_empty() {
                    let (boot, usage) = which.get(&sent);
                    let (_, mut stream, _acks) = plane.connect(names[*boot]).await;
                    stream.note(usage, &TwoVersions);
                }
            }
            Event::Flushes => plane.flush().await,
            Event::Dies => plane.reopen().await,
        }
    }
    for number in [1, 2] {
        let truth: u64 = saw.iter().map(|boot| boot[number as usize - 1]).sum();
        assert_eq!(plane.requests(number), truth, "of version {number}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn counts_survive_a_control_plane_that_is_killed_at_any_moment(
        events in prop::collection::vec(event(), 0..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(survive(events));
    }
}

#[tokio::test]
async fn more_than_one_transaction_takes_is_written_and_acked_with_one_flush() {
    struct All;
    impl KnownVersions for All {
        fn known(&self, _: &KeyringName, asked: &[VersionRef], _: Timestamp) -> Vec<Option<Known>> {
            let known = Known {
                keeps_callers: false,
            };
            vec![Some(known); asked.len()]
        }
    }
    let versions = u32::try_from(2 * MAX_ROWS + 1).expect("a few thousand");
    let mut plane = Plane::new().await;
    let (_, mut stream, acks) = plane.connect("one").await;
    let told = discovery::KeyringUsage {
        keyring: testing::keyring_name().to_string(),
        versions: (1..=versions)
            .map(|number| used(number, 3, START))
            .collect(),
    };
    let report = discovery::Usage {
        sequence: 1,
        keyrings: vec![told],
        ..discovery::Usage::default()
    };
    stream.note(&report, &All);
    plane.flush().await;
    assert_eq!(*acks.durable.borrow(), 1);
    plane.reopen().await;
    for number in 1..=versions {
        assert_eq!(plane.requests(number), 3, "version {number}");
    }
}
