//! What is known of the disk: what is on it, and how writing goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::{
    key::{Epoch, KeyringName, Revision, Timestamp},
    keyring::KeyringView,
};

/// What is on the disk, and how writing goes.
#[derive(Debug, Default)]
pub struct Disk {
    state: Mutex<State>,
    /// Woken when more of a keyring is on the disk.
    news: Notify,
}

/// How writing goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Writes that came to the disk, whole ones and appends.
    pub written: u64,
    /// Writes that failed.
    pub failed: u64,
    /// When something was last written, by the wall clock.
    pub last_written_at: Option<Timestamp>,
    /// The length of the file.
    pub size: u64,
    /// Why the last write failed; none when it did not.
    pub problem: Option<String>,
    /// Why the file was not taken at the start; none when it was, or there was none.
    pub refused: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    durable: BTreeMap<KeyringName, (Epoch, Revision)>,
    /// The keyrings of which the control plane has not been told.
    untold: BTreeSet<KeyringName>,
    health: Health,
}

impl Disk {
    /// Up to where a keyring is on the disk; the beginning of no epoch when it is not.
    #[must_use]
    pub fn durable(&self, keyring: &KeyringName) -> (Epoch, Revision) {
        let durable = self.lock().durable.get(keyring).copied();
        durable.unwrap_or_default()
    }

    /// How writing goes.
    #[must_use]
    pub fn health(&self) -> Health {
        self.lock().health.clone()
    }

    /// A keyring of which more came to the disk since it was last asked for.
    #[must_use]
    pub fn next_untold(&self) -> Option<KeyringName> {
        self.lock().untold.pop_first()
    }

    /// Of every keyring is to be told anew: nobody knows of it.
    pub fn forget_told(&self) {
        let mut state = self.lock();
        state.untold = state.durable.keys().cloned().collect();
    }

    /// Woken when there is something to tell.
    pub const fn news(&self) -> &Notify {
        &self.news
    }

    /// `views` are on the disk.
    pub(super) fn written<'v>(
        &self,
        views: impl IntoIterator<Item = &'v KeyringView>,
        size: u64,
        now: Timestamp,
    ) {
        let mut state = self.lock();
        for view in views {
            let is = (view.epoch(), view.revision());
            if state.durable.insert(view.name().clone(), is) != Some(is) {
                state.untold.insert(view.name().clone());
            }
        }
        state.health.written += 1;
        state.health.last_written_at = Some(now);
        state.health.size = size;
        state.health.problem = None;
        if !state.untold.is_empty() {
            self.news.notify_one();
        }
    }

    /// Writing failed; whether it did not before.
    pub(super) fn failed(&self, problem: String) -> bool {
        let mut state = self.lock();
        state.health.failed += 1;
        state.health.problem.replace(problem).is_none()
    }

    pub(super) fn refused(&self, reason: String) {
        self.lock().health.refused = Some(reason);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
