//! The tables, and the marks that identify a database of relatch.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::place::{DatabasePlace, Fault};
use crate::store::StoreError;

/// The application id of a database of relatch: `rlch`.
const APPLICATION_ID: i32 = 0x726c_6368;

/// The version of the tables: that of [`TABLES`] and one more for each of [`UPGRADES`].
const VERSION: u32 = 4;

/// The version of [`TABLES`].
const FIRST_VERSION: u32 = 1;

/// The upgrades from each version to the next. A version that was released is never edited.
const UPGRADES: &[&[&str]] = &[&[DELIVERIES, USAGE], &[STATE_PAGES], &[RUNS]];

/// Version 1. Times are milliseconds since the Unix epoch. The triggers protect against accidents;
/// the hash chain protects against intent.
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

/// Version 2: the usage of key versions, and the time up to which each sidecar has reported it
/// completely. The process `''` stands for the sum of all processes that have ended.
const USAGE: &str = "
    CREATE TABLE usage (
        keyring    TEXT NOT NULL,
        key_id     TEXT NOT NULL,
        version    INTEGER NOT NULL CHECK (version > 0),
        boot_id    TEXT NOT NULL,
        requests   INTEGER NOT NULL CHECK (requests >= 0),
        denied     INTEGER NOT NULL CHECK (denied >= 0),
        first_used INTEGER,
        last_used  INTEGER,
        PRIMARY KEY (keyring, key_id, version, boot_id)
    ) STRICT, WITHOUT ROWID;

    CREATE INDEX usage_by_boot ON usage (boot_id);

    CREATE TABLE usage_callers (
        keyring TEXT NOT NULL,
        key_id  TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version > 0),
        boot_id TEXT NOT NULL,
        payload BLOB NOT NULL,
        PRIMARY KEY (keyring, key_id, version, boot_id)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE usage_folded (
        boot_id   TEXT PRIMARY KEY CHECK (boot_id <> ''),
        folded_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;

    ALTER TABLE presence ADD COLUMN complete_until INTEGER;
    ALTER TABLE presence ADD COLUMN gone_at INTEGER;
";

/// Version 3: states in pages.
const STATE_PAGES: &str = "
    ALTER TABLE states ADD COLUMN pages INTEGER NOT NULL DEFAULT 0 CHECK (pages >= 0);

    CREATE TABLE state_pages (
        log      TEXT NOT NULL REFERENCES logs (name),
        revision INTEGER NOT NULL CHECK (revision > 0),
        format   INTEGER NOT NULL CHECK (format >= 0),
        number   INTEGER NOT NULL CHECK (number >= 0),
        payload  BLOB NOT NULL,
        PRIMARY KEY (log, revision, format, number)
    ) STRICT;
";

/// Version 4: a process of a sidecar is called a run, and the table records what may still serve.
const RUNS: &str = "
    ALTER TABLE presence RENAME COLUMN boot_id TO run_id;
    ALTER TABLE presence ADD COLUMN serving TEXT CHECK (json_valid(serving));
    ALTER TABLE usage RENAME COLUMN boot_id TO run_id;
    ALTER TABLE usage_callers RENAME COLUMN boot_id TO run_id;
    ALTER TABLE usage_folded RENAME COLUMN boot_id TO run_id;
";

/// Version 2: deliveries to webhooks, and the revision up to which each log was turned into
/// deliveries.
const DELIVERIES: &str = "
    CREATE TABLE outbox (
        log      TEXT PRIMARY KEY REFERENCES logs (name),
        revision INTEGER NOT NULL CHECK (revision > 0)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE deliveries (
        webhook         TEXT NOT NULL,
        event           TEXT NOT NULL,
        keyring         TEXT NOT NULL,
        revision        INTEGER NOT NULL CHECK (revision > 0),
        kind            TEXT NOT NULL,
        body            TEXT NOT NULL CHECK (json_valid(body)),
        created_at      INTEGER NOT NULL,
        state           TEXT NOT NULL CHECK (state IN ('waiting', 'delivered', 'given_up')),
        attempts        INTEGER NOT NULL CHECK (attempts >= 0),
        next_attempt_at INTEGER NOT NULL,
        claimed_until   INTEGER NOT NULL,
        settled_at      INTEGER,
        last_status     INTEGER,
        last_error      TEXT,
        PRIMARY KEY (webhook, event)
    ) STRICT;

    CREATE INDEX deliveries_due ON deliveries (next_attempt_at) WHERE state = 'waiting';
    CREATE INDEX deliveries_claimed ON deliveries (webhook, claimed_until) WHERE state = 'waiting';
";

/// Creates the tables and sets the marks.
pub(super) fn create(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute_batch(TABLES)?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    upgrade_from(transaction, FIRST_VERSION)
}

/// Upgrades the tables of an earlier version to this one, completely or not at all.
pub(super) fn upgrade(connection: &mut Connection) -> rusqlite::Result<()> {
    if version(connection)? == VERSION {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have been first.
    let found = version(&transaction)?;
    if found < VERSION {
        upgrade_from(&transaction, found)?;
        tracing::info!(
            from = found,
            to = VERSION,
            "the tables of the store are upgraded"
        );
    }
    transaction.commit()
}

fn upgrade_from(transaction: &Transaction<'_>, found: u32) -> rusqlite::Result<()> {
    let done = usize::try_from(found - FIRST_VERSION).unwrap_or(usize::MAX);
    for step in UPGRADES.iter().skip(done).copied().flatten() {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "user_version", VERSION)
}

fn version(connection: &Connection) -> rusqlite::Result<u32> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// Checks the marks of a database: its application id and its schema version.
pub(super) fn check_marks(id: i32, version: u32, place: &DatabasePlace) -> Result<(), StoreError> {
    if id != APPLICATION_ID {
        return Err(StoreError::NotRelatch {
            store: place.name(),
            found: format!("a SQLite database with application id {id:#x}"),
        });
    }
    if version > VERSION {
        return Err(StoreError::NewerSchema {
            store: place.name(),
            found: version,
            supported: VERSION,
        });
    }
    if version < FIRST_VERSION {
        return Err(StoreError::NotRelatch {
            store: place.name(),
            found: format!("a SQLite database with schema version {version}"),
        });
    }
    Ok(())
}

/// Checks the marks, then every page.
///
/// Reading all pages takes about a second per gigabyte, once per start. The check finds a damaged
/// tree; the hash chain finds a damaged byte within a payload.
pub(super) fn check(connection: &Connection, place: &DatabasePlace) -> Result<(), Fault> {
    let pages: u32 = connection.pragma_query_value(None, "page_count", |row| row.get(0))?;
    if pages == 0 {
        return Err(StoreError::NotRelatch {
            store: place.name(),
            found: "an empty file".into(),
        }
        .into());
    }
    let id = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    check_marks(id, version(connection)?, place)?;
    let detail: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if detail != "ok" {
        let store = place.name();
        return Err(StoreError::Corrupt { store, detail }.into());
    }
    Ok(())
}
