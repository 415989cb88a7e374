//! Rows of presence: the known processes of sidecars.

use rusqlite::{Connection, Transaction, params, types::Type};

use super::{
    log::{optional_timestamp, timestamp, unreadable},
    place::Fault,
};
use crate::{
    key::Timestamp,
    store::{PresenceKey, PresenceRow},
};

pub(super) fn save(transaction: Transaction<'_>, rows: &[PresenceRow]) -> Result<(), Fault> {
    {
        let mut upsert = transaction.prepare_cached(
            "INSERT INTO presence (node, run_id, cluster, version, keyrings, last_contact, complete_until,
                 gone_at, serving)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
             ON CONFLICT (node, run_id) DO UPDATE SET cluster = excluded.cluster,
                 version = excluded.version, keyrings = excluded.keyrings,
                 last_contact = excluded.last_contact,
                 complete_until = excluded.complete_until, gone_at = excluded.gone_at,
                 serving = excluded.serving",
        )?;
        for row in rows {
            let keyrings =
                serde_json::to_string(&row.keyrings).expect("a list of texts can be JSON");
            upsert.execute(params![
                row.node,
                row.run_id,
                row.cluster,
                row.version,
                keyrings,
                row.last_contact.as_millis(),
                row.complete_until.map(Timestamp::as_millis),
                row.gone_at.map(Timestamp::as_millis),
                row.serving,
            ])?;
        }
    }
    transaction.commit()?;
    Ok(())
}

pub(super) fn remove(transaction: Transaction<'_>, keys: &[PresenceKey]) -> Result<(), Fault> {
    {
        let mut delete =
            transaction.prepare_cached("DELETE FROM presence WHERE node = ?1 AND run_id = ?2")?;
        for key in keys {
            delete.execute(params![key.node, key.run_id])?;
        }
    }
    transaction.commit()?;
    Ok(())
}

pub(super) fn load(connection: &Connection) -> Result<Vec<PresenceRow>, Fault> {
    let mut statement = connection.prepare_cached(
        "SELECT node, run_id, cluster, version, keyrings, last_contact, complete_until, gone_at,
                serving
         FROM presence ORDER BY node, run_id",
    )?;
    let rows = statement.query_map([], |row| {
        let keyrings: String = row.get(4)?;
        Ok(PresenceRow {
            node: row.get(0)?,
            run_id: row.get(1)?,
            cluster: row.get(2)?,
            version: row.get(3)?,
            keyrings: serde_json::from_str(&keyrings)
                .map_err(|error| unreadable(4, Type::Text, error))?,
            last_contact: timestamp(row, 5)?,
            complete_until: optional_timestamp(row, 6)?,
            gone_at: optional_timestamp(row, 7)?,
            serving: row.get(8)?,
        })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}
