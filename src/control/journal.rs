//! A log of the store, folded into a state that is held in memory.

use std::{
    fmt,
    ops::Deref,
    sync::{
        Arc, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    clock::Clock,
    key::{ApplyError, Epoch, Refusal, Revision, Timestamp},
    store::{
        AppendError, Entry, EntryHash, Head, LogName, MAX_PAGE, NewEntry, StateSnapshot, Store,
        StoreError,
    },
};

/// What a log folds into.
pub trait State: fmt::Debug + Send + Sync + 'static {
    /// What happened, as the log holds it.
    type Change: Serialize + DeserializeOwned + Send + Sync;

    /// The name of a change in the log.
    fn kind(change: &Self::Change) -> &'static str;

    /// The revision that the state is at.
    fn revision(&self) -> Revision;

    /// Folds the next change in.
    ///
    /// # Errors
    ///
    /// When the change is not possible; the state is then as before.
    fn apply(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &Self::Change,
    ) -> Result<(), ApplyError>;

    /// The format of a saved state, and the state in it; none when reading the whole log is quick enough.
    fn save(&self) -> Option<(u32, Vec<u8>)> {
        None
    }
}

/// The one writer of a log in this process. Other processes may write to the same log: the store decides who is first.
#[derive(Debug)]
pub struct Journal<S> {
    log: LogName,
    epoch: Epoch,
    store: Arc<dyn Store>,
    clock: Clock,
    /// Held from the plan to the fold, so that this process does not conflict with itself.
    turn: tokio::sync::Mutex<()>,
    folded: RwLock<Folded<S>>,
    /// The revision of the last saved state.
    saved: AtomicU64,
}

/// A state, and the hash of the last entry in it.
#[derive(Debug)]
struct Folded<S> {
    state: S,
    hash: EntryHash,
}

/// Read access to the state of a journal.
#[derive(Debug)]
pub struct StateGuard<'a, S>(RwLockReadGuard<'a, Folded<S>>);

/// A change was not committed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// It was refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Others kept being first.
    #[error("other writers were first {CONFLICTS} times in a row; try again")]
    Contended,
    /// The log cannot be followed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The operating system's random source failed.
    #[error(transparent)]
    Random(#[from] crate::key::RandomError),
}

/// A log cannot be read, or does not tell a possible history.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An entry breaks a bound of the store.
    #[error(transparent)]
    Entry(#[from] crate::store::EntryError),
    /// An entry cannot be understood.
    #[error(
        "revision {revision} of log {log} cannot be understood: it was written by a newer relatch, or tampered with; see `relatch audit verify`"
    )]
    Payload {
        /// Which log.
        log: LogName,
        /// Which entry.
        revision: Revision,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// An entry does not fit what is before it.
    #[error("log {log} does not tell a possible history; see `relatch audit verify`")]
    Apply {
        /// Which log.
        log: LogName,
        /// What is wrong.
        source: ApplyError,
    },
}

/// What was committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed<T> {
    /// What the plan returned beside the changes.
    pub value: T,
    /// The revision of the last change.
    pub revision: Revision,
    /// When it was decided.
    pub at: Timestamp,
}

/// A log has few writers; this many conflicts in a row mean that something is wrong.
const CONFLICTS: usize = 32;
/// A state is saved whenever so many changes were folded in since: a start reads at most about so many entries.
const SAVE_EVERY: u64 = 1_000;

impl<S: State> Journal<S> {
    /// Takes a state that was folded from the log up to the entry with `hash`, and folds the rest in.
    ///
    /// # Errors
    ///
    /// When the log cannot be followed.
    pub async fn open(
        store: Arc<dyn Store>,
        clock: Clock,
        log: LogName,
        epoch: Epoch,
        state: S,
        hash: EntryHash,
    ) -> Result<Self, LogError> {
        let journal = Self {
            log,
            epoch,
            store,
            clock,
            turn: tokio::sync::Mutex::new(()),
            saved: AtomicU64::new(state.revision().get()),
            folded: RwLock::new(Folded { state, hash }),
        };
        journal.catch_up().await?;
        Ok(journal)
    }

    /// Its log.
    #[must_use]
    pub const fn log(&self) -> &LogName {
        &self.log
    }

    /// The epoch of its log.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The state. Hold it shortly, and never across an await.
    #[expect(clippy::missing_panics_doc, reason = "no writer of the state panics")]
    pub fn state(&self) -> StateGuard<'_, S> {
        StateGuard(self.folded.read().expect("no writer of the state panics"))
    }

    /// Saves the state, so that the next start need not read the whole log, if enough has changed since the last time.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    pub async fn save_if_due(&self) -> Result<(), StoreError> {
        let saved = Revision::new(self.saved.load(Ordering::Relaxed));
        let snapshot = {
            let folded = self.state();
            let revision = folded.revision();
            if saved.behind(revision) < SAVE_EVERY {
                return Ok(());
            }
            let Some((format, payload)) = folded.save() else {
                return Ok(());
            };
            StateSnapshot {
                revision,
                hash: folded.0.hash,
                format,
                payload,
            }
        };
        let revision = snapshot.revision;
        self.store.save_state(&self.log, snapshot).await?;
        self.saved.fetch_max(revision.get(), Ordering::Relaxed);
        Ok(())
    }

    /// Commits what `plan` returns for the state as it is; plans anew when another process was first. A plan without
    /// changes commits nothing.
    ///
    /// Dropping the future may leave the commit in the store and not yet in the state; [`catch_up`](Self::catch_up)
    /// mends that.
    ///
    /// # Errors
    ///
    /// When the plan is refused, or the store fails.
    pub async fn commit<T>(
        &self,
        actor: &str,
        mut plan: impl FnMut(&S, Timestamp) -> Result<(Vec<S::Change>, T), CommitError>,
    ) -> Result<Committed<T>, CommitError> {
        let _turn = self.turn.lock().await;
        for _ in 0..CONFLICTS {
            let at = self.clock.wall();
            let (expected, changes, value) = {
                let state = self.state();
                let (changes, value) = plan(&state, at)?;
                (state.revision(), changes, value)
            };
            if changes.is_empty() {
                return Ok(Committed {
                    value,
                    revision: expected,
                    at,
                });
            }
            let entries = changes
                .iter()
                .map(|change| entry::<S>(change, actor, at))
                .collect();
            match self.store.append(&self.log, expected, entries).await {
                Ok(Head { revision, hash, .. }) => {
                    self.fold(expected, hash, changes.iter().map(|change| (at, change)))?;
                    return Ok(Committed {
                        value,
                        revision,
                        at,
                    });
                }
                Err(AppendError::Conflict { .. }) => self.read_rest().await?,
                Err(AppendError::Invalid(error)) => return Err(LogError::from(error).into()),
                Err(AppendError::Store(error)) => return Err(LogError::from(error).into()),
            }
        }
        Err(CommitError::Contended)
    }

    /// Folds in what other processes have committed.
    ///
    /// # Errors
    ///
    /// When the log cannot be followed.
    pub async fn catch_up(&self) -> Result<(), LogError> {
        let _turn = self.turn.lock().await;
        self.read_rest().await
    }

    async fn read_rest(&self) -> Result<(), LogError> {
        loop {
            let held = self.state().revision();
            let page = self.store.read(&self.log, held, MAX_PAGE).await?;
            let Some(last) = page.last() else {
                return Ok(());
            };
            let hash = last.hash;
            let changes = page
                .iter()
                .map(|entry| Ok((entry.at, decode::<S::Change>(entry)?)))
                .collect::<Result<Vec<_>, LogError>>()?;
            self.fold(held, hash, changes.iter().map(|(at, change)| (*at, change)))?;
        }
    }

    fn fold<'a>(
        &self,
        after: Revision,
        hash: EntryHash,
        changes: impl Iterator<Item = (Timestamp, &'a S::Change)>,
    ) -> Result<(), LogError>
    where
        S::Change: 'a,
    {
        let mut folded = self.folded.write().expect("no writer of the state panics");
        let mut revision = after;
        for (at, change) in changes {
            revision = revision.next();
            folded
                .state
                .apply(revision, at, change)
                .map_err(|source| LogError::Apply {
                    log: self.log.clone(),
                    source,
                })?;
        }
        folded.hash = hash;
        Ok(())
    }
}

impl<S> Deref for StateGuard<'_, S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.0.state
    }
}

/// The change that an entry holds.
///
/// # Errors
///
/// When it is none that this version knows.
pub fn decode<C: DeserializeOwned>(entry: &Entry) -> Result<C, LogError> {
    serde_json::from_slice(&entry.payload).map_err(|source| LogError::Payload {
        log: entry.log.clone(),
        revision: entry.revision,
        source,
    })
}

/// The entry that holds a change.
#[expect(clippy::missing_panics_doc, reason = "a change is always JSON")]
pub fn entry<S: State>(change: &S::Change, actor: &str, at: Timestamp) -> NewEntry {
    NewEntry {
        at,
        actor: actor.to_owned(),
        kind: S::kind(change).to_owned(),
        payload: serde_json::to_vec(change).expect("a change has no map with other keys than text"),
    }
}
