//! The changes and snapshots of a keyring for its sidecars, encoded once for all of them.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::steps::{EncodedStep, Steps};
use crate::{
    key::{Epoch, KeyRecord, KeyState, Keyring, Revision, Touched},
    proto::discovery,
    wire::item,
};

/// The recent changes of a keyring, and the digest of its set of items. Its clones share the changes.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    epoch: Epoch,
    set_digest: u64,
    recent: Steps,
    /// The last revision that revoked a version; before the first one, the revision at which the
    /// feed began. A sidecar that has every revocation up to here misses none.
    revoked_at: Revision,
}

/// A whole keyring, encoded.
#[derive(Debug)]
pub(crate) struct EncodedSnapshot {
    /// The number of this encoding; zero if it cannot be resumed.
    pub(crate) id: u64,
    /// The revision of the keyring in it.
    pub(crate) revision: Revision,
    /// Serialized chunks, at least one.
    pub(crate) chunks: Vec<Bytes>,
}

/// The most bytes of items in one chunk of a snapshot. A revocation then waits for little data, and
/// a chunk fits into the 8 KiB that tonic keeps for the messages of a stream. tonic would keep a
/// larger buffer as long as the stream lives, a thousand times for a thousand streams.
const MAX_CHUNK: usize = 7_680;

impl Feed {
    /// Returns the feed of a keyring as it is; no sidecar can resume from an earlier revision.
    #[must_use]
    pub(crate) fn new(epoch: Epoch, keyring: &Keyring) -> Self {
        let mut feed = Self {
            epoch,
            set_digest: 0,
            recent: Steps::default(),
            revoked_at: keyring.revision(),
        };
        for record in keyring.records() {
            let hash = item::hash_record(&item::encode_record(&record));
            feed.set_digest = feed.set_digest.wrapping_add(hash);
        }
        feed.recent = Steps::after(keyring.revision(), feed.set_digest);
        feed
    }

    /// Returns the digest of the set of all items.
    #[must_use]
    pub(crate) const fn set_digest(&self) -> u64 {
        self.set_digest
    }

    /// Returns the digest of the set at `revision`; none if that revision is too old, from before
    /// the feed began, or still to come. The digest is known for every revision that a kept step
    /// leads on from.
    #[must_use]
    pub(crate) fn digest_at(&self, revision: Revision) -> Option<u64> {
        self.recent.digest_at(revision)
    }

    /// Encodes the change that led to the keyring's revision and touched these versions.
    pub(crate) fn push(&mut self, keyring: &Keyring, touched: &[Touched]) {
        let revision = keyring.revision();
        let mut delta = discovery::Delta {
            keyring: keyring.name().to_string(),
            epoch: self.epoch.get(),
            prev_revision: revision.get() - 1,
            revision: revision.get(),
            nonce: revision.get(),
            upserts: Vec::new(),
            revocations: Vec::new(),
            removals: Vec::new(),
        };
        for Touched { record, former } in touched {
            let item = item::encode(record);
            self.replace(former.as_ref(), &item);
            match record.state {
                KeyState::Revoked => delta.revocations.push(item),
                KeyState::Pending | KeyState::Active | KeyState::Retiring | KeyState::Retired => {
                    delta.upserts.push(item);
                }
            }
        }
        let revocations = (!delta.revocations.is_empty()).then(|| {
            let message = discovery::Revocations {
                keyring: delta.keyring.clone(),
                epoch: delta.epoch,
                revision: delta.revision,
                nonce: delta.nonce,
                items: delta.revocations.clone(),
                complete_after: self.revoked_at.get(),
            };
            message.encode_to_vec().into()
        });
        if revocations.is_some() {
            self.revoked_at = revision;
        }
        self.recent.push(EncodedStep {
            revision,
            delta: delta.encode_to_vec().into(),
            revocations,
            set_digest: self.set_digest,
        });
    }

    /// Returns the step that leads on from revision `after`; none if it is not kept any more, or
    /// does not exist yet.
    #[must_use]
    pub(crate) fn step_after(&self, after: Revision) -> Option<&EncodedStep> {
        self.recent.get(after.next())
    }

    /// Returns the first kept step after revision `after` that revokes a version.
    #[must_use]
    pub(crate) fn revocation_after(&self, after: Revision) -> Option<&EncodedStep> {
        self.recent.first_revocation(after.next())
    }

    /// Encodes the whole keyring. `confirmed_items` is the number of items that an operator
    /// confirmed, and `id` a number that no other encoding has; zero for none.
    #[must_use]
    pub(crate) fn snapshot(
        &self,
        keyring: &Keyring,
        confirmed_items: u64,
        id: u64,
    ) -> Arc<EncodedSnapshot> {
        let revision = keyring.revision();
        let empty = discovery::SnapshotChunk {
            keyring: keyring.name().to_string(),
            epoch: self.epoch.get(),
            revision: revision.get(),
            nonce: revision.get(),
            index: 0,
            last: false,
            total_items: keyring.version_count() as u64,
            set_digest: self.set_digest,
            items: Vec::new(),
            confirmed_items,
            id,
        };
        let mut chunks = Vec::new();
        let mut chunk = empty.clone();
        let mut size = 0;
        for record in keyring.records() {
            let item = item::encode(&record);
            let len = item.encoded_len();
            if size + len > MAX_CHUNK {
                let next = discovery::SnapshotChunk {
                    index: chunk.index + 1,
                    ..empty.clone()
                };
                let full = std::mem::replace(&mut chunk, next);
                chunks.push(full.encode_to_vec().into());
                size = 0;
            }
            size += len;
            chunk.items.push(item);
        }
        chunk.last = true;
        chunks.push(chunk.encode_to_vec().into());
        Arc::new(EncodedSnapshot {
            id,
            revision,
            chunks,
        })
    }

    /// Replaces the hash of an item's former state in the digest of the set.
    fn replace(&mut self, former: Option<&KeyRecord>, item: &discovery::Item) {
        let former = former.map(item::encode_record);
        let former = former.map_or(0, |former| item::hash_record(&former));
        let hash = item::hash(item);
        self.set_digest = self.set_digest.wrapping_sub(former).wrapping_add(hash);
    }
}
