//! All keyrings of a control plane.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{sync::watch, task};

use super::{
    journal::{self, CommitError, Committed, Journal, LogError},
    metrics::{CommitOutcome, ControlMetrics},
    saved::{self, Restorer, SavedError},
    served::{FedKeyring, ServedKeyring},
    spans::{Changes, CommitEvent, ControlTracer},
    steps,
};
use crate::{
    causes,
    clock::{BootTime, Clock},
    key::{
        Change, Epoch, KeyId, Keyring, KeyringName, MasterPepper, Pepper, Refusal, Revision,
        Timestamp,
    },
    store::{AppendError, EntryHash, LogName, StatePage, StateSnapshot, Store, StoreError},
};

/// The keyrings, where they are kept, and who is told of their changes.
#[derive(Debug)]
pub struct Catalog {
    store: Arc<dyn Store>,
    clock: Clock,
    pepper: MasterPepper,
    keyrings: RwLock<BTreeMap<KeyringName, Arc<ServedKeyring>>>,
    /// Counts changes of any keyring.
    changes: watch::Sender<u64>,
    /// Counts the keyrings that began to be served, or began anew.
    served: watch::Sender<u64>,
    metrics: ControlMetrics,
    tracer: ControlTracer,
    /// When the store was last read successfully, in milliseconds of the clock that no step of the wall clock moves.
    read_at: AtomicU64,
}

impl Catalog {
    /// Loads every keyring of the store.
    ///
    /// # Errors
    ///
    /// When a log cannot be followed.
    pub async fn open(
        store: Arc<dyn Store>,
        clock: Clock,
        pepper: MasterPepper,
        metrics: ControlMetrics,
    ) -> Result<Self, LogError> {
        let catalog = Self {
            store,
            clock,
            pepper,
            keyrings: RwLock::new(BTreeMap::new()),
            changes: watch::Sender::new(0),
            served: watch::Sender::new(0),
            metrics,
            tracer: ControlTracer::default(),
            read_at: AtomicU64::new(0),
        };
        catalog.refresh().await?;
        Ok(catalog)
    }

    /// The same, with spans of its commits and of what leads to them.
    #[must_use]
    pub fn with_tracer(self, tracer: ControlTracer) -> Self {
        Self { tracer, ..self }
    }

    /// What is counted of commits and of their way to sidecars.
    #[must_use]
    pub const fn metrics(&self) -> &ControlMetrics {
        &self.metrics
    }

    /// What makes spans.
    #[must_use]
    pub const fn tracer(&self) -> &ControlTracer {
        &self.tracer
    }

    /// The clock that commits are dated by.
    #[must_use]
    pub const fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The store.
    #[must_use]
    pub const fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// One keyring.
    ///
    /// # Errors
    ///
    /// When it does not exist.
    pub fn get(&self, name: &KeyringName) -> Result<Arc<ServedKeyring>, Refusal> {
        self.read()
            .get(name)
            .cloned()
            .ok_or_else(|| Refusal::NotFound {
                what: "keyring",
                name: name.to_string(),
            })
    }

    /// The keyring that holds a key.
    ///
    /// # Errors
    ///
    /// When none does.
    pub fn holding(&self, key_id: KeyId) -> Result<Arc<ServedKeyring>, Refusal> {
        self.read()
            .values()
            .find(|served| {
                served
                    .journal()
                    .state()
                    .keyring
                    .keys()
                    .contains_key(&key_id)
            })
            .cloned()
            .ok_or_else(|| Refusal::NotFound {
                what: "key",
                name: key_id.to_string(),
            })
    }

    /// All keyrings by name.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<ServedKeyring>> {
        self.read().values().cloned().collect()
    }

    /// Wakes whenever a keyring has changed or was made.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Wakes whenever a keyring begins to be served, or begins anew after its history was rewritten.
    #[must_use]
    pub fn watch_served(&self) -> watch::Receiver<u64> {
        self.served.subscribe()
    }

    /// When the store was last read successfully: how fresh the keyrings are. Told by the wall clock as it stands now, so
    /// that the difference is right whatever that clock has done since.
    #[must_use]
    pub fn as_of(&self) -> Timestamp {
        let read_at = BootTime::from_millis(self.read_at.load(Ordering::Relaxed));
        let age = self.clock.boot().saturating_since(read_at);
        self.clock.wall().saturating_sub(age)
    }

    /// Makes a keyring from the first change of its log.
    ///
    /// # Errors
    ///
    /// When it exists, or the store fails.
    pub async fn create_keyring(
        &self,
        actor: &str,
        name: KeyringName,
        first: &Change,
    ) -> Result<Arc<ServedKeyring>, CommitError> {
        let created = self.create_keyring_with(actor, name, first, |_, _, _| Ok(Vec::new()));
        Ok(created.await?.0)
    }

    /// Creates a keyring from the first change of its log and, in the same transaction, what `plan` returns for it: a
    /// plan that is refused leaves no keyring behind. Returns the revision of the last change as well.
    ///
    /// # Errors
    ///
    /// When it exists, the plan is refused, or the store fails.
    pub async fn create_keyring_with(
        &self,
        actor: &str,
        name: KeyringName,
        first: &Change,
        plan: impl FnOnce(&Keyring, &Pepper, Timestamp) -> Result<Vec<Change>, Refusal>,
    ) -> Result<(Arc<ServedKeyring>, Revision), CommitError> {
        let started = self.clock.system_time();
        let now = self.clock.wall();
        let planned = self.plan_first(&name, first, plan, now);
        let changes = match &planned {
            Ok((changes, _)) => Changes::of(changes),
            Err(_) => Changes::of([first]),
        };
        let created = match planned {
            Ok((changes, revision)) => self
                .append_first(actor, &name, &changes, now)
                .await
                .map(|epoch| (epoch, revision)),
            Err(error) => Err(error),
        };
        self.tell(&CommitEvent {
            started,
            actor,
            keyring: Some(&name),
            changes: &changes,
            outcome: CommitOutcome::of(&created),
            revision: created.as_ref().ok().map(|(_, revision)| *revision),
        });
        let (epoch, revision) = created?;
        Ok((self.serve(name, epoch).await?, revision))
    }

    /// The changes that a log begins with, and the revision that they lead to. Each of them is known to apply.
    fn plan_first(
        &self,
        name: &KeyringName,
        first: &Change,
        plan: impl FnOnce(&Keyring, &Pepper, Timestamp) -> Result<Vec<Change>, Refusal>,
        now: Timestamp,
    ) -> Result<(Vec<Change>, Revision), CommitError> {
        let cannot_be = |source| LogError::Apply {
            log: LogName::Keyring(name.clone()),
            source,
        };
        let mut keyring = Keyring::begin(now, first).map_err(cannot_be)?;
        let rest = plan(&keyring, &self.pepper.for_keyring(name), now)?;
        for change in &rest {
            let next = keyring.revision().next();
            keyring.advance(next, now, change).map_err(cannot_be)?;
        }
        let changes = std::iter::once(first.clone()).chain(rest).collect();
        Ok((changes, keyring.revision()))
    }

    async fn append_first(
        &self,
        actor: &str,
        name: &KeyringName,
        changes: &[Change],
        now: Timestamp,
    ) -> Result<Epoch, CommitError> {
        let log = LogName::Keyring(name.clone());
        let entries = changes
            .iter()
            .map(|change| journal::entry::<FedKeyring>(change, actor, now))
            .collect();
        let begin = self.store.append(&log, Revision::default(), entries);
        match begin.await {
            Ok(head) => Ok(head.epoch),
            Err(AppendError::Conflict { .. }) => Err(Refusal::AlreadyExists {
                what: "keyring",
                name: name.to_string(),
            }
            .into()),
            Err(AppendError::Invalid(error)) => Err(LogError::from(error).into()),
            Err(AppendError::Store(error)) => Err(LogError::from(error).into()),
        }
    }

    /// Commits what `plan` returns for a keyring, and tells its sidecars.
    ///
    /// # Errors
    ///
    /// When the plan is refused, or the store fails.
    pub async fn commit<T>(
        &self,
        served: &ServedKeyring,
        actor: &str,
        mut plan: impl FnMut(&Keyring, Timestamp) -> Result<(Vec<Change>, T), CommitError>,
    ) -> Result<Committed<T>, CommitError> {
        let started = self.clock.system_time();
        let mut changes = Changes::default();
        let committed = served
            .journal()
            .commit(actor, |state, now| {
                let planned = plan(&state.keyring, now)?;
                changes = Changes::of(&planned.0);
                Ok(planned)
            })
            .await;
        if committed.is_err() || !changes.is_empty() {
            self.tell(&CommitEvent {
                started,
                actor,
                keyring: Some(served.name()),
                changes: &changes,
                outcome: CommitOutcome::of(&committed),
                revision: committed.as_ref().ok().map(|done| done.revision),
            });
        }
        if committed.is_ok() && !changes.is_empty() {
            self.wake(served);
        }
        committed
    }

    /// Counts a commit and makes its span.
    fn tell(&self, event: &CommitEvent<'_>) {
        self.metrics.committed(event.outcome);
        self.tracer.commit(event);
    }

    /// Follows what other processes have committed, and notes that the store could be read.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a log cannot be followed.
    pub async fn refresh(&self) -> Result<(), LogError> {
        let began = self.clock.boot();
        let heads = self.store.heads().await.map_err(LogError::from)?;
        for head in heads {
            let LogName::Keyring(name) = head.log else {
                continue;
            };
            let held = self.read().get(&name).cloned();
            match held {
                Some(served) if served.epoch() == head.epoch => {
                    if served.revision() < head.revision {
                        served.journal().catch_up().await?;
                        self.wake(&served);
                    }
                }
                Some(_) | None => {
                    self.serve(name, head.epoch).await?;
                }
            }
        }
        self.read_at.fetch_max(began.as_millis(), Ordering::Relaxed);
        Ok(())
    }

    async fn serve(&self, name: KeyringName, epoch: Epoch) -> Result<Arc<ServedKeyring>, LogError> {
        let log = LogName::Keyring(name.clone());
        let (folded, saved) = self.load(&log, &name, epoch).await?;
        let journal = Journal::open(
            Arc::clone(&self.store),
            self.clock.clone(),
            log,
            epoch,
            folded,
            saved,
        )
        .await?;
        let served = Arc::new(ServedKeyring::new(journal, self.pepper.for_keyring(&name)));
        let served = {
            let mut keyrings = self
                .keyrings
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            match keyrings.get(&name) {
                // Another task was first; one journal is the writer.
                Some(held) if held.epoch() == epoch => Arc::clone(held),
                Some(_) | None => {
                    keyrings.insert(name, Arc::clone(&served));
                    served
                }
            }
        };
        self.served
            .send_modify(|count| *count = count.wrapping_add(1));
        self.wake(&served);
        Ok(served)
    }

    /// A keyring as of its last saved state, else of its first change, and followed to its head, with the last of its
    /// changes encoded for sidecars that resume. The revision of the saved state, if there is one, comes with it.
    async fn load(
        &self,
        log: &LogName,
        name: &KeyringName,
        epoch: Epoch,
    ) -> Result<((FedKeyring, EntryHash), Revision), LogError> {
        let (saved, (keyring, hash)) = match self.load_saved(log, name).await? {
            Some(folded) => (folded.0.revision(), folded),
            None => (Revision::default(), self.load_first(log).await?),
        };
        let head = self.store.head(log).await?;
        let head = head.map_or(Revision::default(), |head| head.revision);
        let until = Revision::new(head.get().saturating_sub(steps::KEPT));
        let (keyring, hash) = journal::follow(&*self.store, log, keyring, hash, until).await?;
        let fed = task::spawn_blocking(move || FedKeyring::from_keyring(epoch, keyring));
        let fed = fed.await.map_err(|_| StoreError::Closing)?;
        Ok(((fed, hash), saved))
    }

    async fn load_first(&self, log: &LogName) -> Result<(Keyring, EntryHash), LogError> {
        let page = self.store.read(log, Revision::default(), 1).await?;
        let first = page
            .first()
            .ok_or_else(|| StoreError::UnknownLog { log: log.clone() })?;
        let change = journal::decode(first)?;
        let keyring = Keyring::begin(first.at, &change).map_err(|source| LogError::Apply {
            log: log.clone(),
            source,
        })?;
        Ok((keyring, first.hash))
    }

    /// The last saved state; none when there is none, or none that can be used.
    async fn load_saved(
        &self,
        log: &LogName,
        name: &KeyringName,
    ) -> Result<Option<(Keyring, EntryHash)>, LogError> {
        let Some(state) = self.store.load_state(log).await? else {
            return Ok(None);
        };
        let problem = if state.format == saved::FORMAT {
            match self.restore(log, &state).await? {
                Ok(keyring) if keyring.name() == name && keyring.revision() == state.revision => {
                    return Ok(Some((keyring, state.hash)));
                }
                Ok(_) => "it is of another keyring or revision".to_owned(),
                Err(error) => causes::in_one_line(&error),
            }
        } else {
            "its format is another one".to_owned()
        };
        tracing::warn!(
            auth.keyring = %name,
            format = state.format,
            problem,
            "the saved state of the keyring cannot be used; reading its whole log"
        );
        Ok(None)
    }

    /// Puts a saved keyring together, page by page: the next one is read while one is understood.
    async fn restore(
        &self,
        log: &LogName,
        state: &StateSnapshot,
    ) -> Result<Result<Keyring, SavedError>, LogError> {
        let page = |number| {
            self.store
                .load_state_page(log, state.revision, state.format, number)
        };
        let mut restorer = match Restorer::new(&state.payload) {
            Ok(restorer) => restorer,
            Err(error) => return Ok(Err(error)),
        };
        let mut next = page(0).await?;
        for number in 0..state.pages {
            // Another control plane may have saved a newer state meanwhile.
            let Some(StatePage { payload, .. }) = next else {
                return Ok(Err(SavedError::Field("page")));
            };
            let understood = task::spawn_blocking(move || {
                restorer.page(&payload)?;
                Ok(restorer)
            });
            let (understood, read) = tokio::join!(understood, page(number + 1));
            restorer = match understood.map_err(|_| StoreError::Closing)? {
                Ok(restorer) => restorer,
                Err(error) => return Ok(Err(error)),
            };
            next = read?;
        }
        let finished = task::spawn_blocking(move || restorer.finish());
        Ok(finished.await.map_err(|_| StoreError::Closing)?)
    }

    fn wake(&self, changed: &ServedKeyring) {
        changed.ring();
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<KeyringName, Arc<ServedKeyring>>> {
        self.keyrings.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        key::{PepperId, Prefix, operation, testing},
        store::{SqliteOptions, SqliteStore},
    };

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
        let catalog =
            Catalog::open(Arc::clone(store), clock, pepper, ControlMetrics::default()).await;
        catalog.expect("a sound store")
    }

    async fn with_keyring(store: &Arc<dyn Store>) -> Catalog {
        let catalog = catalog(store).await;
        let name = testing::keyring_name();
        let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
        catalog
            .create_keyring("test", name, &first.expect("a valid keyring"))
            .await
            .expect("a new keyring");
        catalog
    }

    async fn add_consumer(catalog: &Catalog, id: &str) {
        let served = catalog.get(&testing::keyring_name()).expect("it exists");
        let consumer: crate::key::ConsumerId = id.parse().expect("a valid id");
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
        // A state of a later version is passed over.
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
    async fn freshness_is_that_of_the_last_read_whatever_the_wall_clock_does() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = store(&dir).await;
        let start = Timestamp::from_millis(1_800_000_000_000);
        let (clock, hands) = Clock::manual(start);
        let catalog = catalog_at(&store, clock.clone()).await;
        let age = || clock.wall().saturating_since(catalog.as_of());
        let minute = Duration::from_mins(1);
        let month = Duration::from_hours(30 * 24);
        hands.set_wall(start.saturating_add(month));
        catalog.refresh().await.expect("readable");
        assert_eq!(age(), Duration::ZERO);
        hands.advance(minute);
        hands.set_wall(start);
        assert_eq!(age(), minute);
        catalog.refresh().await.expect("readable");
        assert_eq!(age(), Duration::ZERO);
        std::fs::remove_file(dir.path().join("relatch.db")).expect("it is there");
        hands.advance(minute);
        assert!(catalog.refresh().await.is_err());
        assert_eq!(age(), minute);
    }
}
