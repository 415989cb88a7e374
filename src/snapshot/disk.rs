//! The state of the snapshot file on the disk, and the health of its writes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, watch};

use super::{
    durable::Durable,
    journal::{Applied, Removal},
};
use crate::key::{KeyringName, Timestamp};

/// The state of the file on the disk, and the health of its writes.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    state: Mutex<State>,
    /// Notified when more of a keyring is on the disk, or when a keyring is removed from it.
    news: Notify,
    end: watch::Sender<Option<FileEnd>>,
}

/// The state of the file after an orderly stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileEnd {
    /// There is no file, and a loss of power cannot bring it back.
    Erased,
    /// The file exists, as its last write left it.
    Kept {
        /// The number of that write.
        last_write: u64,
    },
    /// The state is not known.
    Unknown,
}

/// The health of the writes to the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Health {
    /// The number of successful writes, of whole files and of appends.
    pub(crate) written: u64,
    /// The number of failed writes.
    pub(crate) failed: u64,
    /// The time of the last write, by the wall clock.
    pub(crate) last_written_at: Option<Timestamp>,
    /// The length of the file, in bytes.
    pub(crate) size: u64,
    /// The reason why the last write failed, or why nothing is written at all; none if there is no problem.
    pub(crate) problem: Option<String>,
    /// The reason why the file was refused at the start; none if it was used, or if there was none.
    pub(crate) refused: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    durable: BTreeMap<KeyringName, Durable>,
    /// The newest removal of a keyring that is on the disk.
    removed: Removal,
    /// The keyrings whose state the control plane does not know yet.
    untold: BTreeSet<KeyringName>,
    health: Health,
}

impl Disk {
    /// The state of a keyring on the disk.
    #[must_use]
    pub(crate) fn durable(&self, keyring: &KeyringName) -> Durable {
        let durable = self.lock().durable.get(keyring).copied();
        durable.unwrap_or_default()
    }

    /// Whether a removal is on the disk, so that the file no longer has the keyring.
    #[must_use]
    pub(crate) fn has_removed(&self, removal: Removal) -> bool {
        self.lock().removed >= removal
    }

    /// Waits until nothing more is written, and returns the state of the file.
    pub(crate) async fn end(&self) -> FileEnd {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await;
        end.ok().and_then(|is| *is).unwrap_or(FileEnd::Unknown)
    }

    /// The health of the writes to the file.
    #[must_use]
    pub(crate) fn health(&self) -> Health {
        self.lock().health.clone()
    }

    /// The next keyring whose state on the disk has changed since it was last returned here.
    #[must_use]
    pub(crate) fn next_untold(&self) -> Option<KeyringName> {
        self.lock().untold.pop_first()
    }

    /// Marks every keyring as changed, because the control plane knows none of them.
    pub(crate) fn forget_told(&self) {
        let mut state = self.lock();
        state.untold = state.durable.keys().cloned().collect();
    }

    /// Notified when there is a change to report.
    pub(crate) const fn news(&self) -> &Notify {
        &self.news
    }

    /// Records a write: after `removal`, exactly the keyrings of `state` are on the disk.
    pub(super) fn written(
        &self,
        state: &BTreeMap<KeyringName, Applied>,
        removal: Removal,
        size: u64,
        now: Timestamp,
    ) {
        let mut disk = self.lock();
        let mut has_news = disk.removed < removal;
        disk.removed = disk.removed.max(removal);
        disk.durable.retain(|name, _| state.contains_key(name));
        disk.untold.retain(|name| state.contains_key(name));
        for (name, applied) in state {
            let is = applied.durable();
            if disk.durable.insert(name.clone(), is) != Some(is) {
                disk.untold.insert(name.clone());
            }
        }
        disk.health.written += 1;
        disk.health.last_written_at = Some(now);
        disk.health.size = size;
        disk.health.problem = None;
        has_news |= !disk.untold.is_empty();
        if has_news {
            self.news.notify_one();
        }
    }

    /// Records that nothing more is written to the file.
    pub(super) fn ended(&self, end: FileEnd) {
        if end == FileEnd::Erased {
            let mut disk = self.lock();
            disk.durable.clear();
            disk.untold.clear();
            disk.health.size = 0;
        }
        self.end.send_replace(Some(end));
    }

    /// Records why no file is read or written.
    pub(crate) fn unused(&self, reason: String) {
        self.lock().health.problem = Some(reason);
    }

    /// Records a failed write. Returns whether it is the first after a success.
    pub(super) fn failed(&self, problem: String) -> bool {
        let mut state = self.lock();
        state.health.failed += 1;
        state.health.problem.replace(problem).is_none()
    }

    pub(crate) fn refused(&self, reason: String) {
        self.lock().health.refused = Some(reason);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
