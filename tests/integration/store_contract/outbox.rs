//! The contract of a store's deliveries.

use std::sync::Arc;

use relatch::{
    key::{Revision, Timestamp},
    store::{Delivery, DeliveryState, NewDelivery, Retention, Settled, Settlement, Store},
};
use tokio::task::JoinSet;

use super::{Engine, append, log};

pub(crate) async fn cursor_moves_with_its_deliveries<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 9).await;
    append(&store, &log("partners"), 0, 9).await;
    assert_eq!(cursor(&store, "payments").await, 0);
    let one = row("a", 2);

    assert!(project(&store, 0, 3, std::slice::from_ref(&one)).await);

    assert_eq!(cursor(&store, "payments").await, 3);
    assert_eq!(cursor(&store, "partners").await, 0);
    assert_eq!(list(&store, "a").await, [waiting(&one)]);
    for from in [0, 2, 4] {
        let moved = project(&store, from, 9, &[row("a", 3)]).await;
        assert!(!moved, "it moved from {from}");
    }
    assert_eq!(cursor(&store, "payments").await, 3);
    assert_eq!(list(&store, "a").await, [waiting(&one)]);

    // What is there already stays as it is.
    let mut again = one.clone();
    again.body = "{}".into();
    assert!(project(&store, 3, 4, &[again, row("b", 2)]).await);
    drop(store);
    let store = engine.open().await;
    assert_eq!(cursor(&store, "payments").await, 4);
    assert_eq!(list(&store, "a").await, [waiting(&one)]);
    assert_eq!(list(&store, "b").await, [waiting(&row("b", 2))]);
}

pub(crate) async fn deliveries_that_are_refused_do_not_move_the_cursor<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 9).await;
    let mut broken = row("a", 3);
    broken.body = "not JSON".into();
    let refused = store
        .project(
            &log("payments"),
            Revision::default(),
            Revision::new(3),
            vec![row("a", 2), broken],
        )
        .await;
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(cursor(&store, "payments").await, 0);
    assert_eq!(list(&store, "a").await, []);
}

/// Two replicas walk the same log; whoever loses reads the cursor and goes on from there.
pub(crate) async fn of_two_projectors_one_makes_each_delivery<E: Engine>() {
    const END: u64 = 40;
    let engine = E::start().await;
    let handles = [engine.open().await, engine.open().await];
    append(&handles[0], &log("payments"), 0, 40).await;
    let mut projectors = JoinSet::new();
    for (number, store) in handles.iter().enumerate() {
        let store = Arc::clone(store);
        projectors.spawn(async move {
            let mut won = 0;
            loop {
                let from = cursor(&store, "payments").await;
                if from == END {
                    return won;
                }
                // Its event tells who made it.
                let mut row = row("a", from + 1);
                row.kind = number.to_string();
                won += u64::from(project(&store, from, from + 1, &[row]).await);
            }
        });
    }
    let won: Vec<_> = projectors.join_all().await;
    assert_eq!(won.iter().sum::<u64>(), END);
    let made = list(&handles[0], "a").await;
    assert_eq!(made.len() as u64, END);
}

pub(crate) async fn a_claimed_delivery_is_nobody_elses<E: Engine>() {
    let engine = E::start().await;
    let (one, other) = (engine.open().await, engine.open().await);
    append(&one, &log("payments"), 0, 9).await;
    let rows = [row("a", 1), row("a", 2), row("b", 3), row("c", 4)];
    assert!(project(&one, 0, 9, &rows).await);

    assert_eq!(claim(&one, 99, 10).await, [], "before they are due");
    let claimed = claim(&one, 100, 2).await;
    assert_eq!(names(&claimed), ["a 1 #1", "b 3 #1"]);
    assert_eq!(names(&claim(&other, 100, 10).await), ["c 4 #1"]);
    // The second of `a` waits until the first is settled or its claim is over.
    assert_eq!(claim(&other, 100 + LEASE - 1, 10).await, []);
    assert!(settle(&one, "a", 1, 1, Settled::Delivered).await);
    assert_eq!(names(&claim(&other, 101, 10).await), ["a 2 #1"]);

    let abandoned = claim(&other, 100 + LEASE, 10).await;
    assert_eq!(names(&abandoned), ["b 3 #2", "c 4 #2"]);
}

pub(crate) async fn two_claimants_never_share_a_delivery<E: Engine>() {
    const EACH: u64 = 12;
    let engine = E::start().await;
    let handles = [engine.open().await, engine.open().await];
    append(&handles[0], &log("payments"), 0, 40).await;
    let rows: Vec<_> = (1..=EACH)
        .flat_map(|revision| ["a", "b", "c"].map(|webhook| row(webhook, revision)))
        .collect();
    assert!(project(&handles[0], 0, EACH, &rows).await);
    let mut claimants = JoinSet::new();
    for store in handles {
        claimants.spawn(async move {
            let mut claimed = Vec::new();
            // Who finds nothing sees that the other one has all that is left under way.
            loop {
                let some = claim(&store, 100, 2).await;
                for delivery in &some {
                    assert_eq!(delivery.attempts, 1);
                    let NewDelivery {
                        webhook, revision, ..
                    } = &delivery.what;
                    assert!(settle(&store, webhook, revision.get(), 1, Settled::Delivered).await);
                }
                if some.is_empty() && over(&store).await == 3 * EACH {
                    return claimed;
                }
                claimed.extend(names(&some));
            }
        });
    }
    let mut claimed: Vec<_> = claimants.join_all().await.concat();
    claimed.sort();
    let whole = claimed.len();
    claimed.dedup();
    assert_eq!((claimed.len(), whole), (rows.len(), rows.len()));
}

pub(crate) async fn a_delivery_is_settled_by_its_newest_claim<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 9).await;
    assert!(project(&store, 0, 9, &[row("a", 1), row("b", 1), row("c", 1)]).await);
    claim(&store, 100, 10).await;
    let retry = Settled::Retry(Timestamp::from_millis(500));
    let at = Settlement {
        status: Some(503),
        error: Some("busy".into()),
        ..settlement("a", 1, 1, retry)
    };
    assert!(store.settle_delivery(at.clone()).await.expect("it settles"));
    let delivery = &list(&store, "a").await[0];
    assert_eq!(delivery.state, DeliveryState::Waiting);
    assert_eq!(delivery.next_attempt_at, Timestamp::from_millis(500));
    assert_eq!(delivery.settled_at, Some(at.at));
    assert_eq!(delivery.last_status, Some(503));
    assert_eq!(delivery.last_error.as_deref(), Some("busy"));
    assert_eq!(claim(&store, 499, 10).await, []);
    assert_eq!(names(&claim(&store, 500, 10).await), ["a 1 #2"]);

    // The first attempt speaks again: that it failed is old, that it was taken is not.
    assert!(!settle(&store, "a", 1, 1, retry).await);
    assert!(!settle(&store, "a", 1, 1, Settled::GivenUp).await);
    assert!(settle(&store, "a", 1, 1, Settled::Delivered).await);
    assert!(!settle(&store, "a", 1, 2, Settled::GivenUp).await);
    let delivery = &list(&store, "a").await[0];
    assert_eq!(delivery.state, DeliveryState::Delivered);
    assert_eq!((delivery.last_status, &delivery.last_error), (None, &None));

    assert!(settle(&store, "b", 1, 1, Settled::GivenUp).await);
    assert!(!settle(&store, "b", 1, 1, Settled::Delivered).await);
    assert_eq!(list(&store, "b").await[0].state, DeliveryState::GivenUp);
    assert!(!settle(&store, "nobody", 1, 1, Settled::Delivered).await);
    let far = 100 + LEASE;
    assert_eq!(names(&claim(&store, far, 10).await), ["c 1 #2"]);
}

pub(crate) async fn deliveries_are_listed_by_webhook_and_pruned<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 9).await;
    let rows: Vec<_> = (1..=6).map(|revision| row("a", revision)).collect();
    assert!(project(&store, 0, 9, &rows).await);
    for (revision, state) in [
        (1, Settled::Delivered),
        (2, Settled::GivenUp),
        (3, Settled::Delivered),
    ] {
        claim(&store, 100, 1).await;
        assert!(settle(&store, "a", revision, 1, state).await);
    }
    assert_eq!(revisions(&store).await, [6, 5, 4, 3, 2, 1]);
    let partners = "partners".parse().expect("a name");
    let foreign = store.deliveries(&partners, "a", 9).await;
    assert_eq!(foreign.expect("it reads"), []);

    // Settled at 101, 102 and 103.
    let all = Retention {
        delivered_since: Timestamp::from_millis(101),
        given_up_since: Timestamp::from_millis(102),
        max_over: 3,
        max_waiting: 3,
    };
    assert_eq!(prune(&store, all).await, [] as [&str; 0]);
    assert_eq!(revisions(&store).await, [6, 5, 4, 3, 2, 1]);
    let young = Retention {
        delivered_since: Timestamp::from_millis(102),
        ..all
    };
    assert_eq!(prune(&store, young).await, [] as [&str; 0]);
    assert_eq!(revisions(&store).await, [6, 5, 4, 3, 2]);
    let given_up = Retention {
        given_up_since: Timestamp::from_millis(103),
        ..all
    };
    prune(&store, given_up).await;
    assert_eq!(revisions(&store).await, [6, 5, 4, 3]);

    // One of those that wait is under way and stays.
    claim(&store, 100, 1).await;
    let narrow = Retention {
        max_waiting: 1,
        max_over: 1,
        ..all
    };
    assert_eq!(prune(&store, narrow).await, ["a 5 #0"]);
    assert_eq!(revisions(&store).await, [6, 5, 4]);
    let delivery = &list(&store, "a").await[1];
    assert_eq!(delivery.state, DeliveryState::GivenUp);
    let error = delivery.last_error.as_deref().unwrap_or_default();
    assert!(error.contains("too many"), "{error}");
}

/// How long a claim holds here, in milliseconds.
const LEASE: i64 = 1_000;

/// A delivery that is due at 100 ms.
fn row(webhook: &str, revision: u64) -> NewDelivery {
    NewDelivery {
        webhook: webhook.into(),
        event: format!("payments-1-{revision}"),
        keyring: "payments".parse().expect("a name"),
        revision: Revision::new(revision),
        kind: "rotation.started".into(),
        body: format!("{{\"id\": \"{revision} ' \u{1F511}\"}}"),
        created_at: Timestamp::from_millis(100),
    }
}

fn waiting(what: &NewDelivery) -> Delivery {
    Delivery {
        what: what.clone(),
        state: DeliveryState::Waiting,
        attempts: 0,
        next_attempt_at: what.created_at,
        settled_at: None,
        last_status: None,
        last_error: None,
    }
}

/// Settled at 100 ms and one for each revision.
fn settlement(webhook: &str, revision: u64, attempts: u32, state: Settled) -> Settlement {
    let at = 100 + i64::try_from(revision).expect("a small number");
    Settlement {
        webhook: webhook.into(),
        event: row(webhook, revision).event,
        attempts,
        at: Timestamp::from_millis(at),
        state,
        status: None,
        error: None,
    }
}

async fn cursor(store: &Arc<dyn Store>, name: &str) -> u64 {
    let cursor = store.outbox_cursor(&log(name)).await;
    cursor.expect("it reads").get()
}

async fn project(store: &Arc<dyn Store>, from: u64, to: u64, rows: &[NewDelivery]) -> bool {
    let (from, to) = (Revision::new(from), Revision::new(to));
    let log = log("payments");
    let moved = store.project(&log, from, to, rows.to_vec()).await;
    moved.expect("it projects")
}

async fn claim(store: &Arc<dyn Store>, now: i64, limit: usize) -> Vec<Delivery> {
    let (now, until) = (
        Timestamp::from_millis(now),
        Timestamp::from_millis(now + LEASE),
    );
    let claimed = store.claim_deliveries(now, until, limit).await;
    claimed.expect("it claims")
}

async fn settle(
    store: &Arc<dyn Store>,
    webhook: &str,
    revision: u64,
    attempts: u32,
    state: Settled,
) -> bool {
    let settlement = settlement(webhook, revision, attempts, state);
    let settled = store.settle_delivery(settlement).await;
    settled.expect("it settles")
}

async fn list(store: &Arc<dyn Store>, webhook: &str) -> Vec<Delivery> {
    let keyring = "payments".parse().expect("a name");
    let listed = store.deliveries(&keyring, webhook, 100).await;
    listed.expect("it reads")
}

async fn revisions(store: &Arc<dyn Store>) -> Vec<u64> {
    let listed = list(store, "a").await;
    listed.iter().map(|d| d.what.revision.get()).collect()
}

async fn over(store: &Arc<dyn Store>) -> u64 {
    let mut over = 0;
    for webhook in ["a", "b", "c"] {
        let listed = list(store, webhook).await;
        let done = listed.iter().filter(|d| d.state != DeliveryState::Waiting);
        over += done.count() as u64;
    }
    over
}

async fn prune(store: &Arc<dyn Store>, retention: Retention) -> Vec<String> {
    let now = Timestamp::from_millis(200);
    let pruned = store.prune_deliveries(now, retention).await;
    names(&pruned.expect("it prunes"))
}

fn names(deliveries: &[Delivery]) -> Vec<String> {
    deliveries
        .iter()
        .map(|Delivery { what, attempts, .. }| {
            format!("{} {} #{attempts}", what.webhook, what.revision)
        })
        .collect()
}
