//! The store: an append-only log of changes per keyring, and what stands beside the logs.
//!
//! A [`log`](LogName) is a gapless sequence of [`LogEntry`]s, each chained to the one before it by [`chain`]. A commit is
//! an append at the head that the writer expects. That alone orders the control plane's replicas: the loser of a race
//! gets a [conflict](AppendError::Conflict), reads what it missed, validates its change again and retries.
//!
//! Beside each log stand its [`Head`] and the newest [`StateSnapshot`], from which a replica starts without reading
//! the whole log. [`PresenceRow`]s say which sidecars there are, [`UsageRow`]s how often they saw each key version used.
//! [`Delivery`]s are what webhooks are to be told, made from the log up to a cursor that moves with them.
//!
//! # What every engine promises
//!
//! - **Order of revisions is order of commits.** An entry that can be read has all entries before it. A reader that
//!   asks for what lies after the last revision that it saw therefore never skips and never repeats an entry.
//! - **All or nothing.** The entries of an append become visible together, with the head that names the last of them.
//! - **Durable.** What [`append`](Store::append) reported is on disk.
//! - **Primary.** Every read sees every append that was reported before the read began, by whatever replica.
//! - **Byte for byte.** What is read is what was appended.
//! - **Nothing is mended.** A store that cannot be understood is reported and left as it is.
//!
//! A call whose future is dropped may still take effect.

pub mod chain;
mod entry;
mod error;
mod outbox;
mod sqlite;
mod usage;

use std::{fmt, time::Duration};

use async_trait::async_trait;

use crate::key::{KeyringName, Revision, Timestamp};

pub use entry::{
    EntryError, EntryHash, Expected, Head, LogEntry, LogName, NewEntry, ParseLogNameError,
};
pub use error::{AppendError, StoreError};
pub use outbox::DeliveryState;
pub use outbox::Settled;
pub use outbox::{Delivery, NewDelivery, Retention, Settlement};
pub(crate) use sqlite::{Named, Owner, OwnerError, Ownership, StoreOwner};
pub use sqlite::{SqliteOptions, SqliteStore};
pub use usage::{CallersRow, StoredUsage, UsageRow};

/// The most entries in one append. An append holds the only write lock, and this many take well under a second.
pub const MAX_APPEND: usize = 10_000;

/// The most bytes of actor, kind and payload in one entry. The largest change is a few kilobytes; an entry above this
/// would be a mistake that every replica had to read for ever.
pub const MAX_ENTRY_LEN: usize = 1024 * 1024;

/// The most entries in one page: enough that a long log reads at full speed, few enough to hold in memory.
pub const MAX_PAGE: usize = 1_000;

/// The size at which a page ends early, in bytes of payload, so that a page of large entries fits into memory too.
pub const MAX_PAGE_LEN: usize = 8 * 1024 * 1024;

/// How long a process whose usage was folded is remembered. A report of it that comes later was under way for longer
/// than any stream lives.
pub const FOLDED_FOR: Duration = Duration::from_hours(30 * 24);

/// A place where logs are kept; shared by all tasks of a control plane, and by its replicas where the engine can.
///
/// The [module](self) says what an engine promises. Every engine runs the same contract tests.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Appends `entries` to `log`, the first at the revision after `expected`, and returns the new head.
    ///
    /// An append to a log that does not exist, with `expected` 0, makes it, with a new epoch. An append of nothing only
    /// compares `expected`.
    ///
    /// # Errors
    ///
    /// [`AppendError::Conflict`] when the head is not `expected`; [`AppendError::Invalid`] when an entry breaks a
    /// bound. Nothing was appended then. After [`AppendError::Store`] the outcome is known only by reading the head.
    async fn append(
        &self,
        log: &LogName,
        expected: Revision,
        entries: Vec<NewEntry>,
    ) -> Result<Head, AppendError> {
        self.append_at(log, expected.into(), entries).await
    }

    /// The same, where the writer may also say by its hash which entry it expects at the head: of a log that was replaced,
    /// the revision alone can be right.
    ///
    /// # Errors
    ///
    /// As [`append`](Self::append).
    async fn append_at(
        &self,
        log: &LogName,
        expected: Expected,
        entries: Vec<NewEntry>,
    ) -> Result<Head, AppendError>;

    /// The head of every log, in the order of their names.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn heads(&self) -> Result<Vec<Head>, StoreError>;

    /// The head of `log`; none when there is no such log.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn head(&self, log: &LogName) -> Result<Option<Head>, StoreError>;

    /// The entries of `log` after revision `after`, in order, at most `limit` and at most [`MAX_PAGE`].
    ///
    /// A page also ends when it holds [`MAX_PAGE_LEN`] bytes. Only an empty page means that nothing follows. A log that
    /// does not exist is an empty one.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn read(
        &self,
        log: &LogName,
        after: Revision,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError>;

    /// Gives `log` a new epoch, so that every sidecar takes it anew. To be called after a restore.
    ///
    /// # Errors
    ///
    /// [`StoreError::UnknownLog`], or when the store cannot be written.
    async fn rotate_epoch(&self, log: &LogName) -> Result<Head, StoreError>;

    /// Keeps a page of a state that is about to be saved, in the place of the same page.
    ///
    /// # Errors
    ///
    /// [`StoreError::ForeignState`] when the log has no entry of that revision, or when the store cannot be written.
    async fn save_state_page(&self, log: &LogName, page: StatePage) -> Result<(), StoreError>;

    /// Keeps `state` as the newest of `log`, unless a newer one is kept already. Its pages must have been saved.
    ///
    /// Of two states at the same revision the one of the higher format is newer.
    ///
    /// # Errors
    ///
    /// [`StoreError::ForeignState`] when the log has no entry of that revision and hash,
    /// [`StoreError::IncompleteState`] when a page is missing, or when the store cannot be written.
    async fn save_state(&self, log: &LogName, state: StateSnapshot) -> Result<(), StoreError>;

    /// The newest state of `log`.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn load_state(&self, log: &LogName) -> Result<Option<StateSnapshot>, StoreError>;

    /// Page `number` of a state of `log`; none when it is not kept, or not any more.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn load_state_page(
        &self,
        log: &LogName,
        revision: Revision,
        format: u32,
        number: u32,
    ) -> Result<Option<StatePage>, StoreError>;

    /// Removes a few pages of states that are older than the newest of `log`. False when there are none left.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn prune_state_pages(&self, log: &LogName) -> Result<bool, StoreError>;

    /// Keeps `rows`, each in place of the one with its key, whatever its times are: the later save wins, and of two in one
    /// call the later row.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn save_presence(&self, rows: Vec<PresenceRow>) -> Result<(), StoreError>;

    /// Removes the rows of `keys`; those that are absent are passed over.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn remove_presence(&self, keys: Vec<PresenceKey>) -> Result<(), StoreError>;

    /// All rows, in the order of their keys.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn load_presence(&self) -> Result<Vec<PresenceRow>, StoreError>;

    /// Merges `rows` into those with their keys: the larger counts, the earlier first use, the later last use. To save
    /// rows again, or late, changes nothing. All become durable together.
    ///
    /// Of a process that was folded only the times are merged, into the row of all that were: its counts are in there.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is merged then.
    async fn save_usage(&self, rows: Vec<UsageRow>) -> Result<(), StoreError>;

    /// Keeps `rows`, each in place of the one with its key; one without a payload only removes that one.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is changed then.
    async fn save_callers(&self, rows: Vec<CallersRow>) -> Result<(), StoreError>;

    /// Adds the rows of a process that has ended for good to those of all that have, at once. To fold it again changes
    /// nothing, as long as it is remembered: for [`FOLDED_FOR`] after `now`.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is folded then.
    async fn fold_usage(&self, run_id: &str, now: Timestamp) -> Result<(), StoreError>;

    /// All that was saved of the use of key versions.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn load_usage(&self) -> Result<StoredUsage, StoreError>;

    /// How far `log` was turned into deliveries; 0 at first.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn outbox_cursor(&self, log: &LogName) -> Result<Revision, StoreError>;

    /// Keeps `rows`, which follow from the entries of `log` after `from` up to `to`, and moves the cursor there, both
    /// or neither. False when the cursor is not at `from`: somebody else was first, and nothing was kept.
    ///
    /// A delivery that is there already stays as it is.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn project(
        &self,
        log: &LogName,
        from: Revision,
        to: Revision,
        rows: Vec<NewDelivery>,
    ) -> Result<bool, StoreError>;

    /// Takes deliveries that are due at `now`, the longest due first, at most `limit`: one of each webhook that has none
    /// under way. Nobody else gets them before `until`, unless they are settled; a claim that is never settled thus
    /// leads to another attempt.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is claimed then.
    async fn claim_deliveries(
        &self,
        now: Timestamp,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError>;

    /// Notes how an attempt ended. False when that is of no interest any more: the delivery is over, gone, or claimed
    /// anew. That it was taken always is of interest until it is over.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn settle_delivery(&self, settlement: Settlement) -> Result<bool, StoreError>;

    /// The deliveries to a webhook, the newest first, at most `limit`.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn deliveries(
        &self,
        keyring: &KeyringName,
        webhook: &str,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError>;

    /// Removes deliveries that are over, and gives up those that wait in too great a number, which are returned.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is changed then.
    async fn prune_deliveries(
        &self,
        now: Timestamp,
        retention: Retention,
    ) -> Result<Vec<Delivery>, StoreError>;

    /// Reads the primary store, and nothing more. What a sidecar holds is as fresh as the last success of this or of
    /// any other read.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn ping(&self) -> Result<(), StoreError>;
}

/// A keyring, or whatever else a log folds into, as of one revision.
#[derive(Clone, PartialEq, Eq)]
pub struct StateSnapshot {
    /// The last entry that it contains.
    pub revision: Revision,
    /// That entry's hash.
    pub hash: EntryHash,
    /// The format of `payload`; a reader that does not know it reads the log instead.
    pub format: u32,
    /// The state, or the beginning of it.
    pub payload: Vec<u8>,
    /// In how many pages the rest of it is.
    pub pages: u32,
}

/// A part of a [`StateSnapshot`]. A large state is written and read in parts, so that nobody waits for all of it.
#[derive(Clone, PartialEq, Eq)]
pub struct StatePage {
    /// Of the state.
    pub revision: Revision,
    /// The same.
    pub format: u32,
    /// Counted from 0.
    pub number: u32,
    /// The part.
    pub payload: Vec<u8>,
}

/// What is known of one process of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresenceRow {
    /// The sidecar.
    pub node: String,
    /// Its process.
    pub run_id: String,
    /// The cluster that it names as its own.
    pub cluster: String,
    /// Its version of relatch.
    pub version: String,
    /// The keyrings to which it subscribes.
    pub keyrings: Vec<String>,
    /// When it was last heard of.
    pub last_contact: Timestamp,
    /// It has told of every use of a key before this moment; none when it has told nothing.
    pub complete_until: Option<Timestamp>,
    /// It is gone, and may have served until then; none for one that may serve.
    pub gone_at: Option<Timestamp>,
    /// What lets it serve, and for how long, as JSON; none in rows of versions that did not keep that.
    pub serving: Option<String>,
}

/// Names a [`PresenceRow`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PresenceKey {
    /// The sidecar.
    pub(crate) node: String,
    /// Its process.
    pub(crate) run_id: String,
}

impl PresenceRow {
    /// What names it.
    #[must_use]
    pub fn key(&self) -> PresenceKey {
        PresenceKey {
            node: self.node.clone(),
            run_id: self.run_id.clone(),
        }
    }
}

impl fmt::Debug for StateSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateSnapshot")
            .field("revision", &self.revision)
            .field("hash", &self.hash)
            .field("format", &self.format)
            .field("payload_len", &self.payload.len())
            .field("pages", &self.pages)
            .finish()
    }
}

impl fmt::Debug for StatePage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StatePage")
            .field("revision", &self.revision)
            .field("format", &self.format)
            .field("number", &self.number)
            .field("payload_len", &self.payload.len())
            .finish()
    }
}
