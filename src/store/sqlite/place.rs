//! The path of a database, and the meaning of its errors.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::ErrorCode;

use crate::store::StoreError;

/// The file of a database.
#[derive(Debug)]
pub(super) struct DatabasePlace {
    path: PathBuf,
    busy_timeout: Duration,
    /// Device and inode of the file that is open; none before the open.
    identity: Option<(u64, u64)>,
}

/// An error of a piece of work on a connection.
#[derive(Debug)]
pub(super) enum Fault {
    /// An error of SQLite, to be explained by the [`DatabasePlace`].
    Sqlite(rusqlite::Error),
    /// An error that is already explained.
    Store(StoreError),
}

impl DatabasePlace {
    /// Describes the database at `path`, for whose lock a call waits up to `busy_timeout`.
    pub(super) fn new(path: PathBuf, busy_timeout: Duration) -> Self {
        Self {
            path,
            busy_timeout,
            identity: None,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn busy_timeout(&self) -> Duration {
        self.busy_timeout
    }

    /// Returns the path as text, for messages.
    pub(super) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Returns the path followed by `suffix`, where SQLite and relatch keep files of the database.
    pub(super) fn beside(&self, suffix: &str) -> PathBuf {
        let mut path = OsString::from(&self.path);
        path.push(suffix);
        path.into()
    }

    /// Returns the reason why there is no database: none was created, or it was removed but its log
    /// is left.
    pub(super) fn missing(&self) -> StoreError {
        let (store, log) = (self.name(), self.beside("-wal"));
        if fs::metadata(&log).is_ok_and(|metadata| metadata.len() > 0) {
            StoreError::Orphaned { store, log }
        } else {
            StoreError::Missing { store }
        }
    }

    /// Records the device and inode of the open file.
    pub(super) fn note_identity(&mut self) -> Result<(), StoreError> {
        let metadata = fs::metadata(&self.path).map_err(|error| self.cannot_open(error))?;
        self.identity = Some((metadata.dev(), metadata.ino()));
        Ok(())
    }

    /// Checks that the open file is still at its path. A write to a file that was removed succeeds,
    /// but is lost.
    pub(super) fn check_present(&self) -> Result<(), StoreError> {
        let found = match fs::metadata(&self.path) {
            Ok(metadata) => Some((metadata.dev(), metadata.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(self.cannot_open(error)),
        };
        if found.is_some() && found == self.identity {
            Ok(())
        } else {
            Err(StoreError::Replaced { store: self.name() })
        }
    }

    pub(super) fn cannot_open(&self, error: io::Error) -> StoreError {
        let store = self.name();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::DiskFull { store }
            }
            io::ErrorKind::ReadOnlyFilesystem => StoreError::ReadOnly { store },
            _ => StoreError::CannotOpen {
                store,
                source: error.into(),
            },
        }
    }

    /// Returns the error that explains `fault` to a user.
    pub(super) fn explain(&self, fault: Fault) -> StoreError {
        let error = match fault {
            Fault::Sqlite(error) => error,
            Fault::Store(error) => return error,
        };
        let store = self.name();
        // These errors come from rows that break the rules of their table.
        if let rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::Utf8Error(..) = error
        {
            let detail = error.to_string();
            return StoreError::Corrupt { store, detail };
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Locked {
                store,
                waited: self.busy_timeout,
            },
            Some(ErrorCode::ReadOnly) => StoreError::ReadOnly { store },
            Some(ErrorCode::DiskFull) => StoreError::DiskFull { store },
            Some(ErrorCode::DatabaseCorrupt) => StoreError::Corrupt {
                store,
                detail: error.to_string(),
            },
            Some(ErrorCode::NotADatabase) => StoreError::NotRelatch {
                store,
                found: "another file, or its beginning is damaged".into(),
            },
            Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => StoreError::CannotOpen {
                store,
                source: error.into(),
            },
            Some(_) | None => StoreError::Failed {
                store,
                source: error.into(),
            },
        }
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
