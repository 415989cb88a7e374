//! One immutable state of a keyring.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::Arc,
};

use super::usage::VersionUsage;
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
    counts: [usize; KeyState::ALL.len()],
    set_digest: u64,
}

/// What is needed to judge the keys of a keyring.
#[derive(Clone, Debug)]
pub struct KeyringSettings {
    /// What issued tokens begin with.
    pub prefix: Prefix,
    /// Every key is an issued token, so that others can be refused before hashing.
    pub issued_only: bool,
    /// The newest first; a key is looked up under each.
    pub peppers: Vec<Pepper>,
    /// A page for consumers whose key is about to retire.
    pub help_url: Option<String>,
}

/// A key version as checks find it.
#[derive(Debug)]
pub struct HeldKey {
    record: KeyRecord,
    /// Of the version, shared by all records of it.
    usage: Arc<VersionUsage>,
}

/// A version, and the hash under which the control plane counts it in the keyring's set digest.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: Arc<HeldKey>,
    /// Of the item as it was announced; 0 for a tombstone that the control plane does not (or no longer) announce.
    pub(super) announced: u64,
}

type Shard = HashMap<KeyDigest, Entry, BuildHasherDefault<DigestHasher>>;

/// A change to a keyring of a million keys copies a shard of a thousand, and as many pointers to shards.
const SHARDS: usize = 1024;

impl KeyringView {
    pub(super) fn empty(
        name: KeyringName,
        epoch: Epoch,
        revision: Revision,
        settings: Arc<KeyringSettings>,
    ) -> Self {
        let empty = Arc::new(Shard::default());
        Self {
            name,
            epoch,
            revision,
            settings,
            shards: vec![empty; SHARDS].into_boxed_slice(),
            counts: [0; KeyState::ALL.len()],
            set_digest: 0,
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &KeyringName {
        &self.name
    }

    /// The history that its revision belongs to.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The revision that it is at.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// What is needed to judge its keys.
    #[must_use]
    pub fn settings(&self) -> &KeyringSettings {
        &self.settings
    }

    /// The version whose secret a presented key is, whatever its state.
    #[must_use]
    pub fn find(&self, key: &PresentedKey<'_>) -> Option<&Arc<HeldKey>> {
        self.settings
            .peppers
            .iter()
            .find_map(|pepper| self.lookup(&pepper.digest(key)))
    }

    /// The version with `digest`, whatever its state.
    #[must_use]
    pub fn lookup(&self, digest: &KeyDigest) -> Option<&Arc<HeldKey>> {
        self.entry(digest).map(|entry| &entry.key)
    }

    /// How many versions it holds in `state`.
    #[must_use]
    pub const fn count(&self, state: KeyState) -> usize {
        self.counts[state as usize]
    }

    /// How many versions it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) const fn set_digest(&self) -> u64 {
        self.set_digest
    }

    pub(super) fn entry(&self, digest: &KeyDigest) -> Option<&Entry> {
        self.shards[shard_of(digest)].get(digest)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.shards.iter().flat_map(|shard| shard.values())
    }

    /// Puts an entry in the place of the one with its digest.
    pub(super) fn put(&mut self, entry: Entry) {
        self.counts[entry.state() as usize] += 1;
        self.set_digest = self.set_digest.wrapping_add(entry.announced);
        let digest = entry.key.record.digest;
        let shard = Arc::make_mut(&mut self.shards[shard_of(&digest)]);
        let former = shard.insert(digest, entry);
        self.forget(former);
    }

    pub(super) fn remove(&mut self, digest: &KeyDigest) {
        if self.entry(digest).is_some() {
            let shard = Arc::make_mut(&mut self.shards[shard_of(digest)]);
            let former = shard.remove(digest);
            self.forget(former);
        }
    }

    pub(super) const fn advance(&mut self, revision: Revision) {
        self.revision = revision;
    }

    pub(super) fn adopt(&mut self, settings: Arc<KeyringSettings>) {
        self.settings = settings;
    }

    fn forget(&mut self, former: Option<Entry>) {
        if let Some(former) = former {
            self.counts[former.state() as usize] -= 1;
            self.set_digest = self.set_digest.wrapping_sub(former.announced);
        }
    }
}

impl HeldKey {
    /// A version, and its counters.
    pub(super) const fn new(record: KeyRecord, usage: Arc<VersionUsage>) -> Self {
        Self { record, usage }
    }

    /// A version that no keyring holds, for tests of what is made of one.
    #[cfg(test)]
    pub(crate) fn unused(record: KeyRecord) -> Arc<Self> {
        let usage = VersionUsage::unused(record.version_ref());
        Arc::new(Self::new(record, usage))
    }

    /// What is known of it.
    #[must_use]
    pub const fn record(&self) -> &KeyRecord {
        &self.record
    }

    /// How often it was used.
    #[must_use]
    pub const fn usage(&self) -> &Arc<VersionUsage> {
        &self.usage
    }
}

impl Entry {
    pub(super) fn state(&self) -> KeyState {
        self.key.record.state
    }
}

/// Other bytes than those that place a digest within its shard.
const fn shard_of(digest: &KeyDigest) -> usize {
    let bytes = digest.as_bytes();
    u16::from_le_bytes([bytes[8], bytes[9]]) as usize % SHARDS
}

/// Takes the eight bytes that a digest offers as they are: a digest is as good as random.
#[derive(Default)]
struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
