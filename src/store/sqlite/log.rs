//! Logs and their heads.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params, types::Type};

use super::place::Fault;
use crate::{
    key::{Epoch, Revision, Timestamp},
    store::{
        EntryHash, Expected, Head, LogEntry, LogName, MAX_PAGE, MAX_PAGE_LEN, NewEntry, StoreError,
        chain, entry::random_epoch,
    },
};

/// The result of an append.
pub(super) enum AppendOutcome {
    /// The entries were appended; this is the new head.
    Appended(Head),
    /// Nothing was appended: the head is this one, not the expected one.
    Conflict(Head),
}

/// A time that does not fit into a [`Timestamp`].
#[derive(Debug, thiserror::Error)]
#[error("{0} ms is not a time between 1970 and 9999")]
struct TimeError(i64);

pub(super) fn append(
    transaction: Transaction<'_>,
    log: LogName,
    expected: Expected,
    entries: Vec<NewEntry>,
) -> Result<AppendOutcome, Fault> {
    let mut head = head(&transaction, &log)?.unwrap_or_else(|| Head::absent(log));
    if !expected.is(&head) {
        return Ok(AppendOutcome::Conflict(head));
    }
    let entries = chain::link(&head, entries);
    let Some(last) = entries.last() else {
        return Ok(AppendOutcome::Appended(head));
    };
    if head.epoch == Epoch::default() {
        head.epoch = random_epoch().map_err(StoreError::from)?;
    }
    (head.revision, head.hash) = (last.revision, last.hash);
    transaction
        .prepare_cached(
            "INSERT INTO logs (name, epoch, revision, hash) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (name) DO UPDATE SET revision = excluded.revision, hash = excluded.hash",
        )?
        .execute(params![
            head.log.as_str(),
            integer(head.epoch.get()),
            integer(head.revision.get()),
            head.hash.as_bytes(),
        ])?;
    {
        let mut insert = transaction.prepare_cached(
            "INSERT INTO entries (log, revision, at, actor, kind, payload, prev_hash, hash)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?;
        for entry in &entries {
            insert.execute(params![
                entry.log.as_str(),
                integer(entry.revision.get()),
                entry.at.as_millis(),
                entry.actor,
                entry.kind,
                entry.payload,
                entry.prev_hash.as_bytes(),
                entry.hash.as_bytes(),
            ])?;
        }
    }
    transaction.commit()?;
    Ok(AppendOutcome::Appended(head))
}

pub(super) fn heads(connection: &Connection) -> Result<Vec<Head>, Fault> {
    let mut statement =
        connection.prepare_cached("SELECT name, epoch, revision, hash FROM logs ORDER BY name")?;
    let heads = statement.query_map([], head_from)?;
    Ok(heads.collect::<rusqlite::Result<_>>()?)
}

pub(super) fn head(connection: &Connection, log: &LogName) -> Result<Option<Head>, Fault> {
    let head = connection
        .prepare_cached("SELECT name, epoch, revision, hash FROM logs WHERE name = ?1")?
        .query_row([log.as_str()], head_from)
        .optional()?;
    Ok(head)
}

pub(super) fn read(
    connection: &Connection,
    log: &LogName,
    after: Revision,
    limit: usize,
) -> Result<Vec<LogEntry>, Fault> {
    let limit = limit.min(MAX_PAGE);
    let mut statement = connection.prepare_cached(
        "SELECT revision, at, actor, kind, payload, prev_hash, hash FROM entries
         WHERE log = ?1 AND revision > ?2 ORDER BY revision LIMIT ?3",
    )?;
    let mut rows = statement.query(params![
        log.as_str(),
        integer(after.get()),
        integer(limit as u64)
    ])?;
    let mut page = Vec::new();
    let mut len = 0;
    while let Some(row) = rows.next()? {
        let entry = entry_from(log, row)?;
        len += entry.payload.len();
        page.push(entry);
        if len >= MAX_PAGE_LEN {
            break;
        }
    }
    Ok(page)
}

pub(super) fn rotate_epoch(transaction: Transaction<'_>, log: LogName) -> Result<Head, Fault> {
    let Some(mut head) = head(&transaction, &log)? else {
        return Err(StoreError::UnknownLog { log }.into());
    };
    let old = head.epoch;
    while head.epoch == old {
        head.epoch = random_epoch().map_err(StoreError::from)?;
    }
    transaction
        .prepare_cached("UPDATE logs SET epoch = ?2 WHERE name = ?1")?
        .execute(params![log.as_str(), integer(head.epoch.get())])?;
    transaction.commit()?;
    Ok(head)
}

pub(super) fn ping(connection: &Connection) -> Result<(), Fault> {
    connection
        .prepare_cached("SELECT 1 FROM logs LIMIT 1")?
        .exists([])?;
    Ok(())
}

fn head_from(row: &Row<'_>) -> rusqlite::Result<Head> {
    let name: String = row.get(0)?;
    Ok(Head {
        log: name
            .parse()
            .map_err(|error| unreadable(0, Type::Text, error))?,
        epoch: Epoch::new(number(row, 1)?),
        revision: Revision::new(number(row, 2)?),
        hash: EntryHash::new(row.get(3)?),
    })
}

fn entry_from(log: &LogName, row: &Row<'_>) -> rusqlite::Result<LogEntry> {
    Ok(LogEntry {
        log: log.clone(),
        revision: Revision::new(number(row, 0)?),
        at: timestamp(row, 1)?,
        actor: row.get(2)?,
        kind: row.get(3)?,
        payload: row.get(4)?,
        prev_hash: EntryHash::new(row.get(5)?),
        hash: EntryHash::new(row.get(6)?),
    })
}

/// Returns the time in `column`; an error if a [`Timestamp`] cannot represent it unchanged.
pub(super) fn timestamp(row: &Row<'_>, column: usize) -> rusqlite::Result<Timestamp> {
    held(row.get(column)?, column)
}

/// Returns the time in `column`, or none if the column is null.
pub(super) fn optional_timestamp(
    row: &Row<'_>,
    column: usize,
) -> rusqlite::Result<Option<Timestamp>> {
    let millis: Option<i64> = row.get(column)?;
    millis.map(|millis| held(millis, column)).transpose()
}

fn held(millis: i64, column: usize) -> rusqlite::Result<Timestamp> {
    let time = Timestamp::from_millis(millis);
    if time.as_millis() == millis {
        Ok(time)
    } else {
        Err(unreadable(column, Type::Integer, TimeError(millis)))
    }
}

/// Returns the error for a value that breaks the rules of `column`.
pub(super) fn unreadable(
    column: usize,
    kind: Type,
    error: impl std::error::Error + Send + Sync + 'static,
) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, kind, Box::new(error))
}

pub(super) fn number(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, value))
}

/// Returns `number` as a signed integer of SQLite. No log reaches the largest such integer, which
/// therefore replaces all numbers above it.
pub(super) fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
