//! States of logs, and their pages.

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::{
    log::{integer, number},
    place::Fault,
};
use crate::{
    key::Revision,
    store::{EntryHash, LogName, StatePage, StateSnapshot, StoreError},
};

/// The maximum number of pages that one transaction deletes. Each has about a mebibyte, and SQLite
/// frees its blocks one by one while a commit may wait.
const MAX_PRUNED: u32 = 4;

pub(super) fn save_page(
    transaction: Transaction<'_>,
    log: LogName,
    page: &StatePage,
) -> Result<(), Fault> {
    let revision = integer(page.revision.get());
    let belongs = transaction
        .prepare_cached("SELECT 1 FROM entries WHERE log = ?1 AND revision = ?2")?
        .exists(params![log.as_str(), revision])?;
    if !belongs {
        let revision = page.revision;
        return Err(StoreError::ForeignState { log, revision }.into());
    }
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO state_pages (log, revision, format, number, payload)
             VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![
            log.as_str(),
            revision,
            page.format,
            page.number,
            page.payload,
        ])?;
    transaction.commit()?;
    Ok(())
}

pub(super) fn save(
    transaction: Transaction<'_>,
    log: LogName,
    state: &StateSnapshot,
) -> Result<(), Fault> {
    let revision = integer(state.revision.get());
    let belongs = transaction
        .prepare_cached("SELECT 1 FROM entries WHERE log = ?1 AND revision = ?2 AND hash = ?3")?
        .exists(params![log.as_str(), revision, state.hash.as_bytes()])?;
    if !belongs {
        let revision = state.revision;
        return Err(StoreError::ForeignState { log, revision }.into());
    }
    let pages: u32 = transaction
        .prepare_cached(
            "SELECT COUNT(*) FROM state_pages
             WHERE log = ?1 AND revision = ?2 AND format = ?3 AND number < ?4",
        )?
        .query_row(
            params![log.as_str(), revision, state.format, state.pages],
            |row| row.get(0),
        )?;
    if pages != state.pages {
        let revision = state.revision;
        return Err(StoreError::IncompleteState { log, revision }.into());
    }
    transaction
        .prepare_cached(
            "INSERT INTO states (log, revision, hash, format, payload, pages)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (log) DO UPDATE SET revision = excluded.revision, hash = excluded.hash,
                 format = excluded.format, payload = excluded.payload, pages = excluded.pages
             WHERE (excluded.revision, excluded.format) > (states.revision, states.format)",
        )?
        .execute(params![
            log.as_str(),
            revision,
            state.hash.as_bytes(),
            state.format,
            state.payload,
            state.pages,
        ])?;
    transaction.commit()?;
    Ok(())
}

pub(super) fn load(connection: &Connection, log: &LogName) -> Result<Option<StateSnapshot>, Fault> {
    let state = connection
        .prepare_cached("SELECT revision, hash, format, payload, pages FROM states WHERE log = ?1")?
        .query_row([log.as_str()], |row| {
            Ok(StateSnapshot {
                revision: Revision::new(number(row, 0)?),
                hash: EntryHash::new(row.get(1)?),
                format: row.get(2)?,
                payload: row.get(3)?,
                pages: row.get(4)?,
            })
        })
        .optional()?;
    Ok(state)
}

pub(super) fn load_page(
    connection: &Connection,
    log: &LogName,
    revision: Revision,
    format: u32,
    number: u32,
) -> Result<Option<StatePage>, Fault> {
    let payload: Option<Vec<u8>> = connection
        .prepare_cached(
            "SELECT payload FROM state_pages
             WHERE log = ?1 AND revision = ?2 AND format = ?3 AND number = ?4",
        )?
        .query_row(
            params![log.as_str(), integer(revision.get()), format, number],
            |row| row.get(0),
        )
        .optional()?;
    Ok(payload.map(|payload| StatePage {
        revision,
        format,
        number,
        payload,
    }))
}

/// Deletes older pages than those of the saved state. Pages of a later revision belong to a state
/// that is being saved.
pub(super) fn prune_pages(transaction: Transaction<'_>, log: &LogName) -> Result<bool, Fault> {
    let removed = transaction
        .prepare_cached(
            "DELETE FROM state_pages WHERE rowid IN (
                 SELECT pages.rowid FROM state_pages AS pages JOIN states USING (log)
                 WHERE log = ?1
                     AND (pages.revision, pages.format) < (states.revision, states.format)
                 LIMIT ?2)",
        )?
        .execute(params![log.as_str(), MAX_PRUNED])?;
    transaction.commit()?;
    Ok(removed > 0)
}
