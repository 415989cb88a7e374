//! The connection that writes, and the order of its writes.
//!
//! SQLite has one writer at a time. While another process is that writer, or the disk is slow,
//! writes queue in this process. A write that a sidecar or an operator waits for, such as a commit
//! or a row of presence, comes before writes that no caller needs soon: counts of uses, saved
//! states, deliveries.

use std::{sync::Arc, time::Duration};

use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use tokio::{sync::Mutex, time::Instant};

use super::{
    blocking,
    place::{DatabasePlace, Fault},
};
use crate::store::StoreError;

#[derive(Debug)]
pub(super) struct Writer {
    connection: Arc<Mutex<Connection>>,
    /// Held by the one bulk write that may wait for the connection.
    bulk: Mutex<()>,
    place: Arc<DatabasePlace>,
}

/// The order in which a write gets the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A sidecar or an operator waits for the write. Such writes are made in the order in which
    /// they arrive.
    Awaited,
    /// No caller needs the write soon. At most one such write is in progress or next; the others
    /// come after all awaited ones.
    Bulk,
}

/// The result of one attempt to write.
enum Attempt<T, W> {
    Written(T),
    /// Another process writes; none of the work was done.
    Busy(W),
}

/// The time for which one attempt waits for another process. Between two attempts, the other
/// waiting writes have theirs.
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

    /// Does `work` in a transaction that holds the lock of the database from its beginning: no
    /// other process can write between the reads and the writes of the work.
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

/// Does `work` unless another process writes. It returns the connection in every case.
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
