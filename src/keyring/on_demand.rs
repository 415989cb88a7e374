//! A keyring that is too large for the sidecar: it holds the keys that it has looked up, within bounds.
//!
//! A check reads the [`KeyCache`] without a lock. What it does not find there is looked up at the control plane, once
//! however many checks wait for it ([`lookup`]), at the expense of a [`Budget`](crate::budget::Budget) where nobody knows the key. One
//! [`Follower`] writes: what comes down the stream goes through it, one message after the other.
//!
//! # Why a fill never brings back what a revocation ended
//!
//! An entry is a record, judged anew by every check, and it is true at the revision at which the control plane read it.
//! The follower keeps it true from there on, because on one stream nothing comes too late:
//!
//! 1. The control plane reads the answer to a lookup from its newest state at the moment at which the transport asks for
//!    the message. Its state only moves ahead. So whatever came before an answer on the same stream, be it a delta or a
//!    revocation that overtook deltas, is of a revision that the answer includes.
//! 2. What comes after the answer and touches its key is applied to the entry. A delta that the answer includes already
//!    changes nothing: an entry knows its revision. A revocation always applies.
//! 3. Between streams the sidecar keeps the revision that it has seen, the larger of the deltas applied and the
//!    revocations that overtook them. A control plane that lags behind it cannot say what became of a key since: its
//!    answers are dropped as outdated, whatever the key. So an answer that was read before a revocation loses against it,
//!    whichever stream it takes and however long.
//! 4. Where the control plane cannot go on by deltas, it says from where it starts instead. Then every entry is of an
//!    older generation and is not used again, and neither is an answer that waits to be collected.
//! 5. Revisions of another epoch cannot be compared. There the tombstones decide: the newest revocations that this process
//!    has seen. History is rewritten at its end, so that the newest are the ones that can get lost.
//!
//! Checks that waited judge what the lookup holds when they collect it, not what it held when it was answered: until the
//! last of them has gone, the follower keeps a lookup true like an entry. So a check that begins after the ack of a
//! revocation is denied, and a waiting one sees whatever an entry would show it.
//!
//! An entry is looked up again at its end, and until that is answered it is kept true all the same. So where no answer comes
//! it is used on: an outage of the control plane denies nobody whose key is held. An answer that cannot be read ends it: the
//! version is not what it was, and its key is denied.
//!
//! An entry that the cache does not let in, for want of room, is used by the checks that waited for it all the same.
//!
//! # Why an ack of a staged version holds for a sidecar that holds some keys only
//!
//! A rotation hands a secret out when every sidecar has acked the delta that staged its version. A sidecar may be cut off
//! right after its ack. It must then answer for the new version wherever it answers for the old one. So the versions of one
//! key are held as a [`Group`]: a sidecar holds every version of a key that is accepted, or none.
//!
//! 1. The answer to a lookup brings the siblings of what was looked up: the other versions of the key that are accepted
//!    within their windows. All of them are read from one state, so the group is complete at the answer's revision.
//! 2. A delta that brings a version of a key which is held adds it to the group, before the delta is acked. So the group is
//!    complete at the revision that is acked.
//! 3. A lookup may be under way while a version is staged. Either its answer is read after that and brings the version, or
//!    the answer precedes the delta on the stream, by the first rule above, and the delta adds the version. An answer that
//!    is older than an acked delta is dropped as outdated. A delta that an answer includes adds nothing: what the answer
//!    did not bring has ended by then.
//! 4. The cache counts a use of any version as a use of all, and evicts all of them at once. Changes that make a group larger
//!    are let in: the cache makes room elsewhere, or evicts the group.
//! 5. Where a sibling cannot be read, a key that is not held is used by the checks that waited for it and is not held. Of a
//!    key that is held, a version that cannot be read came by a delta, whose nack names it.
//!
//! Every sidecar gets every delta and acks them in order, whatever it holds. So an ack means for one that holds keys on
//! demand what it means for one that holds all: whoever can answer for the old version can answer for the new one. The
//! control plane needs no book of who holds what. A sidecar that holds no version of the key could not answer for the old one
//! either.

use std::{
    fmt,
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use moka::{notification::RemovalCause, policy::EvictionPolicy, sync::Cache};
use tokio::sync::Notify;

use super::held::OwnedKey;
use crate::{
    clock::BootTime,
    key::{KeyDigest, Pepper, PresentedKey, Revision},
};

mod follower;
mod group;
mod groups;
mod lookup;
mod refusal;
mod settings;
mod stats;
mod tombstones;

pub(crate) use follower::StartError;
pub use follower::{Fill, Follower, Found};
use group::Group;
use groups::Gone;
pub use lookup::Answer;
pub use lookup::Waiting;
pub(crate) use lookup::{Failure, Lookups, MAX_WAITING};
pub use refusal::Refusal;
pub use settings::CacheSettings;
pub(crate) use stats::{CacheStats, LookupOutcome, ReadOutcome};
use tombstones::Tombstones;

/// The versions of a keyring that this sidecar has looked up, and their siblings. Checks read it, one [`Follower`] writes.
pub struct KeyCache {
    settings: CacheSettings,
    /// By the digest of their head.
    groups: Cache<KeyDigest, Group, Hashing>,
    /// From the digests of the other versions to that of the head. It has no bound of its own: a group's weight counts its
    /// links.
    links: Cache<KeyDigest, KeyDigest, Hashing>,
    /// The groups that went, for the writer.
    gone: Arc<Mutex<Vec<Gone>>>,
    /// What the control plane does not know, and until when that is believed.
    unknown: Cache<KeyDigest, Unknown, Hashing>,
    /// Of the entries that may be used; others are left to be evicted.
    generation: AtomicU32,
    lookups: Mutex<Lookups>,
    /// Wakes whoever sends lookups.
    wake: Arc<Notify>,
    stats: Arc<CacheStats>,
}

/// A version as it was looked up.
#[derive(Debug)]
pub struct CachedKey {
    key: OwnedKey,
    /// At which the record is true, and from which on it was kept true.
    revision: Revision,
    /// Of the answer that brought it or its group, with every version of the key that was accepted then.
    complete_at: Revision,
    /// In milliseconds since the boot.
    expires_at: u64,
    generation: u32,
    /// It is being looked up ahead of its end, or was.
    refreshed: AtomicBool,
}

/// What a cache knows of a presented key.
#[derive(Clone, Debug)]
pub enum Finding {
    /// Its version, whatever its state.
    Held(Arc<CachedKey>),
    /// The same, to be looked up again by its digest. Where nobody answers it is used as it is: changes have come to it all
    /// the while, and how long that may go on is said by the limit of staleness.
    Ended(Arc<CachedKey>, KeyDigest),
    /// The control plane holds no such key.
    Unknown,
    /// It has to be looked up.
    Missing(KeyDigest),
}

/// Nobody has this key, as of a generation, and until a moment in milliseconds since the boot.
#[derive(Clone, Copy, Debug)]
struct Unknown {
    expires_at: u64,
    generation: u32,
}

type Hashing = BuildHasherDefault<DigestHasher>;

/// Takes the eight bytes that a digest offers as they are: a digest is as good as random.
#[derive(Default)]
struct DigestHasher(u64);

/// The most digests that are known to be unknown: some megabytes, and ten times what the default budget lets in during
/// the default time.
const MAX_UNKNOWN: u64 = 16_384;
/// An entry that is used in this last part of its life is looked up again.
const REFRESH_PART: u64 = 10;

impl KeyCache {
    /// An empty cache. Lookups that are to be sent wake `wake`.
    #[must_use]
    pub(crate) fn new(settings: CacheSettings, wake: Arc<Notify>) -> Self {
        let stats = Arc::new(CacheStats::default());
        let told = Arc::clone(&stats);
        let gone: Arc<Mutex<Vec<Gone>>> = Arc::default();
        let left = Arc::clone(&gone);
        let groups = Cache::builder()
            .max_capacity(settings.max_size)
            .weigher(|_: &KeyDigest, group: &Group| {
                u32::try_from(group.weight()).unwrap_or(u32::MAX)
            })
            .eviction_listener(move |_, group: Group, cause| {
                match cause {
                    RemovalCause::Size => told.evicted(group.versions().len() as u64),
                    RemovalCause::Expired | RemovalCause::Explicit => {}
                    RemovalCause::Replaced => return,
                }
                let mut gone = left.lock().unwrap_or_else(PoisonError::into_inner);
                gone.push(Gone::new(&group));
            })
            .build_with_hasher(Hashing::default());
        let links = Cache::builder().build_with_hasher(Hashing::default());
        let unknown = Cache::builder()
            .max_capacity(MAX_UNKNOWN)
            // The newest is always let in: what is refused here would be asked again.
            .eviction_policy(EvictionPolicy::lru())
            .build_with_hasher(Hashing::default());
        Self {
            settings,
            groups,
            links,
            gone,
            unknown,
            generation: AtomicU32::new(0),
            lookups: Mutex::new(Lookups::new(settings.unknown_budget)),
            wake,
            stats,
        }
    }

    /// Its settings.
    #[must_use]
    pub(crate) const fn settings(&self) -> &CacheSettings {
        &self.settings
    }

    /// What is counted of it.
    #[must_use]
    pub fn stats(&self) -> &CacheStats {
        &self.stats
    }

    /// How many entries it has, those included that are not used any more and wait for their eviction. What was written
    /// within the last moment may be missing.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.groups.entry_count() + self.links.entry_count()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What its entries take, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.groups.weighted_size()
    }

    /// How many digests are known to be nobody's.
    #[must_use]
    pub(crate) fn unknown_len(&self) -> u64 {
        self.unknown.entry_count()
    }

    /// Does what the cache puts off: lets entries in, orders them by use, evicts some. Checks do a part of it from time to
    /// time; whoever calls this often spares them most of it.
    pub fn tidy(&self) {
        self.groups.run_pending_tasks();
        self.links.run_pending_tasks();
        self.unknown.run_pending_tasks();
    }

    /// What is known of a presented key at `now`, under any of `peppers`. `asked` are digests that this check has found to
    /// be unknown already.
    #[must_use]
    pub fn find(
        &self,
        peppers: &[Pepper],
        key: &PresentedKey<'_>,
        asked: &[KeyDigest],
        now: BootTime,
    ) -> Finding {
        // A check that comes back from a lookup was counted.
        let count = |outcome| {
            if asked.is_empty() {
                self.stats.read(outcome);
            }
        };
        let mut missing = None;
        for pepper in peppers {
            let digest = pepper.digest(key);
            if let Some(cached) = self.entry(&digest) {
                if now.as_millis() >= cached.expires_at {
                    count(ReadOutcome::Miss);
                    return Finding::Ended(cached, digest);
                }
                count(ReadOutcome::Hit);
                self.refresh_if_due(&digest, &cached, now);
                return Finding::Held(cached);
            }
            if missing.is_none() && !asked.contains(&digest) && !self.is_unknown(&digest, now) {
                missing = Some(digest);
            }
        }
        if let Some(digest) = missing {
            count(ReadOutcome::Miss);
            Finding::Missing(digest)
        } else {
            count(ReadOutcome::Unknown);
            Finding::Unknown
        }
    }

    /// Whether a version is held under a digest, also one that is to be looked up again.
    #[must_use]
    pub(crate) fn holds(&self, digest: &KeyDigest) -> bool {
        self.entry(digest).is_some()
    }

    fn entry(&self, digest: &KeyDigest) -> Option<Arc<CachedKey>> {
        self.groups
            .get(digest)
            .map(Group::into_head)
            .filter(|head| self.is_current(head.generation))
            .or_else(|| self.sibling(digest))
    }

    /// A version that is not the head of its group. Reading it counts as a use of the group.
    fn sibling(&self, digest: &KeyDigest) -> Option<Arc<CachedKey>> {
        let group = self.groups.get(&self.links.get(digest)?)?;
        let cached = group.find(digest)?;
        self.is_current(cached.generation)
            .then(|| Arc::clone(cached))
    }

    fn is_unknown(&self, digest: &KeyDigest, now: BootTime) -> bool {
        self.unknown.get(digest).is_some_and(|unknown| {
            self.is_current(unknown.generation) && now.as_millis() < unknown.expires_at
        })
    }

    /// An entry that is in use when its end is near is looked up again meanwhile. Once: if that comes to nothing, it ends, and
    /// the next check of it waits for a lookup.
    fn refresh_if_due(&self, digest: &KeyDigest, cached: &CachedKey, now: BootTime) {
        let life = u64::try_from(self.settings.ttl.as_millis()).unwrap_or(u64::MAX);
        let is_due = now.as_millis() >= cached.expires_at.saturating_sub(life / REFRESH_PART);
        if is_due && !cached.refreshed.swap(true, Ordering::Relaxed) {
            self.refresh(*digest, now);
        }
    }

    fn is_current(&self, generation: u32) -> bool {
        // Pairs with the release in `Follower::start`: who sees what came after a start does not see what was before.
        generation == self.generation.load(Ordering::Acquire)
    }

    /// Drops what is held of the key that has a digest, as the cache may at any time.
    #[cfg(test)]
    pub(crate) fn evict(&self, digest: &KeyDigest) {
        self.groups.invalidate(digest);
        if let Some(head) = self.links.get(digest) {
            self.groups.invalidate(&head);
        }
        self.unknown.invalidate(digest);
    }

    fn lock_gone(&self) -> MutexGuard<'_, Vec<Gone>> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_lookups(&self) -> MutexGuard<'_, Lookups> {
        self.lookups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CachedKey {
    /// The version.
    #[must_use]
    pub const fn key(&self) -> &OwnedKey {
        &self.key
    }
}

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

impl fmt::Debug for KeyCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyCache")
            .field("settings", &self.settings)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
