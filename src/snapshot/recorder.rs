//! The interface between the task that applies changes and the snapshot file.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    disk::Disk,
    durable::Durable,
    journal::{Applied, Journal, Removal, WriteUrgency},
    write::{Change, ChangeKind},
};
use crate::{
    key::{KeyringName, Revision},
    keyring::Slot,
};

/// Records for the file what was applied to a keyring, after it was applied. It never waits for the disk. Cheap to clone.
///
/// Nothing is recorded for a keyring that is not loaded yet: no check is answered from it, and its snapshot will be newer.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    journal: Arc<Journal>,
    disk: Arc<Disk>,
}

/// The state after a message was applied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct After<'a> {
    /// The slot in which it is published.
    pub(crate) slot: &'a Slot,
    /// Every revocation up to this revision is in use.
    pub(crate) revoked_through: Revision,
}

impl Recorder {
    /// Records in `journal`.
    #[must_use]
    pub(crate) const fn new(journal: Arc<Journal>, disk: Arc<Disk>) -> Self {
        Self { journal, disk }
    }

    /// The state of the disk.
    #[must_use]
    pub(crate) const fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The state of a keyring on the disk.
    #[must_use]
    pub(crate) fn durable(&self, slot: &Slot) -> Durable {
        self.disk.durable(slot.name())
    }

    /// A snapshot was applied.
    pub(crate) fn replaced(&self, after: After<'_>) {
        if let Some(applied) = after.applied() {
            self.journal.replaced(applied);
        }
    }

    /// A serialized `Delta` was applied.
    pub(crate) fn delta(&self, after: After<'_>, delta: Bytes, urgency: WriteUrgency) {
        self.changed(after, ChangeKind::Delta(delta), urgency);
    }

    /// Serialized `Revocations` were applied.
    pub(crate) fn revocations(&self, after: After<'_>, revocations: Bytes) {
        self.changed(
            after,
            ChangeKind::Revocations(revocations),
            WriteUrgency::Now,
        );
    }

    /// Serialized `KeyringSettings` were adopted.
    pub(crate) fn settings(&self, after: After<'_>, settings: Bytes) {
        self.changed(after, ChangeKind::Settings(settings), WriteUrgency::Soon);
    }

    /// Removes a keyring from the file. [`Disk::has_removed`] reports when this is done.
    #[must_use]
    pub(crate) fn removed(&self, keyring: &KeyringName) -> Removal {
        self.journal.removed(keyring)
    }

    fn changed(&self, after: After<'_>, kind: ChangeKind, urgency: WriteUrgency) {
        if let Some(applied) = after.applied() {
            let keyring = after.slot.name().clone();
            self.journal
                .changed(Change { keyring, kind }, urgency, applied);
        }
    }
}

impl After<'_> {
    fn applied(self) -> Option<Applied> {
        let view = self.slot.load().as_ref().map(Arc::clone)?;
        Some(Applied {
            view,
            revoked_through: self.revoked_through,
        })
    }
}
