use std::path::PathBuf;

use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::{
    clock::Clock,
    control::metrics::ControlMetrics,
    key::{
        AllowedSources, MasterPepper, PepperId, Prefix, Scopes,
        operation::{self, KeySpec},
        testing,
    },
    store::{SqliteOptions, SqliteStore, Store},
};

/// Longer than every wait in these tests: only a hung test reaches it.
const SOON: Duration = Duration::from_mins(1);

/// A store with one key, whose second version is staged.
struct World {
    directory: TempDir,
    key_id: KeyId,
}

impl World {
    /// Creates the world, with the control plane that staged the version.
    async fn new() -> (Self, Rotations, Staged) {
        let world = Self {
            directory: tempfile::tempdir().expect("a temporary directory"),
            key_id: KeyId::generate().expect("the random source works"),
        };
        let rotations = world.rotations().await;
        let catalog = &rotations.catalog;
        let name = testing::keyring_name();
        let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
        let first = first.expect("a valid keyring");
        let served = catalog.create_keyring("test", name, &first).await;
        let served = served.expect("a new keyring");
        let secret = testing::secret(world.key_id);
        let created = catalog.commit(&served, "test", |keyring, now| {
            let spec = KeySpec {
                key_id: world.key_id,
                consumer: "checkout".parse().expect("a name"),
                name: String::new(),
                scopes: Scopes::default(),
                allowed_sources: AllowedSources::default(),
                window: Window::default(),
                imported: false,
            };
            let pepper = served.pepper();
            Ok((
                keyring.create_key_and_consumer(spec, &secret.presented(), pepper, now)?,
                (),
            ))
        });
        created.await.expect("a new key");
        let spec = RotationSpec {
            key_id: world.key_id,
            id: None,
            old_ends: OldEnds::AfterOverlap(None),
            lifetime: None,
            patience: Patience::default(),
            sink: None,
            due_at: None,
        };
        let staged = rotations.stage("test", &spec).await.expect("it is staged");
        (world, rotations, staged)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("relatch.db")
    }

    async fn rotations(&self) -> Rotations {
        let options = SqliteOptions {
            create: true,
            busy_timeout: Duration::from_millis(50),
        };
        let store = SqliteStore::open(&self.path(), options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("it opens"));
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        let (clock, metrics) = (Clock::system(), ControlMetrics::default());
        let catalog = Catalog::open(store, clock.clone(), pepper, metrics).await;
        let fleet = Fleet::new(clock, Duration::from_hours(1), Vec::new());
        let fleet = fleet.expect("no rows");
        Rotations::new(
            Arc::new(catalog.expect("a sound store")),
            Arc::new(fleet),
            Arc::new(Sinks::new(&[]).expect("they need no certificates")),
            CancellationToken::new(),
        )
    }

    /// Holds the lock of the database, as a backup does, until it is dropped.
    fn lock(&self) -> Connection {
        let connection = Connection::open(self.path()).expect("it opens");
        connection
            .execute_batch("BEGIN IMMEDIATE")
            .expect("nobody writes");
        connection
    }
}

fn state_of(staged: &Staged) -> KeyState {
    let state = staged.served.journal().state();
    let version = state.keyring.version(staged.version);
    version.expect("it was staged").1.state.kind()
}

#[tokio::test]
async fn a_store_that_fails_at_the_hand_over_is_asked_again() {
    let (world, rotations, staged) = World::new().await;
    let locked = world.lock();
    let old_ends = OldEnds::AfterOverlap(None);
    let hand_over = rotations.hand_over("test", &staged, &old_ends);
    tokio::pin!(hand_over);
    let early = tokio::time::timeout(Duration::from_millis(500), &mut hand_over).await;
    assert!(early.is_err(), "the store is locked: {early:?}");

    drop(locked);

    let done = tokio::time::timeout(SOON, hand_over).await;
    let (old, _) = done.expect("in time").expect("the store is back");
    assert_eq!(old.map(|old| old.version.get()), Some(1));
    assert_eq!(state_of(&staged), KeyState::Active);
}

#[tokio::test]
async fn a_hand_over_that_the_store_has_though_it_failed_counts() {
    let (world, rotations, staged) = World::new().await;
    for old_ends in [
        OldEnds::AfterOverlap(None),
        OldEnds::AtOnce("leaked".into()),
    ] {
        // A write without an answer looks like the write of another process.
        let other = world.rotations().await;
        let served = other.catalog.get(&testing::keyring_name());
        let served = served.expect("it was made");
        let written = other.catalog.commit(&served, "test", |keyring, now| {
            let again = keyring.hand_over(world.key_id, staged.rotation, &old_ends, now);
            Ok((again.unwrap_or_default(), ()))
        });
        written.await.expect("the store is there");

        let done = rotations.hand_over("test", &staged, &old_ends).await;

        let (old, revision) = done.expect("it is handed over");
        assert_eq!(old.map(|old| old.version.get()), Some(1));
        assert_eq!(revision, served.revision());
        assert_eq!(state_of(&staged), KeyState::Active);
    }
}

#[tokio::test]
async fn a_store_that_stays_away_leaves_it_open_what_became_of_the_version() {
    let (world, rotations, staged) = World::new().await;
    let _locked = world.lock();
    let old_ends = OldEnds::AfterOverlap(None);

    let done = tokio::time::timeout(SOON, rotations.hand_over("test", &staged, &old_ends)).await;

    let error = done.expect("in time").expect_err("the store is locked");
    assert!(!error.is_withdrawn(), "{error}");
    let command = format!("relatch key show {}", world.key_id);
    assert!(error.to_string().contains(&command), "{error}");
}
