//! What the task that applies changes leaves for the file.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    disk::Disk,
    journal::{Journal, Urgency},
    write::{Change, ChangeKind},
};
use crate::{
    key::{Epoch, Revision},
    keyring::{KeyringView, Slot},
};

/// Notes for the file what was applied to a keyring, after it was; cheap to clone. It never waits for the disk.
///
/// Of a keyring that is not here yet there is nothing to note: no check is answered from it, and what comes is newer.
#[derive(Clone, Debug)]
pub struct Recorder {
    journal: Arc<Journal>,
    disk: Arc<Disk>,
}

impl Recorder {
    /// Notes in `journal`.
    #[must_use]
    pub const fn new(journal: Arc<Journal>, disk: Arc<Disk>) -> Self {
        Self { journal, disk }
    }

    /// What is known of the disk.
    #[must_use]
    pub const fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Up to where a keyring is on the disk.
    #[must_use]
    pub fn durable(&self, slot: &Slot) -> (Epoch, Revision) {
        self.disk.durable(slot.name())
    }

    /// A snapshot was taken.
    pub fn replaced(&self, slot: &Slot) {
        if let Some(view) = view(slot) {
            self.journal.replaced(view);
        }
    }

    /// A serialized `Delta` was applied.
    pub fn delta(&self, slot: &Slot, delta: Bytes, urgency: Urgency) {
        self.changed(slot, ChangeKind::Delta(delta), urgency);
    }

    /// Serialized `Revocations` were applied.
    pub fn revocations(&self, slot: &Slot, revocations: Bytes) {
        self.changed(slot, ChangeKind::Revocations(revocations), Urgency::Now);
    }

    /// Serialized `KeyringSettings` were adopted.
    pub fn settings(&self, slot: &Slot, settings: Bytes) {
        self.changed(slot, ChangeKind::Settings(settings), Urgency::Soon);
    }

    fn changed(&self, slot: &Slot, kind: ChangeKind, urgency: Urgency) {
        if let Some(view) = view(slot) {
            let keyring = slot.name().clone();
            self.journal
                .changed(Change { keyring, kind }, urgency, view);
        }
    }
}

fn view(slot: &Slot) -> Option<Arc<KeyringView>> {
    slot.load().as_ref().map(Arc::clone)
}
