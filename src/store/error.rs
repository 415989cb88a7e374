//! What goes wrong with a store, and what to do about it.

use std::{error::Error, path::PathBuf, time::Duration};

use crate::{duration::written, key::Revision};

use super::{EntryError, Head, LogName};

/// Why an append was not made.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Another writer was first, or the log is not what the caller takes it for: at the same revision, the head is then
    /// another entry.
    #[error("log {} is at revision {}, not at {expected}: read what was committed since, then try again", head.log, head.revision)]
    Conflict {
        /// The head that the caller expected.
        expected: Revision,
        /// The head that was found; at revision 0 when there is no such log.
        head: Head,
    },
    /// The entries break a bound.
    #[error(transparent)]
    Invalid(#[from] EntryError),
    /// The store failed; whether the entries were appended, the head says.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a store could not be opened, read or written. `store` is a path or an address, without credentials.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no store there.
    #[error(
        "there is no database at {store}: create one with `relatch control init`, or correct the path"
    )]
    Missing {
        /// Where it was looked for.
        store: String,
    },
    /// The database is gone, but committed changes are left beside it.
    #[error(
        "there is no database at {store}, but its write-ahead log {} has changes of it: put the database back, or move that file away to start with a new database",
        log.display()
    )]
    Orphaned {
        /// Where it was looked for.
        store: String,
        /// What is left.
        log: PathBuf,
    },
    /// Something else is there.
    #[error(
        "{store} is not a database of relatch ({found}): correct the path; nothing was changed"
    )]
    NotRelatch {
        /// Where it is.
        store: String,
        /// What was found.
        found: String,
    },
    /// A later relatch made it.
    #[error(
        "{store} has schema version {found}, and this relatch knows version {supported}: upgrade relatch; nothing was changed"
    )]
    NewerSchema {
        /// Where it is.
        store: String,
        /// Its version.
        found: u32,
        /// The newest version that is understood.
        supported: u32,
    },
    /// It is damaged.
    #[error(
        "{store} is corrupt ({detail}): keep a copy of it, check the disk, and restore the last backup"
    )]
    Corrupt {
        /// Where it is.
        store: String,
        /// What the check found.
        detail: String,
    },
    /// Another process holds it.
    #[error("{store} stayed locked by another process for {}: end that process or let it finish, then try again", written(*waited))]
    Locked {
        /// Where it is.
        store: String,
        /// For how long it was tried.
        waited: Duration,
    },
    /// It cannot be written.
    #[error(
        "{store} is read-only: make the file, its directory and its file system writable for the user that runs relatch"
    )]
    ReadOnly {
        /// Where it is.
        store: String,
    },
    /// There is no space left.
    #[error("there is no space left for {store}: free some space; the last write was not kept")]
    DiskFull {
        /// Where it is.
        store: String,
    },
    /// It was taken away while it was open.
    #[error(
        "{store} was moved, removed or replaced while it was open: stop relatch, put the database back, start again"
    )]
    Replaced {
        /// Where it was.
        store: String,
    },
    /// It cannot be opened.
    #[error(
        "cannot open {store}: it and its directory must be readable and writable for the user that runs relatch"
    )]
    CannotOpen {
        /// Where it is.
        store: String,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// There is no such log.
    #[error("there is no log {log}: check its name")]
    UnknownLog {
        /// The name.
        log: LogName,
    },
    /// A state that no entry of the log leads to.
    #[error(
        "the state of {log} at revision {revision} does not belong to its log: read the log again"
    )]
    ForeignState {
        /// The log.
        log: LogName,
        /// The state's revision.
        revision: Revision,
    },
    /// A state of which a page was not saved.
    #[error("the state of {log} at revision {revision} lacks a page: save it again")]
    IncompleteState {
        /// The log.
        log: LogName,
        /// The state's revision.
        revision: Revision,
    },
    /// No epoch could be drawn.
    #[error("the operating system's random source failed ({0}): try again")]
    Random(getrandom::Error),
    /// The process is ending.
    #[error("the store is closing because relatch is stopping: try again once it runs")]
    Closing,
    /// Anything else.
    #[error("the store {store} failed: see the cause, then try again")]
    Failed {
        /// Where it is.
        store: String,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl From<getrandom::Error> for StoreError {
    fn from(error: getrandom::Error) -> Self {
        Self::Random(error)
    }
}
