use super::*;
use crate::key::{VersionRef, testing};

const LEASE: Duration = Duration::from_mins(1);

fn hello(node: &str, run_id: &str, revision: u64) -> wire::Hello {
    wire::Hello {
        node: Some(wire::Node {
            id: node.to_owned(),
            ..wire::Node::default()
        }),
        run_id: run_id.to_owned(),
        subscriptions: vec![wire::Subscription {
            keyring: testing::keyring_name().to_string(),
            epoch: 1,
            revision,
            ..wire::Subscription::default()
        }],
        ..Default::default()
    }
}

fn ack(applied: u64, revoked_through: u64) -> wire::Ack {
    wire::Ack {
        keyring: testing::keyring_name().to_string(),
        epoch: 1,
        nonce: applied,
        applied_revision: applied,
        durable_revision: 0,
        revoked_through,
        ..Default::default()
    }
}

fn fleet() -> (Fleet, crate::clock::ManualClock) {
    let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000_000));
    (Fleet::new(clock, LEASE, Vec::new()), hands)
}

fn barrier(fleet: &Fleet, target: Target) -> Barrier {
    let (name, epoch) = (testing::keyring_name(), Epoch::new(1));
    let barrier = fleet.barrier(&name, epoch, target);
    let (reached, all) = fleet.reached(&name, epoch, target);
    assert_eq!((reached, all), (barrier.applied, barrier.total));
    barrier
}

fn connect(fleet: &Fleet, node: &str, run_id: &str, revision: u64) -> MemberKey {
    let connected = fleet.connected(&hello(node, run_id, revision), None);
    connected.expect("nobody else is this node")
}

fn staged() -> VersionRef {
    VersionRef {
        key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
        version: crate::key::VersionNumber::FIRST,
    }
}

fn applied(revision: u64) -> Target {
    Target::Applied(Revision::new(revision), staged())
}

#[test]
fn a_barrier_waits_for_every_live_sidecar() {
    let (fleet, _) = fleet();
    let first = connect(&fleet, "edge-1", "a", 3);
    connect(&fleet, "edge-2", "b", 2);
    let seen = barrier(&fleet, applied(4));
    assert_eq!((seen.applied, seen.total), (0, 2));
    assert_eq!(seen.laggards[1].behind, 2);
    fleet.acked(&first, &ack(4, 4));
    let seen = barrier(&fleet, applied(4));
    assert_eq!((seen.applied, seen.total), (1, 2));
    assert!(!seen.is_passed());
}

#[test]
fn a_lost_sidecar_is_waited_for_until_its_lease_is_over() {
    let (fleet, hands) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.disconnected(&key, Parting::Lost);
    hands.advance(LEASE.saturating_sub(Duration::from_millis(1)));
    assert!(!barrier(&fleet, applied(4)).is_passed());
    hands.advance(Duration::from_millis(1));
    assert!(barrier(&fleet, applied(4)).is_passed());
}

#[test]
fn a_sidecar_that_said_goodbye_is_gone_at_once() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.disconnected(&key, Parting::Goodbye { told_all: true });
    assert!(barrier(&fleet, applied(4)).is_passed());
    assert!(fleet.members().is_empty());
}

#[test]
fn a_restarted_sidecar_takes_its_former_place() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.disconnected(&key, Parting::Lost);
    connect(&fleet, "edge-1", "b", 4);
    assert_eq!(barrier(&fleet, applied(4)).total, 1);
}

#[test]
fn a_stream_that_is_replaced_does_not_end_the_sidecar() {
    let (fleet, hands) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    connect(&fleet, "edge-1", "a", 3);
    fleet.disconnected(&key, Parting::Lost);
    hands.advance(2 * LEASE);
    assert_eq!(fleet.members().len(), 1);
}

#[test]
fn sidecars_of_a_former_life_are_waited_for() {
    let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000_000));
    let row = PresenceRow {
        node: "edge-1".to_owned(),
        run_id: "a".to_owned(),
        cluster: String::new(),
        version: String::new(),
        keyrings: vec![testing::keyring_name().to_string()],
        last_contact: Timestamp::from_millis(999_000),
        complete_until: None,
        gone_at: None,
    };
    let fleet = Fleet::new(clock, LEASE, vec![row]);
    assert!(!barrier(&fleet, applied(1)).is_passed());
    hands.advance(LEASE);
    assert!(barrier(&fleet, applied(1)).is_passed());
}

#[test]
fn revocations_are_acked_ahead_of_the_revision() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.acked(&key, &ack(3, 9));
    assert!(barrier(&fleet, Target::Revoked(Revision::new(9))).is_passed());
    assert!(!barrier(&fleet, applied(9)).is_passed());
}

#[test]
fn a_sidecar_that_refused_the_version_is_not_there() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    let nack = wire::Nack {
        keyring: testing::keyring_name().to_string(),
        epoch: 1,
        nonce: 4,
        items: vec![wire::RejectedItem {
            name: staged().to_string(),
            reason: "state: 9 is unknown".to_owned(),
        }],
        applied_revision: 4,
        revoked_through: 4,
        ..Default::default()
    };
    fleet.nacked(&key, &nack);
    fleet.acked(&key, &ack(5, 5));
    assert!(!barrier(&fleet, applied(4)).is_passed());
    let other = VersionRef {
        version: staged().version.next(),
        ..staged()
    };
    assert!(barrier(&fleet, Target::Applied(Revision::new(4), other)).is_passed());
}

#[test]
fn another_epoch_is_never_there() {
    let (fleet, _) = fleet();
    connect(&fleet, "edge-1", "a", 30);
    let seen = fleet.barrier(&testing::keyring_name(), Epoch::new(2), applied(4));
    assert!(!seen.is_passed());
}

fn told_all() -> Parting {
    Parting::Goodbye { told_all: true }
}

fn coverage(fleet: &Fleet) -> (Option<i64>, Option<i64>) {
    let now = fleet.clock.wall();
    let coverage = fleet.coverage(&testing::keyring_name(), now);
    (
        coverage.complete_until.map(Timestamp::as_millis),
        coverage.gap_until.map(Timestamp::as_millis),
    )
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

const START: i64 = 1_000_000;
const LEASE_MS: i64 = 60_000;

/// What the store has of the fleet after it was recorded.
async fn recorded(fleet: &Fleet, dir: &tempfile::TempDir) -> Vec<PresenceRow> {
    let options = crate::store::SqliteOptions {
        create: true,
        ..crate::store::SqliteOptions::default()
    };
    let path = dir.path().join("relatch.db");
    let store = crate::store::SqliteStore::open(&path, options).await;
    let store = store.expect("it opens");
    fleet.record(&store).await.expect("it writes");
    store.load_presence().await.expect("it reads")
}

#[tokio::test]
async fn news_are_written_of_those_who_came_or_went_and_once() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = crate::store::SqliteOptions {
        create: true,
        ..crate::store::SqliteOptions::default()
    };
    let path = dir.path().join("relatch.db");
    let store = crate::store::SqliteStore::open(&path, options).await;
    let store = store.expect("it opens");
    let written = async || {
        let rows = store.load_presence().await.expect("it reads");
        let rows = rows.into_iter();
        rows.map(|row| (row.node, row.last_contact.as_millis()))
            .collect::<Vec<_>>()
    };
    let row = |node: &str, contact| (node.to_owned(), contact);
    let (fleet, hands) = fleet();
    let first = connect(&fleet, "edge-1", "a", 3);
    let second = connect(&fleet, "edge-2", "b", 3);
    fleet.record_news(&store).await.expect("it writes");
    assert_eq!(
        written().await,
        [row("edge-1", START), row("edge-2", START)]
    );
    // Nobody has come since: nothing is written, although both were heard of later.
    hands.advance(Duration::from_secs(1));
    fleet.record_news(&store).await.expect("it writes");
    assert_eq!(
        written().await,
        [row("edge-1", START), row("edge-2", START)]
    );
    fleet.disconnected(&second, Parting::Lost);
    fleet.record_news(&store).await.expect("it writes");
    let later = START + 1_000;
    assert_eq!(
        written().await,
        [row("edge-1", START), row("edge-2", later)]
    );
    fleet.disconnected(&first, Parting::Goodbye { told_all: true });
    let gone = fleet.record_news(&store).await.expect("it writes");
    assert_eq!(gone, [first]);
    assert_eq!(written().await, [row("edge-2", later)]);
}

/// The fleet as the next control plane finds it.
async fn reopened(fleet: &Fleet, dir: &tempfile::TempDir) -> Fleet {
    let rows = recorded(fleet, dir).await;
    Fleet::new(fleet.clock.clone(), LEASE, rows)
}

#[test]
fn coverage_is_that_of_the_last_to_report() {
    let (fleet, hands) = fleet();
    assert_eq!(coverage(&fleet), (Some(START), None));
    let first = connect(&fleet, "edge-1", "a", 3);
    let second = connect(&fleet, "edge-2", "b", 3);
    fleet.told(&first, at(START - 1));
    assert_eq!(coverage(&fleet), (None, None));
    fleet.told(&second, at(START - 5));
    assert_eq!(coverage(&fleet), (Some(START - 5), None));
    fleet.told(&second, at(START - 9));
    assert_eq!(coverage(&fleet), (Some(START - 5), None));
    // Neither a clock that is ahead nor one that is set back later proves anything.
    fleet.told(&second, at(START + 5_000));
    assert_eq!(coverage(&fleet), (Some(START - 1), None));
    hands.advance(Duration::from_secs(9));
    fleet.told(&first, at(START + 9_000));
    assert_eq!(coverage(&fleet), (Some(START), None));
    hands.set_wall(at(START - 100));
    assert_eq!(coverage(&fleet), (Some(START - 100), None));
    let other: KeyringName = "elsewhere".parse().expect("a name");
    let elsewhere = fleet.coverage(&other, at(START));
    assert_eq!(elsewhere.complete_until, Some(at(START)));
}

#[test]
fn who_lags_is_named() {
    let (fleet, _) = fleet();
    let first = connect(&fleet, "edge-1", "a", 3);
    connect(&fleet, "edge-2", "b", 3);
    fleet.told(&first, at(START - 10));
    let late = |since| -> Vec<String> {
        let late = fleet.late(&testing::keyring_name(), at(since));
        late.into_iter().map(|late| late.node).collect()
    };
    assert_eq!(late(START - 10), ["edge-2"]);
    assert_eq!(late(START - 9), ["edge-1", "edge-2"]);
}

#[test]
fn a_sidecar_that_vanishes_leaves_a_gap_one_lease_after_its_last_contact() {
    let (fleet, hands) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.told(&key, at(START));
    hands.advance(Duration::from_secs(5));
    fleet.disconnected(&key, Parting::Lost);
    hands.advance(LEASE.saturating_sub(Duration::from_millis(1)));
    assert_eq!(coverage(&fleet), (Some(START), None));
    hands.advance(Duration::from_millis(1));
    let until = START + 5_000 + LEASE_MS;
    assert_eq!(coverage(&fleet), (Some(until), Some(until)));
    let gaps = fleet.gaps(Some(&testing::keyring_name()));
    assert_eq!(gaps[0].0, key);
    assert_eq!(gaps[0].1.complete_until, Some(at(START)));
    assert_eq!(gaps[0].1.last_contact, at(START + 5_000));
    assert!(fleet.members().is_empty());
    // The same process comes back: its counts have grown on.
    connect(&fleet, "edge-1", "a", 3);
    assert_eq!(coverage(&fleet), (Some(START), None));
    fleet.told(&key, at(until + 1));
    assert_eq!(coverage(&fleet), (Some(until), None));
}

#[test]
fn only_a_goodbye_after_the_last_report_leaves_no_gap() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.disconnected(&key, told_all());
    assert_eq!(coverage(&fleet), (Some(START), None));
    let key = connect(&fleet, "edge-1", "b", 3);
    fleet.disconnected(&key, Parting::Goodbye { told_all: false });
    assert_eq!(coverage(&fleet), (Some(START), Some(START + LEASE_MS)));
    assert!(fleet.members().is_empty());
}

#[test]
fn a_new_process_leaves_a_gap_of_its_former_one() {
    let (fleet, hands) = fleet();
    let former = connect(&fleet, "edge-1", "a", 3);
    fleet.disconnected(&former, Parting::Lost);
    hands.advance(Duration::from_secs(2));
    connect(&fleet, "edge-1", "b", 3);
    assert_eq!(coverage(&fleet), (None, Some(START + LEASE_MS)));
    assert_eq!(fleet.gaps(None)[0].0, former);
}

#[tokio::test]
async fn gaps_survive_a_restart_without_a_new_lease() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (fleet, hands) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.told(&key, at(START));
    fleet.disconnected(&key, Parting::Lost);
    hands.advance(LEASE);
    let mut fleet = fleet;
    for _ in 0..3 {
        fleet = reopened(&fleet, &dir).await;
        let now = fleet.clock.wall().as_millis();
        assert_eq!(coverage(&fleet), (Some(now), Some(START + LEASE_MS)));
        assert!(fleet.members().is_empty());
        assert_eq!(fleet.gaps(None)[0].1.complete_until, Some(at(START)));
        hands.advance(LEASE);
    }
    // It is forgotten after thirty days.
    hands.advance(Duration::from_hours(30 * 24));
    fleet = reopened(&fleet, &dir).await;
    assert_eq!(fleet.gaps(None), []);
}

#[tokio::test]
async fn a_sidecar_that_does_not_come_back_to_a_new_control_plane_may_have_served_until_then() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (fleet, hands) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.told(&key, at(START));
    let rows = recorded(&fleet, &dir).await;
    hands.advance(Duration::from_hours(1));
    let fleet = Fleet::new(fleet.clock.clone(), LEASE, rows);
    let started = START + 3_600_000;
    assert_eq!(coverage(&fleet), (Some(START), None));
    hands.advance(LEASE);
    let until = started + LEASE_MS;
    assert_eq!(coverage(&fleet), (Some(until), Some(until)));
    // And the next control plane knows the same.
    let fleet = reopened(&fleet, &dir).await;
    assert_eq!(coverage(&fleet).1, Some(until));
}

#[tokio::test]
async fn who_said_goodbye_is_not_in_the_store_any_more() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    assert_eq!(reopened(&fleet, &dir).await.members().len(), 1);
    fleet.disconnected(&key, told_all());
    let next = reopened(&fleet, &dir).await;
    assert!(next.members().is_empty());
    assert_eq!(next.gaps(None), []);
}

#[test]
fn a_sidecar_that_dies_again_and_again_keeps_its_newest_gaps() {
    let (fleet, hands) = fleet();
    for number in 0..40 {
        let key = connect(&fleet, "edge-1", &format!("boot-{number:02}"), 3);
        fleet.disconnected(&key, Parting::Lost);
        hands.advance(2 * LEASE);
    }
    let gaps = fleet.gaps(None);
    assert_eq!(gaps.len(), 16);
    assert_eq!(gaps[0].0.run_id, "boot-24");
}

#[test]
fn a_node_belongs_to_the_identity_that_is_it_until_its_lease_is_over() {
    let (fleet, hands) = fleet();
    let [one, other] = ["spiffe://mesh/one", "spiffe://mesh/other"]
        .map(|text| text.parse::<Identity>().expect("an identity"));
    let connect = |identity, run_id| fleet.connected(&hello("edge-1", run_id, 3), Some(identity));
    let first = connect(&one, "a").expect("it is new");
    connect(&one, "b").expect("its next process");
    let refused = connect(&other, "c").expect_err("it is taken");
    assert_eq!(
        refused.to_string(),
        "the identity spiffe://mesh/other may not appear as node edge-1: another identity does, until its lease is over"
    );
    // Not even as the very process, whose Goodbye would end it.
    connect(&other, "a").expect_err("it is taken");
    assert_eq!(fleet.members().len(), 2);
    for (run_id, key) in [
        ("a", &first),
        (
            "b",
            &MemberKey {
                run_id: "b".to_owned(),
                ..first.clone()
            },
        ),
    ] {
        fleet.disconnected(key, Parting::Lost);
        assert!(connect(&other, run_id).is_err(), "it has a lease");
    }
    hands.advance(LEASE);
    connect(&other, "c").expect("nobody is it any more");
}

#[test]
fn long_texts_about_refused_items_are_cut() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    let item = |number| wire::RejectedItem {
        name: format!("{number} {}", "long".repeat(10_000)),
        reason: "long".repeat(10_000),
    };
    let nack = wire::Nack {
        keyring: testing::keyring_name().to_string(),
        epoch: 1,
        nonce: 4,
        items: (0..200).map(item).collect(),
        applied_revision: 4,
        revoked_through: 4,
        ..Default::default()
    };
    fleet.nacked(&key, &nack);
    let (_, member) = fleet.members().remove(0);
    let rejected = &member.keyrings[&testing::keyring_name()].rejected;
    assert_eq!(rejected.len(), MAX_REJECTED);
    let lengths = rejected
        .iter()
        .map(|(name, reason)| name.len() + reason.len());
    assert_eq!(lengths.max(), Some(400));
}

#[test]
fn what_is_on_disk_of_another_epoch_is_not_of_this_one() {
    let (fleet, _) = fleet();
    let key = connect(&fleet, "edge-1", "a", 3);
    fleet.acked(
        &key,
        &wire::Ack {
            durable_revision: 3,
            ..ack(3, 3)
        },
    );
    let durable = || {
        let (_, member) = fleet.members().remove(0);
        member.keyrings[&testing::keyring_name()].durable
    };
    let nack = |epoch| wire::Nack {
        keyring: testing::keyring_name().to_string(),
        epoch,
        nonce: 4,
        items: Vec::new(),
        applied_revision: 1,
        revoked_through: 1,
        ..Default::default()
    };
    fleet.nacked(&key, &nack(1));
    assert_eq!(durable(), Revision::new(3));
    fleet.nacked(&key, &nack(2));
    assert_eq!(durable(), Revision::default());
}
