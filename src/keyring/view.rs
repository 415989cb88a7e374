//! One immutable state of a keyring.

use std::sync::Arc;

use super::{
    grants::{self, Granted, SharedGrants},
    held::HeldKey,
    shard::{Shard, ShardEntry},
};
use crate::key::{
    Epoch, KeyDigest, KeyRecord, KeyState, KeyringName, Pepper, Prefix, PresentedKey, Revision,
};

/// A keyring as a check sees it. Cloning one copies pointers; a change copies the shards that it touches.
#[derive(Clone, Debug)]
pub struct KeyringView {
    name: KeyringName,
    epoch: Epoch,
    revision: Revision,
    settings: Arc<KeyringSettings>,
    shards: Box<[Arc<Shard>]>,
    grants: Arc<SharedGrants>,
    room: Room,
    counts: [usize; KeyState::ALL.len()],
    set_digest: u64,
}

/// The settings by which the keys of a keyring are judged.
#[derive(Clone, Debug)]
pub struct KeyringSettings {
    /// The prefix of issued tokens.
    pub prefix: Prefix,
    /// Whether every key is an issued token. Other credentials are then rejected before hashing.
    pub issued_only: bool,
    /// The peppers, the newest first. A key is looked up under each of them.
    pub peppers: Vec<Pepper>,
    /// A page for consumers whose key is about to retire.
    pub help_url: Option<String>,
}

/// The memory that a shard reserves when its first version arrives.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    /// The number of versions for which a shard reserves memory.
    versions: usize,
    /// The packed bytes of all versions that were put so far.
    bytes: usize,
    /// The number of versions that were put so far.
    put: usize,
}

/// The number of shards. A change to a keyring of a million keys copies a shard of about a thousand
/// keys, and 1,024 pointers to shards.
const SHARDS: usize = 1024;

impl KeyringView {
    /// Creates a view without versions, with memory for `versions` of them.
    pub(super) fn empty(
        name: KeyringName,
        epoch: Epoch,
        revision: Revision,
        settings: Arc<KeyringSettings>,
        versions: usize,
    ) -> Self {
        // Digests spread evenly: few shards need more than a sixteenth beyond their share, and
        // those grow.
        let versions = (versions + versions / 16) / SHARDS;
        Self {
            name,
            epoch,
            revision,
            settings,
            shards: (0..SHARDS).map(|_| Arc::default()).collect(),
            grants: Arc::default(),
            room: Room {
                versions,
                ..Room::default()
            },
            counts: [0; KeyState::ALL.len()],
            set_digest: 0,
        }
    }

    #[must_use]
    pub(crate) const fn name(&self) -> &KeyringName {
        &self.name
    }

    /// Returns the epoch to which the revision belongs.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Returns the revision of the view.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// Returns the settings by which its keys are judged.
    #[must_use]
    pub(crate) fn settings(&self) -> &KeyringSettings {
        &self.settings
    }

    /// Returns the version whose secret a presented key is, whatever its state. The key is looked
    /// up under each pepper, the newest first.
    #[must_use]
    pub(crate) fn find(&self, key: &PresentedKey<'_>) -> Option<HeldKey<'_>> {
        self.settings
            .peppers
            .iter()
            .find_map(|pepper| self.lookup(&pepper.digest(key)))
    }

    /// Returns the version with `digest`, whatever its state.
    #[must_use]
    pub fn lookup(&self, digest: &KeyDigest) -> Option<HeldKey<'_>> {
        self.entry(digest).map(|entry| entry.key)
    }

    /// Returns the record of the version with `digest`, whatever its state.
    #[must_use]
    pub(crate) fn record(&self, digest: &KeyDigest) -> Option<KeyRecord> {
        Some(self.lookup(digest)?.to_record())
    }

    /// Returns the number of held versions in `state`.
    #[must_use]
    pub(crate) const fn count(&self, state: KeyState) -> usize {
        self.counts[state as usize]
    }

    /// Returns the number of held versions, including revoked ones.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Returns whether the view holds no version.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn shared_settings(&self) -> Arc<KeyringSettings> {
        Arc::clone(&self.settings)
    }

    pub(super) const fn set_digest(&self) -> u64 {
        self.set_digest
    }

    pub(super) fn entry(&self, digest: &KeyDigest) -> Option<ShardEntry<'_>> {
        self.shards[shard_of(digest)].get(digest, self.grants.list())
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = ShardEntry<'_>> {
        let shards = self.shards.iter();
        shards.flat_map(|shard| shard.entries(self.grants.list()))
    }

    /// Adds a version, or replaces the version with the same digest. The set digest counts it under
    /// the hash `announced`.
    pub(super) fn put(&mut self, record: &KeyRecord, announced: u64) {
        self.forget(&record.digest);
        self.counts[record.state as usize] += 1;
        self.set_digest = self.set_digest.wrapping_add(announced);
        let packed = grants::pack(record);
        let granted = packed.as_deref().map(|packed| self.granted(packed));
        let room = self.room;
        let shard = self.shard_mut(&record.digest);
        if shard.is_empty() {
            shard.reserve(room.versions, room.typical());
        }
        let bytes = shard.put(record, granted, announced);
        self.room.note(bytes);
    }

    /// Counts the version with `digest` under another hash. The view must hold that version.
    pub(super) fn announce(&mut self, digest: &KeyDigest, announced: u64) {
        let former = self.entry(digest).map_or(0, |entry| entry.announced);
        self.set_digest = self.set_digest.wrapping_sub(former).wrapping_add(announced);
        self.shard_mut(digest).announce(digest, announced);
    }

    pub(super) fn remove(&mut self, digest: &KeyDigest) {
        if self.entry(digest).is_some() {
            self.forget(digest);
            self.shard_mut(digest).remove(digest);
        }
    }

    pub(super) const fn advance(&mut self, revision: Revision) {
        self.revision = revision;
    }

    pub(super) fn adopt(&mut self, settings: Arc<KeyringSettings>) {
        self.settings = settings;
    }

    /// Removes the version with `digest` from the counts and from the set digest.
    fn forget(&mut self, digest: &KeyDigest) {
        let former = self.entry(digest);
        if let Some((state, announced)) = former.map(|entry| (entry.key.state(), entry.announced)) {
            self.counts[state as usize] -= 1;
            self.set_digest = self.set_digest.wrapping_sub(announced);
        }
    }

    /// Shares grants where that is possible, and returns how they are found.
    fn granted<'p>(&mut self, packed: &'p [u8]) -> Granted<'p> {
        if let Some(number) = self.grants.number(packed) {
            return Granted::Shared(number);
        }
        if self.grants.has_room(packed) {
            return Granted::Shared(Arc::make_mut(&mut self.grants).add(packed));
        }
        Granted::Own(packed)
    }

    fn shard_mut(&mut self, digest: &KeyDigest) -> &mut Shard {
        Arc::make_mut(&mut self.shards[shard_of(digest)])
    }
}

impl Room {
    const fn note(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.put += 1;
    }

    /// Returns the packed bytes of a typical version: the average of those that were put so far,
    /// rounded up, and one more.
    fn typical(self) -> usize {
        self.bytes.div_ceil(self.put.max(1)) + 1
    }
}

/// Returns the index of the shard of a digest. It uses other bytes than those that place the digest
/// within its shard.
const fn shard_of(digest: &KeyDigest) -> usize {
    let bytes = digest.as_bytes();
    u16::from_le_bytes([bytes[8], bytes[9]]) as usize % SHARDS
}
