//! Ends the writing of the snapshot file at an orderly stop.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{
    disk::{Disk, FileEnd},
    journal::{Ending, Journal},
};

/// Ends the writing of the file of a sidecar that stops in order: the file is written for the last time, or erased.
#[derive(Debug)]
pub(crate) struct Closer {
    journal: Arc<Journal>,
    disk: Arc<Disk>,
    ending: Ending,
}

/// The longest wait of an orderly stop for its file: a disk needs milliseconds.
const TIMEOUT: Duration = Duration::from_secs(1);

impl Closer {
    /// Creates a closer for `journal` and `disk`.
    #[must_use]
    pub(crate) const fn new(journal: Arc<Journal>, disk: Arc<Disk>, ending: Ending) -> Self {
        Self {
            journal,
            disk,
            ending,
        }
    }

    /// Ends the writing, and returns the durable state of the file. The caller answers no more checks. It takes at most a
    /// second. If it is cancelled, the writing ends nevertheless.
    pub(crate) async fn close(&self) -> FileEnd {
        self.journal.close(self.ending);
        match timeout(TIMEOUT, self.disk.end()).await {
            Ok(end) => end,
            Err(_elapsed) => {
                tracing::warn!("the snapshot file was not written or erased in time");
                FileEnd::Unknown
            }
        }
    }
}
