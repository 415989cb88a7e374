//! Deliveries to webhooks, and the revision up to which each log was turned into deliveries.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params, types::Type};

use super::{
    log::{integer, number, optional_timestamp, timestamp, unreadable},
    place::Fault,
};
use crate::{
    key::{KeyringName, Revision, Timestamp},
    store::{Delivery, DeliveryState, LogName, NewDelivery, Retention, Settled, Settlement},
};

/// An unknown state of a delivery.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a state of a delivery")]
struct StateError(String);

/// The columns that [`delivery_from`] reads.
const COLUMNS: &str = "webhook, event, keyring, revision, kind, body, created_at, state, attempts,
    next_attempt_at, settled_at, last_status, last_error";

/// The last error of a delivery that was given up because too many were waiting.
const OVERFLOW: &str = "too many events were waiting for this webhook";

pub(super) fn cursor(connection: &Connection, log: &LogName) -> Result<Revision, Fault> {
    let revision = connection
        .prepare_cached("SELECT revision FROM outbox WHERE log = ?1")?
        .query_row([log.as_str()], |row| number(row, 0))
        .optional()?;
    Ok(revision.map_or_else(Revision::default, Revision::new))
}

pub(super) fn project(
    transaction: Transaction<'_>,
    log: &LogName,
    from: Revision,
    to: Revision,
    rows: &[NewDelivery],
) -> Result<bool, Fault> {
    if cursor(&transaction, log)? != from {
        return Ok(false);
    }
    transaction
        .prepare_cached(
            "INSERT INTO outbox (log, revision) VALUES (?1, ?2)
             ON CONFLICT (log) DO UPDATE SET revision = excluded.revision",
        )?
        .execute(params![log.as_str(), integer(to.get())])?;
    {
        let mut insert = transaction.prepare_cached(
            "INSERT INTO deliveries (webhook, event, keyring, revision, kind, body, created_at,
                 state, attempts, next_attempt_at, claimed_until)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 'waiting', 0, ?7, 0)
             ON CONFLICT (webhook, event) DO NOTHING",
        )?;
        for row in rows {
            insert.execute(params![
                row.webhook,
                row.event,
                row.keyring.as_str(),
                integer(row.revision.get()),
                row.kind,
                row.body,
                row.created_at.as_millis(),
            ])?;
        }
    }
    transaction.commit()?;
    Ok(true)
}

pub(super) fn claim(
    transaction: Transaction<'_>,
    now: Timestamp,
    until: Timestamp,
    limit: usize,
) -> Result<Vec<Delivery>, Fault> {
    let due = due(&transaction, now, limit)?;
    let mut claimed = Vec::with_capacity(due.len());
    {
        let query = format!(
            "UPDATE deliveries SET attempts = attempts + 1, claimed_until = ?2 WHERE rowid = ?1
             RETURNING {COLUMNS}"
        );
        let mut claim = transaction.prepare_cached(&query)?;
        for row in due {
            claimed.push(claim.query_row(params![row, until.as_millis()], delivery_from)?);
        }
    }
    transaction.commit()?;
    Ok(claimed)
}

/// Returns the rows of the due deliveries, the longest due first, one for each webhook that has no
/// attempt in progress.
fn due(transaction: &Transaction<'_>, now: Timestamp, limit: usize) -> rusqlite::Result<Vec<i64>> {
    transaction
        .prepare_cached(
            "SELECT id FROM (
                 SELECT rowid AS id, next_attempt_at, row_number() OVER
                     (PARTITION BY webhook ORDER BY next_attempt_at, rowid) AS place
                 FROM deliveries AS due
                 WHERE state = 'waiting' AND next_attempt_at <= ?1 AND NOT EXISTS (
                     SELECT 1 FROM deliveries AS busy WHERE busy.webhook = due.webhook
                         AND busy.state = 'waiting' AND busy.claimed_until > ?1)
             ) WHERE place = 1 ORDER BY next_attempt_at, id LIMIT ?2",
        )?
        .query_map(params![now.as_millis(), integer(limit as u64)], |row| {
            row.get(0)
        })?
        .collect()
}

pub(super) fn settle(transaction: Transaction<'_>, settlement: &Settlement) -> Result<bool, Fault> {
    let Settlement {
        webhook,
        event,
        attempts,
        at,
        state,
        status,
        error,
    } = settlement;
    let next = match state {
        Settled::Retry(next) => Some(next.as_millis()),
        Settled::Delivered | Settled::GivenUp => None,
    };
    // A webhook that accepted the event has it, whichever attempt this was. Any other result counts
    // only for the newest attempt.
    let settled = transaction
        .prepare_cached(
            "UPDATE deliveries SET state = ?4, next_attempt_at = coalesce(?5, next_attempt_at),
                 claimed_until = 0, settled_at = ?6, last_status = ?7, last_error = ?8
             WHERE webhook = ?1 AND event = ?2 AND state = 'waiting'
                 AND (attempts = ?3 OR ?4 = 'delivered')",
        )?
        .execute(params![
            webhook,
            event,
            attempts,
            state.state().name(),
            next,
            at.as_millis(),
            status,
            error,
        ])?;
    transaction.commit()?;
    Ok(settled > 0)
}

pub(super) fn list(
    connection: &Connection,
    keyring: &KeyringName,
    webhook: &str,
    limit: usize,
) -> Result<Vec<Delivery>, Fault> {
    let query = format!(
        "SELECT {COLUMNS} FROM deliveries WHERE webhook = ?1 AND keyring = ?2
         ORDER BY created_at DESC, rowid DESC LIMIT ?3"
    );
    let mut statement = connection.prepare_cached(&query)?;
    let rows = statement.query_map(
        params![webhook, keyring.as_str(), integer(limit as u64)],
        delivery_from,
    )?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

pub(super) fn prune(
    transaction: Transaction<'_>,
    now: Timestamp,
    retention: Retention,
) -> Result<Vec<Delivery>, Fault> {
    let given_up = {
        let query = format!(
            "UPDATE deliveries SET state = 'given_up', settled_at = ?1, last_error = ?2
             WHERE rowid IN (
                 SELECT id FROM (
                     SELECT rowid AS id, claimed_until, row_number() OVER
                         (PARTITION BY webhook ORDER BY created_at DESC, rowid DESC) AS place
                     FROM deliveries WHERE state = 'waiting'
                 ) WHERE place > ?3 AND claimed_until <= ?1
             ) RETURNING {COLUMNS}"
        );
        let max = integer(retention.max_waiting as u64);
        let mut statement = transaction.prepare_cached(&query)?;
        let rows = statement.query_map(params![now.as_millis(), OVERFLOW, max], delivery_from)?;
        rows.collect::<rusqlite::Result<_>>()?
    };
    transaction
        .prepare_cached(
            "DELETE FROM deliveries WHERE (state = 'delivered' AND settled_at < ?1)
                 OR (state = 'given_up' AND settled_at < ?2)
                 OR rowid IN (
                     SELECT id FROM (
                         SELECT rowid AS id, row_number() OVER
                             (PARTITION BY webhook ORDER BY settled_at DESC, rowid DESC) AS place
                         FROM deliveries WHERE state <> 'waiting'
                     ) WHERE place > ?3
                 )",
        )?
        .execute(params![
            retention.delivered_since.as_millis(),
            retention.given_up_since.as_millis(),
            integer(retention.max_over as u64),
        ])?;
    transaction.commit()?;
    Ok(given_up)
}

fn delivery_from(row: &Row<'_>) -> rusqlite::Result<Delivery> {
    let (keyring, state): (String, String) = (row.get(2)?, row.get(7)?);
    Ok(Delivery {
        what: NewDelivery {
            webhook: row.get(0)?,
            event: row.get(1)?,
            keyring: keyring
                .parse()
                .map_err(|error| unreadable(2, Type::Text, error))?,
            revision: Revision::new(number(row, 3)?),
            kind: row.get(4)?,
            body: row.get(5)?,
            created_at: timestamp(row, 6)?,
        },
        state: [
            DeliveryState::Waiting,
            DeliveryState::Delivered,
            DeliveryState::GivenUp,
        ]
        .into_iter()
        .find(|known| known.name() == state)
        .ok_or_else(|| unreadable(7, Type::Text, StateError(state)))?,
        attempts: row.get(8)?,
        next_attempt_at: timestamp(row, 9)?,
        settled_at: optional_timestamp(row, 10)?,
        last_status: row.get(11)?,
        last_error: row.get(12)?,
    })
}
