use std::time::Duration;

use prometheus_client::{encoding::text::encode, registry::Registry};
use rusqlite::Connection;
use tokio::sync::Notify;

use super::*;
use crate::{
    key::{ConsumerId, PepperId, Prefix, operation, testing},
    store::{NewEntry, SqliteOptions, SqliteStore},
};

/// Longer than any step takes, so that only a hung test reaches it.
const DEADLINE: Duration = Duration::from_mins(2);

async fn store(dir: &tempfile::TempDir) -> Arc<dyn Store> {
    let options = SqliteOptions {
        create: true,
        ..SqliteOptions::default()
    };
    let store = SqliteStore::open(&dir.path().join("relatch.db"), options).await;
    Arc::new(store.expect("a new store"))
}

async fn catalog(store: &Arc<dyn Store>) -> Catalog {
    catalog_at(store, Clock::system()).await
}

async fn catalog_at(store: &Arc<dyn Store>, clock: Clock) -> Catalog {
    let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
    let catalog = Catalog::open(Arc::clone(store), clock, pepper, ControlMetrics::default()).await;
    catalog.expect("a sound store")
}

async fn with_keyring(store: &Arc<dyn Store>) -> Catalog {
    let catalog = catalog(store).await;
    create(&catalog, testing::keyring_name()).await;
    catalog
}

async fn create(catalog: &Catalog, name: KeyringName) {
    let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
    catalog
        .create_keyring("test", name, &first.expect("a valid keyring"))
        .await
        .expect("a new keyring");
}

async fn add_consumer(catalog: &Catalog, id: &str) {
    let served = catalog.get(&testing::keyring_name()).expect("it exists");
    let consumer: ConsumerId = id.parse().expect("a valid id");
    catalog
        .commit(&served, "test", |keyring, _| {
            Ok((
                keyring.create_consumer(consumer.clone(), String::new())?,
                (),
            ))
        })
        .await
        .expect("a new consumer");
}

fn keyring(catalog: &Catalog) -> Keyring {
    let served = catalog.get(&testing::keyring_name()).expect("it exists");
    served.journal().state().keyring.clone()
}

#[tokio::test]
async fn a_start_goes_on_from_the_saved_state() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let first = with_keyring(&store).await;
    for number in 0..1_001 {
        add_consumer(&first, &format!("consumer-{number}")).await;
    }
    let served = first.get(&testing::keyring_name()).expect("it exists");
    served.journal().save_if_due().await.expect("it is saved");
    add_consumer(&first, "after-the-save").await;
    let log = LogName::Keyring(testing::keyring_name());
    let saved = store.load_state(&log).await.expect("readable");
    let saved = saved.expect("it was saved");
    assert_eq!(saved.revision, Revision::new(1_002));
    assert_eq!(keyring(&catalog(&store).await), keyring(&first));
    // A state of a later version is ignored.
    let later = StateSnapshot {
        format: SAVED_BY_A_LATER_VERSION,
        payload: b"?".to_vec(),
        pages: 0,
        ..saved
    };
    store.save_state(&log, later).await.expect("it is saved");
    assert_eq!(keyring(&catalog(&store).await), keyring(&first));
}

const SAVED_BY_A_LATER_VERSION: u32 = 99;

#[tokio::test]
async fn two_control_planes_on_one_store_lose_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let one = with_keyring(&store).await;
    let other = catalog(&store).await;
    for number in 0..10 {
        add_consumer(&one, &format!("one-{number}")).await;
        add_consumer(&other, &format!("other-{number}")).await;
    }
    one.refresh().await.expect("readable");
    assert_eq!(keyring(&one).consumers().len(), 20);
    assert_eq!(keyring(&one), keyring(&other));
}

#[tokio::test]
async fn a_new_epoch_is_served_anew() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let catalog = with_keyring(&store).await;
    let before = catalog.get(&testing::keyring_name()).expect("it exists");
    let log = LogName::Keyring(testing::keyring_name());
    let head = store.rotate_epoch(&log).await.expect("writable");
    catalog.refresh().await.expect("readable");
    let after = catalog.get(&testing::keyring_name()).expect("it exists");
    assert_ne!(before.epoch(), head.epoch);
    assert_eq!(after.epoch(), head.epoch);
}

#[tokio::test]
async fn those_who_ask_wait_until_the_store_can_be_read() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let catalog = catalog_at(&store(&dir).await, Clock::system()).await;
    create(&catalog, testing::keyring_name()).await;
    let catalog = Arc::new(catalog);
    let mut reads = catalog.reads().watch();
    let (path, aside) = (dir.path().join("relatch.db"), dir.path().join("aside"));
    std::fs::rename(&path, &aside).expect("it is there");
    let asked = catalog.reads().ask();
    assert!(catalog.refresh().await.is_err());
    assert!(!asked.is_served_by(*reads.borrow()), "nothing was read");
    assert!(!served(&catalog).is_current());
    std::fs::rename(&aside, &path).expect("it is there");
    let shutdown = CancellationToken::new();
    let reading = Arc::clone(&catalog).read_for_those_who_ask(shutdown.clone());
    let reading = tokio::spawn(reading);
    let done = reads.wait_for(|done| asked.is_served_by(*done)).await;
    drop(done.expect("the catalog lives"));
    shutdown.cancel();
    reading.await.expect("it ends");
    assert!(served(&catalog).is_current());
}

fn other_name() -> KeyringName {
    "partners".parse().expect("a valid name")
}

fn database(dir: &tempfile::TempDir) -> Connection {
    Connection::open(dir.path().join("relatch.db")).expect("it opens")
}

/// Appends an entry that no relatch can read.
async fn append_rubbish(store: &Arc<dyn Store>, name: &KeyringName) {
    let log = LogName::Keyring(name.clone());
    let head = store.head(&log).await.expect("readable");
    let entry = NewEntry {
        at: Timestamp::from_millis(1),
        actor: "somebody".to_owned(),
        kind: "rubbish".to_owned(),
        payload: b"{}".to_vec(),
    };
    let at = head.expect("the log exists").revision;
    let appended = store.append(&log, at, vec![entry]).await;
    appended.expect("any bytes can be appended");
}

/// Cuts the log of the keyring back to `revision`, as a restore under a running process does.
fn take_back(dir: &tempfile::TempDir, revision: u32) {
    let name = testing::keyring_name();
    let database = database(dir);
    database
        .execute_batch("DROP TRIGGER IF EXISTS entries_are_never_deleted")
        .expect("it is the test's");
    database
        .execute(
            "DELETE FROM entries WHERE log = ?1 AND revision > ?2",
            (name.as_str(), revision),
        )
        .expect("it is the test's");
    let moved = database.execute(
        "UPDATE logs SET revision = ?2, hash =
             (SELECT hash FROM entries WHERE log = ?1 AND revision = ?2) WHERE name = ?1",
        (name.as_str(), revision),
    );
    assert_eq!(moved.expect("it is the test's"), 1);
}

fn served(catalog: &Catalog) -> Arc<ServedKeyring> {
    catalog.get(&testing::keyring_name()).expect("it is served")
}

fn bell_of(served: &ServedKeyring) -> Arc<Notify> {
    let bell = Arc::new(Notify::new());
    served.bells().join(&bell);
    bell
}

async fn rings(bell: &Notify) {
    tokio::time::timeout(DEADLINE, bell.notified())
        .await
        .expect("the bell rings");
}

#[tokio::test]
async fn a_commit_whose_caller_has_left_is_heard_by_sidecars_and_counted() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    with_keyring(&store).await;
    let mut registry = Registry::default();
    let metrics = ControlMetrics::register(&mut registry);
    let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
    let catalog = Catalog::open(Arc::clone(&store), Clock::system(), pepper, metrics);
    let catalog = catalog.await.expect("a sound store");
    let served = served(&catalog);
    let mut changes = catalog.watch();
    let bell = bell_of(&served);
    let lock = database(&dir);
    lock.execute_batch("BEGIN IMMEDIATE").expect("it is free");
    {
        let consumer: ConsumerId = "checkout".parse().expect("a valid id");
        let left = catalog.commit(&served, "test", |keyring, _| {
            let changes = keyring.create_consumer(consumer.clone(), String::new())?;
            Ok((changes, ()))
        });
        tokio::pin!(left);
        let early = tokio::time::timeout(Duration::from_millis(50), left.as_mut()).await;
        assert!(early.is_err(), "{early:?} while the store is locked");
    }
    assert_eq!(served.revision(), Revision::new(1));
    drop(lock);

    rings(&bell).await;

    assert_eq!(served.revision(), Revision::new(2));
    assert!(changes.has_changed().expect("the catalog lives"));
    changes.mark_unchanged();
    let counted = || {
        let mut page = String::new();
        encode(&mut page, &registry).expect("text");
        page.contains("relatch_commits_total{outcome=\"committed\"} 1\n")
    };
    let told = async {
        // The report comes after the bell.
        while !counted() {
            task::yield_now().await;
        }
    };
    let told = tokio::time::timeout(DEADLINE, told).await;
    told.expect("the commit is counted");
}

#[tokio::test]
async fn what_a_conflict_brings_is_heard_by_sidecars_though_nothing_is_left_to_commit() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let catalog = with_keyring(&store).await;
    let other = self::catalog(&store).await;
    let served = served(&catalog);
    let bell = bell_of(&served);
    add_consumer(&other, "checkout").await;
    let consumer: ConsumerId = "checkout".parse().expect("a valid id");

    let committed = catalog.commit(&served, "test", |keyring, _| {
        let is_there = keyring.consumers().contains_key(&consumer);
        let changes = if is_there {
            Vec::new()
        } else {
            keyring.create_consumer(consumer.clone(), String::new())?
        };
        Ok((changes, is_there))
    });

    assert!(committed.await.expect("writable").value);
    rings(&bell).await;
    assert_eq!(served.revision(), Revision::new(2));
}

#[tokio::test]
async fn an_entry_that_cannot_be_read_stops_its_own_keyring_alone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let start = Timestamp::from_millis(1_800_000_000_000);
    let (clock, hands) = Clock::manual(start);
    let catalog = catalog_at(&store, clock.clone()).await;
    create(&catalog, other_name()).await;
    create(&catalog, testing::keyring_name()).await;
    let (good, bad) = (
        served(&catalog),
        catalog.get(&other_name()).expect("it exists"),
    );
    assert!(good.is_current() && bad.is_current());
    // The entries before it in the same read are in use.
    let elsewhere = self::catalog(&store).await;
    let there = elsewhere.get(&other_name()).expect("it exists");
    let consumer: ConsumerId = "checkout".parse().expect("a valid id");
    elsewhere
        .commit(&there, "test", |keyring, _| {
            let changes = keyring.create_consumer(consumer.clone(), String::new())?;
            Ok((changes, ()))
        })
        .await
        .expect("writable");
    append_rubbish(&store, &other_name()).await;
    hands.advance(Duration::from_secs(10));

    catalog.refresh().await.expect("the store can be read");

    assert!(good.is_current() && !bad.is_current());
    assert_eq!(good.read_at(), clock.boot());
    assert!(bad.read_at() < clock.boot());
    assert_eq!(bad.revision(), Revision::new(2));
    let unreadable = catalog.unreadable();
    let [(name, problem)] = &unreadable[..] else {
        panic!("unreadable are {unreadable:?}");
    };
    assert_eq!(*name, other_name());
    assert!(problem.contains("revision 3 of log partners"), "{problem}");
    add_consumer(&catalog, "checkout").await;
    let refused = catalog
        .commit(&bad, "test", |keyring, _| {
            let other: ConsumerId = "other".parse().expect("a valid id");
            Ok((keyring.create_consumer(other, String::new())?, ()))
        })
        .await;
    let refused = causes::in_one_line(&refused.expect_err("its log goes on"));
    assert!(refused.contains("revision 3 of log partners"), "{refused}");
}

#[tokio::test]
async fn a_start_goes_on_without_a_keyring_that_cannot_be_read() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let before = with_keyring(&store).await;
    create(&before, other_name()).await;
    append_rubbish(&store, &other_name()).await;

    let catalog = catalog(&store).await;

    add_consumer(&catalog, "checkout").await;
    let refused = catalog.get(&other_name()).expect_err("it cannot be read");
    assert!(
        matches!(&refused, OperationRefusal::Unsafe(why) if why.contains("revision 2 of log partners")),
        "{refused}"
    );
    let key_id = KeyId::generate().expect("the random source works");
    let refused = catalog.holding(key_id).expect_err("nobody has it");
    assert!(
        matches!(&refused, OperationRefusal::Unsafe(why) if why.contains("keyring partners")),
        "{refused}"
    );
    assert_eq!(catalog.unreadable().len(), 1);
}

/// Returns the errors of the catalog about a keyring whose log was replaced, after a read and after
/// a commit.
async fn refusals(catalog: &Catalog) -> [String; 2] {
    let served = served(catalog);
    let before = served.revision();
    catalog.refresh().await.expect("the store can be read");
    assert!(!served.is_current());
    let unreadable = catalog.unreadable();
    let [(_, problem)] = &unreadable[..] else {
        panic!("unreadable are {unreadable:?}");
    };
    let consumer: ConsumerId = "late".parse().expect("a valid id");
    let refused = catalog.commit(&served, "test", |keyring, _| {
        let changes = keyring.create_consumer(consumer.clone(), String::new())?;
        Ok((changes, ()))
    });
    let refused = refused.await.expect_err("it would fork the history");
    // The state that was read stays in use: it is newer.
    assert_eq!(served.revision(), before);
    [problem.to_string(), causes::in_one_line(&refused)]
}

#[tokio::test]
async fn a_head_that_goes_back_is_not_called_fresh() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let catalog = with_keyring(&store).await;
    add_consumer(&catalog, "checkout").await;
    add_consumer(&catalog, "billing").await;
    take_back(&dir, 2);
    for refusal in refusals(&catalog).await {
        for part in [
            "log payments was read up to revision 3",
            "the store has revision 2",
            "--new-epoch",
        ] {
            assert!(refusal.contains(part), "{part}: {refusal}");
        }
    }
}

#[tokio::test]
async fn a_head_that_is_another_entry_is_not_called_fresh_whatever_its_revision() {
    for others in 1..=3 {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = store(&dir).await;
        let catalog = with_keyring(&store).await;
        add_consumer(&catalog, "checkout").await;
        add_consumer(&catalog, "billing").await;
        take_back(&dir, 1);
        let elsewhere = self::catalog(&store).await;
        for number in 0..others {
            add_consumer(&elsewhere, &format!("other-{number}")).await;
        }
        for refusal in refusals(&catalog).await {
            let said = "log payments was read up to revision 3";
            assert!(refusal.contains(said), "{others}: {refusal}");
        }
        // Nothing was written on top of a history that this catalog does not know.
        assert!(elsewhere.refresh().await.is_ok() && elsewhere.unreadable().is_empty());
        assert_eq!(keyring(&elsewhere).revision(), Revision::new(1 + others));
    }
}

#[tokio::test]
async fn another_epoch_of_another_history_is_not_served() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let catalog = with_keyring(&store).await;
    add_consumer(&catalog, "checkout").await;
    take_back(&dir, 1);
    add_consumer(&self::catalog(&store).await, "other").await;
    let log = LogName::Keyring(testing::keyring_name());
    store.rotate_epoch(&log).await.expect("writable");
    let epoch = served(&catalog).epoch();
    for refusal in refusals(&catalog).await {
        let said = "log payments was read up to revision 2";
        assert!(refusal.contains(said), "{refusal}");
    }
    assert_eq!(served(&catalog).epoch(), epoch);
}

#[tokio::test]
async fn a_keyring_that_the_store_has_no_more_is_not_called_fresh() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = store(&dir).await;
    let catalog = with_keyring(&store).await;
    let database = database(&dir);
    database
        .execute_batch(
            "DROP TRIGGER entries_are_never_deleted; DELETE FROM entries; DELETE FROM logs",
        )
        .expect("it is the test's");

    catalog.refresh().await.expect("the store can be read");

    assert!(!served(&catalog).is_current());
    let unreadable = catalog.unreadable();
    let [(_, problem)] = &unreadable[..] else {
        panic!("unreadable are {unreadable:?}");
    };
    let said = "log payments was read up to revision 1";
    assert!(problem.contains(said), "{problem}");
}
