//! When scheduled rotations start, and what happens after a failure.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::*;
use crate::{
    clock::{Clock, ManualClock},
    config::{
        SinkSettings,
        sink::{ExecSettings, FileSettings, SinkTarget},
    },
    control::{fleet::Fleet, metrics::ControlMetrics, sink::Sinks},
    key::{
        AllowedSources, Key, Keyring, MasterPepper, PepperId, Prefix, PresentedKey, Scopes,
        VersionNumber, Window,
        operation::{self, KeySpec},
        policy::PolicyOverrides,
        testing,
    },
    store::{SqliteOptions, SqliteStore, Store},
};

const DAY: Duration = Duration::from_hours(24);
const START: Timestamp = Timestamp::from_millis(1_800_000_000_000);
/// Longer than every wait in these tests: only a hung test reaches it.
const SOON: Duration = Duration::from_mins(2);

/// A store with one keyring, on a clock of its own. Secrets go to `files`, or to `hook`, which
/// accepts nothing before [`World::mend`].
struct World {
    directory: TempDir,
    clock: Clock,
    hands: ManualClock,
}

/// A control plane on it, without sidecars.
struct Plane {
    catalog: Arc<Catalog>,
    schedule: Schedule,
}

impl World {
    fn new() -> Self {
        let (clock, hands) = Clock::manual(START);
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir(directory.path().join("keys")).expect("it can be made");
        Self {
            directory,
            clock,
            hands,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn mend(&self) {
        fs::write(self.path("mended"), "").expect("it can be written");
    }

    async fn plane(&self) -> Plane {
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&self.path("relatch.db"), options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("it opens"));
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        let metrics = ControlMetrics::default();
        let catalog = Catalog::open(store, self.clock.clone(), pepper, metrics).await;
        let catalog = Arc::new(catalog.expect("a sound store"));
        let fleet = Fleet::new(self.clock.clone(), Duration::from_hours(1), Vec::new());
        let fleet = fleet.expect("no rows");
        let rotations = Rotations::new(
            Arc::clone(&catalog),
            Arc::new(fleet),
            Arc::new(self.sinks()),
            CancellationToken::new(),
        );
        let schedule = Schedule::new(
            Arc::clone(&catalog),
            rotations,
            Arc::new(Pace::new(self.clock.clone())),
            TaskTracker::new(),
        );
        Plane { catalog, schedule }
    }

    fn sinks(&self) -> Sinks {
        let files = SinkTarget::File(FileSettings {
            directory: self.path("keys"),
        });
        let script = format!("cat > /dev/null; test -e {}", self.path("mended").display());
        let hook = SinkTarget::Exec(ExecSettings {
            program: Path::new("/bin/sh").to_owned(),
            arguments: vec!["-c".to_owned(), script],
            timeout: SOON,
        });
        let sinks = [("files", files), ("hook", hook)].map(|(name, target)| SinkSettings {
            name: name.parse().expect("a name"),
            target,
        });
        Sinks::new(&sinks).expect("they need no certificates")
    }

    fn delivered(&self, key_id: KeyId) -> String {
        let keyring = self.path("keys").join(testing::keyring_name().as_str());
        let secret = fs::read_to_string(keyring.join(key_id.as_str()).join("current"));
        secret.expect("it was delivered").trim().to_owned()
    }
}

impl Plane {
    async fn make_keyring(&self) {
        let name = testing::keyring_name();
        let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
        let first = first.expect("a valid keyring");
        let made = self.catalog.create_keyring("test", name, &first).await;
        made.expect("a new keyring");
        self.commit(|keyring| {
            keyring.create_consumer("checkout".parse().expect("a name"), String::new())
        })
        .await;
    }

    /// Creates a key that is rotated every day.
    async fn make_key(&self, sink: &str) -> KeyId {
        let key_id = KeyId::generate().expect("the random source works");
        let secret = testing::secret(key_id);
        let pepper = self.served().pepper().clone();
        self.commit(|keyring| {
            let spec = KeySpec {
                key_id,
                consumer: "checkout".parse().expect("a name"),
                name: String::new(),
                scopes: Scopes::default(),
                allowed_sources: AllowedSources::default(),
                window: Window::new(None, Some(START.saturating_add(30 * DAY))),
                imported: false,
            };
            keyring.create_key(spec, &secret.presented(), &pepper, START)
        })
        .await;
        let policy = PolicyOverrides {
            rotate_every: Some(DAY),
            overlap: Some(DAY / 2),
            idle_for: Some(Duration::ZERO),
            sink: Some(sink.into()),
            ..PolicyOverrides::default()
        };
        self.commit(|keyring| keyring.set_key_policy(key_id, &policy, false))
            .await;
        key_id
    }

    async fn commit(
        &self,
        plan: impl Fn(&Keyring) -> Result<Vec<crate::key::Change>, crate::key::OperationRefusal>,
    ) {
        let served = self.served();
        let committed = self
            .catalog
            .commit(&served, "test", |keyring, _| Ok((plan(keyring)?, ())));
        committed.await.expect("it is permitted");
    }

    fn served(&self) -> Arc<ServedKeyring> {
        let served = self.catalog.get(&testing::keyring_name());
        served.expect("it was made")
    }

    fn running(&self) -> usize {
        self.schedule.tasks.len()
    }

    /// Waits until no rotation is in progress.
    async fn settled(&self) {
        self.schedule.tasks.close();
        let settled = tokio::time::timeout(SOON, self.schedule.tasks.wait()).await;
        settled.expect("the rotations end");
        self.schedule.tasks.reopen();
    }

    fn key(&self, key_id: KeyId) -> Key {
        let served = self.served();
        let state = served.journal().state();
        state.keyring.key(key_id).expect("it was made").clone()
    }

    fn active(&self, key_id: KeyId) -> VersionNumber {
        let key = self.key(key_id);
        key.active().expect("one is active").number
    }

    /// Waits until the key's staged version is held.
    async fn held(&self, key_id: KeyId) {
        let mut changes = self.catalog.watch();
        let is_held = || {
            let key = self.key(key_id);
            key.pending()
                .is_some_and(|version| version.told.held_at.is_some())
        };
        let held = async {
            while !is_held() {
                changes.changed().await.expect("the catalog is there");
            }
        };
        let held = tokio::time::timeout(SOON, held).await;
        held.expect("it is held");
    }
}

fn number(number: u32) -> VersionNumber {
    VersionNumber::new(number).expect("counted from 1")
}

#[tokio::test]
async fn a_key_is_rotated_when_it_is_due_and_its_secret_is_where_the_policy_says() {
    let world = World::new();
    let plane = world.plane().await;
    plane.make_keyring().await;
    let key_id = plane.make_key("files").await;

    world
        .hands
        .advance(DAY.saturating_sub(Duration::from_millis(1)));
    plane.schedule.start_due();
    assert_eq!(plane.running(), 0, "a tick before");
    world.hands.advance(Duration::from_millis(1));
    plane.schedule.start_due();
    plane.schedule.start_due();
    assert_eq!(plane.running(), 1);
    plane.settled().await;

    assert_eq!(plane.active(key_id), number(2));
    let secret = world.delivered(key_id);
    let presented = PresentedKey::new(secret.as_bytes()).expect("a token");
    let key = plane.key(key_id);
    let digest = plane.served().pepper().digest(&presented);
    assert_eq!(key.versions[&number(2)].digest, digest);
    // Its lifetime is that of the version before it.
    let expires_at = key.versions[&number(2)].window.expires_at;
    assert_eq!(expires_at, Some(START.saturating_add(31 * DAY)));
    world.hands.advance(DAY);
    plane.schedule.start_due();
    assert_eq!(plane.running(), 0, "the old version retires first");
}

#[tokio::test]
async fn a_sink_that_fails_holds_the_rotation_until_it_takes_the_secret() {
    let world = World::new();
    let plane = world.plane().await;
    plane.make_keyring().await;
    let key_id = plane.make_key("hook").await;
    world.hands.advance(DAY);
    plane.schedule.start_due();

    plane.held(key_id).await;

    assert_eq!(plane.active(key_id), number(1));
    plane.schedule.start_due();
    assert_eq!(plane.running(), 1, "the rotation that is held");
    world.mend();
    plane.settled().await;
    assert_eq!(plane.active(key_id), number(2));
    assert!(plane.schedule.lock().is_empty());
}

#[tokio::test]
async fn a_rotation_that_fails_is_tried_again_after_longer_and_longer() {
    let world = World::new();
    let plane = world.plane().await;
    plane.make_keyring().await;
    let key_id = plane.make_key("files").await;
    world.hands.advance(DAY);
    for name in ["relatch.db", "relatch.db-wal", "relatch.db-shm"] {
        let moved = fs::rename(world.path(name), world.path(&format!("{name}.away")));
        moved.expect("the store is there");
    }
    for minutes in [1, 2, 4, 8, 16, 32, 60, 60] {
        plane.schedule.start_due();
        assert_eq!(plane.running(), 1, "before {minutes} min");
        plane.settled().await;
        let wait = Duration::from_mins(minutes);
        world
            .hands
            .advance(wait.saturating_sub(Duration::from_millis(1)));
        plane.schedule.start_due();
        assert_eq!(plane.running(), 0, "a tick before {minutes} min");
        world.hands.advance(Duration::from_millis(1));
    }
    assert_eq!(plane.active(key_id), number(1));
    assert_eq!(plane.key(key_id).versions.len(), 1);
}

#[tokio::test]
async fn two_schedules_on_one_store_rotate_once() {
    let world = World::new();
    let one = world.plane().await;
    one.make_keyring().await;
    let key_id = one.make_key("files").await;
    let another = world.plane().await;
    let late = world.plane().await;
    world.hands.advance(DAY);

    one.schedule.start_due();
    another.schedule.start_due();
    assert_eq!((one.running(), another.running()), (1, 1));
    one.settled().await;
    another.settled().await;
    // It has not read the commits of the others.
    late.schedule.start_due();
    assert_eq!(late.running(), 1);
    late.settled().await;

    for plane in [one, another, late] {
        plane.catalog.refresh().await.expect("readable");
        assert_eq!(plane.active(key_id), number(2));
        assert_eq!(
            plane.key(key_id).versions.len(),
            2,
            "{:?}",
            plane.key(key_id)
        );
        assert!(plane.schedule.lock().is_empty(), "nothing failed");
    }
}

#[tokio::test]
async fn a_sink_that_fails_holds_up_no_rotation_of_another() {
    let world = World::new();
    let plane = world.plane().await;
    plane.make_keyring().await;
    let mut held = Vec::new();
    for _ in 0..=MAX_RUNNING {
        held.push(plane.make_key("hook").await);
    }
    world.hands.advance(DAY);
    plane.schedule.start_due();
    assert_eq!(plane.running(), MAX_RUNNING);
    let key_id = plane.make_key("files").await;
    world.hands.advance(DAY);
    plane.schedule.start_due();
    assert_eq!(plane.running(), MAX_RUNNING + 1);

    let mut changes = plane.catalog.watch();
    let rotated = async {
        while plane.active(key_id) != number(2) {
            changes.changed().await.expect("the catalog is there");
        }
    };
    let rotated = tokio::time::timeout(SOON, rotated).await;
    rotated.expect("it is rotated");
    world.mend();
    plane.settled().await;
    let rotated = held
        .iter()
        .filter(|key_id| plane.active(**key_id) == number(2));
    assert_eq!(rotated.count(), MAX_RUNNING);
}
