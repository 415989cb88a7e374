//! A part of a keyring's view: key versions by digest, in three allocations, however many versions
//! there are.
//!
//! A shard is immutable once it is published. A change copies it: eighty kilobytes for a thousand
//! versions.

use std::sync::Arc;

use super::{
    grants::Granted,
    held::{self, HeldKey},
    usage_cell::UsageCell,
};
use crate::key::{KeyDigest, KeyRecord};

/// Key versions by digest.
#[derive(Debug, Default)]
pub(super) struct Shard {
    /// The hash table from digests to heads. A head's number and tag are at the place that the
    /// digest chooses, or behind it.
    table: Vec<Place>,
    heads: Vec<Head>,
    /// The packed versions that the heads point into.
    packed: Vec<u8>,
    /// The bytes of `packed` that no head points to any more.
    wasted: usize,
}

/// A version, and the hash under which the control plane counts it in the keyring's set digest.
#[derive(Clone, Copy, Debug)]
pub(super) struct ShardEntry<'v> {
    pub(super) key: HeldKey<'v>,
    /// The hash of the item as it was announced; 0 for a tombstone that the control plane does not
    /// (or no longer) announce.
    pub(super) announced: u64,
}

/// The fields that have the same size for every version.
#[derive(Clone, Debug)]
struct Head {
    digest: KeyDigest,
    announced: u64,
    /// The offset of the rest in `packed`.
    at: u32,
    usage: UsageCell,
}

/// The number of a head, counted from 1, in the low bits, and a part of its digest above them; 0
/// where there is no head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place(u32);

/// The bits of a head's number: enough for a keyring of four thousand million versions in 1,024
/// shards.
const INDEX_BITS: u32 = 22;
/// The number of places for every four heads: a lookup reads two or three adjacent places, and one
/// head.
const PLACES_FOR_FOUR: usize = 5;
/// The spare memory of a copy, in heads and in packed bytes: a change adds one or two versions.
const SPARE_HEADS: usize = 4;
const SPARE_BYTES: usize = 256;

impl Shard {
    /// Reserves memory for `versions` versions of `typical` bytes each, in a shard that has none
    /// yet.
    ///
    /// This should be little more than the versions will use. A shard that grows leaves its former
    /// memory behind. Where the system's pages are large, unused memory counts like used memory.
    pub(super) fn reserve(&mut self, versions: usize, typical: usize) {
        self.heads.reserve_exact(versions);
        self.packed.reserve_exact(versions * typical);
    }

    /// Returns whether the shard has no version.
    pub(super) fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Returns the version with `digest`. Its grants may be among the shared ones.
    pub(super) fn get<'v>(
        &'v self,
        digest: &KeyDigest,
        shared: &'v [Arc<[u8]>],
    ) -> Option<ShardEntry<'v>> {
        self.find(digest)
            .map(|index| self.entry(&self.heads[index], shared))
    }

    pub(super) fn entries<'v>(
        &'v self,
        shared: &'v [Arc<[u8]>],
    ) -> impl Iterator<Item = ShardEntry<'v>> {
        self.heads.iter().map(|head| self.entry(head, shared))
    }

    /// Adds a version, or replaces the version with the same digest. If it is the same version of
    /// the same key, its counters are kept. Returns the number of bytes that the version uses when
    /// packed.
    pub(super) fn put(
        &mut self,
        record: &KeyRecord,
        granted: Option<Granted<'_>>,
        announced: u64,
    ) -> usize {
        self.grow();
        let at = self.packed.len();
        held::pack(record, granted, &mut self.packed);
        let bytes = self.packed.len() - at;
        let at = u32::try_from(at).expect("a shard is far smaller than 4 GiB");
        let head = Head {
            digest: record.digest,
            announced,
            at,
            usage: UsageCell::default(),
        };
        let Some(index) = self.find(&record.digest) else {
            self.heads.push(head);
            self.place(self.heads.len() - 1);
            return bytes;
        };
        let former = &self.heads[index];
        let is_same = held::version_ref(self.packed_at(former.at)) == record.version_ref();
        let usage = is_same.then(|| former.usage.clone());
        self.wasted += held::packed_len(self.packed_at(former.at));
        self.heads[index] = Head {
            usage: usage.unwrap_or_default(),
            ..head
        };
        bytes
    }

    /// Counts the version with `digest` under another hash.
    pub(super) fn announce(&mut self, digest: &KeyDigest, announced: u64) {
        if let Some(index) = self.find(digest) {
            self.heads[index].announced = announced;
        }
    }

    /// Removes the version with `digest`.
    pub(super) fn remove(&mut self, digest: &KeyDigest) {
        let Some(index) = self.find(digest) else {
            return;
        };
        let removed = self.heads.swap_remove(index);
        self.wasted += held::packed_len(self.packed_at(removed.at));
        self.rebuild_table();
    }

    /// Reserves memory for some more versions where little is left: about a sixteenth, where a
    /// vector would double.
    fn grow(&mut self) {
        if self.heads.len() == self.heads.capacity() {
            self.heads.reserve_exact(self.heads.len() / 16 + 1);
        }
        if self.packed.capacity() - self.packed.len() < SPARE_BYTES {
            self.packed
                .reserve_exact(self.packed.len() / 16 + SPARE_BYTES);
        }
    }

    /// Returns the memory that its versions use, in bytes.
    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.table.capacity() * size_of::<Place>()
            + self.heads.capacity() * size_of::<Head>()
            + self.packed.capacity()
    }

    fn entry<'v>(&'v self, head: &'v Head, shared: &'v [Arc<[u8]>]) -> ShardEntry<'v> {
        ShardEntry {
            key: HeldKey::read(&head.digest, &head.usage, self.packed_at(head.at), shared),
            announced: head.announced,
        }
    }

    fn packed_at(&self, at: u32) -> &[u8] {
        &self.packed[usize::try_from(at).expect("an address has 32 bits")..]
    }

    fn find(&self, digest: &KeyDigest) -> Option<usize> {
        if self.table.is_empty() {
            return None;
        }
        let mut at = self.first_place(digest);
        let tag = Place::tag(digest);
        loop {
            let place = self.table[at];
            let index = place.index()?;
            if place.0 >> INDEX_BITS == tag && self.heads[index].digest == *digest {
                return Some(index);
            }
            at = self.next_place(at);
        }
    }

    /// Adds the head with `index`, the newest one, to the table.
    fn place(&mut self, index: usize) {
        if (self.heads.len() * PLACES_FOR_FOUR).div_ceil(4) >= self.table.len() {
            self.rebuild_table();
        } else {
            self.place_unchecked(index);
        }
    }

    fn place_unchecked(&mut self, index: usize) {
        let digest = &self.heads[index].digest;
        let mut at = self.first_place(digest);
        while self.table[at].index().is_some() {
            at = self.next_place(at);
        }
        self.table[at] = Place::new(index, digest);
    }

    /// Builds the table again, with places for as many heads as there is memory for.
    fn rebuild_table(&mut self) {
        // One place more than there are heads, so that a search always ends at an empty place.
        let places = (self.heads.capacity() * PLACES_FOR_FOUR).div_ceil(4) + 1;
        self.table.clear();
        self.table.shrink_to(places);
        self.table.resize(places, Place::default());
        for index in 0..self.heads.len() {
            self.place_unchecked(index);
        }
    }

    /// Returns the first place of a digest. The high bits of a product spread the digests over the
    /// table without a division.
    fn first_place(&self, digest: &KeyDigest) -> usize {
        let places = u128::try_from(self.table.len()).expect("a length");
        let at = (u128::from(digest.table_hash()) * places) >> u64::BITS;
        usize::try_from(at).expect("less than the table's length")
    }

    const fn next_place(&self, at: usize) -> usize {
        if at + 1 == self.table.len() {
            0
        } else {
            at + 1
        }
    }
}

/// A copy has spare memory for a change, and leaves out the bytes that no head points to any more.
impl Clone for Shard {
    fn clone(&self) -> Self {
        let mut heads = Vec::with_capacity(self.heads.len() + SPARE_HEADS);
        heads.extend_from_slice(&self.heads);
        let mut packed = Vec::with_capacity(self.packed.len() - self.wasted + SPARE_BYTES);
        if self.wasted == 0 {
            packed.extend_from_slice(&self.packed);
        } else {
            for head in &mut heads {
                let from = self.packed_at(head.at);
                head.at = u32::try_from(packed.len()).expect("it has become no larger");
                packed.extend_from_slice(&from[..held::packed_len(from)]);
            }
        }
        Self {
            table: self.table.clone(),
            heads,
            packed,
            wasted: 0,
        }
    }
}

impl Place {
    fn new(index: usize, digest: &KeyDigest) -> Self {
        let number = u32::try_from(index + 1).unwrap_or(u32::MAX);
        assert!(
            number < 1 << INDEX_BITS,
            "a shard holds fewer than 4,194,304 versions"
        );
        Self(Self::tag(digest) << INDEX_BITS | number)
    }

    const fn index(self) -> Option<usize> {
        match self.0 & ((1 << INDEX_BITS) - 1) {
            0 => None,
            number => Some(number as usize - 1),
        }
    }

    /// Returns a part of the digest: other bits than those that choose the shard and the place.
    fn tag(digest: &KeyDigest) -> u32 {
        let bytes = digest.as_bytes();
        u32::from(u16::from_le_bytes([bytes[10], bytes[11]]))
            >> (u16::BITS + INDEX_BITS - u32::BITS)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        key::{KeyState, Scopes, Timestamp, Window, testing},
        keyring::{grants, usage::Ledger},
    };

    /// A change to one of a few digests, which collide in small tables.
    #[derive(Clone, Debug)]
    enum Act {
        Put(u8, KeyState, bool, u64),
        Announce(u8, u64),
        Remove(u8),
        /// A change to a published view copies the shard.
        Copy,
    }

    fn digest(number: u8) -> KeyDigest {
        let mut bytes = [0; KeyDigest::LEN];
        // The same place for every four, and the same tag for every eight.
        bytes[7] = number / 4 * 16;
        bytes[10] = number / 8;
        bytes[31] = number;
        KeyDigest::from_slice(&bytes).expect("32 bytes")
    }

    fn record(number: u8, state: KeyState, is_long: bool) -> KeyRecord {
        let expires_at = is_long.then(|| Timestamp::from_millis(9));
        KeyRecord {
            digest: digest(number),
            state,
            window: Window::new(None, expires_at),
            scopes: Scopes::parse(if is_long { "a b" } else { "" }).expect("scopes"),
            key_id: "7Qm2Xc91TbKe".parse().expect("an id"),
            ..testing::record()
        }
    }

    fn act() -> impl Strategy<Value = Act> {
        let number = 0_u8..24;
        let state = proptest::sample::select(KeyState::ALL.to_vec());
        prop_oneof![
            6 => (number.clone(), state, any::<bool>(), any::<u64>())
                .prop_map(|(number, state, is_long, hash)| Act::Put(number, state, is_long, hash)),
            1 => (number.clone(), any::<u64>())
                .prop_map(|(number, hash)| Act::Announce(number, hash)),
            3 => number.prop_map(Act::Remove),
            2 => Just(Act::Copy),
        ]
    }

    /// The grants of every long record. Records with an even number share them.
    fn shared() -> [Arc<[u8]>; 1] {
        let packed = grants::pack(&record(0, KeyState::Active, true));
        [packed.expect("it has scopes").into()]
    }

    fn put(shard: &mut Shard, record: &KeyRecord, announced: u64) {
        let packed = grants::pack(record);
        let granted = packed.as_deref().map(|packed| {
            if record.digest.as_bytes()[31].is_multiple_of(2) {
                Granted::Shared(0)
            } else {
                Granted::Own(packed)
            }
        });
        shard.put(record, granted, announced);
    }

    proptest! {
        #[test]
        fn a_shard_holds_what_a_map_holds(acts in vec(act(), 0..80)) {
            let shared = shared();
            let mut shard = Shard::default();
            let mut model: HashMap<u8, (KeyRecord, u64)> = HashMap::new();
            for act in acts {
                match act {
                    Act::Put(number, state, is_long, hash) => {
                        let record = record(number, state, is_long);
                        put(&mut shard, &record, hash);
                        model.insert(number, (record, hash));
                    }
                    Act::Announce(number, hash) => {
                        shard.announce(&digest(number), hash);
                        if let Some((_, announced)) = model.get_mut(&number) {
                            *announced = hash;
                        }
                    }
                    Act::Remove(number) => {
                        shard.remove(&digest(number));
                        model.remove(&number);
                    }
                    Act::Copy => shard = shard.clone(),
                }
                prop_assert_eq!(shard.entries(&shared).count(), model.len());
                for number in 0..24 {
                    let held = shard.get(&digest(number), &shared);
                    let held = held.map(|entry| (entry.key.to_record(), entry.announced));
                    prop_assert_eq!(held.as_ref(), model.get(&number));
                }
            }
        }
    }

    #[test]
    fn a_copy_leaves_nothing_behind_of_what_was_replaced() {
        let mut shard = Shard::default();
        for round in 0..100 {
            put(&mut shard, &record(1, KeyState::Active, true), round);
            shard = shard.clone();
        }
        assert!(shard.size() <= 1_024, "{} bytes", shard.size());
    }

    #[test]
    fn counters_stay_with_their_version_alone() {
        let ledger = Ledger::default();
        let mut shard = Shard::default();
        let one = record(1, KeyState::Active, true);
        put(&mut shard, &one, 1);
        let found = |shard: &Shard| {
            let key = shard.get(&one.digest, &[]).map(|entry| entry.key);
            key.expect("it is held").usage().get()
        };
        assert_eq!(found(&shard), None);
        let key = shard.get(&one.digest, &[]).map(|entry| entry.key);
        let counters = ledger.of(&key.expect("it is held"));
        let retiring = record(1, KeyState::Retiring, false);
        put(&mut shard, &retiring, 2);
        assert_eq!(found(&shard.clone()), Some(counters));
        let other = KeyRecord {
            key_id: "8Qm2Xc91TbKe".parse().expect("an id"),
            ..one.clone()
        };
        put(&mut shard, &other, 3);
        assert_eq!(found(&shard), None);
    }

    /// The target is 120 bytes a key for the whole process.
    #[test]
    fn a_key_takes_a_hundred_bytes() {
        const KEYS: usize = 1_000;
        let mut shard = Shard::default();
        for number in 0..KEYS {
            let mut bytes = [0; KeyDigest::LEN];
            let hash = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            bytes[..8].copy_from_slice(&hash.to_le_bytes());
            bytes[8..16].copy_from_slice(&hash.rotate_left(32).to_le_bytes());
            let plain = KeyRecord {
                digest: KeyDigest::from_slice(&bytes).expect("32 bytes"),
                consumer: format!("consumer-{number:07}").parse().expect("a consumer"),
                window: Window::new(None, Some(Timestamp::from_millis(9))),
                ..testing::record()
            };
            shard.put(&plain, Some(Granted::Shared(0)), hash);
        }
        let size = shard.clone().size() / KEYS;
        assert!(size <= 100, "{size} bytes");
    }
}
