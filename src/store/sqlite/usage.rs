//! Usage of key versions, and their callers.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params, types::Type};

use super::{
    log::{number, optional_timestamp, unreadable},
    place::Fault,
};
use crate::{
    key::{KeyringName, Timestamp, VersionNumber, VersionRef},
    store::{CallersRow, FOLDED_FOR, StoredUsage, UsageRow},
};

/// An invalid version number.
#[derive(Debug, thiserror::Error)]
#[error("{0} is not a number of a version")]
struct NumberError(u32);

/// The largest sum of folded processes: one more process cannot overflow it.
const MAX_SUM: i64 = i64::MAX / 2;

pub(super) fn save(transaction: Transaction<'_>, rows: &[UsageRow]) -> Result<(), Fault> {
    {
        let mut merge = transaction.prepare_cached(
            "INSERT INTO usage
                 (keyring, key_id, version, run_id, requests, denied, first_used, last_used)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
             ON CONFLICT (keyring, key_id, version, run_id) DO UPDATE SET
                 requests = max(requests, excluded.requests),
                 denied = max(denied, excluded.denied),
                 first_used = min(coalesce(first_used, excluded.first_used),
                     coalesce(excluded.first_used, first_used)),
                 last_used = max(coalesce(last_used, excluded.last_used),
                     coalesce(excluded.last_used, last_used))",
        )?;
        for row in rows {
            let folded = is_folded(&transaction, &row.run_id)?;
            let (run_id, requests, denied) = if folded {
                (UsageRow::FOLDED, 0, 0)
            } else {
                (row.run_id.as_str(), row.requests, row.denied)
            };
            merge.execute(params![
                row.keyring.as_str(),
                row.version.key_id.as_str(),
                row.version.version.get(),
                run_id,
                count(requests),
                count(denied),
                row.first_used.map(Timestamp::as_millis),
                row.last_used.map(Timestamp::as_millis),
            ])?;
        }
    }
    transaction.commit()?;
    Ok(())
}

pub(super) fn save_callers(transaction: Transaction<'_>, rows: &[CallersRow]) -> Result<(), Fault> {
    {
        let mut replace = transaction.prepare_cached(
            "INSERT INTO usage_callers (keyring, key_id, version, run_id, payload)
             VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (keyring, key_id, version, run_id)
                 DO UPDATE SET payload = excluded.payload",
        )?;
        let mut delete = transaction.prepare_cached(
            "DELETE FROM usage_callers
             WHERE keyring = ?1 AND key_id = ?2 AND version = ?3 AND run_id = ?4",
        )?;
        for row in rows {
            let (keyring, key_id) = (row.keyring.as_str(), row.version.key_id.as_str());
            let (version, run_id) = (row.version.version.get(), &row.run_id);
            if row.payload.is_empty() {
                delete.execute(params![keyring, key_id, version, run_id])?;
            } else {
                replace.execute(params![keyring, key_id, version, run_id, row.payload])?;
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

pub(super) fn fold(
    transaction: Transaction<'_>,
    run_id: &str,
    now: Timestamp,
) -> Result<(), Fault> {
    if !is_folded(&transaction, run_id)? {
        transaction.execute(
            "INSERT INTO usage
                 (keyring, key_id, version, run_id, requests, denied, first_used, last_used)
             SELECT keyring, key_id, version, ?2, requests, denied, first_used, last_used
             FROM usage WHERE run_id = ?1
             ON CONFLICT (keyring, key_id, version, run_id) DO UPDATE SET
                 requests = min(requests + excluded.requests, ?3),
                 denied = min(denied + excluded.denied, ?3),
                 first_used = min(coalesce(first_used, excluded.first_used),
                     coalesce(excluded.first_used, first_used)),
                 last_used = max(coalesce(last_used, excluded.last_used),
                     coalesce(excluded.last_used, last_used))",
            params![run_id, UsageRow::FOLDED, MAX_SUM],
        )?;
        transaction.execute("DELETE FROM usage WHERE run_id = ?1", [run_id])?;
        transaction.execute(
            "INSERT INTO usage_folded (run_id, folded_at) VALUES (?1, ?2)",
            params![run_id, now.as_millis()],
        )?;
    }
    let kept = i64::try_from(FOLDED_FOR.as_millis()).unwrap_or(i64::MAX);
    transaction.execute(
        "DELETE FROM usage_folded WHERE folded_at < ?1",
        [now.as_millis().saturating_sub(kept)],
    )?;
    transaction.commit()?;
    Ok(())
}

pub(super) fn load(connection: &mut Connection) -> Result<StoredUsage, Fault> {
    // One transaction, so that a process that is folded meanwhile is found either with its own rows
    // or in the sum.
    let transaction = connection.transaction()?;
    let usage = StoredUsage {
        counts: all(
            &transaction,
            "SELECT keyring, key_id, version, run_id, requests, denied, first_used, last_used
             FROM usage",
            |row| {
                let (keyring, version) = version_of(row)?;
                Ok(UsageRow {
                    keyring,
                    version,
                    run_id: row.get(3)?,
                    requests: number(row, 4)?,
                    denied: number(row, 5)?,
                    first_used: optional_timestamp(row, 6)?,
                    last_used: optional_timestamp(row, 7)?,
                })
            },
        )?,
        callers: all(
            &transaction,
            "SELECT keyring, key_id, version, run_id, payload FROM usage_callers",
            |row| {
                let (keyring, version) = version_of(row)?;
                Ok(CallersRow {
                    keyring,
                    version,
                    run_id: row.get(3)?,
                    payload: row.get(4)?,
                })
            },
        )?,
        folded: all(&transaction, "SELECT run_id FROM usage_folded", |row| {
            row.get(0)
        })?,
    };
    transaction.commit()?;
    Ok(usage)
}

fn is_folded(transaction: &Transaction<'_>, run_id: &str) -> rusqlite::Result<bool> {
    transaction
        .prepare_cached("SELECT 1 FROM usage_folded WHERE run_id = ?1")?
        .query_row([run_id], |_| Ok(()))
        .optional()
        .map(|found| found.is_some())
}

fn all<T>(
    transaction: &Transaction<'_>,
    query: &str,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    transaction
        .prepare_cached(query)?
        .query_map([], read)?
        .collect()
}

fn version_of(row: &Row<'_>) -> rusqlite::Result<(KeyringName, VersionRef)> {
    let (keyring, key_id): (String, String) = (row.get(0)?, row.get(1)?);
    let number = row.get(2)?;
    let version = VersionRef {
        key_id: key_id
            .parse()
            .map_err(|error| unreadable(1, Type::Text, error))?,
        version: VersionNumber::new(number)
            .ok_or_else(|| unreadable(2, Type::Integer, NumberError(number)))?,
    };
    let keyring = keyring
        .parse()
        .map_err(|error| unreadable(0, Type::Text, error))?;
    Ok((keyring, version))
}

fn count(number: u64) -> i64 {
    i64::try_from(number).map_or(MAX_SUM, |number| number.min(MAX_SUM))
}
