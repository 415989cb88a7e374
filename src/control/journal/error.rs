//! The errors of a log that cannot be followed, and of a change that is not committed.

use std::{fmt, sync::Arc};

use crate::{
    key::{ApplyError, OperationRefusal, Revision},
    store::{EntryHash, Head, LogEntry, LogName, StoreError},
};

use super::CONFLICTS;

/// A change was not committed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The change was refused.
    #[error(transparent)]
    Refused(#[from] OperationRefusal),
    /// Other writers were first too many times in a row.
    #[error("other writers were first {CONFLICTS} times in a row; try again")]
    Contended,
    /// The log cannot be followed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The operating system's random source failed.
    #[error(transparent)]
    Random(#[from] crate::key::RandomError),
}

/// A log cannot be read, or its history is not possible.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An entry breaks a bound of the store.
    #[error(transparent)]
    Entry(#[from] crate::store::EntryError),
    /// A transaction with several commits failed.
    #[error(transparent)]
    Shared(Arc<LogError>),
    /// An entry cannot be decoded.
    #[error(
        "revision {revision} of log {log} cannot be understood: it was written by a newer relatch, or tampered with; see `relatch audit verify`"
    )]
    Payload {
        /// The log of the entry.
        log: LogName,
        /// The revision of the entry.
        revision: Revision,
        /// The error in the entry's JSON.
        source: serde_json::Error,
    },
    /// An entry contradicts the entries before it.
    #[error(
        "revision {revision} of log {log} contradicts the revisions before it; see `relatch audit verify`"
    )]
    Apply {
        /// The log of the entry.
        log: LogName,
        /// The revision of the entry.
        revision: Revision,
        /// The reason why the change is not possible.
        source: ApplyError,
    },
    /// The store has another history than the one that was read from it.
    #[error(
        "log {log} was read up to {held}, and the store has {found}: the store was restored or replaced under the running process; stop relatch, and start it once with --new-epoch (docs/operating.md, \"Backup and restore\")"
    )]
    OtherHistory {
        /// The log with the other history.
        log: LogName,
        /// The position up to which the log was read.
        held: Position,
        /// The position that the store has in its place.
        found: Position,
    },
}

/// A place in the history of a log: an entry, with all before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The revision of the entry; 0 before the first one.
    pub(crate) revision: Revision,
    /// The hash of the entry.
    pub(crate) hash: EntryHash,
}

impl Position {
    /// Checks that a log that was read up to this position may have the head `head` by now.
    ///
    /// # Errors
    ///
    /// When the head is before this position, or is another entry at it.
    pub(crate) fn check(self, head: &Head) -> Result<(), LogError> {
        let found = Self {
            revision: head.revision,
            hash: head.hash,
        };
        if found.revision > self.revision || found == self {
            return Ok(());
        }
        Err(self.unlike(&head.log, found))
    }

    /// Checks that `next` is the entry that follows this position.
    ///
    /// # Errors
    ///
    /// When it follows another entry.
    pub(crate) fn check_next(self, next: &LogEntry) -> Result<(), LogError> {
        if next.prev_hash == self.hash {
            return Ok(());
        }
        let found = Self {
            revision: self.revision,
            hash: next.prev_hash,
        };
        Err(self.unlike(&next.log, found))
    }

    /// Returns the error of a store that has `found` in the place of this position.
    #[must_use]
    pub(crate) fn unlike(self, log: &LogName, found: Self) -> LogError {
        LogError::OtherHistory {
            log: log.clone(),
            held: self,
            found,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "revision {} (hash {})", self.revision, self.hash)
    }
}
