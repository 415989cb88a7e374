//! What is known of the disk: what is on it, and how writing goes.

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

/// What is on the disk, and how writing goes.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    state: Mutex<State>,
    /// Woken when more of a keyring is on the disk, or one is removed from it.
    news: Notify,
    end: watch::Sender<Option<FileEnd>>,
}

/// What is left of a file at an orderly stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileEnd {
    /// Nothing, and that outlives a loss of power.
    Erased,
    /// The file, as its last write left it.
    Kept {
        /// The number of that write.
        last_write: u64,
    },
    /// Nobody knows.
    Unknown,
}

/// How writing goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Health {
    /// Writes that came to the disk, whole ones and appends.
    pub(crate) written: u64,
    /// Writes that failed.
    pub(crate) failed: u64,
    /// When something was last written, by the wall clock.
    pub(crate) last_written_at: Option<Timestamp>,
    /// The length of the file.
    pub(crate) size: u64,
    /// Why the last write failed, or why nothing is written at all; none when neither is so.
    pub(crate) problem: Option<String>,
    /// Why the file was not taken at the start; none when it was, or there was none.
    pub(crate) refused: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    durable: BTreeMap<KeyringName, Durable>,
    /// The newest removal of a keyring that is on the disk.
    removed: Removal,
    /// The keyrings of which the control plane has not been told.
    untold: BTreeSet<KeyringName>,
    health: Health,
}

impl Disk {
    /// Up to where a keyring is on the disk.
    #[must_use]
    pub(crate) fn durable(&self, keyring: &KeyringName) -> Durable {
        let durable = self.lock().durable.get(keyring).copied();
        durable.unwrap_or_default()
    }

    /// Whether a removal is on the disk: the file does not have the keyring any more.
    #[must_use]
    pub(crate) fn has_removed(&self, removal: Removal) -> bool {
        self.lock().removed >= removal
    }

    /// What is left of the file, once nothing more is written to it.
    pub(crate) async fn end(&self) -> FileEnd {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await;
        end.ok().and_then(|is| *is).unwrap_or(FileEnd::Unknown)
    }

    /// How writing goes.
    #[must_use]
    pub(crate) fn health(&self) -> Health {
        self.lock().health.clone()
    }

    /// A keyring of which more came to the disk since it was last asked for.
    #[must_use]
    pub(crate) fn next_untold(&self) -> Option<KeyringName> {
        self.lock().untold.pop_first()
    }

    /// Of every keyring is to be told anew: nobody knows of it.
    pub(crate) fn forget_told(&self) {
        let mut state = self.lock();
        state.untold = state.durable.keys().cloned().collect();
    }

    /// Woken when there is something to tell.
    pub(crate) const fn news(&self) -> &Notify {
        &self.news
    }

    /// The keyrings of `state` are on the disk, and no others, after `removal`.
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

    /// Nothing more is written to the file.
    pub(super) fn ended(&self, end: FileEnd) {
        if end == FileEnd::Erased {
            let mut disk = self.lock();
            disk.durable.clear();
            disk.untold.clear();
            disk.health.size = 0;
        }
        self.end.send_replace(Some(end));
    }

    /// No file is read or written, for this reason.
    pub(crate) fn unused(&self, reason: String) {
        self.lock().health.problem = Some(reason);
    }

    /// Writing failed; whether it did not before.
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
