//! Ends the keeping of the file at an orderly stop.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{
    disk::{Disk, FileEnd},
    journal::{Ending, Journal},
};

/// Ends the keeping of the file of a sidecar that stops in order: the file is written for the last time, or erased.
#[derive(Debug)]
pub(crate) struct Closer {
    journal: Arc<Journal>,
    disk: Arc<Disk>,
    ending: Ending,
}

/// How long an orderly stop waits for its file: a disk takes milliseconds.
const TIMEOUT: Duration = Duration::from_secs(1);

impl Closer {
    /// Ends what is kept of `journal` and `disk`.
    #[must_use]
    pub(crate) const fn new(journal: Arc<Journal>, disk: Arc<Disk>, ending: Ending) -> Self {
        Self {
            journal,
            disk,
            ending,
        }
    }

    /// Ends it, once no check will be answered any more; returns what is left, on the disk too. Nothing is written from now
    /// on. It takes a second at most; cancelling it has the file ended all the same.
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
