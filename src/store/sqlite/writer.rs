//! The one connection that writes, and who gets it next.
//!
//! SQLite has one writer at a time. While another process is that writer, or the disk is slow, writes queue here. What a
//! sidecar or an operator waits for, a commit or a row of presence, is written before what nobody waits for: counts of uses,
//! saved states, deliveries.

use std::{sync::Arc, time::Duration};

use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use tokio::{sync::Mutex, time::Instant};

use super::{
    blocking,
    place::{DatabasePlace, Fault},
};
use crate::store::StoreError;

/// The connection that writes.
#[derive(Debug)]
pub(super) struct Writer {
    connection: Arc<Mutex<Connection>>,
    /// Held by the one bulk write that may wait for the connection.
    bulk: Mutex<()>,
    place: Arc<DatabasePlace>,
}

/// Who waits for a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A sidecar or an operator. Such writes are made in the order in which they come.
    Awaited,
    /// Nobody. At most one such write is under way or next; the others come after all that are awaited.
    Bulk,
}

/// How one attempt to write ended.
enum Attempt<T, W> {
    Written(T),
    /// Another process writes; nothing of the work was done.
    Busy(W),
}

/// How long one attempt waits for another process. In between, whoever else waits has an attempt.
const ATTEMPT: Duration = Duration::from_millis(50);

impl Writer {
    pub(super) fn new(connection: Connection, place: Arc<DatabasePlace>) -> Result<Self, Fault> {
        connection.busy_timeout(ATTEMPT.min(place.busy_timeout()))?;
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
            bulk: Mutex::default(),
            place,
        })
    }

    /// Does `work` in a transaction that holds the lock of the database from its begin: between what it reads and what it
    /// writes nobody else can write.
    ///
    /// # Errors
    ///
    /// When the work fails, or another process holds the lock for the busy timeout of the place, counted from the first
    /// attempt.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        urgency: Urgency,
        work: impl FnOnce(Transaction<'_>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let _turn = match urgency {
            Urgency::Awaited => None,
            Urgency::Bulk => Some(self.bulk.lock().await),
        };
        let mut work = work;
        let mut began = None;
        loop {
            let connection = Arc::clone(&self.connection).lock_owned().await;
            let began = *began.get_or_insert_with(Instant::now);
            let place = Arc::clone(&self.place);
            work = match blocking(move || attempt(connection, &place, work)).await? {
                Attempt::Written(done) => return Ok(done),
                Attempt::Busy(work) => work,
            };
            let waited = self.place.busy_timeout();
            if began.elapsed() >= waited {
                return Err(StoreError::Locked {
                    store: self.place.name(),
                    waited,
                });
            }
        }
    }

    #[cfg(test)]
    pub(super) const fn connection(&self) -> &Arc<Mutex<Connection>> {
        &self.connection
    }
}

/// Does `work` unless another process writes. The connection is free when it returns.
fn attempt<T, W>(
    mut connection: tokio::sync::OwnedMutexGuard<Connection>,
    place: &DatabasePlace,
    work: W,
) -> Result<Attempt<T, W>, StoreError>
where
    W: FnOnce(Transaction<'_>) -> Result<T, Fault>,
{
    place.check_present()?;
    let begun = connection.transaction_with_behavior(TransactionBehavior::Immediate);
    match begun {
        Ok(transaction) => work(transaction)
            .map(Attempt::Written)
            .map_err(|fault| place.explain(fault)),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
            Ok(Attempt::Busy(work))
        }
        Err(error) => Err(place.explain(error.into())),
    }
}

#[cfg(test)]
mod tests;
