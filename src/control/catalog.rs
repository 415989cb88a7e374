//! All keyrings of a control plane.

mod unread;

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
    time::SystemTime,
};

use tokio::{sync::watch, task, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    bells::Ringer,
    journal::{self, CommitError, CommitOutcome, Committed, Journal, LogError, Position, Report},
    metrics::ControlMetrics,
    reads::{READ_PAUSE, RETRY_PAUSE, Reads},
    saved::{self, Restorer, SavedError},
    served::{FedKeyring, ServedKeyring},
    spans::{Changes, CommitEvent, ControlTracer, carried_report},
    steps,
};
use crate::{
    causes,
    clock::{BootTime, Clock},
    http::NoteSource,
    key::{
        Change, Epoch, KeyId, Keyring, KeyringName, MasterPepper, OperationRefusal, Pepper,
        Revision, Timestamp,
    },
    store::{AppendError, EntryHash, Head, LogName, StatePage, StateSnapshot, Store, StoreError},
};

use unread::Unread;

/// The keyrings, their store, and the signals of their changes.
#[derive(Debug)]
pub struct Catalog {
    store: Arc<dyn Store>,
    clock: Clock,
    pepper: MasterPepper,
    keyrings: RwLock<BTreeMap<KeyringName, Arc<ServedKeyring>>>,
    /// Counts changes of any keyring.
    changes: watch::Sender<u64>,
    /// Counts the keyrings that are served for the first time, or anew.
    served: watch::Sender<u64>,
    metrics: ControlMetrics,
    tracer: ControlTracer,
    unread: Unread,
    reads: Reads,
}

impl Catalog {
    /// Loads every keyring of the store. A keyring that cannot be read is left out, logged as an
    /// error, and read again later.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
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
            unread: Unread::default(),
            reads: Reads::default(),
        };
        catalog.refresh().await?;
        Ok(catalog)
    }

    /// Creates spans of commits, and of the calls that lead to them, with `tracer`.
    #[must_use]
    pub(crate) fn with_tracer(self, tracer: ControlTracer) -> Self {
        Self { tracer, ..self }
    }

    /// Returns the metrics of commits and of their way to sidecars.
    #[must_use]
    pub(crate) const fn metrics(&self) -> &ControlMetrics {
        &self.metrics
    }

    /// Returns the tracer, which creates spans.
    #[must_use]
    pub(crate) const fn tracer(&self) -> &ControlTracer {
        &self.tracer
    }

    /// Returns the clock that dates commits.
    #[must_use]
    pub(crate) const fn clock(&self) -> &Clock {
        &self.clock
    }

    #[must_use]
    pub(crate) const fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Returns the keyring `name`.
    ///
    /// # Errors
    ///
    /// When it does not exist, or could never be read.
    pub fn get(&self, name: &KeyringName) -> Result<Arc<ServedKeyring>, OperationRefusal> {
        if let Some(served) = self.read().get(name) {
            return Ok(Arc::clone(served));
        }
        Err(match self.unread.problem(name) {
            Some(problem) => {
                OperationRefusal::Unsafe(format!("keyring {name} is not served: {problem}"))
            }
            None => OperationRefusal::NotFound {
                what: "keyring",
                name: name.to_string(),
            },
        })
    }

    /// Returns the keyring that contains a key.
    ///
    /// # Errors
    ///
    /// When no keyring contains it, or when a keyring that could never be read may contain it.
    pub(crate) fn holding(&self, key_id: KeyId) -> Result<Arc<ServedKeyring>, OperationRefusal> {
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
            .ok_or_else(|| self.not_holding(key_id))
    }

    fn not_holding(&self, key_id: KeyId) -> OperationRefusal {
        let mut unread = self.unread.list().into_iter();
        match unread.find(|(name, _)| !self.read().contains_key(name)) {
            Some((name, problem)) => OperationRefusal::Unsafe(format!(
                "no keyring that is served has key {key_id}; keyring {name} is not served: {problem}"
            )),
            None => OperationRefusal::NotFound {
                what: "key",
                name: key_id.to_string(),
            },
        }
    }

    /// Returns the keyrings whose last read failed, each with the problem and what to do. Some of
    /// them may still be served, in the state that was read before.
    #[must_use]
    pub(crate) fn unreadable(&self) -> Vec<(KeyringName, Arc<str>)> {
        self.unread.list()
    }

    /// Returns all keyrings, in the order of their names.
    #[must_use]
    pub(crate) fn list(&self) -> Vec<Arc<ServedKeyring>> {
        self.read().values().cloned().collect()
    }

    /// Returns a receiver that wakes whenever a keyring is changed or created.
    #[must_use]
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Returns a receiver that wakes whenever a keyring is served for the first time, or anew after
    /// its history was rewritten.
    #[must_use]
    pub(crate) fn watch_served(&self) -> watch::Receiver<u64> {
        self.served.subscribe()
    }

    /// Returns the reads of the store, and the callers that wait for one.
    #[must_use]
    pub(crate) const fn reads(&self) -> &Reads {
        &self.reads
    }

    /// Reads the store for the callers that ask for it, until `shutdown`. Callers that ask within a
    /// pause of [`READ_PAUSE`] share a read. After a failed read they continue to wait. The
    /// reconciler, which reads too, logs the reason.
    pub(crate) async fn read_for_those_who_ask(self: Arc<Self>, shutdown: CancellationToken) {
        let reading = async {
            loop {
                self.reads.wanted().await;
                if self.refresh().await.is_ok() {
                    sleep(READ_PAUSE).await;
                } else {
                    self.reads.ask_again();
                    sleep(RETRY_PAUSE).await;
                }
            }
        };
        shutdown.run_until_cancelled(reading).await;
    }

    /// Creates a keyring from the first change of its log.
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

    /// Creates a keyring from the first change of its log and, in the same transaction, the changes
    /// that `plan` returns for it. A refused plan leaves no keyring behind. Returns the revision of
    /// the last change as well.
    ///
    /// # Errors
    ///
    /// When it exists, the plan is refused, or the store fails.
    pub(crate) async fn create_keyring_with(
        &self,
        actor: &str,
        name: KeyringName,
        first: &Change,
        plan: impl FnOnce(&Keyring, &Pepper, Timestamp) -> Result<Vec<Change>, OperationRefusal>,
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

    /// Returns the changes that a log begins with, and the revision that they lead to. Each of them
    /// is known to apply.
    fn plan_first(
        &self,
        name: &KeyringName,
        first: &Change,
        plan: impl FnOnce(&Keyring, &Pepper, Timestamp) -> Result<Vec<Change>, OperationRefusal>,
        now: Timestamp,
    ) -> Result<(Vec<Change>, Revision), CommitError> {
        let cannot_be = |revision, source| LogError::Apply {
            log: LogName::Keyring(name.clone()),
            revision,
            source,
        };
        let mut keyring = Keyring::begin(now, first)
            .map_err(|source| cannot_be(Revision::default().next(), source))?;
        let rest = plan(&keyring, &self.pepper.for_keyring(name), now)?;
        for change in &rest {
            let next = keyring.revision().next();
            keyring
                .advance(next, now, change)
                .map_err(|source| cannot_be(next, source))?;
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
            Err(AppendError::Conflict { .. }) => Err(OperationRefusal::AlreadyExists {
                what: "keyring",
                name: name.to_string(),
            }
            .into()),
            Err(AppendError::Invalid(error)) => Err(LogError::from(error).into()),
            Err(AppendError::Store(error)) => Err(LogError::from(error).into()),
        }
    }

    /// Commits the changes that `plan` returns for a keyring. They are sent to sidecars and
    /// reported, whether the caller still waits or not.
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
        let planned = |state: &FedKeyring, now| {
            let planned = plan(&state.keyring, now)?;
            changes = Changes::of(&planned.0);
            Ok(planned)
        };
        let report = |changes: &[Change]| self.report(started, actor, served.name(), changes);
        let committed = served.journal().commit(actor, planned, report).await;
        if committed.is_err() {
            self.tell(&CommitEvent {
                started,
                actor,
                keyring: Some(served.name()),
                changes: &changes,
                outcome: CommitOutcome::of(&committed),
                revision: None,
            });
        }
        committed
    }

    /// Returns the report of a commit, which is sent when the store has the commit. After a
    /// restore, revocations are repeated from its log lines.
    fn report(
        &self,
        started: SystemTime,
        actor: &str,
        name: &KeyringName,
        changes: &[Change],
    ) -> Report {
        let told = Changes::of(changes);
        let revoked: Vec<Change> = changes
            .iter()
            .filter(|change| matches!(change, Change::VersionsRevoked { .. }))
            .cloned()
            .collect();
        let (metrics, tracer) = (self.metrics.clone(), self.tracer.clone());
        let (actor, name) = (actor.to_owned(), name.clone());
        Report::new(carried_report(move |revision| {
            for change in &revoked {
                log_revocation(&actor, &name, change);
            }
            metrics.committed(CommitOutcome::Committed);
            tracer.commit(&CommitEvent {
                started,
                actor: &actor,
                keyring: Some(&name),
                changes: &told,
                outcome: CommitOutcome::Committed,
                revision: Some(revision),
            });
        }))
    }

    /// Counts a commit and creates its span.
    fn tell(&self, event: &CommitEvent<'_>) {
        self.metrics.committed(event.outcome);
        self.tracer.commit(event);
    }

    /// Reads what other processes have committed, and notes which keyrings could be read. A keyring
    /// that could not be read stays as it was, and is noted: see [`unreadable`](Self::unreadable).
    ///
    /// # Errors
    ///
    /// When the store cannot be read. The keyrings that could be read are noted nevertheless.
    pub async fn refresh(&self) -> Result<(), LogError> {
        let read = self.reads.begin();
        let began = self.clock.boot();
        // The positions are read before the heads: commits that arrive in between are not in the
        // positions.
        let held: BTreeMap<KeyringName, (Epoch, Position)> = self
            .list()
            .iter()
            .map(|served| {
                let at = (served.epoch(), served.journal().position());
                (served.name().clone(), at)
            })
            .collect();
        let heads = match self.store.heads().await {
            Ok(heads) => heads,
            Err(error) => {
                self.list().iter().for_each(|served| served.was_not_read());
                return Err(error.into());
            }
        };
        let mut gone: BTreeMap<&KeyringName, Position> = held
            .iter()
            .map(|(name, (_, position))| (name, *position))
            .collect();
        let mut failed = Ok(());
        for head in &heads {
            let LogName::Keyring(name) = &head.log else {
                continue;
            };
            gone.remove(name);
            let followed = self.follow(name, head, held.get(name)).await;
            if let Err(error) = self.note_read(name, Some(head), followed, began) {
                failed = Err(error);
            }
        }
        for (name, position) in gone {
            let log = LogName::Keyring(name.clone());
            let error = position.unlike(&log, Position::default());
            self.note_read(name, None, Err(error), began)?;
        }
        if failed.is_ok() {
            self.reads.succeeded(read);
        }
        failed
    }

    /// Notes how the read of a keyring ended. Returns an error that concerns the whole store.
    fn note_read(
        &self,
        name: &KeyringName,
        head: Option<&Head>,
        followed: Result<(), LogError>,
        began: BootTime,
    ) -> Result<(), LogError> {
        let served = self.read().get(name).cloned();
        let error = match followed {
            Ok(()) => {
                if let Some(served) = served {
                    served.was_read(began);
                    self.unread.clear(name);
                }
                return Ok(());
            }
            Err(error) => error,
        };
        if let Some(served) = served {
            served.was_not_read();
        }
        if !unread::is_of_one_log(&error) {
            return Err(error);
        }
        self.unread.note(name, head, &error, began);
        Ok(())
    }

    /// Reads a keyring up to its head; `known` is how far it was read before the head was.
    async fn follow(
        &self,
        name: &KeyringName,
        head: &Head,
        known: Option<&(Epoch, Position)>,
    ) -> Result<(), LogError> {
        let Some((epoch, reached)) = known else {
            // It is also none if the keyring was created after the list was made.
            if self.read().contains_key(name) || self.unread.is_known(name, head, self.clock.boot())
            {
                return Ok(());
            }
            return self.serve(name.clone(), head.epoch).await.map(drop);
        };
        reached.check(head)?;
        if *epoch != head.epoch {
            self.check_goes_on(head, *reached).await?;
            return self.serve(name.clone(), head.epoch).await.map(drop);
        }
        let served = self.read().get(name).cloned();
        match served {
            Some(served) if served.revision() < head.revision => served.journal().catch_up().await,
            Some(_) | None => Ok(()),
        }
    }

    /// Checks that a log with another epoch still has everything that was read of it.
    async fn check_goes_on(&self, head: &Head, reached: Position) -> Result<(), LogError> {
        let before = Revision::new(reached.revision.get().saturating_sub(1));
        let page = self.store.read(&head.log, before, 1).await?;
        let found = page
            .first()
            .map_or_else(Position::default, |entry| Position {
                revision: entry.revision,
                hash: entry.hash,
            });
        if found == reached {
            return Ok(());
        }
        Err(reached.unlike(&head.log, found))
    }

    async fn serve(&self, name: KeyringName, epoch: Epoch) -> Result<Arc<ServedKeyring>, LogError> {
        let began = self.clock.boot();
        let log = LogName::Keyring(name.clone());
        let (folded, saved) = self.load(&log, &name, epoch).await?;
        let ringer = Arc::new(Ringer::new(self.changes.clone()));
        let journal = Journal::open(
            Arc::clone(&self.store),
            self.clock.clone(),
            log,
            epoch,
            folded,
            saved,
            Arc::<Ringer>::clone(&ringer),
        )
        .await?;
        let pepper = self.pepper.for_keyring(&name);
        let served = Arc::new(ServedKeyring::new(journal, ringer, pepper));
        served.was_read(began);
        let served = {
            let mut keyrings = self
                .keyrings
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            match keyrings.get(&name) {
                // Another task was first. Only one journal may be the writer.
                Some(held) if held.epoch() == epoch => Arc::clone(held),
                Some(_) | None => {
                    keyrings.insert(name, Arc::clone(&served));
                    served
                }
            }
        };
        self.served
            .send_modify(|count| *count = count.wrapping_add(1));
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
        Ok(served)
    }

    /// Loads a keyring from its last saved state, or else from its first change, and follows its
    /// log to the head. The last of its changes are encoded for sidecars that resume. Also returns
    /// the revision of the saved state; 0 if there is none.
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
            revision: first.revision,
            source,
        })?;
        Ok((keyring, first.hash))
    }

    /// Returns the last saved state; none if there is none, or none that can be used.
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
                Ok(_) => "it belongs to another keyring or revision".to_owned(),
                Err(error) => causes::in_one_line(&error),
            }
        } else {
            "it has another format".to_owned()
        };
        tracing::warn!(
            auth.keyring = %name,
            format = state.format,
            problem,
            "the saved state of the keyring cannot be used; reading its whole log"
        );
        Ok(None)
    }

    /// Restores a saved keyring, page by page: the next page is read while one is decoded.
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

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<KeyringName, Arc<ServedKeyring>>> {
        self.keyrings.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NoteSource for Catalog {
    fn notes(&self) -> Vec<String> {
        let unreadable = self.unreadable().into_iter();
        unreadable
            .map(|(name, problem)| format!("keyring {name} cannot be read: {problem}"))
            .collect()
    }
}

fn log_revocation(actor: &str, keyring: &KeyringName, change: &Change) {
    if let Change::VersionsRevoked {
        key_id,
        versions,
        reason,
    } = change
    {
        tracing::info!(
            actor,
            auth.keyring = %keyring,
            auth.key.id = %key_id,
            versions = ?versions.iter().map(|version| version.get()).collect::<Vec<_>>(),
            reason = &**reason,
            "revoked"
        );
    }
}

#[cfg(test)]
mod tests;
