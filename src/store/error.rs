//! Errors of a store, with advice.

use std::{error::Error, path::PathBuf, time::Duration};

use crate::{duration::written, key::Revision};

use super::{EntryError, Head, LogName};

/// The reason that an append failed.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Another writer was first, or the log is not the one that the caller knows: the head is then
    /// another entry, perhaps at the same revision.
    #[error("log {} is at revision {}, not at {expected}: read what was committed since, then try again", head.log, head.revision)]
    Conflict {
        /// The head that the caller expected.
        expected: Revision,
        /// The head that was found; at revision 0 if the log does not exist.
        head: Head,
    },
    /// The entries break a bound.
    #[error(transparent)]
    Invalid(#[from] EntryError),
    /// The store failed; only the head shows whether the entries were appended.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The reason that a store cannot be opened, read or written. `store` is a path or an address,
/// without credentials.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No store exists at this path.
    #[error(
        "there is no database at {store}: create one with `relatch control init`, or correct the path"
    )]
    Missing {
        /// The path of the missing database.
        store: String,
    },
    /// The database is missing, but its write-ahead log contains committed changes.
    #[error(
        "there is no database at {store}, but its write-ahead log {} still contains changes: put the database back, or move that file away to start with a new database",
        log.display()
    )]
    Orphaned {
        /// The path of the missing database.
        store: String,
        /// The write-ahead log that is left.
        log: PathBuf,
    },
    /// The path does not lead to a database of relatch.
    #[error(
        "{store} is not a database of relatch ({found}): correct the path; nothing was changed"
    )]
    NotRelatch {
        /// The path that was opened.
        store: String,
        /// A description of the file that was found.
        found: String,
    },
    /// A later version of relatch created or upgraded the database.
    #[error(
        "{store} has schema version {found}, and this relatch knows version {supported}: upgrade relatch; nothing was changed"
    )]
    NewerSchema {
        /// The path of the database.
        store: String,
        /// The schema version of the database.
        found: u32,
        /// The newest schema version that this version of relatch supports.
        supported: u32,
    },
    /// The database is damaged.
    #[error(
        "{store} is corrupt ({detail}): keep a copy of it, check the disk, and restore the last backup"
    )]
    Corrupt {
        /// The path of the database.
        store: String,
        /// The first problem that the check found.
        detail: String,
    },
    /// Another process holds the lock of the database.
    #[error("{store} stayed locked by another process for {}: stop that process or let it finish, then try again", written(*waited))]
    Locked {
        /// The path of the database.
        store: String,
        /// The time for which the call waited.
        waited: Duration,
    },
    /// The database cannot be written.
    #[error(
        "{store} is read-only: make the file, its directory and its file system writable for the user that runs relatch"
    )]
    ReadOnly {
        /// The path of the database.
        store: String,
    },
    /// The disk is full.
    #[error("there is no space left for {store}: free some space; the last write was not kept")]
    DiskFull {
        /// The path of the database.
        store: String,
    },
    /// The database was moved, removed or replaced while it was open.
    #[error(
        "{store} was moved, removed or replaced while it was open: stop relatch, put the database back, start again"
    )]
    Replaced {
        /// The path at which the database was.
        store: String,
    },
    /// The database cannot be opened.
    #[error(
        "cannot open {store}: it and its directory must be readable and writable for the user that runs relatch"
    )]
    CannotOpen {
        /// The path of the database.
        store: String,
        /// The error of the system or of SQLite.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The log does not exist.
    #[error("there is no log {log}: check its name")]
    UnknownLog {
        /// The name of the missing log.
        log: LogName,
    },
    /// The log has no entry with the revision and hash of the state.
    #[error(
        "the state of {log} at revision {revision} does not belong to its log: read the log again"
    )]
    ForeignState {
        /// The log of the state.
        log: LogName,
        /// The revision of the state.
        revision: Revision,
    },
    /// A page of the state was not saved.
    #[error("the state of {log} at revision {revision} lacks a page: save it again")]
    IncompleteState {
        /// The log of the state.
        log: LogName,
        /// The revision of the state.
        revision: Revision,
    },
    /// The system has no random bytes for an epoch.
    #[error("the operating system's random source failed ({0}): try again")]
    Random(getrandom::Error),
    /// The process is stopping.
    #[error("the store is closing because relatch is stopping: try again once it runs")]
    Closing,
    /// Any other failure.
    #[error("the store {store} failed: see the cause, then try again")]
    Failed {
        /// The path of the database.
        store: String,
        /// The error of the system or of SQLite.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl From<getrandom::Error> for StoreError {
    fn from(error: getrandom::Error) -> Self {
        Self::Random(error)
    }
}
