//! The tables, and the marks by which a database is known as ours.

use rusqlite::{Connection, Transaction};

use super::place::{Fault, Place};
use crate::store::StoreError;

/// Marks the file as a database of relatch: `rlch`.
const APPLICATION_ID: i32 = 0x726c_6368;

/// The version of [`TABLES`].
const VERSION: u32 = 1;

/// Times are milliseconds since the Unix epoch. The triggers stand against accidents; against intent stands the chain.
const TABLES: &str = "
    CREATE TABLE logs (
        name     TEXT PRIMARY KEY,
        epoch    INTEGER NOT NULL CHECK (epoch > 0),
        revision INTEGER NOT NULL CHECK (revision > 0),
        hash     BLOB NOT NULL CHECK (length(hash) = 32)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE entries (
        log       TEXT NOT NULL REFERENCES logs (name),
        revision  INTEGER NOT NULL CHECK (revision > 0),
        at        INTEGER NOT NULL,
        actor     TEXT NOT NULL,
        kind      TEXT NOT NULL,
        payload   BLOB NOT NULL,
        prev_hash BLOB NOT NULL CHECK (length(prev_hash) = 32),
        hash      BLOB NOT NULL CHECK (length(hash) = 32),
        PRIMARY KEY (log, revision)
    ) STRICT, WITHOUT ROWID;

    CREATE TRIGGER entries_are_never_updated BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries of a log are never updated'); END;

    CREATE TRIGGER entries_are_never_deleted BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries of a log are never deleted'); END;

    CREATE TABLE states (
        log      TEXT PRIMARY KEY REFERENCES logs (name),
        revision INTEGER NOT NULL CHECK (revision > 0),
        hash     BLOB NOT NULL CHECK (length(hash) = 32),
        format   INTEGER NOT NULL CHECK (format >= 0),
        payload  BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE presence (
        node         TEXT NOT NULL,
        boot_id      TEXT NOT NULL,
        cluster      TEXT NOT NULL,
        version      TEXT NOT NULL,
        keyrings     TEXT NOT NULL CHECK (json_valid(keyrings)),
        last_contact INTEGER NOT NULL,
        PRIMARY KEY (node, boot_id)
    ) STRICT, WITHOUT ROWID;
";

/// Makes the tables and leaves the marks.
pub(super) fn create(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute_batch(TABLES)?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", VERSION)
}

/// Checks the marks, then every page.
///
/// Reading all pages takes about a second per gigabyte, once per start. It finds a damaged tree; a damaged byte within
/// a payload is found by the hash chain.
pub(super) fn check(connection: &Connection, place: &Place) -> Result<(), Fault> {
    let id: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    if id != APPLICATION_ID {
        let pages: u64 = connection
            .pragma_query_value(None, "page_count", |row| row.get::<_, u32>(0))?
            .into();
        let found = if pages == 0 {
            "an empty file".into()
        } else {
            format!("a SQLite database with application id {id:#x}")
        };
        let store = place.name();
        return Err(StoreError::NotRelatch { store, found }.into());
    }
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found > VERSION {
        return Err(StoreError::NewerSchema {
            store: place.name(),
            found,
            supported: VERSION,
        }
        .into());
    }
    if found < VERSION {
        return Err(StoreError::NotRelatch {
            store: place.name(),
            found: format!("a SQLite database with schema version {found}"),
        }
        .into());
    }
    let detail: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if detail != "ok" {
        let store = place.name();
        return Err(StoreError::Corrupt { store, detail }.into());
    }
    Ok(())
}
