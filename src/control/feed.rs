//! What a keyring's sidecars are to be told, encoded once for all of them.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use prost::Message;

use crate::{
    discovery::item,
    key::{Epoch, KeyState, Keyring, Revision, VersionRef},
    proto::discovery as wire,
};

/// The recent changes of a keyring, and the digest of its set of items.
#[derive(Debug)]
pub struct Feed {
    epoch: Epoch,
    set_digest: u64,
    hashes: HashMap<VersionRef, u64>,
    recent: VecDeque<Step>,
    recent_bytes: usize,
}

/// One revision, encoded.
#[derive(Clone, Debug)]
pub struct Step {
    /// The revision to which it leads.
    pub revision: Revision,
    /// A serialized delta.
    pub delta: Bytes,
    /// Serialized revocations, where the delta has any.
    pub revocations: Option<Bytes>,
}

/// A whole keyring, encoded.
#[derive(Debug)]
pub struct EncodedSnapshot {
    /// The revision that it is at.
    pub revision: Revision,
    /// Serialized chunks, at least one.
    pub chunks: Vec<Bytes>,
}

/// How many revisions are kept for sidecars that resume. One that was away for longer takes a snapshot.
const MAX_STEPS: usize = 8_192;
/// The same in bytes: what all streams of a keyring share, however slow their readers are.
const MAX_BYTES: usize = 16 << 20;
/// The most bytes of items in one chunk of a snapshot, so that a revocation waits behind little.
const MAX_CHUNK: usize = 1 << 20;

impl Feed {
    /// The feed of a keyring as it is; nobody can resume before that.
    #[must_use]
    pub fn new(epoch: Epoch, keyring: &Keyring) -> Self {
        let mut feed = Self {
            epoch,
            set_digest: 0,
            hashes: HashMap::with_capacity(keyring.version_count()),
            recent: VecDeque::new(),
            recent_bytes: 0,
        };
        for record in keyring.records() {
            feed.count(record.version_ref(), item::hash(&item::encode(&record)));
        }
        feed
    }

    /// The digest of the set of all items.
    #[must_use]
    pub const fn set_digest(&self) -> u64 {
        self.set_digest
    }

    /// Encodes the change that led to the keyring's revision and touched these versions.
    pub fn push(&mut self, keyring: &Keyring, touched: &[VersionRef]) {
        let revision = keyring.revision();
        let mut delta = wire::Delta {
            keyring: keyring.name().to_string(),
            epoch: self.epoch.get(),
            prev_revision: revision.get() - 1,
            revision: revision.get(),
            nonce: revision.get(),
            upserts: Vec::new(),
            revocations: Vec::new(),
            removals: Vec::new(),
        };
        for which in touched {
            let Some(record) = keyring.record(*which) else {
                continue;
            };
            let item = item::encode(&record);
            self.count(*which, item::hash(&item));
            match record.state {
                KeyState::Revoked => delta.revocations.push(item),
                KeyState::Pending | KeyState::Active | KeyState::Retiring | KeyState::Retired => {
                    delta.upserts.push(item);
                }
            }
        }
        let revocations = (!delta.revocations.is_empty()).then(|| {
            let message = wire::Revocations {
                keyring: delta.keyring.clone(),
                epoch: delta.epoch,
                revision: delta.revision,
                nonce: delta.nonce,
                items: delta.revocations.clone(),
            };
            message.encode_to_vec().into()
        });
        self.keep(Step {
            revision,
            delta: delta.encode_to_vec().into(),
            revocations,
        });
    }

    /// The step that leads on from revision `after`; none when it is not kept any more, or there is none yet.
    #[must_use]
    pub fn step_after(&self, after: Revision) -> Option<&Step> {
        let first = self.recent.front()?.revision;
        let index = after.next().get().checked_sub(first.get())?;
        self.recent.get(usize::try_from(index).ok()?)
    }

    /// The first step after revision `after` that revokes something, as far as steps are kept.
    #[must_use]
    pub fn revocation_after(&self, after: Revision) -> Option<&Step> {
        let start = self.recent.partition_point(|step| step.revision <= after);
        self.recent
            .range(start..)
            .find(|step| step.revocations.is_some())
    }

    /// Encodes the whole keyring. `confirmed_items` is the number that an operator confirmed.
    #[must_use]
    pub fn snapshot(&self, keyring: &Keyring, confirmed_items: u64) -> Arc<EncodedSnapshot> {
        let revision = keyring.revision();
        let empty = wire::SnapshotChunk {
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
        };
        let mut chunks = Vec::new();
        let mut chunk = empty.clone();
        let mut size = 0;
        for record in keyring.records() {
            let item = item::encode(&record);
            let len = item.encoded_len();
            if size + len > MAX_CHUNK {
                let next = wire::SnapshotChunk {
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
        Arc::new(EncodedSnapshot { revision, chunks })
    }

    fn count(&mut self, which: VersionRef, hash: u64) {
        let former = self.hashes.insert(which, hash).unwrap_or(0);
        self.set_digest = self.set_digest.wrapping_sub(former).wrapping_add(hash);
    }

    fn keep(&mut self, step: Step) {
        self.recent_bytes += step.len();
        self.recent.push_back(step);
        while self.recent.len() > MAX_STEPS || self.recent_bytes > MAX_BYTES {
            let Some(oldest) = self.recent.pop_front() else {
                break;
            };
            self.recent_bytes -= oldest.len();
        }
    }
}

impl Step {
    fn len(&self) -> usize {
        self.delta.len() + self.revocations.as_ref().map_or(0, Bytes::len)
    }
}
