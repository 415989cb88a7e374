//! Opens a database, or creates one.
//!
//! A connection that cannot write checks a database first, so that a database that is refused stays
//! unchanged: the close of any other connection would empty the write-ahead log into the file.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, OpenFlags, TransactionBehavior, config::DbConfig};

use super::{
    place::{DatabasePlace, Fault},
    schema,
};
use crate::{draft, store::StoreError};

/// The number of compiled statements that a connection keeps: more than the sibling modules use, so
/// that each is compiled once.
const STATEMENT_CACHE: usize = 32;

/// The size in bytes to which the write-ahead log shrinks after it was emptied. It is many times
/// the size between two checkpoints, so that only an exceptional burst leads to a smaller file.
const WAL_SIZE_LIMIT: i64 = 64 * 1024 * 1024;

/// Opens the database at `place`, or creates it if `create` is set. Returns its reading and its
/// writing connection.
pub(super) fn open(
    mut place: DatabasePlace,
    create: bool,
) -> Result<(DatabasePlace, Connection, Connection), StoreError> {
    match fs::metadata(place.path()) {
        Ok(metadata) if metadata.is_dir() => {
            return Err(StoreError::NotRelatch {
                store: place.name(),
                found: "a directory".into(),
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(&place, create)?,
        Err(error) => return Err(place.cannot_open(error)),
    }
    let connections = connect(&place).map_err(|fault| place.explain(fault))?;
    place.note_identity()?;
    Ok((place, connections.0, connections.1))
}

fn connect(place: &DatabasePlace) -> Result<(Connection, Connection), Fault> {
    let reader = open_reader(place)?;
    schema::check(&reader, place)?;
    let mut writer = open_writer(place)?;
    schema::upgrade(&mut writer)?;
    Ok((reader, writer))
}

fn open_reader(place: &DatabasePlace) -> Result<Connection, Fault> {
    let reader = open_with(place.path(), place, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    reader.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    Ok(reader)
}

fn open_writer(place: &DatabasePlace) -> Result<Connection, Fault> {
    let writer = open_with(place.path(), place, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    check_writable(&writer, place)?;
    use_wal(&writer, place)?;
    // Syncs at every commit, so that a reported commit is on disk.
    writer.pragma_update(None, "synchronous", "FULL")?;
    writer.pragma_update(None, "journal_size_limit", WAL_SIZE_LIMIT)?;
    Ok(writer)
}

/// Returns an error if SQLite has opened a read-only file: the open itself succeeds then.
pub(super) fn check_writable(connection: &Connection, place: &DatabasePlace) -> Result<(), Fault> {
    if connection.is_readonly("main")? {
        return Err(StoreError::ReadOnly {
            store: place.name(),
        }
        .into());
    }
    Ok(())
}

fn use_wal(connection: &Connection, place: &DatabasePlace) -> Result<(), Fault> {
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if mode != "wal" {
        let cause = format!("its file system does not support a write-ahead log, only {mode:?}");
        return Err(StoreError::CannotOpen {
            store: place.name(),
            source: cause.into(),
        }
        .into());
    }
    Ok(())
}

fn open_with(path: &Path, place: &DatabasePlace, flags: OpenFlags) -> Result<Connection, Fault> {
    // A connection is used by one thread at a time.
    let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(place.busy_timeout())?;
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    connection.pragma_update(None, "foreign_keys", true)?;
    // A file from elsewhere may contain triggers and views; they cannot call functions with side
    // effects.
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "cell_size_check", true)?;
    Ok(connection)
}

/// Creates a database where none exists, if `create` is set.
fn make(place: &DatabasePlace, create: bool) -> Result<(), StoreError> {
    let missing = place.missing();
    // SQLite would replay the log of the lost database into the new one.
    if !create || matches!(missing, StoreError::Orphaned { .. }) {
        return Err(missing);
    }
    let suffix = draft_suffix()?;
    let draft = place.beside(&suffix);
    let made = build(&draft, place).and_then(|()| publish(&draft, place));
    for suffix in ["", "-journal", "-wal", "-shm"] {
        remove(&draft, suffix);
    }
    made
}

/// Whether a database exists at `place`.
pub(super) fn is_at(place: &DatabasePlace) -> Result<bool, StoreError> {
    match fs::metadata(place.path()) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if place.path().is_symlink() {
                return Err(place.cannot_open(error));
            }
            refuse_orphan(place)?;
            Ok(false)
        }
        Err(error) => Err(place.cannot_open(error)),
    }
}

/// Refuses the write-ahead log of a lost database: SQLite would replay it into a new one.
fn refuse_orphan(place: &DatabasePlace) -> Result<(), StoreError> {
    match place.missing() {
        orphaned @ StoreError::Orphaned { .. } => Err(orphaned),
        _ => Ok(()),
    }
}

/// Returns a suffix for a draft, which no other process uses at the same time.
#[expect(clippy::disallowed_methods, reason = "this is the home of drafts")]
fn draft_suffix() -> Result<String, getrandom::Error> {
    Ok(format!(".new-{:016x}", getrandom::u64()?))
}

/// Builds a whole database at `draft`, so that the path itself never contains an incomplete one.
fn build(draft: &Path, place: &DatabasePlace) -> Result<(), StoreError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(draft)
        .map_err(|error| place.cannot_open(error))?;
    let fill = || -> Result<(), Fault> {
        let mut connection = open_with(draft, place, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive)?;
        schema::create(&transaction)?;
        transaction.commit()?;
        // The switch comes last, so that all content is in the file itself.
        use_wal(&connection, place)
    };
    fill().map_err(|fault| place.explain(fault))
}

/// Links the database at `draft` to its final path, durably. A database that another process
/// created meanwhile stays.
fn publish(draft: &Path, place: &DatabasePlace) -> Result<(), StoreError> {
    match fs::hard_link(draft, place.path()) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(place.cannot_open(error)),
    }
    draft::sync_directory_of(place.path()).map_err(|error| place.cannot_open(error))
}

/// Removes a file of the draft, if it exists. A file that cannot be removed does no harm.
fn remove(draft: &Path, suffix: &str) {
    let mut path = draft.as_os_str().to_owned();
    path.push(suffix);
    drop(fs::remove_file(PathBuf::from(path)));
}
