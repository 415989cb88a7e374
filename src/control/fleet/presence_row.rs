//! Converts between the rows of the book of the sidecars that may serve and the rows in the store.

use crate::{
    serving::{Row, RunKey},
    store::{PresenceKey, PresenceRow},
};

pub(super) fn row_of_presence(row: PresenceRow) -> Row {
    Row {
        key: RunKey {
            node: row.node,
            run_id: row.run_id,
        },
        cluster: row.cluster,
        version: row.version,
        keyrings: row
            .keyrings
            .into_iter()
            .filter_map(|name| name.parse().ok())
            .collect(),
        last_seen: row.last_contact,
        complete_until: row.complete_until,
        gone_at: row.gone_at,
        record: row.serving,
    }
}

pub(super) fn presence_of_row(row: Row) -> PresenceRow {
    PresenceRow {
        node: row.key.node,
        run_id: row.key.run_id,
        cluster: row.cluster,
        version: row.version,
        keyrings: row.keyrings.iter().map(ToString::to_string).collect(),
        last_contact: row.last_seen,
        complete_until: row.complete_until,
        gone_at: row.gone_at,
        serving: row.record,
    }
}

impl From<RunKey> for PresenceKey {
    fn from(key: RunKey) -> Self {
        Self {
            node: key.node,
            run_id: key.run_id,
        }
    }
}
