//! The store: an append-only log of changes per keyring, and what stands beside the logs.
//!
//! A [`log`](LogName) is a gapless sequence of [`LogEntry`]s, each chained to the one before it by
//! [`chain`]. A commit appends entries at the head that the writer expects. This alone orders the
//! replicas of the control plane: the replica that loses a race gets a
//! [conflict](AppendError::Conflict), reads the entries that it missed, validates its change again
//! and retries.
//!
//! The store holds for each log its [`Head`] and the newest [`StateSnapshot`], from which a replica
//! starts without reading the whole log. A [`PresenceRow`] describes one process of a sidecar. A
//! [`UsageRow`] counts the checks with which one process saw a key version used. A [`Delivery`] is
//! one event for one webhook. Deliveries are created from the log up to a cursor, in the
//! transaction that moves the cursor.
//!
//! # What every engine promises
//!
//! - **Order of revisions is order of commits.** An entry that can be read has all entries before
//!   it. A reader that asks for the entries after the last revision that it saw therefore never
//!   skips and never repeats an entry.
//! - **All or nothing.** The entries of an append become visible together, with the head that names
//!   the last of them.
//! - **Durable.** Entries are on disk before [`append`](Store::append) returns.
//! - **Primary.** Every read sees every append that returned before the read began, on any replica.
//! - **Byte for byte.** A read returns the bytes that were appended.
//! - **No repair.** A store that cannot be understood is reported and not changed.
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

/// The most entries in one append. An append holds the only write lock; an append of this size
/// needs well under a second.
pub const MAX_APPEND: usize = 10_000;

/// The most bytes of actor, kind and payload in one entry. The largest change has a few kilobytes;
/// a larger entry than this would be a mistake, and every replica would have to read it for ever.
pub const MAX_ENTRY_LEN: usize = 1024 * 1024;

/// The most entries in one page: enough to read a long log at full speed, few enough to hold in
/// memory.
pub const MAX_PAGE: usize = 1_000;

/// The size at which a page ends early, in bytes of payload, so that a page of large entries also
/// fits into memory.
pub const MAX_PAGE_LEN: usize = 8 * 1024 * 1024;

/// The time for which the store remembers a process whose usage was folded: 30 days. No stream
/// lives that long, so no report of the process can arrive later.
pub const FOLDED_FOR: Duration = Duration::from_hours(30 * 24);

/// Storage for logs. All tasks of a control plane share it, and so do its replicas if the engine
/// allows that.
///
/// The [module](self) lists the guarantees of every engine. Every engine runs the same contract
/// tests.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Appends `entries` to `log`, the first at the revision after `expected`, and returns the new
    /// head.
    ///
    /// An append with `expected` 0 to a log that does not exist creates the log, with a new epoch.
    /// An append without entries only compares `expected`.
    ///
    /// # Errors
    ///
    /// [`AppendError::Conflict`] when the head is not `expected`; [`AppendError::Invalid`] when an
    /// entry breaks a bound. In both cases nothing was appended. After [`AppendError::Store`], only
    /// a read of the head shows whether the entries were appended.
    async fn append(
        &self,
        log: &LogName,
        expected: Revision,
        entries: Vec<NewEntry>,
    ) -> Result<Head, AppendError> {
        self.append_at(log, expected.into(), entries).await
    }

    /// Appends like [`append`](Self::append), but `expected` may also contain the hash of the entry
    /// at the head. If a log was replaced, its revision alone can match by chance.
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

    /// Returns the head of every log, in the order of their names.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn heads(&self) -> Result<Vec<Head>, StoreError>;

    /// Returns the head of `log`; none if the log does not exist.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn head(&self, log: &LogName) -> Result<Option<Head>, StoreError>;

    /// Returns the entries of `log` after revision `after`, in order, at most `limit` and at most
    /// [`MAX_PAGE`].
    ///
    /// A page also ends when it contains [`MAX_PAGE_LEN`] bytes of payload. Only an empty page
    /// means that no entries follow. A log that does not exist reads as an empty log.
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

    /// Sets a new epoch for `log`, so that every sidecar loads it again. Call this after a restore.
    ///
    /// # Errors
    ///
    /// [`StoreError::UnknownLog`], or when the store cannot be written.
    async fn rotate_epoch(&self, log: &LogName) -> Result<Head, StoreError>;

    /// Saves a page of a state before the state itself, and replaces the same page.
    ///
    /// # Errors
    ///
    /// [`StoreError::ForeignState`] when the log has no entry of that revision, or when the store cannot be written.
    async fn save_state_page(&self, log: &LogName, page: StatePage) -> Result<(), StoreError>;

    /// Saves `state` as the newest of `log`, unless a newer one is already saved. Its pages must be
    /// saved before.
    ///
    /// Of two states at the same revision, the one with the higher format is newer.
    ///
    /// # Errors
    ///
    /// [`StoreError::ForeignState`] when the log has no entry of that revision and hash,
    /// [`StoreError::IncompleteState`] when a page is missing, or when the store cannot be written.
    async fn save_state(&self, log: &LogName, state: StateSnapshot) -> Result<(), StoreError>;

    /// Returns the newest state of `log`; none if no state was saved.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn load_state(&self, log: &LogName) -> Result<Option<StateSnapshot>, StoreError>;

    /// Returns page `number` of a state of `log`; none if the page was not saved, or was deleted.
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

    /// Deletes a few pages of states that are older than the newest of `log`. Returns false if
    /// there was none to delete.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn prune_state_pages(&self, log: &LogName) -> Result<bool, StoreError>;

    /// Saves `rows` and replaces the rows with the same keys, whatever their times are: the later
    /// save wins, and of two rows in one call the later row.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn save_presence(&self, rows: Vec<PresenceRow>) -> Result<(), StoreError>;

    /// Deletes the rows of `keys`; it ignores keys without a row.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn remove_presence(&self, keys: Vec<PresenceKey>) -> Result<(), StoreError>;

    /// Returns all rows, in the order of their keys.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn load_presence(&self) -> Result<Vec<PresenceRow>, StoreError>;

    /// Merges `rows` into the rows with the same keys. The larger counts win, the earlier first use
    /// and the later last use. A row that is saved again, or late, changes nothing. All rows become
    /// durable together.
    ///
    /// For a process that was folded, only the times are merged, into the row that sums all folded
    /// processes: that row already contains its counts.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is merged then.
    async fn save_usage(&self, rows: Vec<UsageRow>) -> Result<(), StoreError>;

    /// Saves `rows` and replaces the rows with the same keys; a row without a payload only deletes
    /// the saved row.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is changed then.
    async fn save_callers(&self, rows: Vec<CallersRow>) -> Result<(), StoreError>;

    /// Adds the rows of a process that has ended for good to the rows that sum all such processes,
    /// in one transaction. A second fold of the same process changes nothing while the first is
    /// remembered: for [`FOLDED_FOR`] after `now`.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is folded then.
    async fn fold_usage(&self, run_id: &str, now: Timestamp) -> Result<(), StoreError>;

    /// Returns all saved usage of key versions.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn load_usage(&self) -> Result<StoredUsage, StoreError>;

    /// Returns the last revision of `log` for which deliveries were created; 0 at first.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn outbox_cursor(&self, log: &LogName) -> Result<Revision, StoreError>;

    /// Saves `rows`, which follow from the entries of `log` after `from` up to `to`, and moves the
    /// cursor to `to`, both or neither. Returns false if the cursor is not at `from`: another
    /// replica was first, and nothing was saved.
    ///
    /// A delivery that already exists stays unchanged.
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

    /// Claims deliveries that are due at `now`, the longest due first, at most `limit`: one for
    /// each webhook that has no attempt in progress. No other claim returns them before `until`,
    /// unless they are settled. A claim that is never settled therefore leads to another attempt.
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

    /// Records the result of an attempt. Returns false if the result no longer matters: the
    /// delivery is complete, deleted, or claimed again. A result that the webhook accepted the
    /// event matters until the delivery is complete.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    async fn settle_delivery(&self, settlement: Settlement) -> Result<bool, StoreError>;

    /// Returns the deliveries to a webhook, the newest first, at most `limit`.
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

    /// Deletes complete deliveries as `retention` requires. Also gives up the oldest waiting
    /// deliveries of a webhook with more than [`Retention::max_waiting`], except one with an
    /// attempt in progress, and returns the given-up ones.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; nothing is changed then.
    async fn prune_deliveries(
        &self,
        now: Timestamp,
        retention: Retention,
    ) -> Result<Vec<Delivery>, StoreError>;

    /// Reads the primary store, to prove that it can be read. The keyrings of the sidecars are as
    /// fresh as the last successful read, of this or any other kind.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    async fn ping(&self) -> Result<(), StoreError>;
}

/// The state that a log folds into, such as a keyring, as of one revision.
#[derive(Clone, PartialEq, Eq)]
pub struct StateSnapshot {
    /// The revision of the last entry that the state contains.
    pub revision: Revision,
    /// The hash of that entry.
    pub hash: EntryHash,
    /// The format of `payload`; a reader that does not know it reads the log instead.
    pub format: u32,
    /// The state; if there are pages, its beginning.
    pub payload: Vec<u8>,
    /// The number of pages that contain the rest of the state.
    pub pages: u32,
}

/// A part of a [`StateSnapshot`]. A large state is written and read in parts, so that other calls
/// do not wait for all of it.
#[derive(Clone, PartialEq, Eq)]
pub struct StatePage {
    /// The revision of the state.
    pub revision: Revision,
    /// The format of the state.
    pub format: u32,
    /// The number of the page, counted from 0.
    pub number: u32,
    /// The part of the state.
    pub payload: Vec<u8>,
}

/// The saved facts about one process of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresenceRow {
    /// The node id of the sidecar.
    pub node: String,
    /// The run: one process of the sidecar.
    pub run_id: String,
    /// The cluster that the sidecar names.
    pub cluster: String,
    /// The version of relatch that the process runs.
    pub version: String,
    /// The keyrings to which it subscribes.
    pub keyrings: Vec<String>,
    /// The time of the last message from the process.
    pub last_contact: Timestamp,
    /// The process has reported every use of a key before this time; none if it has reported
    /// nothing.
    pub complete_until: Option<Timestamp>,
    /// The time until which a process that is gone may have served; none while it may still serve.
    pub gone_at: Option<Timestamp>,
    /// The grounds on which the process may serve, and for how long, as JSON; none in rows of
    /// versions that did not save them.
    pub serving: Option<String>,
}

/// The key of a [`PresenceRow`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PresenceKey {
    pub(crate) node: String,
    pub(crate) run_id: String,
}

impl PresenceRow {
    /// Returns the key of the row.
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
