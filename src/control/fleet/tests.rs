use std::{collections::BTreeMap, path::PathBuf};

use rusqlite::Connection;

use super::*;
use crate::{
    control::fleet::hello::read,
    key::{VersionNumber, VersionRef, testing},
    serving::{Farewell, Lock, LockAt, LockPlace, Presence, SnapshotFile},
    store::{SqliteOptions, SqliteStore},
};

const MAX_SERVE_FOR: Duration = Duration::from_hours(1);
/// An hour by a boot clock that is slower by 1 %.
const STRETCHED: Duration = Duration::from_millis(3_636_001);
const START: i64 = 1_000_000;

/// The first stream of a process that holds a revision.
fn hello(node: &str, run_id: &str, revision: u64) -> discovery::Hello {
    discovery::Hello {
        node: Some(discovery::Node {
            id: node.to_owned(),
            ..discovery::Node::default()
        }),
        run_id: run_id.to_owned(),
        subscriptions: vec![discovery::Subscription {
            keyring: testing::keyring_name().to_string(),
            epoch: 1,
            revision,
            revoked_through: revision,
            deny_after_ms: 3_600_000,
            ..discovery::Subscription::default()
        }],
        protocol: discovery::PROTOCOL,
        stream: 1,
        ..Default::default()
    }
}

fn believed() -> Believed {
    Believed::from([(testing::keyring_name(), true)])
}

fn ack(applied: u64) -> discovery::Ack {
    discovery::Ack {
        keyring: testing::keyring_name().to_string(),
        epoch: 1,
        nonce: applied,
        applied_revision: applied,
        revoked_through: applied,
        ..Default::default()
    }
}

fn told_all() -> Parting {
    Parting::Goodbye(Farewell {
        has_told_all: true,
        has_erased_file: false,
        last_write: 0,
    })
}

fn fleet() -> (Fleet, crate::clock::ManualClock) {
    let (clock, hands) = Clock::manual(at(START));
    let fleet = Fleet::new(clock, MAX_SERVE_FOR, Vec::new());
    (fleet.expect("no rows"), hands)
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn barrier(fleet: &Fleet, target: Target) -> Barrier {
    let (name, epoch) = (testing::keyring_name(), Epoch::new(1));
    let nobody = BTreeSet::new();
    let barrier = fleet.barrier(&name, epoch, target, &nobody);
    let reached = fleet.reached(&name, epoch, target, &nobody);
    assert_eq!(reached, (barrier.confirmed, barrier.total));
    barrier
}

fn connect(fleet: &Fleet, node: &str, run_id: &str, revision: u64) -> OpenStream {
    let connected = fleet.connected(&hello(node, run_id, revision), &believed(), None);
    connected.expect("nobody else is this node")
}

fn staged() -> VersionRef {
    VersionRef {
        key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
        version: VersionNumber::FIRST,
    }
}

fn applied(revision: u64) -> Target {
    Target::Applied(Revision::new(revision), staged())
}

fn run_ids(runs: &[RunKey]) -> Vec<&str> {
    runs.iter().map(|run| &*run.run_id).collect()
}

/// A database with the rows of a fleet.
struct Disk {
    dir: tempfile::TempDir,
    store: SqliteStore,
}

impl Disk {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let options = SqliteOptions {
            create: true,
            busy_timeout: Duration::from_millis(50),
        };
        let store = SqliteStore::open(&dir.path().join("relatch.db"), options).await;
        let store = store.expect("it opens");
        Self { dir, store }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("relatch.db")
    }

    async fn rows(&self) -> Vec<PresenceRow> {
        self.store.load_presence().await.expect("it reads")
    }

    /// Returns the node of each row, and the time of the last contact.
    async fn contacts(&self) -> Vec<(String, i64)> {
        let rows = self.rows().await.into_iter();
        rows.map(|row| (row.node, row.last_contact.as_millis()))
            .collect()
    }

    async fn news(&self, fleet: &Fleet) -> Vec<RunKey> {
        fleet.record_news(&self.store).await.expect("it writes")
    }

    /// Returns the fleet as the next control plane finds it, with a clock of its own.
    async fn next(&self, fleet: &Fleet) -> (Fleet, crate::clock::ManualClock) {
        fleet.record(&self.store).await.expect("it writes");
        let (clock, hands) = Clock::manual(fleet.clock.wall());
        let fleet = Fleet::new(clock, MAX_SERVE_FOR, self.rows().await);
        (fleet.expect("sound rows"), hands)
    }

    /// Locks the database against writes until the lock is dropped.
    fn lock(&self) -> Connection {
        let connection = Connection::open(self.path()).expect("it opens");
        let locked = connection.execute_batch("BEGIN IMMEDIATE");
        locked.expect("nobody writes");
        connection
    }
}

// Reads of messages.

#[test]
fn a_hello_is_read_as_it_was_said() {
    let place = discovery::lock::Place::File(discovery::FileLock {
        device: 2,
        inode: 3,
    });
    let said = discovery::Hello {
        node: Some(discovery::Node {
            id: "edge-1".to_owned(),
            cluster: "gateway".to_owned(),
            version: "0.1.0".to_owned(),
            labels: [("zone".to_owned(), "a".to_owned())].into(),
        }),
        stream: 4,
        lock: Some(discovery::Lock {
            boot_id: "boot-1".to_owned(),
            time_namespace: 5,
            acquired_ns: 6,
            place: Some(place),
        }),
        snapshot_file: Some(discovery::SnapshotFile {
            id: vec![0x0a, 0xff].into(),
            begun_from_write: 7,
        }),
        ..hello("edge-1", "a", 3)
    };
    let identity: Identity = "spiffe://mesh/one".parse().expect("an identity");
    let read = read(&said, &believed(), Some(&identity));
    assert_eq!((&*read.key.node, &*read.key.run_id), ("edge-1", "a"));
    assert_eq!(read.stream, 4);
    assert_eq!(read.about.cluster, "gateway");
    assert_eq!(read.about.version, "0.1.0");
    assert_eq!(read.about.labels["zone"], "a");
    assert_eq!(read.about.identity, Some(identity));
    let at = LockAt::File {
        device: 2,
        inode: 3,
    };
    let place = LockPlace {
        boot_id: "boot-1".to_owned(),
        time_namespace: 5,
        at,
    };
    let lock = Lock {
        place,
        acquired_ns: 6,
    };
    assert_eq!(read.lock, Some(lock));
    let file = SnapshotFile {
        id: "0aff".to_owned(),
        begun_from_write: 7,
    };
    assert_eq!(read.file, Some(file));
    let held = read.keyrings[&testing::keyring_name()];
    assert_eq!(
        (held.epoch, held.revision),
        (Epoch::new(1), Revision::new(3))
    );
    assert_eq!(held.revoked_through, Revision::new(3));
    assert_eq!(held.deny_after, MAX_SERVE_FOR);
    assert!(held.agrees);
}

#[test]
fn what_a_hello_holds_counts_only_where_somebody_has_compared_it() {
    let mut said = hello("edge-1", "a", 3);
    said.subscriptions.push(discovery::Subscription {
        keyring: "no name!".to_owned(),
        ..discovery::Subscription::default()
    });
    for believed in [
        Believed::new(),
        Believed::from([(testing::keyring_name(), false)]),
    ] {
        let read = read(&said, &believed, None);
        assert_eq!(read.keyrings.len(), 1);
        assert!(!read.keyrings[&testing::keyring_name()].agrees);
    }
}

#[test]
fn a_lock_that_does_not_say_where_it_is_proves_nothing() {
    let socket = discovery::lock::Place::Socket(discovery::SocketLock {
        network_namespace: 9,
    });
    let lock = discovery::Lock {
        boot_id: "boot-1".to_owned(),
        time_namespace: 5,
        acquired_ns: 6,
        place: Some(socket),
    };
    let read = |lock: discovery::Lock| {
        let said = discovery::Hello {
            lock: Some(lock),
            ..hello("edge-1", "a", 3)
        };
        read(&said, &believed(), None)
            .lock
            .map(|lock| lock.place.at)
    };
    let at = LockAt::Socket {
        network_namespace: 9,
        node: "edge-1".to_owned(),
    };
    assert_eq!(read(lock.clone()), Some(at));
    for nowhere in [
        discovery::Lock {
            place: None,
            ..lock.clone()
        },
        discovery::Lock {
            boot_id: String::new(),
            ..lock.clone()
        },
        discovery::Lock {
            boot_id: "b".repeat(65),
            ..lock.clone()
        },
        discovery::Lock {
            time_namespace: 0,
            ..lock
        },
    ] {
        assert_eq!(read(nowhere.clone()), None, "{nowhere:?}");
    }
}

#[test]
fn acks_and_nacks_are_read_as_they_were_said() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    let progress = || {
        let (_, run) = fleet.members().remove(0);
        run.keyrings[&testing::keyring_name()].progress.clone()
    };
    let whole = discovery::Ack {
        applied_revision: 9,
        revoked_through: 8,
        durable_revision: 7,
        durable_revoked_through: 6,
        is_whole: true,
        ..ack(9)
    };
    let nack = discovery::Nack {
        keyring: testing::keyring_name().to_string(),
        epoch: 1,
        nonce: 4,
        items: vec![discovery::RejectedItem {
            name: staged().to_string(),
            reason: "state: 9 is unknown".to_owned(),
        }],
        applied_revision: 12,
        revoked_through: 11,
        durable_revision: 10,
        durable_revoked_through: 9,
        is_whole: false,
        has_more: true,
    };
    let numbers = || {
        let progress = progress();
        [
            progress.applied,
            progress.revoked_through,
            progress.durable,
            progress.durable_revoked_through,
        ]
        .map(Revision::get)
    };
    fleet.nacked(&key, &nack);
    assert_eq!(numbers(), [12, 11, 10, 9]);
    assert!(progress().has_more_rejected);
    assert_eq!(
        progress().rejected[&staged().to_string()],
        "state: 9 is unknown"
    );
    fleet.acked(&key, &whole);
    assert_eq!(numbers(), [9, 8, 7, 6]);
    assert!(!progress().has_more_rejected && progress().rejected.is_empty());
    let refused_whole = discovery::Nack {
        is_whole: true,
        has_more: false,
        ..nack
    };
    fleet.nacked(&key, &refused_whole);
    assert!(!progress().has_more_rejected);
    assert_eq!(progress().rejected.len(), 1);
    // For a name that is no keyring's, nothing is kept.
    let nowhere = discovery::Ack {
        keyring: "no name!".to_owned(),
        ..ack(20)
    };
    fleet.acked(&key, &nowhere);
    assert_eq!(numbers(), [12, 11, 10, 9]);
}

#[test]
fn long_texts_about_refused_items_are_cut() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    let item = |number| discovery::RejectedItem {
        name: format!("{number} {}", "long".repeat(10_000)),
        reason: "long".repeat(10_000),
    };
    let nack = discovery::Nack {
        keyring: testing::keyring_name().to_string(),
        epoch: 1,
        nonce: 4,
        items: (0..200).map(item).collect(),
        applied_revision: 4,
        revoked_through: 4,
        ..Default::default()
    };
    fleet.nacked(&key, &nack);
    let (_, run) = fleet.members().remove(0);
    let progress = &run.keyrings[&testing::keyring_name()].progress;
    assert_eq!(progress.rejected.len(), 100);
    assert!(progress.has_more_rejected);
    let rejected = progress.rejected.iter();
    let lengths = rejected.map(|(name, reason)| name.len() + reason.len());
    assert_eq!(lengths.max(), Some(400));
    assert!(!barrier(&fleet, applied(4)).is_passed());
}

// The sidecars for which a barrier waits.

#[test]
fn a_barrier_waits_for_everything_that_may_serve() {
    let (fleet, hands) = fleet();
    let first = connect(&fleet, "edge-1", "a", 3);
    let second = connect(&fleet, "edge-2", "b", 2);
    let seen = barrier(&fleet, applied(4));
    assert_eq!((seen.confirmed, seen.total), (0, 2));
    assert_eq!(seen.laggards[1].behind, 2);
    fleet.acked(&first, &ack(4));
    let seen = barrier(&fleet, applied(4));
    assert_eq!((seen.confirmed, seen.total), (1, 2));
    fleet.disconnected(&second, Parting::Lost);
    hands.advance(STRETCHED.saturating_sub(Duration::from_millis(1)));
    assert!(!barrier(&fleet, applied(4)).is_passed());
    hands.advance(Duration::from_millis(1));
    assert!(barrier(&fleet, applied(4)).is_passed());
    fleet.disconnected(&first, told_all());
    assert!(fleet.members().is_empty());
}

#[test]
fn a_wall_clock_that_jumps_ends_no_wait() {
    let (fleet, hands) = fleet();
    let stream = connect(&fleet, "edge-1", "a", 3);
    fleet.disconnected(&stream, Parting::Lost);
    hands.set_wall(at(START + 1_000_000_000));
    assert!(!barrier(&fleet, applied(4)).is_passed());
    hands.set_wall(at(0));
    hands.advance(STRETCHED);
    assert!(barrier(&fleet, applied(4)).is_passed());
}

#[test]
fn every_event_wakes_who_waits() {
    let (fleet, _) = fleet();
    let mut changes = fleet.watch();
    let mut woken = || {
        let has_changed = changes.has_changed().expect("the fleet lives");
        changes.mark_unchanged();
        has_changed
    };
    let stream = connect(&fleet, "edge-1", "a", 3);
    assert!(woken());
    fleet.acked(&stream, &ack(4));
    assert!(woken());
    fleet.dropped(&stream, &testing::keyring_name());
    assert!(woken());
    assert_eq!(barrier(&fleet, applied(4)).total, 0);
    fleet.disconnected(&stream, Parting::Lost);
    assert!(woken());
    let stream = connect(&fleet, "edge-1", "b", 3);
    fleet.disconnected(&stream, Parting::Lost);
    assert!(woken());
    forget(&fleet, "edge-1", None).expect("it is lost");
    assert!(woken() && !woken());
}

#[test]
fn a_node_belongs_to_the_identity_that_may_serve_as_it() {
    let (fleet, hands) = fleet();
    let [one, other] = ["spiffe://mesh/one", "spiffe://mesh/other"]
        .map(|text| text.parse::<Identity>().expect("an identity"));
    let connect = |identity, run_id| {
        let hello = hello("edge-1", run_id, 3);
        fleet.connected(&hello, &believed(), Some(identity))
    };
    let first = connect(&one, "a").expect("it is new");
    let refused = connect(&other, "c").expect_err("it is taken");
    assert_eq!(
        refused.to_string(),
        "the identity spiffe://mesh/other may not appear as node edge-1: another identity does, for as long as one of its processes may serve"
    );
    fleet.disconnected(&first, Parting::Lost);
    connect(&other, "c").expect_err("it may serve");
    hands.advance(STRETCHED);
    connect(&other, "c").expect("nobody is it any more");
}

#[test]
fn streams_of_the_past_are_refused() {
    let (fleet, _) = fleet();
    let stream = connect(&fleet, "edge-1", "a", 3);
    let again = || fleet.connected(&hello("edge-1", "a", 3), &believed(), None);
    assert!(matches!(again(), Err(Refusal::Late)));
    let filed = discovery::Hello {
        stream: 2,
        snapshot_file: Some(discovery::SnapshotFile {
            id: vec![1].into(),
            begun_from_write: 0,
        }),
        ..hello("edge-1", "a", 3)
    };
    let filed = fleet.connected(&filed, &believed(), None);
    filed.expect("it is later");
    fleet.disconnected(&stream, told_all());
    assert!(matches!(again(), Err(Refusal::Ended)));
}

// Forgotten sidecars.

fn forget(fleet: &Fleet, node: &str, run_id: Option<&str>) -> Result<Vec<RunKey>, ForgetError> {
    fleet.forget(&fleet.lost_runs(node, run_id)?)
}

#[test]
fn what_is_not_connected_of_a_node_is_forgotten() {
    let (fleet, _) = fleet();
    let streams = ["a", "b", "c"].map(|run_id| connect(&fleet, "edge-1", run_id, 3));
    let other = connect(&fleet, "edge-2", "d", 3);
    assert_eq!(forget(&fleet, "edge-1", None), Err(ForgetError::Connected));
    assert_eq!(forget(&fleet, "edge-9", None), Err(ForgetError::Unknown));
    for stream in [&streams[0], &streams[1], &other] {
        fleet.disconnected(stream, Parting::Lost);
    }
    let unknown = forget(&fleet, "edge-1", Some("d"));
    assert_eq!(unknown, Err(ForgetError::Unknown), "it is of edge-2");
    let connected = forget(&fleet, "edge-1", Some("c"));
    assert_eq!(connected, Err(ForgetError::Connected));
    let forgotten = forget(&fleet, "edge-1", None).expect("two are lost");
    assert_eq!(run_ids(&forgotten), ["a", "b"]);
    assert_eq!(barrier(&fleet, applied(4)).total, 2);
    assert_eq!(fleet.gaps(None).len(), 2);
    assert!(fleet.gaps(None).iter().all(|(_, gap)| gap.is_forgotten));
}

#[test]
fn one_process_of_a_node_is_forgotten() {
    let (fleet, _) = fleet();
    let streams = ["a", "b"].map(|run_id| connect(&fleet, "edge-1", run_id, 3));
    for stream in &streams {
        fleet.disconnected(stream, Parting::Lost);
    }
    let forgotten = forget(&fleet, "edge-1", Some("a")).expect("it is lost");
    assert_eq!(run_ids(&forgotten), ["a"]);
    assert_eq!(barrier(&fleet, applied(4)).laggards[0].key.run_id, "b");
    // It connects again, and has to load its keyrings anew.
    let back = discovery::Hello {
        stream: 2,
        ..hello("edge-1", "a", 9)
    };
    let back = fleet.connected(&back, &believed(), None);
    assert!(back.expect("it is welcome").was_forgotten);
    assert_eq!(barrier(&fleet, applied(4)).confirmed, 0);
}

// Evidence.

#[test]
fn who_lags_is_named() {
    let (fleet, _) = fleet();
    let first = connect(&fleet, "edge-1", "a", 3);
    let second = connect(&fleet, "edge-2", "b", 3);
    fleet.told(&first.run, at(START - 10));
    fleet.disconnected(&second, Parting::Lost);
    let late = |since| -> Vec<(String, Presence)> {
        let late = fleet.late(&testing::keyring_name(), at(since));
        let late = late.into_iter();
        late.map(|late| (late.key.node, late.presence)).collect()
    };
    let lost = || ("edge-2".to_owned(), Presence::Lost(at(START)));
    let connected = || ("edge-1".to_owned(), Presence::Connected);
    assert_eq!(late(START - 10), [lost()]);
    assert_eq!(late(START - 9), [connected(), lost()]);
}

#[test]
fn coverage_is_that_of_the_last_to_report() {
    let (fleet, hands) = fleet();
    let coverage = || {
        let now = fleet.clock.wall();
        fleet.coverage(&testing::keyring_name(), now)
    };
    let first = connect(&fleet, "edge-1", "a", 3);
    let second = connect(&fleet, "edge-2", "b", 3);
    fleet.told(&first.run, at(START));
    assert_eq!(coverage().complete_until, None);
    fleet.told(&second.run, at(START - 5));
    assert_eq!(coverage().complete_until, Some(at(START - 5)));
    fleet.disconnected(&second, Parting::Lost);
    hands.advance(STRETCHED);
    let now = fleet.clock.wall();
    assert_eq!(coverage().complete_until, Some(at(START)));
    assert_eq!(coverage().gap_until, Some(now));
    assert_eq!(fleet.gaps(Some(&testing::keyring_name())).len(), 1);
    let other = "elsewhere".parse().expect("a name");
    assert_eq!(fleet.gaps(Some(&other)), []);
}

// The rows in the store.

#[tokio::test]
async fn news_are_written_of_those_who_came_or_went_and_once() {
    let disk = Disk::new().await;
    let row = |node: &str, contact| (node.to_owned(), contact);
    let (fleet, hands) = fleet();
    let first = connect(&fleet, "edge-1", "a", 3);
    let second = connect(&fleet, "edge-2", "b", 3);
    disk.news(&fleet).await;
    let both = [row("edge-1", START), row("edge-2", START)];
    assert_eq!(disk.contacts().await, both);
    // No sidecar has come since: nothing is written, although both were in contact later.
    hands.advance(Duration::from_secs(1));
    fleet.acked(&first, &ack(4));
    disk.news(&fleet).await;
    assert_eq!(disk.contacts().await, both);
    fleet.disconnected(&second, Parting::Lost);
    disk.news(&fleet).await;
    let later = START + 1_000;
    assert_eq!(
        disk.contacts().await,
        [row("edge-1", START), row("edge-2", later)]
    );
    fleet.disconnected(&first, told_all());
    assert_eq!(disk.news(&fleet).await, [first.run]);
    assert_eq!(disk.contacts().await, [row("edge-2", later)]);
    assert_eq!(disk.news(&fleet).await, []);
}

#[tokio::test]
async fn what_could_not_be_written_is_written_later() {
    let disk = Disk::new().await;
    let (fleet, _) = fleet();
    connect(&fleet, "edge-1", "a", 3);
    let locked = disk.lock();
    let failed = fleet.record_news(&disk.store).await;
    assert!(failed.is_err(), "somebody writes");
    drop(locked);
    disk.news(&fleet).await;
    assert_eq!(disk.contacts().await, [("edge-1".to_owned(), START)]);
}

#[tokio::test]
async fn a_grant_is_on_record_before_it_leaves() {
    let disk = Disk::new().await;
    let (fleet, _) = fleet();
    let mut brief = hello("edge-1", "a", 3);
    brief.subscriptions[0].deny_after_ms = 60_000;
    let stream = fleet.connected(&brief, &believed(), None);
    let run = stream.expect("it is welcome").run;
    disk.news(&fleet).await;
    let grant = async |serve_for| {
        let grants = [(testing::keyring_name(), serve_for)];
        let arrived = fleet.clock.boot();
        fleet.grant(&disk.store, &run, arrived, &grants).await
    };
    let minute = Duration::from_mins(1);
    let locked = disk.lock();
    grant(minute).await.expect("its row says so already");
    let longer = grant(2 * minute).await;
    assert!(matches!(longer, Err(GrantError::Store(_))), "{longer:?}");
    drop(locked);
    grant(2 * minute).await.expect("it writes");
    let _locked = disk.lock();
    grant(2 * minute).await.expect("its row says so already");
    // A control plane that opens the store now waits for as long.
    let (clock, _) = Clock::manual(at(START));
    let next = Fleet::new(clock, MAX_SERVE_FOR, disk.rows().await);
    let next = next.expect("sound rows");
    let rest = barrier(&next, applied(4)).rest();
    assert_eq!(rest, Some(Duration::from_millis(121_201)));
    // A run that has ended receives no grant.
    let grants = [(testing::keyring_name(), minute)];
    let unknown = RunKey {
        run_id: "b".to_owned(),
        ..run.clone()
    };
    let arrived = fleet.clock.boot();
    let refused = fleet.grant(&disk.store, &unknown, arrived, &grants).await;
    assert!(matches!(refused, Err(GrantError::Unknown(_))));
}

#[tokio::test]
async fn sidecars_of_a_former_control_plane_are_waited_for() {
    let disk = Disk::new().await;
    let (fleet, hands) = fleet();
    let connected = connect(&fleet, "edge-1", "a", 3).run;
    let lost = connect(&fleet, "edge-2", "b", 3);
    fleet.told(&connected, at(START - 1));
    fleet.disconnected(&lost, Parting::Lost);
    hands.advance(Duration::from_mins(10));
    let (next, hands) = disk.next(&fleet).await;
    let seen = barrier(&next, applied(1));
    assert_eq!((seen.confirmed, seen.total), (0, 2));
    let rests: Vec<_> = seen.laggards.iter().map(|laggard| laggard.rest).collect();
    let rest = STRETCHED.saturating_sub(Duration::from_mins(10));
    assert_eq!(rests, [Some(STRETCHED), Some(rest)]);
    let now = next.clock.wall();
    let coverage = next.coverage(&testing::keyring_name(), now);
    assert_eq!(coverage.complete_until, None);
    hands.advance(rest);
    assert_eq!(barrier(&next, applied(1)).total, 1);
    // A sidecar that has connected again is waited for until it has confirmed.
    let back = discovery::Hello {
        stream: 2,
        ..hello("edge-1", "a", 3)
    };
    let back = next.connected(&back, &believed(), None);
    back.expect("it is welcome");
    hands.advance(STRETCHED);
    assert_eq!(barrier(&next, applied(3)).confirmed, 1);
    assert!(!barrier(&next, applied(4)).is_passed());
}

#[tokio::test]
async fn gaps_survive_restarts_and_grow_older_only_while_somebody_watches() {
    let disk = Disk::new().await;
    let (fleet, hands) = fleet();
    let stream = connect(&fleet, "edge-1", "a", 3);
    fleet.told(&stream.run, at(START));
    fleet.disconnected(&stream, Parting::Lost);
    hands.advance(STRETCHED);
    let mut fleet = fleet;
    let hour = Duration::from_hours(1);
    for restarts in 0..3 {
        let (next, hands) = disk.next(&fleet).await;
        let gaps = next.gaps(None);
        let (key, gap) = &gaps[0];
        assert_eq!(*key, stream.run);
        assert_eq!(gap.complete_until, Some(at(START)));
        assert_eq!(gap.age(next.clock.boot()), restarts * hour);
        assert!(next.members().is_empty());
        hands.advance(hour);
        fleet = next;
    }
    // After thirty days nothing depends on the gaps any more.
    let (clock, hands) = Clock::manual(fleet.clock.wall());
    let fleet = Fleet::new(clock, MAX_SERVE_FOR, disk.rows().await).expect("sound rows");
    hands.advance(Duration::from_hours(30 * 24));
    assert_eq!(fleet.gaps(None), []);
    assert_eq!(disk.news(&fleet).await, [stream.run]);
    assert_eq!(disk.rows().await, []);
}

#[tokio::test]
async fn the_age_of_a_gap_is_written_every_ten_minutes() {
    let disk = Disk::new().await;
    let (fleet, hands) = fleet();
    let stream = connect(&fleet, "edge-1", "a", 3);
    fleet.disconnected(&stream, Parting::Lost);
    hands.advance(STRETCHED);
    let age = async || {
        fleet.record(&disk.store).await.expect("it writes");
        let (clock, _) = Clock::manual(at(START));
        let next = Fleet::new(clock, MAX_SERVE_FOR, disk.rows().await);
        let next = next.expect("sound rows");
        next.gaps(None)[0].1.age(next.clock.boot())
    };
    assert_eq!(age().await, Duration::ZERO);
    hands.advance(Duration::from_mins(10).saturating_sub(Duration::from_millis(1)));
    assert_eq!(age().await, Duration::ZERO);
    hands.advance(Duration::from_millis(1));
    assert_eq!(age().await, Duration::from_mins(10));
}

#[tokio::test]
async fn who_said_goodbye_is_in_the_store_only_with_a_file() {
    let disk = Disk::new().await;
    let (fleet, _) = fleet();
    let gone = connect(&fleet, "edge-1", "a", 3);
    let filed = discovery::Hello {
        snapshot_file: Some(discovery::SnapshotFile {
            id: vec![1].into(),
            begun_from_write: 0,
        }),
        ..hello("edge-2", "b", 3)
    };
    let stopped = fleet.connected(&filed, &believed(), None);
    let stopped = stopped.expect("it is welcome");
    let (next, _) = disk.next(&fleet).await;
    assert_eq!(next.members().len(), 2);
    fleet.disconnected(&gone, told_all());
    fleet.disconnected(&stopped, told_all());
    let (next, _) = disk.next(&fleet).await;
    let members = next.members();
    let members = members.iter().map(|(key, run)| (key, run.presence()));
    let members: BTreeMap<_, _> = members.collect();
    let stopped = (&stopped.run, Presence::Stopped(at(START)));
    assert_eq!(members, BTreeMap::from([stopped]));
    assert_eq!(next.gaps(None), []);
}

#[test]
fn a_row_that_cannot_be_read_keeps_the_control_plane_from_starting() {
    let (clock, _) = Clock::manual(at(START));
    let row = PresenceRow {
        node: "edge-1".to_owned(),
        run_id: "a".to_owned(),
        cluster: String::new(),
        version: String::new(),
        keyrings: vec![testing::keyring_name().to_string()],
        last_contact: at(START),
        complete_until: None,
        gone_at: None,
        serving: Some("not JSON".to_owned()),
    };
    let refused = Fleet::new(clock, MAX_SERVE_FOR, vec![row]);
    let error = refused.expect_err("it would wait for too few");
    assert!(error.to_string().contains("edge-1"), "{error}");
}
