use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use rusqlite::Connection;
use tokio::task::JoinSet;

use super::*;
use crate::{
    key::{Change, ConsumerId, Keyring, OperationRefusal, Prefix, operation, testing},
    store::{SqliteOptions, SqliteStore, chain},
};

/// Longer than any step takes, so that only a hung test reaches it.
const DEADLINE: Duration = Duration::from_mins(2);
/// How long a store waits for its lock in tests in which the wait is to fail.
const SHORT: Duration = Duration::from_millis(50);

/// A store in which a keyring begins, and its database.
struct Place {
    _dir: tempfile::TempDir,
    path: PathBuf,
    store: Arc<dyn Store>,
}

/// The lock of the database, as another process holds it; dropping it releases the lock.
struct Locked {
    _connection: Connection,
}

impl Place {
    async fn new(busy_timeout: Duration) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("relatch.db");
        let options = SqliteOptions {
            create: true,
            busy_timeout,
        };
        let store = SqliteStore::open(&path, options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("a new store"));
        let name = testing::keyring_name();
        let first = operation::create_keyring(name, Prefix::default(), false, None);
        let first = entry::<Keyring>(&first.expect("valid"), "test", Clock::system().wall());
        let made = store.append(&log(), Revision::default(), vec![first]).await;
        made.expect("it is writable");
        Self {
            _dir: dir,
            path,
            store,
        }
    }

    async fn journal(&self) -> Arc<Journal<Keyring>> {
        let page = self.store.read(&log(), Revision::default(), 1).await;
        let first = page.expect("it is readable").remove(0);
        let change: Change = decode(&first).expect("it was just written");
        let journal = Journal::open(
            Arc::clone(&self.store),
            Clock::system(),
            log(),
            Epoch::new(1),
            (
                Keyring::begin(first.at, &change).expect("a first change"),
                first.hash,
            ),
            Revision::default(),
            Arc::new(()),
        );
        Arc::new(journal.await.expect("a sound log"))
    }

    fn lock(&self) -> Locked {
        let connection = Connection::open(&self.path).expect("it opens");
        connection
            .execute_batch("BEGIN IMMEDIATE")
            .expect("nobody writes");
        Locked {
            _connection: connection,
        }
    }

    async fn head(&self) -> Revision {
        let head = self.store.head(&log()).await.expect("it is readable");
        head.expect("the log exists").revision
    }

    async fn assert_intact(&self) {
        let verdict = chain::verify(&*self.store, &log()).await;
        assert_eq!(verdict.expect("it is readable").problem, None);
    }
}

fn log() -> LogName {
    testing::keyring_name().into()
}

fn consumer(number: usize) -> ConsumerId {
    format!("consumer-{number}").parse().expect("a valid id")
}

async fn add(journal: &Journal<Keyring>, number: usize) -> Result<Revision, CommitError> {
    let plan = |keyring: &Keyring, _| {
        let changes = keyring.create_consumer(consumer(number), String::new())?;
        Ok((changes, ()))
    };
    let committed = journal.commit("test", plan, |_| Report::none()).await;
    committed.map(|committed| committed.revision)
}

fn spawn(
    adding: &mut JoinSet<(usize, Result<Revision, CommitError>)>,
    journal: &Arc<Journal<Keyring>>,
    number: usize,
) {
    let journal = Arc::clone(journal);
    adding.spawn(async move { (number, add(&journal, number).await) });
}

/// Lets other tasks run until `count` entries wait to be written.
async fn until_waiting(journal: &Journal<Keyring>, count: usize) {
    let waiting = async {
        while journal.core.ahead().waiting.len() != count {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(DEADLINE, waiting).await;
    waited.expect("the changes are planned");
}

/// Lets other tasks run until a transaction is under way and nothing waits.
async fn until_under_way(journal: &Journal<Keyring>) {
    let under_way = async {
        while !(journal.core.ahead().tell.is_none() && journal.core.ahead().outcome.is_some()) {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(DEADLINE, under_way).await;
    waited.expect("the transaction begins");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_commits_get_consecutive_revisions_and_one_that_is_refused_is_refused_alone() {
    const COMMITS: usize = 200;
    let place = Place::new(DEADLINE).await;
    let journal = place.journal().await;
    let mut adding = JoinSet::new();
    for number in 0..COMMITS {
        // One of the consumers is added twice.
        spawn(&mut adding, &journal, number.min(COMMITS - 2));
    }
    let (mut added, mut refused) = (Vec::new(), Vec::new());
    while let Some(ended) = adding.join_next().await {
        match ended.expect("no task panics") {
            (number, Ok(revision)) => added.push((revision, number)),
            (number, Err(error)) => refused.push((number, error)),
        }
    }
    let [(number, CommitError::Refused(OperationRefusal::AlreadyExists { .. }))] = &refused[..]
    else {
        panic!("refused are {refused:?}");
    };
    assert_eq!(*number, COMMITS - 2);
    let revisions: BTreeSet<u64> = added.iter().map(|(revision, _)| revision.get()).collect();
    assert_eq!(revisions, (2..=COMMITS as u64).collect());
    assert_eq!(journal.state().revision(), place.head().await);
    place.assert_intact().await;
    for (revision, number) in added {
        let before = Revision::new(revision.get() - 1);
        let page = place.store.read(&log(), before, 1).await;
        let change: Change = decode(&page.expect("readable")[0]).expect("a change");
        let made = matches!(change, Change::ConsumerCreated { consumer: made, .. }
            if made == consumer(number));
        assert!(
            made,
            "revision {revision} is not the commit that it answered"
        );
    }
}

#[tokio::test]
async fn what_waits_is_written_together_and_seen_only_then() {
    const COMMITS: usize = 20;
    let place = Place::new(DEADLINE).await;
    let journal = place.journal().await;
    let locked = place.lock();
    let mut adding = JoinSet::new();
    spawn(&mut adding, &journal, 0);
    until_under_way(&journal).await;
    for number in 1..=COMMITS {
        spawn(&mut adding, &journal, number);
    }
    until_waiting(&journal, COMMITS).await;
    assert_eq!(journal.state().revision(), Revision::new(1));
    drop(locked);
    let mut seen = BTreeSet::new();
    while adding.try_join_next().is_some() || !adding.is_empty() {
        seen.insert(journal.state().revision().get());
        tokio::task::yield_now().await;
    }
    seen.insert(journal.state().revision().get());
    // Each transaction is seen whole: the first one with one change, the second one with all others.
    assert!(
        seen.is_subset(&BTreeSet::from([1, 2, 2 + COMMITS as u64])),
        "{seen:?} were seen"
    );
    assert!(seen.contains(&(2 + COMMITS as u64)));
    place.assert_intact().await;
}

#[tokio::test]
async fn a_failed_transaction_fails_all_of_its_commits_and_leaves_nothing() {
    let place = Place::new(SHORT).await;
    let journal = place.journal().await;
    let locked = place.lock();
    let mut adding = JoinSet::new();
    for number in 0..10 {
        spawn(&mut adding, &journal, number);
    }
    while let Some(ended) = adding.join_next().await {
        let (_, failed) = ended.expect("no task panics");
        let is_locked = matches!(&failed, Err(CommitError::Log(LogError::Shared(error)))
            if matches!(**error, LogError::Store(StoreError::Locked { .. })));
        assert!(is_locked, "{failed:?}");
    }
    assert_eq!(journal.state().revision(), Revision::new(1));
    assert!(journal.state().consumers().is_empty());
    assert_eq!(place.head().await, Revision::new(1));
    drop(locked);
    // The failed transaction does not prevent another attempt.
    assert_eq!(
        add(&journal, 0).await.expect("it is free"),
        Revision::new(2)
    );
    assert_eq!(journal.state().consumers().len(), 1);
    place.assert_intact().await;
}

#[tokio::test]
async fn what_was_planned_on_a_failed_transaction_is_planned_anew() {
    let place = Place::new(SHORT).await;
    let journal = place.journal().await;
    let locked = place.lock();
    let mut adding = JoinSet::new();
    spawn(&mut adding, &journal, 0);
    until_under_way(&journal).await;
    // This one is refused on the planned state, which the store then never has.
    spawn(&mut adding, &journal, 0);
    let (_, first) = adding.join_next().await.expect("two").expect("no panic");
    assert!(first.is_err(), "{first:?}");
    drop(locked);
    let (_, second) = adding.join_next().await.expect("one").expect("no panic");
    let is_sound = match &second {
        Ok(revision) => *revision == Revision::new(2),
        // It may have shared the transaction that failed, or have met the lock in its own.
        Err(CommitError::Log(_)) => true,
        Err(_) => false,
    };
    assert!(is_sound, "{second:?}");
    place.assert_intact().await;
}

#[tokio::test]
async fn an_answer_that_changes_nothing_waits_for_what_it_is_based_on() {
    let place = Place::new(DEADLINE).await;
    let journal = place.journal().await;
    let locked = place.lock();
    let mut adding = JoinSet::new();
    spawn(&mut adding, &journal, 0);
    until_under_way(&journal).await;
    let plan = |keyring: &Keyring, _| {
        let is_there = keyring.consumers().contains_key(&consumer(0));
        Ok((Vec::new(), is_there))
    };
    let answer = journal.commit("test", plan, |_| Report::none());
    tokio::pin!(answer);
    let early = tokio::time::timeout(SHORT, answer.as_mut()).await;
    assert!(early.is_err(), "{early:?} before the store has it");
    drop(locked);
    let answer = answer.await.expect("it is free");
    assert!(answer.value);
    assert_eq!(answer.revision, Revision::new(2));
    assert_eq!(place.head().await, Revision::new(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_writers_of_one_log_lose_nothing() {
    const COMMITS: usize = 60;
    let place = Place::new(DEADLINE).await;
    let journals = [place.journal().await, place.journal().await];
    let mut adding = JoinSet::new();
    for number in 0..COMMITS {
        spawn(&mut adding, &journals[number % 2], number);
    }
    let mut revisions = BTreeSet::new();
    while let Some(ended) = adding.join_next().await {
        let (_, revision) = ended.expect("no task panics");
        revisions.insert(revision.expect("it is committed in the end").get());
    }
    assert_eq!(revisions, (2..2 + COMMITS as u64).collect());
    place.assert_intact().await;
    for journal in journals {
        journal.catch_up().await.expect("a sound log");
        assert_eq!(journal.state().consumers().len(), COMMITS);
    }
}

#[tokio::test]
async fn a_plan_that_panics_leaves_no_trace() {
    let place = Place::new(DEADLINE).await;
    let journal = place.journal().await;
    let panicking = Arc::clone(&journal);
    let panicked = tokio::spawn(async move {
        let plan =
            |_: &Keyring, _| -> Result<(Vec<Change>, ()), CommitError> { panic!("as asked for") };
        let planned = panicking.commit("test", plan, |_| Report::none());
        planned.await
    });
    assert!(panicked.await.is_err());
    assert_eq!(
        add(&journal, 0).await.expect("it goes on"),
        Revision::new(2)
    );
    place.assert_intact().await;
}
