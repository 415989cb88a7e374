//! A keyring that is too large for the sidecar. The sidecar holds only the keys that it has looked
//! up, within bounds.
//!
//! A check reads the [`KeyCache`] without a lock. A key that is not in the cache is looked up at
//! the control plane, once, however many checks wait for it ([`lookup`]). Such a lookup is charged
//! to a [`Budget`](crate::budget::Budget), and refunded if the key exists. One [`Follower`] writes
//! to the cache: it applies the messages of the stream one after the other.
//!
//! # Why a fill never restores a revoked version
//!
//! An entry is a record that every check judges again. It is correct at the revision at which the
//! control plane read it. The follower keeps it correct from that revision on, because nothing
//! arrives too late on one stream:
//!
//! 1. The control plane reads the answer to a lookup from its newest state, at the moment at which
//!    the transport asks for the message. Its state only moves forward. So each message that
//!    precedes an answer on the same stream, be it a delta or a revocation that overtook deltas, is
//!    of a revision that the answer includes.
//! 2. A message that follows the answer and concerns its key is applied to the entry. A delta that
//!    the answer already includes changes nothing, because an entry stores its revision. A
//!    revocation always applies.
//! 3. Between streams the sidecar keeps the newest revision that it has seen, be it of an applied
//!    delta or of a revocation that overtook deltas. A control plane that lags behind that revision
//!    does not know what happened to a key since then: its answers are dropped as outdated,
//!    whatever the key. So an answer that was read before a revocation never overrides the
//!    revocation, whichever stream it arrives on and however late.
//! 4. Where the control plane cannot continue with deltas, it announces the revision from which it
//!    starts instead. Every entry is then of an older generation and is not used again. An answer
//!    that waits to be collected is not used either.
//! 5. Revisions of different epochs cannot be compared. Across epochs the tombstones decide: the
//!    newest revocations that this process has seen. A new epoch rewrites the end of the history,
//!    so the revocations that can get lost are the newest ones.
//!
//! A check that waited judges the record that the lookup holds when the check collects it, not the
//! record that the answer brought. The follower keeps the record of a lookup correct, like an
//! entry, until the last waiting check has left. So a check that begins after the ack of a
//! revocation is denied, and a waiting check sees the same as an entry would show it.
//!
//! An entry that has expired is looked up again, and the follower keeps it correct until the answer
//! arrives. Where no answer arrives, the entry is still used: an outage of the control plane denies
//! no check whose key is held. An answer that cannot be read removes the entry: the version is no
//! longer what it was, and its key is denied.
//!
//! Where the cache has no room for an entry, the checks that waited for it still use it.
//!
//! # Why an ack of a staged version is valid for a sidecar that holds only some keys
//!
//! A rotation hands out a secret when every sidecar has acked the delta that staged its version. A
//! sidecar may be cut off right after its ack. It must then accept the new version wherever it
//! accepts the old one. So the versions of one key are held as a [`Group`]: a sidecar holds every
//! version of a key that is accepted, or none.
//!
//! 1. The answer to a lookup contains the siblings of the version that was looked up: the other
//!    versions of the key that are accepted within their windows. All of them are read from one
//!    state, so the group is complete at the answer's revision.
//! 2. A delta that brings a version of a held key adds it to the group, before the delta is acked.
//!    So the group is complete at the acked revision.
//! 3. A lookup may be in progress while a version is staged. Either its answer is read after the
//!    staging and contains the version, or the answer precedes the delta on the stream, by the
//!    first rule above, and the delta adds the version. An answer that is older than an acked delta
//!    is dropped as outdated. A delta that an answer includes adds nothing: a version that the
//!    answer does not contain is no longer accepted by then.
//! 4. The cache counts a use of any version as a use of all versions, and evicts all of them at
//!    once. It admits changes that make a group larger: it evicts other groups, or the group
//!    itself.
//! 5. A sibling may be unreadable. A key that is not held is then used by the checks that waited
//!    for it, and stays out of the cache. Where the key is held, the unreadable version arrived by
//!    a delta, and the nack of that delta names it.
//!
//! Every sidecar receives every delta and acks the deltas in order, whatever it holds. So an ack
//! means the same for a sidecar that holds keys on demand as for one that holds all keys: a sidecar
//! that can accept the old version can accept the new one. The control plane does not need to
//! record which sidecar holds which key. A sidecar that holds no version of the key could not
//! accept the old one either.

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
pub use refusal::LookupRefusal;
pub use settings::CacheSettings;
pub(crate) use stats::{CacheStats, LookupOutcome, ReadOutcome};
use tombstones::Tombstones;

/// The versions of a keyring that this sidecar has looked up, and their siblings. Checks read the
/// cache; one [`Follower`] writes to it.
pub struct KeyCache {
    settings: CacheSettings,
    /// The groups, by the digest of their head.
    groups: Cache<KeyDigest, Group, Hashing>,
    /// The digest of the head, by the digests of the other versions. This map has no bound of its
    /// own: the weight of a group counts its links.
    links: Cache<KeyDigest, KeyDigest, Hashing>,
    /// The groups that were evicted or removed, for the writer.
    gone: Arc<Mutex<Vec<Gone>>>,
    /// The digests that the control plane does not know, and until when each of them counts as
    /// unknown.
    unknown: Cache<KeyDigest, Unknown, Hashing>,
    /// The generation of the entries that may be used. Other entries stay until they are evicted.
    generation: AtomicU32,
    lookups: Mutex<Lookups>,
    /// Wakes the task that sends lookups.
    wake: Arc<Notify>,
    stats: Arc<CacheStats>,
}

/// A version as it was looked up.
#[derive(Debug)]
pub struct CachedKey {
    key: OwnedKey,
    /// The revision at which the record is correct. The follower keeps the record correct from that
    /// revision on.
    revision: Revision,
    /// The revision of the answer that brought this version or its group. The answer contained
    /// every version of the key that was accepted then.
    complete_at: Revision,
    /// In milliseconds since the boot.
    expires_at: u64,
    generation: u32,
    /// Whether a lookup ahead of its expiry was started.
    refreshed: AtomicBool,
}

/// The result of a search for a presented key in a cache.
#[derive(Clone, Debug)]
pub enum Finding {
    /// The version of the key, whatever its state.
    Held(Arc<CachedKey>),
    /// The version of the key, whose entry has expired and must be looked up again by its digest.
    /// Without an answer the entry is used as it is: the follower has applied all changes to it.
    /// The limit of staleness bounds for how long.
    Ended(Arc<CachedKey>, KeyDigest),
    /// The control plane holds no such key.
    Unknown,
    /// The key must be looked up by this digest.
    Missing(KeyDigest),
}

/// A digest that the control plane does not know, in a generation, and until a moment in
/// milliseconds since the boot.
#[derive(Clone, Copy, Debug)]
struct Unknown {
    expires_at: u64,
    generation: u32,
}

type Hashing = BuildHasherDefault<DigestHasher>;

/// Uses eight bytes of a digest unchanged: a digest is as good as random.
#[derive(Default)]
struct DigestHasher(u64);

/// The most digests that are held as unknown: some megabytes, and eight times the 2,000 that the
/// default budget (1,000 at once and 100 a second) allows within the default `negative_ttl` of 10
/// seconds.
const MAX_UNKNOWN: u64 = 16_384;
/// An entry that is used in the last tenth of `ttl` before its expiry is looked up again.
const REFRESH_PART: u64 = 10;

impl KeyCache {
    /// Creates an empty cache. A lookup that must be sent notifies `wake`.
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
            // LRU always admits the newest digest: a digest that is not admitted would be looked up
            // again.
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

    #[must_use]
    pub(crate) const fn settings(&self) -> &CacheSettings {
        &self.settings
    }

    /// Returns the counters of the cache.
    #[must_use]
    pub fn stats(&self) -> &CacheStats {
        &self.stats
    }

    /// Returns the number of entries, including those that are no longer used and wait for their
    /// eviction. Entries of the last moment may be missing.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.groups.entry_count() + self.links.entry_count()
    }

    /// Returns whether the cache has no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the estimated memory of the entries, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.groups.weighted_size()
    }

    /// Returns the number of digests that are held as unknown.
    #[must_use]
    pub(crate) fn unknown_len(&self) -> u64 {
        self.unknown.entry_count()
    }

    /// Does the work that the cache defers: it admits entries, orders them by use and evicts some.
    /// Checks do a part of this work from time to time. A caller that calls this often spares the
    /// checks most of it.
    pub fn tidy(&self) {
        self.groups.run_pending_tasks();
        self.links.run_pending_tasks();
        self.unknown.run_pending_tasks();
    }

    /// Searches for a presented key at `now`, under each of `peppers`. `asked` are the digests that
    /// this check has already found to be unknown.
    #[must_use]
    pub fn find(
        &self,
        peppers: &[Pepper],
        key: &PresentedKey<'_>,
        asked: &[KeyDigest],
        now: BootTime,
    ) -> Finding {
        // A check that returns from a lookup was counted before.
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

    /// Returns whether a version is held under a digest, including a version whose entry has
    /// expired.
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

    /// Returns a version that is not the head of its group. Reading it counts as a use of the
    /// group.
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

    /// Starts a lookup of an entry that is used shortly before its expiry. This happens once: if
    /// the lookup fails, the entry expires, and the next check of it waits for a lookup.
    fn refresh_if_due(&self, digest: &KeyDigest, cached: &CachedKey, now: BootTime) {
        let life = u64::try_from(self.settings.ttl.as_millis()).unwrap_or(u64::MAX);
        let is_due = now.as_millis() >= cached.expires_at.saturating_sub(life / REFRESH_PART);
        if is_due && !cached.refreshed.swap(true, Ordering::Relaxed) {
            self.refresh(*digest, now);
        }
    }

    fn is_current(&self, generation: u32) -> bool {
        // Pairs with the release in `Follower::start` and `Follower::forget`: a check that sees
        // anything written after a start does not use entries of before.
        generation == self.generation.load(Ordering::Acquire)
    }

    /// Drops the group with a digest, as the cache may do at any time.
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
    /// Returns the version.
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
