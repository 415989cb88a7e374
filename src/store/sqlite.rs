//! The embedded store: a SQLite database in one file, with its write-ahead log beside it.
//!
//! One connection writes and one reads, so that a long commit never delays a read. Both work on
//! threads that may block; a caller uses such a thread only during its turn. Writes that a caller
//! waits for come before other writes ([`writer`]). Several processes may share the file: a write
//! acquires the lock of the database before it reads the head, so that of two writers one finds the
//! head moved.

mod log;
mod look;
mod open;
mod outbox;
mod owner;
mod place;
mod presence;
mod schema;
mod state;
mod usage;
mod writer;

use std::{panic, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use rusqlite::{Connection, Transaction};
use tokio::{sync::Mutex, task};

use crate::key::{KeyringName, Revision, Timestamp};

pub(crate) use look::AtRest;
pub(crate) use owner::{Named, Ownership};
pub(crate) use owner::{Owner, OwnerError, StoreOwner};

use self::{
    log::AppendOutcome,
    place::{DatabasePlace, Fault},
    writer::{Urgency, Writer},
};
use super::{
    AppendError, CallersRow, Delivery, Expected, Head, LogEntry, LogName, NewDelivery, NewEntry,
    PresenceKey, PresenceRow, Retention, Settlement, StatePage, StateSnapshot, Store, StoreError,
    StoredUsage, UsageRow,
};

/// The options for opening a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqliteOptions {
    /// Whether to create the database if it does not exist.
    pub create: bool,
    /// The maximum time for which a call waits while another process holds the lock of the
    /// database.
    pub busy_timeout: Duration,
}

/// A [`Store`] in a SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    // The reader is closed before the writer. The close of the writer is then the last one, and it
    // empties the write-ahead log into the file.
    reader: Arc<Mutex<Connection>>,
    writer: Writer,
    place: Arc<DatabasePlace>,
}

impl Default for SqliteOptions {
    /// An existing database, and 5 s of waiting for another process: far longer than any append
    /// needs, and shorter than people and health checks wait.
    fn default() -> Self {
        Self {
            create: false,
            busy_timeout: Duration::from_secs(5),
        }
    }
}

impl SqliteStore {
    /// Opens the database at `path` after a check of the whole file. Only its owner can read and
    /// write a new one.
    ///
    /// # Errors
    ///
    /// When it is missing, is another file, comes from a later version, is damaged, is locked by
    /// another process or cannot be written. It is not changed then.
    pub async fn open(path: &Path, options: SqliteOptions) -> Result<Self, StoreError> {
        let place = DatabasePlace::new(path.to_owned(), options.busy_timeout);
        blocking(move || {
            let (place, reader, writer) = open::open(place, options.create)?;
            let place = Arc::new(place);
            let writer = Writer::new(writer, Arc::clone(&place));
            Ok(Self {
                reader: Arc::new(Mutex::new(reader)),
                writer: writer.map_err(|fault| place.explain(fault))?,
                place,
            })
        })
        .await
    }

    /// Whether a database exists at `path`. It opens nothing.
    ///
    /// # Errors
    ///
    /// When the path is a symbolic link to nothing, or only the write-ahead log of a database is
    /// left.
    pub(crate) fn is_at(path: &Path) -> Result<bool, StoreError> {
        open::is_at(&DatabasePlace::new(path.to_owned(), Duration::ZERO))
    }

    /// Finds the reasons for which [`open`](Self::open) would refuse the database at `path`, as far
    /// as they show without opening it. It locks, creates and changes nothing, and a control plane
    /// may use the database meanwhile. It blocks.
    ///
    /// # Errors
    ///
    /// When the database is missing, is another file, comes from a later version or cannot be
    /// written.
    pub(crate) fn look(path: &Path) -> Result<(), StoreError> {
        look::look(&DatabasePlace::new(path.to_owned(), Duration::ZERO))
    }

    /// Reads the entries of `log` that are of `kind` from a database that no process owns. It
    /// leaves no trace, and it blocks. Returns none if a process owns the database or has just used
    /// it, or if the write-ahead log contains a part of it.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub(crate) fn at_rest(
        path: &Path,
        log: &LogName,
        kind: &str,
    ) -> Result<Option<AtRest>, StoreError> {
        let is_free = || matches!(StoreOwner::look(path), Ok(Ownership::Free));
        if !is_free() {
            return Ok(None);
        }
        let read = look::at_rest(
            &DatabasePlace::new(path.to_owned(), Duration::ZERO),
            log,
            kind,
        );
        // A result from a time when a process began to write is not reliable.
        if is_free() { read } else { Ok(None) }
    }

    async fn read_with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let mut connection = Arc::clone(&self.reader).lock_owned().await;
        let place = Arc::clone(&self.place);
        blocking(move || {
            place.check_present()?;
            work(&mut connection).map_err(|fault| place.explain(fault))
        })
        .await
    }

    /// Makes a write that a sidecar or an operator waits for.
    async fn write_awaited<T: Send + 'static>(
        &self,
        work: impl FnOnce(Transaction<'_>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.writer.write(Urgency::Awaited, work).await
    }

    /// Makes a write that no caller needs soon.
    async fn write_bulk<T: Send + 'static>(
        &self,
        work: impl FnOnce(Transaction<'_>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.writer.write(Urgency::Bulk, work).await
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn append_at(
        &self,
        log: &LogName,
        expected: Expected,
        entries: Vec<NewEntry>,
    ) -> Result<Head, AppendError> {
        NewEntry::check(&entries)?;
        let log = log.clone();
        let outcome = self
            .write_awaited(move |transaction| log::append(transaction, log, expected, entries))
            .await?;
        match outcome {
            AppendOutcome::Appended(head) => Ok(head),
            AppendOutcome::Conflict(head) => Err(AppendError::Conflict {
                expected: expected.revision,
                head,
            }),
        }
    }

    async fn heads(&self) -> Result<Vec<Head>, StoreError> {
        self.read_with(|connection| log::heads(connection)).await
    }

    async fn head(&self, log: &LogName) -> Result<Option<Head>, StoreError> {
        let log = log.clone();
        self.read_with(move |connection| log::head(connection, &log))
            .await
    }

    async fn read(
        &self,
        log: &LogName,
        after: Revision,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let log = log.clone();
        self.read_with(move |connection| log::read(connection, &log, after, limit))
            .await
    }

    async fn rotate_epoch(&self, log: &LogName) -> Result<Head, StoreError> {
        let log = log.clone();
        self.write_awaited(move |transaction| log::rotate_epoch(transaction, log))
            .await
    }

    async fn save_state(&self, log: &LogName, state: StateSnapshot) -> Result<(), StoreError> {
        let log = log.clone();
        self.write_bulk(move |transaction| state::save(transaction, log, &state))
            .await
    }

    async fn save_state_page(&self, log: &LogName, page: StatePage) -> Result<(), StoreError> {
        let log = log.clone();
        self.write_bulk(move |transaction| state::save_page(transaction, log, &page))
            .await
    }

    async fn load_state(&self, log: &LogName) -> Result<Option<StateSnapshot>, StoreError> {
        let log = log.clone();
        self.read_with(move |connection| state::load(connection, &log))
            .await
    }

    async fn load_state_page(
        &self,
        log: &LogName,
        revision: Revision,
        format: u32,
        number: u32,
    ) -> Result<Option<StatePage>, StoreError> {
        let log = log.clone();
        self.read_with(move |connection| {
            state::load_page(connection, &log, revision, format, number)
        })
        .await
    }

    async fn prune_state_pages(&self, log: &LogName) -> Result<bool, StoreError> {
        let log = log.clone();
        self.write_bulk(move |transaction| state::prune_pages(transaction, &log))
            .await
    }

    async fn save_presence(&self, rows: Vec<PresenceRow>) -> Result<(), StoreError> {
        self.write_awaited(move |transaction| presence::save(transaction, &rows))
            .await
    }

    async fn remove_presence(&self, keys: Vec<PresenceKey>) -> Result<(), StoreError> {
        self.write_awaited(move |transaction| presence::remove(transaction, &keys))
            .await
    }

    async fn load_presence(&self) -> Result<Vec<PresenceRow>, StoreError> {
        self.read_with(|connection| presence::load(connection))
            .await
    }

    async fn save_usage(&self, rows: Vec<UsageRow>) -> Result<(), StoreError> {
        self.write_bulk(move |transaction| usage::save(transaction, &rows))
            .await
    }

    async fn save_callers(&self, rows: Vec<CallersRow>) -> Result<(), StoreError> {
        self.write_bulk(move |transaction| usage::save_callers(transaction, &rows))
            .await
    }

    async fn fold_usage(&self, run_id: &str, now: Timestamp) -> Result<(), StoreError> {
        let run_id = run_id.to_owned();
        self.write_bulk(move |transaction| usage::fold(transaction, &run_id, now))
            .await
    }

    async fn load_usage(&self) -> Result<StoredUsage, StoreError> {
        self.read_with(usage::load).await
    }

    async fn outbox_cursor(&self, log: &LogName) -> Result<Revision, StoreError> {
        let log = log.clone();
        self.read_with(move |connection| outbox::cursor(connection, &log))
            .await
    }

    async fn project(
        &self,
        log: &LogName,
        from: Revision,
        to: Revision,
        rows: Vec<NewDelivery>,
    ) -> Result<bool, StoreError> {
        let log = log.clone();
        self.write_bulk(move |transaction| outbox::project(transaction, &log, from, to, &rows))
            .await
    }

    async fn claim_deliveries(
        &self,
        now: Timestamp,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError> {
        self.write_bulk(move |transaction| outbox::claim(transaction, now, until, limit))
            .await
    }

    async fn settle_delivery(&self, settlement: Settlement) -> Result<bool, StoreError> {
        self.write_bulk(move |transaction| outbox::settle(transaction, &settlement))
            .await
    }

    async fn deliveries(
        &self,
        keyring: &KeyringName,
        webhook: &str,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError> {
        let (keyring, webhook) = (keyring.clone(), webhook.to_owned());
        self.read_with(move |connection| outbox::list(connection, &keyring, &webhook, limit))
            .await
    }

    async fn prune_deliveries(
        &self,
        now: Timestamp,
        retention: Retention,
    ) -> Result<Vec<Delivery>, StoreError> {
        self.write_bulk(move |transaction| outbox::prune(transaction, now, retention))
            .await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.read_with(|connection| log::ping(connection)).await
    }
}

/// Runs `work` on a thread that may block. A panic of the work continues in the caller.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => panic::resume_unwind(panic),
            Err(_) => Err(StoreError::Closing),
        },
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::OpenFlags;
    use tempfile::TempDir;

    use super::*;
    use crate::store::chain;

    async fn open(directory: &TempDir) -> SqliteStore {
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        SqliteStore::open(&directory.path().join("relatch.db"), options)
            .await
            .expect("it opens")
    }

    fn entry(len: usize) -> Vec<NewEntry> {
        vec![NewEntry {
            at: Timestamp::from_millis(1),
            actor: "alice".into(),
            kind: "k".into(),
            payload: vec![b' '; len],
        }]
    }

    #[tokio::test]
    async fn read_only_database_refuses_writes_and_still_reads() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut store = open(&directory).await;
        let log = LogName::Control;
        store
            .append(&log, Revision::default(), entry(1))
            .await
            .expect("it appends");
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
        let read_only = Connection::open_with_flags(store.place.path(), flags).expect("it opens");
        let error =
            open::check_writable(&read_only, &store.place).map_err(|f| store.place.explain(f));
        assert!(
            matches!(error, Err(StoreError::ReadOnly { .. })),
            "{error:?}"
        );

        let place = Arc::clone(&store.place);
        store.writer = Writer::new(read_only, place).expect("it is open");

        let error = store.append(&log, Revision::new(1), entry(1)).await;
        assert!(
            matches!(error, Err(AppendError::Store(StoreError::ReadOnly { .. }))),
            "{error:?}"
        );
        assert_eq!(store.heads().await.expect("it reads").len(), 1);
    }

    #[tokio::test]
    async fn full_disk_loses_nothing_that_was_committed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let store = open(&directory).await;
        let log = LogName::Control;
        let before = store
            .append(&log, Revision::default(), entry(1))
            .await
            .expect("it appends");
        limit_pages(&store, 1).await;

        let error = store.append(&log, Revision::new(1), entry(100_000)).await;

        assert!(
            matches!(error, Err(AppendError::Store(StoreError::DiskFull { .. }))),
            "{error:?}"
        );
        assert_eq!(store.head(&log).await.expect("it reads"), Some(before));
        limit_pages(&store, 1_000_000).await;
        store
            .append(&log, Revision::new(1), entry(100_000))
            .await
            .expect("it appends once there is space");
        let verdict = chain::verify(&store, &log).await.expect("it reads");
        assert_eq!((verdict.entries, verdict.problem), (2, None));
    }

    /// SQLite replaces a limit below the present size by the present size.
    async fn limit_pages(store: &SqliteStore, pages: u32) {
        let writer = store.writer.connection().lock().await;
        writer
            .pragma_update_and_check(None, "max_page_count", pages, |_| Ok(()))
            .expect("the limit is set");
    }
}
