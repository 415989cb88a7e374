//! The writer of a keyring that is held on demand: it applies the messages of the stream.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{Answer, CachedKey, Failure, Group, KeyCache, Tombstones, Unknown, groups::Groups};
use crate::{
    clock::BootTime,
    key::{Epoch, KeyDigest, KeyRecord, KeyState, Revision, VersionRef},
    keyring::{
        held::OwnedKey,
        position::{DeltaError, KeyringPosition},
        slot::Slot,
        view::{KeyringSettings, KeyringView},
    },
};

/// Keeps a [`KeyCache`] correct. Each cache has one follower, which applies the messages of the
/// stream in order.
#[derive(Debug)]
pub struct Follower {
    slot: Arc<Slot>,
    cache: Arc<KeyCache>,
    pub(super) groups: Groups,
    settings: Option<Arc<KeyringSettings>>,
    /// A view without keys, for the data that checks need beside them.
    view: Option<Arc<KeyringView>>,
    /// The newest revision in the view's epoch of which any message has arrived. An answer must not
    /// be older.
    seen: Revision,
    tombstones: Tombstones,
}

/// The answer to a lookup.
#[derive(Clone, Debug)]
pub struct Fill {
    /// The epoch of the revision.
    pub epoch: Epoch,
    /// The revision at which the answer is correct.
    pub revision: Revision,
    /// The digest that was looked up.
    pub digest: KeyDigest,
    /// The result: what the keyring holds under the digest.
    pub found: Found,
    /// The other versions of the same key that are accepted within their windows; none when one of them cannot be read.
    pub siblings: Option<Vec<KeyRecord>>,
}

/// The content of a keyring under a digest.
#[derive(Clone, Debug)]
pub enum Found {
    /// A version.
    Version(Box<KeyRecord>),
    /// A version whose record cannot be read.
    Unreadable,
    /// No version.
    Nothing,
}

/// A start is rejected, because the control plane lags behind the follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a start is at revision {found}, but the keyring is already at revision {held} of the same epoch"
)]
pub struct StartError {
    /// The revision of the keyring.
    pub(crate) held: Revision,
    /// The revision of the start.
    pub(crate) found: Revision,
}

impl Follower {
    /// Creates a follower that writes to `cache` and publishes to its `slot`.
    #[must_use]
    pub fn new(slot: Arc<Slot>, cache: Arc<KeyCache>) -> Self {
        Self {
            slot,
            groups: Groups::new(Arc::clone(&cache)),
            cache,
            settings: None,
            view: None,
            seen: Revision::default(),
            tombstones: Tombstones::default(),
        }
    }

    /// Returns the slot that the follower publishes to.
    #[must_use]
    pub(crate) const fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// Returns the cache that the follower writes to.
    #[must_use]
    pub const fn cache(&self) -> &Arc<KeyCache> {
        &self.cache
    }

    /// Returns the position of the follower. Its set digest is 0, because the follower holds only a
    /// part of the set.
    #[must_use]
    pub(crate) fn position(&self) -> KeyringPosition {
        self.view
            .as_ref()
            .map_or_else(KeyringPosition::default, |view| KeyringPosition {
                epoch: view.epoch(),
                revision: view.revision(),
                set_digest: 0,
            })
    }

    /// Records that a stream is open: lookups can be sent.
    pub(crate) fn connected(&self) {
        self.cache.connected();
    }

    /// Records that the stream has ended: all waiting checks wake up.
    pub(crate) fn disconnected(&self) {
        self.cache.disconnected();
    }

    /// Drops everything that the follower holds: checks of the keyring are denied from now on,
    /// until another view is published and confirmed.
    pub(crate) fn forget(&mut self) {
        self.slot.withdraw();
        self.settings = None;
        self.view = None;
        self.seen = Revision::default();
        self.tombstones = Tombstones::default();
        // Pairs with the acquire in `KeyCache::is_current`.
        self.cache.generation.fetch_add(1, Ordering::Release);
        self.cache.outdate_answers();
        self.groups.clear();
        self.cache.unknown.invalidate_all();
    }

    /// Applies new settings. They are in use at once.
    pub fn adopt(&mut self, settings: KeyringSettings) {
        let settings = Arc::new(settings);
        self.settings = Some(Arc::clone(&settings));
        if let Some(view) = &self.view {
            let mut view = KeyringView::clone(view);
            view.adopt(settings);
            self.publish(view);
        }
    }

    /// Begins to follow the keyring at a revision. Entries and answers of earlier lookups are not
    /// used again. Returns false when the settings have not arrived, without which no key can be
    /// judged.
    ///
    /// # Errors
    ///
    /// When the revision is older than the follower's position in the same epoch.
    pub fn start(&mut self, epoch: Epoch, revision: Revision) -> Result<bool, StartError> {
        let Some(settings) = self.settings.clone() else {
            return Ok(false);
        };
        let held = self.position();
        let is_same_history = held.epoch == epoch;
        if is_same_history && revision < held.revision {
            return Err(StartError {
                held: held.revision,
                found: revision,
            });
        }
        self.seen = if is_same_history {
            self.seen.max(revision)
        } else {
            revision
        };
        // Pairs with the acquire in `KeyCache::is_current`.
        self.cache.generation.fetch_add(1, Ordering::Release);
        self.cache.outdate_answers();
        let name = self.slot.name().clone();
        self.publish(KeyringView::empty(name, epoch, revision, settings, 0));
        Ok(true)
    }

    /// Applies a delta to the held entries: revocations first, then upserts, then removals.
    ///
    /// # Errors
    ///
    /// When the delta does not start at exactly the follower's position, or does not lead to a
    /// later revision. Nothing is changed then.
    pub(crate) fn apply_delta(
        &mut self,
        epoch: Epoch,
        from: Revision,
        to: Revision,
        revocations: &[KeyRecord],
        upserts: &[KeyRecord],
        removals: &[KeyDigest],
    ) -> Result<(), DeltaError> {
        let held = self.position();
        held.check(epoch, from, to)?;
        let view = self.view.as_ref().ok_or(DeltaError::Gap {
            held: held.revision,
            from,
        })?;
        let mut view = KeyringView::clone(view);
        self.groups.tidy();
        self.revoke(epoch, to, revocations);
        for record in upserts {
            self.change(record, to);
        }
        for digest in removals {
            self.remove(digest);
        }
        view.advance(to);
        self.publish(view);
        Ok(())
    }

    /// Revokes versions, whichever message the revocation arrives in and whatever the follower's
    /// revision is.
    pub(crate) fn revoke(&mut self, epoch: Epoch, revision: Revision, records: &[KeyRecord]) {
        if self.position().epoch == epoch {
            self.seen = self.seen.max(revision);
        }
        for record in records {
            self.revoke_one(record, revision);
        }
    }

    /// Applies the answer to a lookup.
    pub fn fill(&mut self, fill: Fill, now: BootTime) {
        let Fill {
            epoch,
            revision,
            digest,
            found,
            siblings,
        } = fill;
        self.groups.tidy();
        if let Found::Version(record) = &found
            && record.state == KeyState::Revoked
        {
            self.revoke_one(record, revision);
        }
        let answer = if self.position().epoch != epoch || revision < self.seen {
            Answer::Failed(Failure::Outdated)
        } else {
            match found {
                Found::Version(record) => {
                    let expires_at = self.expires_at(&digest, now);
                    Answer::Held(self.hold(&record, siblings.as_deref(), revision, expires_at))
                }
                Found::Nothing => {
                    self.groups.remove(&digest);
                    let unknown = Unknown {
                        expires_at: after(now, self.cache.settings.negative_ttl.as_millis()),
                        generation: self.generation(),
                    };
                    self.cache.unknown.insert(digest, unknown);
                    Answer::Unknown
                }
                Found::Unreadable => {
                    // A held record is no longer the current record of the version.
                    self.groups.remove(&digest);
                    Answer::Failed(Failure::Unreadable)
                }
            }
        };
        self.cache.answer(&digest, answer, now);
    }

    /// Revokes a version, whatever state its record names.
    fn revoke_one(&mut self, record: &KeyRecord, revision: Revision) {
        self.tombstones.add(record.digest);
        // Where a revocation cannot be read completely, only its digest identifies the version.
        let group = self.groups.with(&record.digest);
        let held = group.as_ref().and_then(|group| group.find(&record.digest));
        let held = held.map(|held| held.key().held().to_record());
        let known = held.filter(|held| held.version_ref() != record.version_ref());
        let revoked = KeyRecord {
            state: KeyState::Revoked,
            ..known.unwrap_or_else(|| record.clone())
        };
        self.change(&revoked, revision);
    }

    /// Stores a version that was looked up, with its siblings. Where a sibling cannot be read, a
    /// key that is not held stays out of the cache: a sidecar that holds a version must hold all of
    /// them.
    fn hold(
        &mut self,
        record: &KeyRecord,
        siblings: Option<&[KeyRecord]>,
        revision: Revision,
        expires_at: u64,
    ) -> Arc<CachedKey> {
        self.cache.unknown.invalidate(&record.digest);
        let held = self.groups.of(record.key_id);
        let complete_at = match (siblings, &held) {
            (None, Some(held)) => held.complete_at(),
            (Some(_), _) | (None, None) => revision,
        };
        let cached = self.cached(record, revision, complete_at, expires_at);
        if held.is_none() && siblings.is_none() {
            return cached;
        }
        let is_sibling = |sibling: &&KeyRecord| {
            sibling.key_id == record.key_id && sibling.digest != record.digest
        };
        let mut versions = vec![Arc::clone(&cached)];
        for sibling in siblings.unwrap_or_default().iter().filter(is_sibling) {
            self.cache.unknown.invalidate(&sibling.digest);
            versions.push(self.cached(sibling, revision, complete_at, expires_at));
        }
        // A digest belongs to one key.
        for version in &versions {
            let digest = version.key.digest();
            if held.as_ref().is_none_or(|held| held.find(digest).is_none()) {
                self.groups.remove(digest);
            }
        }
        let held = held.unwrap_or_else(|| Group::One(Arc::clone(&cached)));
        self.groups.put(held.with(versions));
        cached
    }

    /// Applies the change of one version at `revision` to the held group of its key, and to the
    /// answer of a lookup. A record that was read at that revision or later already includes the
    /// change. A revocation applies to every record.
    fn change(&mut self, record: &KeyRecord, revision: Revision) {
        let digest = &record.digest;
        let is_older =
            |held: &CachedKey| held.revision < revision || record.state == KeyState::Revoked;
        // Most changes concern keys that are not held. This search does not count as a use of such
        // a key.
        if let Some(group) = self.groups.with(digest) {
            if let Some(held) = group.find(digest).filter(|held| is_older(held)) {
                let newest = revision.max(held.revision);
                let changed = self.cached(record, newest, held.complete_at, held.expires_at);
                self.groups.put(group.with([changed]));
            }
        } else if record.state.is_live()
            && let Some(group) = self.groups.of(record.key_id)
            && group.complete_at() < revision
        {
            let staged = self.cached(record, revision, group.complete_at(), group.expires_at());
            self.groups.put(group.with([staged]));
        }
        self.cache.unknown.invalidate(digest);
        self.cache.amend(digest, |answer| {
            let expires_at = match answer {
                Answer::Held(held) if is_older(held) => held.expires_at,
                // The version was created after the answer. The checks that collect it judge it at
                // once.
                Answer::Unknown => 0,
                Answer::Held(_) | Answer::Failed(_) => return None,
            };
            Some(Answer::Held(
                self.cached(record, revision, revision, expires_at),
            ))
        });
        match record.state {
            KeyState::Pending | KeyState::Active => self.forget_callers(record.version_ref()),
            KeyState::Retiring | KeyState::Retired | KeyState::Revoked => {}
        }
    }

    fn remove(&mut self, digest: &KeyDigest) {
        if self.tombstones.contains(digest) {
            return;
        }
        self.groups.remove(digest);
        self.cache.amend(digest, |answer| match answer {
            Answer::Held(_) => Some(Answer::Unknown),
            Answer::Unknown | Answer::Failed(_) => None,
        });
    }

    /// Drops the recorded callers of a version. Callers are recorded only for versions that they
    /// should stop using.
    fn forget_callers(&self, version: VersionRef) {
        if let Some(usage) = self.slot.usage().find(version) {
            usage.forget_callers();
        }
    }

    /// Creates an entry of the current generation. A version with a tombstone stays revoked.
    fn cached(
        &self,
        record: &KeyRecord,
        revision: Revision,
        complete_at: Revision,
        expires_at: u64,
    ) -> Arc<CachedKey> {
        let key = if self.tombstones.contains(&record.digest) {
            let state = KeyState::Revoked;
            OwnedKey::new(&KeyRecord {
                state,
                ..record.clone()
            })
        } else {
            OwnedKey::new(record)
        };
        Arc::new(CachedKey {
            key,
            revision,
            complete_at,
            expires_at,
            generation: self.generation(),
            refreshed: AtomicBool::new(false),
        })
    }

    /// Returns the expiry of an entry that is created at `now`. It is up to a tenth of `ttl`
    /// earlier, depending on the digest, so that entries that are created together do not expire
    /// together.
    fn expires_at(&self, digest: &KeyDigest, now: BootTime) -> u64 {
        let life = self.cache.settings.ttl.as_millis();
        let share = u128::from(digest.as_bytes()[KeyDigest::LEN - 1]);
        after(now, life - life / 10 * share / 256)
    }

    fn generation(&self) -> u32 {
        self.cache.generation.load(Ordering::Relaxed)
    }

    fn publish(&mut self, view: KeyringView) {
        let view = Arc::new(view);
        self.slot.publish(Arc::clone(&view));
        self.view = Some(view);
    }
}

fn after(now: BootTime, millis: u128) -> u64 {
    let millis = u64::try_from(millis).unwrap_or(u64::MAX);
    now.as_millis().saturating_add(millis)
}
