use std::path::PathBuf;

use tokio::task::JoinSet;

use super::*;
use crate::{
    key::{Timestamp, VersionNumber, VersionRef, testing},
    store::{PresenceRow, SqliteOptions, SqliteStore, Store, UsageRow},
};

/// Longer than any write in these tests, so that only a test that hangs reaches it.
const DEADLINE: Duration = Duration::from_mins(2);

/// A write that ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Usage,
    Presence { is_written: bool },
}

struct World {
    _directory: tempfile::TempDir,
    path: PathBuf,
    store: Arc<SqliteStore>,
}

impl World {
    async fn new(busy_timeout: Duration) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("relatch.db");
        let options = SqliteOptions {
            create: true,
            busy_timeout,
        };
        let store = SqliteStore::open(&path, options).await;
        Self {
            _directory: directory,
            path,
            store: Arc::new(store.expect("a new store")),
        }
    }

    /// Locks the database, as another process does, until the connection is dropped.
    fn lock(&self) -> Connection {
        let connection = Connection::open(&self.path).expect("it opens");
        connection
            .execute_batch("BEGIN IMMEDIATE")
            .expect("nobody writes");
        connection
    }

    /// Starts `count` writes of usage and, after them, one of presence.
    async fn begin_writes(&self, count: u32) -> JoinSet<Ended> {
        let mut writes = JoinSet::new();
        for number in 1..=count {
            let store = Arc::clone(&self.store);
            writes.spawn(async move {
                // The test does not need the result.
                let _ = store.save_usage(vec![usage(number)]).await;
                Ended::Usage
            });
        }
        let store = Arc::clone(&self.store);
        writes.spawn(async move {
            let saved = store.save_presence(vec![presence()]).await;
            let is_written = match saved {
                Ok(()) => true,
                Err(StoreError::Locked { .. }) => false,
                Err(error) => panic!("{error}"),
            };
            Ended::Presence { is_written }
        });
        // On this runtime tasks begin in the order in which they were spawned.
        for _ in 0..=count {
            tokio::task::yield_now().await;
        }
        writes
    }
}

fn usage(number: u32) -> UsageRow {
    UsageRow {
        keyring: testing::keyring_name(),
        version: VersionRef {
            key_id: "AAAAAAAAAAAA".parse().expect("a valid id"),
            version: VersionNumber::new(number).expect("counted from 1"),
        },
        run_id: "run".to_owned(),
        requests: 1,
        denied: 0,
        first_used: None,
        last_used: None,
    }
}

fn presence() -> PresenceRow {
    PresenceRow {
        node: "edge-1".to_owned(),
        run_id: "run".to_owned(),
        cluster: String::new(),
        version: String::new(),
        keyrings: Vec::new(),
        last_contact: Timestamp::from_millis(1),
        complete_until: None,
        gone_at: None,
        serving: None,
    }
}

/// Returns the number of writes of usage that ended before the write of presence, and whether that
/// one succeeded.
async fn until_presence(writes: &mut JoinSet<Ended>) -> (usize, bool) {
    let mut before = 0;
    let ended = async {
        loop {
            match writes.join_next().await.expect("it is among them") {
                Ok(Ended::Usage) => before += 1,
                Ok(Ended::Presence { is_written }) => return is_written,
                Err(error) => panic!("{error}"),
            }
        }
    };
    let ended = tokio::time::timeout(DEADLINE, ended).await;
    (before, ended.expect("it ends"))
}

const QUEUE: u32 = 40;

#[tokio::test]
async fn a_row_of_presence_is_written_before_the_bulk_that_waits() {
    let world = World::new(DEADLINE).await;
    let lock = world.lock();
    let mut writes = world.begin_writes(QUEUE).await;
    drop(lock);

    let (before, is_written) = until_presence(&mut writes).await;

    assert!(is_written);
    // One write was in progress.
    assert!(before <= 1, "{before} were written before it");
    while let Some(ended) = writes.join_next().await {
        ended.expect("no task panics");
    }
    let usage = world.store.load_usage().await.expect("readable");
    assert_eq!(usage.counts.len(), QUEUE as usize);
}

#[tokio::test]
async fn a_row_of_presence_waits_for_another_process_once_and_not_for_the_waits_of_others() {
    let world = World::new(Duration::from_millis(200)).await;
    let lock = world.lock();
    let mut writes = world.begin_writes(QUEUE).await;

    let (before, is_written) = until_presence(&mut writes).await;

    assert!(!is_written, "the store is locked");
    // Each of these writes waits as long as the row does.
    assert!(before <= 2, "{before} waited before it");
    drop(lock);
    let saved = world.store.save_presence(vec![presence()]).await;
    saved.expect("it is free");
}
