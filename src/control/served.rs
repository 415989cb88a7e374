//! A keyring as the control plane serves it: its state, and the feed of its sidecars.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::{
    bells::{Bells, Ringer},
    feed::{EncodedSnapshot, Feed},
    journal::{Journal, LogState, SaveState},
    saved::Saver,
};
use crate::{
    clock::BootTime,
    key::{
        ApplyError, Change, Epoch, KeyDigest, Keyring, KeyringName, Pepper, Revision, Timestamp,
    },
    proto::discovery,
    wire::item,
};

/// A keyring, its journal and the feed of its sidecars.
#[derive(Debug)]
pub struct ServedKeyring {
    name: KeyringName,
    pepper: Pepper,
    journal: Journal<FedKeyring>,
    /// The newest encoded snapshot, shared by the streams that need one.
    snapshot: Mutex<Cached>,
    /// Rings for the streams that follow the keyring.
    ringer: Arc<Ringer>,
    /// The start of the last successful read from the store, in milliseconds of the boot clock; 0
    /// before the first one.
    read_at: AtomicU64,
    /// Whether the last read from the store succeeded.
    is_current: AtomicBool,
    /// The number of items that an operator confirmed for a snapshot that shrinks the keyring; 0
    /// for none.
    confirmed_items: AtomicU64,
}

/// An encoded snapshot, if there is one.
#[derive(Debug, Default)]
struct Cached {
    snapshot: Option<Arc<EncodedSnapshot>>,
    /// The number of rounds for which the keeper still leaves the snapshot in place.
    rounds: u32,
}

/// The most revisions by which a snapshot for a stream may be behind; the deltas follow it. Without
/// this tolerance, a keyring that changes while a thousand sidecars reconnect would be encoded anew
/// for each of them.
const MAX_SNAPSHOT_LAG: u64 = 1_024;

/// Rounds of the keeper, one a second, for which a snapshot is kept after its stream broke. The
/// sidecar reconnects within its longest backoff of 30 s and the 15 s that opening a stream may
/// take.
const RESUME_ROUNDS: u32 = 60;

/// A keyring and its feed, which change together.
#[derive(Clone, Debug)]
pub struct FedKeyring {
    pub(crate) keyring: Keyring,
    pub(crate) feed: Feed,
}

/// The versions that a keyring holds under a digest, as its sidecars receive them.
#[derive(Clone, Debug)]
pub(crate) struct LookedUp {
    /// The revision at which the rest is true: all of it is of one moment.
    pub(crate) revision: Revision,
    /// The version with the digest, in any state. None when the keyring does not hold it.
    pub(crate) item: Option<discovery::Item>,
    /// The other versions of the same key that are accepted within their windows.
    pub(crate) siblings: Vec<discovery::Item>,
}

impl ServedKeyring {
    /// Serves the keyring of a journal whose witness is `ringer`.
    #[must_use]
    pub(crate) fn new(journal: Journal<FedKeyring>, ringer: Arc<Ringer>, pepper: Pepper) -> Self {
        let name = journal.state().keyring.name().clone();
        Self {
            name,
            pepper,
            journal,
            snapshot: Mutex::default(),
            ringer,
            read_at: AtomicU64::new(0),
            is_current: AtomicBool::new(false),
            confirmed_items: AtomicU64::new(0),
        }
    }

    #[must_use]
    pub(crate) const fn name(&self) -> &KeyringName {
        &self.name
    }

    /// Returns the epoch of its revisions.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.journal.epoch()
    }

    /// Returns the pepper under which digests of its keys are computed.
    #[must_use]
    pub const fn pepper(&self) -> &Pepper {
        &self.pepper
    }

    /// Returns the journal of its changes.
    #[must_use]
    pub const fn journal(&self) -> &Journal<FedKeyring> {
        &self.journal
    }

    /// Returns the revision of its last change.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.journal.state().keyring.revision()
    }

    /// Returns the settings that sidecars need to check its keys.
    #[must_use]
    pub(crate) fn settings(&self) -> discovery::KeyringSettings {
        let state = self.journal.state();
        discovery::KeyringSettings {
            keyring: self.name.to_string(),
            epoch: self.epoch().get(),
            prefix: state.keyring.prefix().to_string(),
            issued_only: !state.keyring.allow_imported(),
            peppers: vec![discovery::Pepper {
                id: self.pepper.id().get(),
                secret: bytes::Bytes::copy_from_slice(self.pepper.expose()),
            }],
            help_url: state.keyring.help_url().unwrap_or_default().to_owned(),
        }
    }

    /// Returns the key version with `digest`, as its sidecars receive it now.
    #[must_use]
    pub(crate) fn lookup(&self, digest: &KeyDigest) -> LookedUp {
        self.journal.state().lookup(digest)
    }

    /// Returns the bells that ring when the keyring has changed.
    #[must_use]
    pub(crate) fn bells(&self) -> &Bells {
        self.ringer.bells()
    }

    /// Returns the start of the last successful read: the state is at least that of the store at
    /// this time.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn read_at(&self) -> BootTime {
        BootTime::from_millis(self.read_at.load(Ordering::Acquire))
    }

    /// Returns whether the last read succeeded. If it failed, no sidecar may receive a confirmation
    /// that its state is fresh.
    #[must_use]
    pub(crate) fn is_current(&self) -> bool {
        self.is_current.load(Ordering::Acquire)
    }

    /// Records that a read that began at `began` succeeded: the state is that of the store.
    pub(super) fn was_read(&self, began: BootTime) {
        self.read_at.fetch_max(began.as_millis(), Ordering::AcqRel);
        self.is_current.store(true, Ordering::Release);
    }

    /// Records that a read failed.
    pub(super) fn was_not_read(&self) {
        self.is_current.store(false, Ordering::Release);
    }

    /// Returns a snapshot of the whole keyring at `least` or later. Encodes a new one only when
    /// there is none from which the feed leads on. The encoding takes time in proportion to the
    /// size of the keyring, and no change waits for it.
    #[must_use]
    pub(crate) fn snapshot(&self, least: Revision) -> Arc<EncodedSnapshot> {
        let mut cached = self.cached();
        cached.rounds = cached.rounds.max(1);
        let state = self.journal.state();
        if let Some(snapshot) = &cached.snapshot
            && snapshot.revision >= least
            && state.leads_on_from(snapshot.revision)
        {
            return Arc::clone(snapshot);
        }
        let confirmed = self.confirmed_items.load(Ordering::Relaxed);
        let id = snapshot_id();
        let snapshot = state.feed.snapshot(&state.keyring, confirmed, id);
        cached.snapshot = Some(Arc::clone(&snapshot));
        snapshot
    }

    /// Returns the snapshot with `id` if it is still kept, is at `least` or later, and the feed
    /// leads on from it. Does not wait for an encoding in progress, whose snapshot replaces the one
    /// that is kept.
    #[must_use]
    pub(crate) fn resumed_snapshot(
        &self,
        id: u64,
        least: Revision,
    ) -> Option<Arc<EncodedSnapshot>> {
        let cached = self.snapshot.try_lock().ok()?;
        let snapshot = cached.snapshot.as_ref()?;
        let state = self.journal.state();
        let leads_on = snapshot.revision == state.keyring.revision()
            || state.feed.step_after(snapshot.revision).is_some();
        if id == 0 || snapshot.id != id || snapshot.revision < least || !leads_on {
            return None;
        }
        Some(Arc::clone(snapshot))
    }

    /// Keeps the snapshot with `id` for a minute: the stream that sent it ended early, and the next
    /// one may resume it.
    pub(crate) fn keep_snapshot(&self, id: u64) {
        // A caller that is encoding a snapshot replaces this one.
        if let Ok(mut cached) = self.snapshot.try_lock()
            && cached.snapshot.as_ref().is_some_and(|kept| kept.id == id)
        {
            cached.rounds = RESUME_ROUNDS;
        }
    }

    /// Drops the snapshot unless a stream sends it, or a caller has asked for it since the last
    /// time: it takes as much memory as its keys.
    pub(crate) fn drop_idle_snapshot(&self) {
        // A caller that is encoding a snapshot needs it.
        if let Ok(mut cached) = self.snapshot.try_lock() {
            let is_sent = |snapshot| Arc::strong_count(snapshot) > 1;
            if cached.snapshot.as_ref().is_some_and(is_sent) {
                return;
            }
            match cached.rounds.checked_sub(1) {
                Some(rounds) => cached.rounds = rounds,
                None => cached.snapshot = None,
            }
        }
    }

    /// Records that an operator wants sidecars to accept snapshots of this number of items, even if
    /// they shrink the keyring.
    pub(crate) fn confirm_items(&self, items: u64) {
        self.confirmed_items.store(items, Ordering::Relaxed);
        self.cached().snapshot = None;
    }

    fn cached(&self) -> MutexGuard<'_, Cached> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FedKeyring {
    /// Returns whether a holder of `revision` can continue with deltas, over at most
    /// [`MAX_SNAPSHOT_LAG`] revisions.
    fn leads_on_from(&self, revision: Revision) -> bool {
        let newest = self.keyring.revision();
        revision == newest
            || (revision.behind(newest) <= MAX_SNAPSHOT_LAG
                && self.feed.step_after(revision).is_some())
    }

    /// Returns the version with a digest, and its siblings. The cost grows with the logarithm of
    /// the keyring's size.
    #[must_use]
    pub(crate) fn lookup(&self, digest: &KeyDigest) -> LookedUp {
        let keyring = &self.keyring;
        let which = keyring.find(digest);
        let record = which.and_then(|which| keyring.record(which));
        let siblings = which.into_iter().flat_map(|which| keyring.siblings(which));
        LookedUp {
            revision: keyring.revision(),
            item: record.as_ref().map(item::encode),
            siblings: siblings.map(|record| item::encode(&record)).collect(),
        }
    }

    /// Creates the feed of a keyring as it is now. Takes time in proportion to the keyring's size.
    #[must_use]
    pub(crate) fn from_keyring(epoch: Epoch, keyring: Keyring) -> Self {
        Self {
            feed: Feed::new(epoch, &keyring),
            keyring,
        }
    }
}

/// Returns a random number that identifies an encoding. It is 0 when the random source fails: such
/// a snapshot is not resumed.
#[expect(
    clippy::disallowed_methods,
    reason = "it only tells encodings apart; tests pass their own to `Feed::snapshot`"
)]
fn snapshot_id() -> u64 {
    getrandom::u64().unwrap_or(0)
}

/// A keyring without a feed.
impl LogState for Keyring {
    type Change = Change;

    fn kind(change: &Change) -> &'static str {
        change.kind()
    }

    fn revision(&self) -> Revision {
        self.revision()
    }

    fn apply(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &Change,
    ) -> Result<(), ApplyError> {
        self.advance(revision, at, change)
    }
}

impl LogState for FedKeyring {
    type Change = Change;

    fn kind(change: &Change) -> &'static str {
        change.kind()
    }

    fn revision(&self) -> Revision {
        self.keyring.revision()
    }

    fn apply(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &Change,
    ) -> Result<(), ApplyError> {
        let touched = self.keyring.apply(revision, at, change)?;
        self.feed.push(&self.keyring, &touched);
        Ok(())
    }

    fn save(&self) -> Option<Box<dyn SaveState>> {
        Some(Box::new(Saver::new(self.keyring.clone())))
    }

    fn weight(&self) -> u64 {
        self.keyring.version_count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::Clock,
        control::{catalog::Catalog, metrics::ControlMetrics},
        key::{
            AllowedSources, KeyId, KeyState, MasterPepper, PepperId, Prefix, Scopes, VersionNumber,
            VersionRef, Window,
            operation::{self, KeySpec, Which},
            testing,
        },
        store::{SqliteOptions, SqliteStore, Store},
    };

    /// A catalog of one keyring.
    struct Plane {
        _dir: tempfile::TempDir,
        catalog: Catalog,
        served: Arc<ServedKeyring>,
    }

    impl Plane {
        async fn new() -> Self {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let options = SqliteOptions {
                create: true,
                ..SqliteOptions::default()
            };
            let store = SqliteStore::open(&dir.path().join("relatch.db"), options).await;
            let store: Arc<dyn Store> = Arc::new(store.expect("a new store"));
            let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
            let catalog = Catalog::open(store, Clock::system(), pepper, ControlMetrics::default());
            let catalog = catalog.await.expect("an empty store");
            let name = testing::keyring_name();
            let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
            let first = first.expect("a valid keyring");
            let served = catalog.create_keyring("test", name, &first).await;
            let served = served.expect("a new keyring");
            let plane = Self {
                _dir: dir,
                catalog,
                served,
            };
            let consumer: crate::key::ConsumerId = "checkout".parse().expect("a valid id");
            plane
                .commit(|keyring, _| keyring.create_consumer(consumer.clone(), String::new()))
                .await;
            plane
        }

        /// Issues a key and returns the digest of its secret.
        async fn add_key(&self) -> (KeyId, KeyDigest) {
            let key_id = key_id();
            let secret = testing::secret(key_id);
            let spec = KeySpec {
                key_id,
                consumer: "checkout".parse().expect("a valid id"),
                name: String::new(),
                scopes: Scopes::default(),
                allowed_sources: AllowedSources::default(),
                window: Window::default(),
                imported: false,
            };
            self.commit(|keyring, now| {
                keyring.create_key(spec.clone(), &secret.presented(), self.served.pepper(), now)
            })
            .await;
            let digest = self.served.pepper().digest(&secret.presented());
            (key_id, digest)
        }

        async fn commit(
            &self,
            plan: impl Fn(&Keyring, Timestamp) -> Result<Vec<Change>, operation::OperationRefusal>,
        ) {
            self.catalog
                .commit(&self.served, "test", |keyring, now| {
                    Ok((plan(keyring, now)?, ()))
                })
                .await
                .expect("it is committed");
        }
    }

    #[tokio::test]
    async fn a_lookup_tells_how_a_version_stands_at_the_revision() {
        let plane = Plane::new().await;
        let nobodys = testing::secret(key_id());
        let unknown = plane.served.pepper().digest(&nobodys.presented());
        let (revoked, digest) = plane.add_key().await;
        let (other, others_digest) = plane.add_key().await;
        let stands = |digest| {
            let LookedUp { revision, item, .. } = plane.served.lookup(digest);
            let found = item.map(|found| item::decode(&found).expect("it was just encoded"));
            assert_eq!(revision, plane.served.revision());
            found.map(|record| (record.version_ref(), record.state))
        };
        let first_of = |key_id| VersionRef {
            key_id,
            version: VersionNumber::FIRST,
        };
        assert_eq!(stands(&digest), Some((first_of(revoked), KeyState::Active)));
        plane
            .commit(|keyring, _| keyring.revoke(revoked, Which::All, "test"))
            .await;
        let stands_now = stands(&digest);
        assert_eq!(stands_now, Some((first_of(revoked), KeyState::Revoked)));
        let others = stands(&others_digest);
        assert_eq!(others, Some((first_of(other), KeyState::Active)));
        assert_eq!(stands(&unknown), None);
    }

    fn key_id() -> KeyId {
        KeyId::generate().expect("the random source works")
    }
}
