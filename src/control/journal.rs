//! A log of the store, folded into a state that is held in memory.
//!
//! A commit takes long because the disk has to confirm it. Commits that arrive while another one is
//! being written therefore wait together and are written in one transaction: each is planned in its
//! turn on the state that the ones before it lead to, and each gets an answer of its own. Readers
//! never see that state: a state is published only when the store has it. If a transaction fails,
//! nothing of it was folded in, and the commits that were planned on it are planned anew.
//!
//! A caller may leave in the middle of its commit. The followers of the log are therefore woken,
//! and the commit is reported, where the new state becomes visible: see [`Witness`].

mod error;
mod outcome;
mod witness;

use std::{
    fmt,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;

use crate::{
    clock::Clock,
    key::{ApplyError, Epoch, Revision, Timestamp},
    store::{
        AppendError, EntryHash, Expected, Head, LogEntry, LogName, MAX_APPEND, MAX_PAGE, NewEntry,
        StatePage, StateSnapshot, Store, StoreError,
    },
};

pub use error::{CommitError, LogError, Position};
pub(crate) use outcome::CommitOutcome;
pub(crate) use witness::{Report, Witness};

/// The state that a log folds into.
///
/// A clone must be cheap, whatever the state's size: every transaction clones the state.
pub trait LogState: Clone + fmt::Debug + Send + Sync + 'static {
    /// A change, as the log stores it.
    type Change: Serialize + DeserializeOwned + Send + Sync;

    /// Returns the name of a change in the log.
    fn kind(change: &Self::Change) -> &'static str;

    /// Returns the revision of the state.
    fn revision(&self) -> Revision;

    /// Folds in the next change.
    ///
    /// # Errors
    ///
    /// When the change is not possible; the state is then unchanged.
    fn apply(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &Self::Change,
    ) -> Result<(), ApplyError>;

    /// Returns the state in the form in which it is saved; none if reading the whole log is quick
    /// enough.
    fn save(&self) -> Option<Box<dyn SaveState>> {
        None
    }

    /// Returns the size of what is saved, as the number of changes that take as long.
    fn weight(&self) -> u64 {
        0
    }
}

/// A state that is being saved, page by page.
pub trait SaveState: Iterator<Item = Vec<u8>> + Send {
    /// Returns the number of the format.
    fn format(&self) -> u32;

    /// Returns what is saved beside the pages.
    fn head(&self) -> Vec<u8>;
}

/// The one writer of a log in this process. Other processes may write to the same log: the store decides who is first.
#[derive(Debug)]
pub struct Journal<S> {
    core: Arc<Core<S>>,
}

#[derive(Debug)]
struct Core<S> {
    log: LogName,
    epoch: Epoch,
    store: Arc<dyn Store>,
    clock: Clock,
    /// The state in the store.
    folded: ArcSwap<Folded<S>>,
    /// The state that the store is about to have.
    ahead: Mutex<Ahead<S>>,
    /// Held while the log is appended to or read on, so that this process does not conflict with
    /// itself.
    turn: tokio::sync::Mutex<()>,
    witness: Arc<dyn Witness>,
    /// The revision of the last saved state.
    saved: AtomicU64,
}

/// A state, and the hash of the last entry in it.
#[derive(Debug)]
struct Folded<S> {
    state: S,
    hash: EntryHash,
}

/// The state with all planned commits, whether the store has them or not.
#[derive(Debug)]
struct Ahead<S> {
    state: S,
    /// The entries that wait to be written.
    waiting: Vec<NewEntry>,
    /// The report of each waiting commit, with the commit's last revision. It is sent once the
    /// store has the commit.
    reports: Vec<(Revision, Report)>,
    /// The outcome of the transaction that writes the waiting entries, or else of the last planned
    /// one; none if the store has all.
    outcome: Option<watch::Receiver<TransactionOutcome>>,
    /// The sender of that outcome for the waiting entries; none if nothing waits.
    tell: Option<watch::Sender<TransactionOutcome>>,
}

/// The outcome of a transaction.
#[derive(Clone, Debug)]
enum TransactionOutcome {
    /// The transaction is not over.
    Open,
    /// The store has the transaction.
    Written,
    /// The store does not have the transaction, or not surely: its commits are planned anew.
    Undone,
    /// The transaction failed.
    Failed(Arc<LogError>),
}

/// Read access to a state of a journal; the state does not change.
#[derive(Debug)]
pub(crate) struct StateGuard<S>(Arc<Folded<S>>);

/// A committed change, with the result of its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed<T> {
    /// The value that the plan returned beside the changes.
    pub(crate) value: T,
    /// The revision of the last change.
    pub(crate) revision: Revision,
    /// The time at which the commit was planned.
    pub(crate) at: Timestamp,
}

/// The most conflicts in a row. A log has few writers, so more of them mean that something is
/// wrong.
const CONFLICTS: usize = 32;
/// The number of changes after which a state is saved again, except for a large one: see
/// [`SAVE_SHARE`]. A start reads at most about as many entries.
const SAVE_EVERY: u64 = 1_000;
/// A large state is saved when 1/10 of it has changed. A start then reads the rest of the log in no
/// more time than it reads the state, and the bytes written for states are no more than a few times
/// the bytes written for the log.
const SAVE_SHARE: u64 = 10;

impl<S: LogState> Journal<S> {
    /// Opens a journal on a state that was folded from the log up to the entry with `hash`, and
    /// folds in the rest. `saved` is the revision of the newest saved state; 0 if there is none.
    /// `witness` is notified of every state that becomes visible from then on, also of those that
    /// the rest leads to.
    ///
    /// # Errors
    ///
    /// When the log cannot be followed.
    pub(crate) async fn open(
        store: Arc<dyn Store>,
        clock: Clock,
        log: LogName,
        epoch: Epoch,
        (state, hash): (S, EntryHash),
        saved: Revision,
        witness: Arc<dyn Witness>,
    ) -> Result<Self, LogError> {
        let ahead = Ahead {
            state: state.clone(),
            waiting: Vec::new(),
            reports: Vec::new(),
            outcome: None,
            tell: None,
        };
        let journal = Self {
            core: Arc::new(Core {
                log,
                epoch,
                store,
                clock,
                saved: AtomicU64::new(saved.get()),
                folded: ArcSwap::from_pointee(Folded { state, hash }),
                ahead: Mutex::new(ahead),
                turn: tokio::sync::Mutex::new(()),
                witness,
            }),
        };
        journal.catch_up().await?;
        Ok(journal)
    }

    /// Returns the epoch of the log.
    #[must_use]
    pub(crate) fn epoch(&self) -> Epoch {
        self.core.epoch
    }

    /// Returns the state in the store. A holder of it blocks nobody.
    #[must_use]
    pub(crate) fn state(&self) -> StateGuard<S> {
        StateGuard(self.core.folded.load_full())
    }

    /// Returns the position at which the log was last read or written.
    #[must_use]
    pub(crate) fn position(&self) -> Position {
        self.core.folded.load().position()
    }

    /// Saves the state, so that the next start need not read the whole log, if enough has changed since the last time.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    pub async fn save_if_due(&self) -> Result<(), StoreError> {
        let Core {
            store, log, saved, ..
        } = &*self.core;
        let state = self.state();
        let (revision, hash) = (state.revision(), state.0.hash);
        let behind = Revision::new(saved.load(Ordering::Relaxed)).behind(revision);
        if behind < SAVE_EVERY.max(state.weight() / SAVE_SHARE) {
            return Ok(());
        }
        let Some(mut saver) = state.save() else {
            return Ok(());
        };
        drop(state);
        let (format, payload) = (saver.format(), saver.head());
        let mut number = 0;
        loop {
            let page = next_page(saver);
            let (rest, page) = page.await?;
            saver = rest;
            let Some(payload) = page else {
                break;
            };
            let page = StatePage {
                revision,
                format,
                number,
                payload,
            };
            store.save_state_page(log, page).await?;
            number += 1;
        }
        let snapshot = StateSnapshot {
            revision,
            hash,
            format,
            payload,
            pages: number,
        };
        store.save_state(log, snapshot).await?;
        saved.fetch_max(revision.get(), Ordering::Relaxed);
        while store.prune_state_pages(log).await? {}
        Ok(())
    }

    /// Commits the changes that `plan` returns for the current state, and plans anew if another
    /// process was first. A plan without changes commits nothing. Every answer, a refusal too,
    /// waits until the store has the state that the plan was made on.
    ///
    /// `report` returns, for each plan with changes, the report to send once the store has them. It
    /// is sent whether the caller still waits or not. Dropping the future does not withdraw a
    /// planned commit: it may still be committed.
    ///
    /// # Errors
    ///
    /// When the plan is refused, or the store fails.
    pub(crate) async fn commit<T>(
        &self,
        actor: &str,
        mut plan: impl FnMut(&S, Timestamp) -> Result<(Vec<S::Change>, T), CommitError>,
        mut report: impl FnMut(&[S::Change]) -> Report,
    ) -> Result<Committed<T>, CommitError> {
        let mut undone = 0;
        while undone < CONFLICTS {
            let (planned, outcome) = self.core.plan(actor, &mut plan, &mut report);
            let outcome = match outcome {
                Some(outcome) => ended(outcome).await,
                None => TransactionOutcome::Written,
            };
            match (outcome, planned) {
                (TransactionOutcome::Written, Planned::Answer(answer)) => return answer,
                (TransactionOutcome::Written, Planned::Full) => {}
                (TransactionOutcome::Undone | TransactionOutcome::Open, _) => undone += 1,
                (TransactionOutcome::Failed(error), _) => {
                    return Err(LogError::Shared(error).into());
                }
            }
        }
        Err(CommitError::Contended)
    }

    /// Folds in the changes that other processes have committed.
    ///
    /// # Errors
    ///
    /// When the log cannot be followed.
    pub(crate) async fn catch_up(&self) -> Result<(), LogError> {
        let core = &self.core;
        let _turn = core.turn.lock().await;
        let held = core.folded.load().state.revision();
        let read = core.read_rest().await;
        if core.folded.load().state.revision() != held {
            // The waiting commits were planned without these changes.
            core.begin_anew(&mut core.ahead());
        }
        read
    }
}

/// The result of a turn of planning.
enum Planned<T> {
    /// The answer, to be given once the transaction is written that the plan was made for or on.
    Answer(Result<Committed<T>, CommitError>),
    /// So many entries wait already that the change has to wait for the next transaction.
    Full,
}

impl<S: LogState> Core<S> {
    /// Plans a commit in its turn, and adds its changes to the waiting entries. Returns the
    /// transaction that decides.
    fn plan<T>(
        self: &Arc<Self>,
        actor: &str,
        plan: impl FnOnce(&S, Timestamp) -> Result<(Vec<S::Change>, T), CommitError>,
        report: impl FnOnce(&[S::Change]) -> Report,
    ) -> (Planned<T>, Option<watch::Receiver<TransactionOutcome>>) {
        let mut ahead = self.ahead();
        let at = self.clock.wall();
        let planned = plan(&ahead.state, at).and_then(|(changes, value)| {
            let entries: Vec<NewEntry> = changes
                .iter()
                .map(|change| entry::<S>(change, actor, at))
                .collect();
            NewEntry::check(&entries).map_err(LogError::from)?;
            Ok((changes, entries, value))
        });
        let (changes, entries, value) = match planned {
            Ok(planned) => planned,
            Err(error) => return (Planned::Answer(Err(error)), ahead.outcome.clone()),
        };
        if entries.len() + ahead.waiting.len() > MAX_APPEND {
            return (Planned::Full, ahead.outcome.clone());
        }
        if let Err(error) = self.apply(&mut ahead.state, at, &changes) {
            return (Planned::Answer(Err(error.into())), ahead.outcome.clone());
        }
        let committed = Committed {
            value,
            revision: ahead.state.revision(),
            at,
        };
        if !entries.is_empty() {
            ahead.waiting.extend(entries);
            ahead.reports.push((committed.revision, report(&changes)));
            self.begin_transaction(&mut ahead);
        }
        (Planned::Answer(Ok(committed)), ahead.outcome.clone())
    }

    /// Applies all of `changes`, or none.
    fn apply(&self, state: &mut S, at: Timestamp, changes: &[S::Change]) -> Result<(), LogError> {
        let before = (changes.len() > 1).then(|| state.clone());
        for change in changes {
            let revision = state.revision().next();
            if let Err(source) = state.apply(revision, at, change) {
                if let Some(before) = before {
                    *state = before;
                }
                return Err(LogError::Apply {
                    log: self.log.clone(),
                    revision,
                    source,
                });
            }
        }
        Ok(())
    }

    /// Spawns a task that writes the waiting entries, in one transaction with all that arrive until
    /// its turn. The task belongs to no caller: it ends with the transaction, even if all callers
    /// have left.
    fn begin_transaction(self: &Arc<Self>, ahead: &mut Ahead<S>) {
        if ahead.tell.is_some() {
            return;
        }
        let (tell, outcome) = watch::channel(TransactionOutcome::Open);
        ahead.tell = Some(tell);
        ahead.outcome = Some(outcome);
        let core = Arc::clone(self);
        tokio::spawn(async move { core.write().await });
    }

    /// Writes the waiting entries.
    async fn write(&self) {
        let _turn = self.turn.lock().await;
        let (entries, reports, tell, state) = {
            let mut ahead = self.ahead();
            // None if the entries were discarded meanwhile.
            let Some(tell) = ahead.tell.take() else {
                return;
            };
            let entries = std::mem::take(&mut ahead.waiting);
            let reports = std::mem::take(&mut ahead.reports);
            (entries, reports, tell, ahead.state.clone())
        };
        let held = self.folded.load().position();
        if held.revision.behind(state.revision()) != entries.len() as u64 {
            // The former transaction did not end as this one was planned.
            self.begin_anew(&mut self.ahead());
            tell.send_replace(TransactionOutcome::Undone);
            return;
        }
        let expected = Expected::at(held.revision, held.hash);
        let outcome = match self.store.append_at(&self.log, expected, entries).await {
            Ok(Head { hash, .. }) => {
                self.publish(Folded { state, hash });
                for (revision, report) in reports {
                    report.send(revision);
                }
                TransactionOutcome::Written
            }
            Err(AppendError::Conflict { head, .. }) => match self.read_after(held, &head).await {
                Ok(()) => TransactionOutcome::Undone,
                Err(error) => TransactionOutcome::Failed(Arc::new(error)),
            },
            Err(AppendError::Invalid(error)) => TransactionOutcome::Failed(Arc::new(error.into())),
            Err(AppendError::Store(error)) => TransactionOutcome::Failed(Arc::new(error.into())),
        };
        {
            let mut ahead = self.ahead();
            if !matches!(outcome, TransactionOutcome::Written) {
                self.begin_anew(&mut ahead);
            } else if ahead.tell.is_none() {
                ahead.outcome = None;
            }
        }
        tell.send_replace(outcome);
    }

    /// Publishes a state that the store has, and notifies the witness.
    fn publish(&self, folded: Folded<S>) {
        let revision = folded.state.revision();
        self.folded.store(Arc::new(folded));
        self.witness.published(revision);
    }

    /// Folds in the changes that another process has committed, if a log that was read up to
    /// `reached` may have the head `head`.
    async fn read_after(&self, reached: Position, head: &Head) -> Result<(), LogError> {
        reached.check(head)?;
        self.read_rest().await
    }

    /// Discards the waiting entries; their commits are planned anew on the state in the store.
    fn begin_anew(&self, ahead: &mut Ahead<S>) {
        ahead.state = self.folded.load().state.clone();
        ahead.waiting = Vec::new();
        ahead.reports = Vec::new();
        ahead.outcome = None;
        if let Some(tell) = ahead.tell.take() {
            tell.send_replace(TransactionOutcome::Undone);
        }
    }

    /// Folds in the entries of the store. The caller must hold the turn. Entries before one that
    /// cannot be used are folded in: they may contain revocations.
    async fn read_rest(&self) -> Result<(), LogError> {
        loop {
            let folded = self.folded.load_full();
            let held = folded.position();
            let page = self.store.read(&self.log, held.revision, MAX_PAGE).await?;
            let Some(first) = page.first() else {
                return Ok(());
            };
            held.check_next(first)?;
            let mut state = folded.state.clone();
            drop(folded);
            let done = fold(&mut state, &page);
            let count = held.revision.behind(state.revision());
            let last = usize::try_from(count)
                .ok()
                .and_then(|count| count.checked_sub(1));
            if let Some(LogEntry { hash, .. }) = last.and_then(|last| page.get(last)) {
                self.publish(Folded { state, hash: *hash });
            }
            done?;
        }
    }

    fn ahead(&self) -> MutexGuard<'_, Ahead<S>> {
        self.ahead.lock().unwrap_or_else(|poisoned| {
            // A plan has panicked, and it is unknown how far its changes were applied.
            self.ahead.clear_poison();
            let mut ahead = poisoned.into_inner();
            self.begin_anew(&mut ahead);
            ahead
        })
    }
}

/// Folds the entries up to revision `until` into `state`, which is the state of `log` at the entry
/// with `hash`. The next page is read while one is folded in.
///
/// # Errors
///
/// When the log cannot be followed.
pub(crate) async fn follow<S: LogState>(
    store: &dyn Store,
    log: &LogName,
    mut state: S,
    mut hash: EntryHash,
    until: Revision,
) -> Result<(S, EntryHash), LogError> {
    let read = async |after: Revision| {
        let wanted = usize::try_from(after.behind(until)).unwrap_or(MAX_PAGE);
        match wanted {
            0 => Ok(Vec::new()),
            wanted => store.read(log, after, wanted.min(MAX_PAGE)).await,
        }
    };
    let mut page = read(state.revision()).await?;
    while let Some(last) = page.last() {
        hash = last.hash;
        let next = read(last.revision);
        let folded = tokio::task::spawn_blocking(move || {
            fold(&mut state, &page)?;
            Ok::<_, LogError>(state)
        });
        let (folded, next) = tokio::join!(folded, next);
        state = folded.map_err(|_| StoreError::Closing)??;
        page = next?;
    }
    Ok((state, hash))
}

/// Folds in the entries, up to the first that cannot be used.
fn fold<S: LogState>(state: &mut S, page: &[LogEntry]) -> Result<(), LogError> {
    for entry in page {
        let change = decode::<S::Change>(entry)?;
        state
            .apply(entry.revision, entry.at, &change)
            .map_err(|source| LogError::Apply {
                log: entry.log.clone(),
                revision: entry.revision,
                source,
            })?;
    }
    Ok(())
}

/// Creates the next page on a thread that may block.
async fn next_page(
    mut saver: Box<dyn SaveState>,
) -> Result<(Box<dyn SaveState>, Option<Vec<u8>>), StoreError> {
    let made = tokio::task::spawn_blocking(move || {
        let page = saver.next();
        (saver, page)
    });
    made.await.map_err(|_| StoreError::Closing)
}

/// Waits for the end of a transaction. If its outcome is never sent, it was lost with the runtime.
async fn ended(mut outcome: watch::Receiver<TransactionOutcome>) -> TransactionOutcome {
    match outcome
        .wait_for(|outcome| !matches!(outcome, TransactionOutcome::Open))
        .await
    {
        Ok(outcome) => outcome.clone(),
        Err(_) => TransactionOutcome::Failed(Arc::new(StoreError::Closing.into())),
    }
}

impl<S: LogState> Folded<S> {
    fn position(&self) -> Position {
        Position {
            revision: self.state.revision(),
            hash: self.hash,
        }
    }
}

impl<S> Deref for StateGuard<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.0.state
    }
}

/// Decodes the change in an entry.
///
/// # Errors
///
/// When this version does not know the change.
pub(crate) fn decode<C: DeserializeOwned>(entry: &LogEntry) -> Result<C, LogError> {
    serde_json::from_slice(&entry.payload).map_err(|source| LogError::Payload {
        log: entry.log.clone(),
        revision: entry.revision,
        source,
    })
}

/// Returns the entry for a change.
#[expect(clippy::missing_panics_doc, reason = "a change is always JSON")]
pub fn entry<S: LogState>(change: &S::Change, actor: &str, at: Timestamp) -> NewEntry {
    NewEntry {
        at,
        actor: actor.to_owned(),
        kind: S::kind(change).to_owned(),
        payload: serde_json::to_vec(change).expect("a change has no map with other keys than text"),
    }
}

#[cfg(test)]
mod tests;
