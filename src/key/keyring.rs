//! The state of a keyring, as it follows from its log.
//!
//! [`fold`] computes it from [`Change`](super::change::Change)s. The keyring also indexes the
//! versions that the rotation engine has to examine.

mod fold;

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    consumer::{Consumer, Key},
    digest::KeyDigest,
    id::{ConsumerId, KeyId, KeyringName, Revision, VersionRef},
    paged::{PagedMap, PagedSet},
    policy::RotationPolicy,
    record::KeyRecord,
    shared::Shared,
    time::Timestamp,
    token::Prefix,
    version::{KeyVersion, VersionState},
    webhook::{Webhook, WebhookId},
};

pub(crate) use fold::{ApplyError, Touched};

/// All consumers, keys and versions of one API, at a revision.
///
/// A clone costs nothing and stays at its revision: both share everything that neither of them
/// changes.
#[derive(Clone, Debug)]
pub struct Keyring {
    head: Arc<KeyringHead>,
    consumers: PagedMap<ConsumerId, Arc<Consumer>>,
    keys: PagedMap<KeyId, Arc<Key>>,
    /// Every version by the first 8 bytes of its digest. The few versions with the same bytes are
    /// then compared by their whole digests.
    by_digest: PagedSet<(u64, VersionRef)>,
    /// The versions in a rotation: pending and retiring ones.
    moving: PagedSet<VersionRef>,
    /// The active versions for which something will be due, the earliest first.
    due: PagedSet<(Timestamp, VersionRef)>,
    /// The values that many keys have in common, held once.
    shared: Shared,
}

/// Everything of a keyring except its consumers and keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeyringHead {
    pub(crate) name: KeyringName,
    /// The prefix of its tokens.
    pub(crate) prefix: Prefix,
    /// Whether keys of another system may be imported.
    pub(crate) allow_imported: bool,
    /// The URL of a page for consumers whose key is about to retire.
    pub(crate) help_url: Option<String>,
    pub(crate) created_at: Timestamp,
    /// The revision of the last change.
    pub(crate) revision: Revision,
    pub(crate) policy: RotationPolicy,
    /// The webhooks that receive events about its keys.
    pub(crate) webhooks: BTreeMap<WebhookId, Webhook>,
}

impl Keyring {
    #[must_use]
    pub(crate) fn name(&self) -> &KeyringName {
        &self.head.name
    }

    /// Returns the prefix of its tokens.
    #[must_use]
    pub(crate) fn prefix(&self) -> &Prefix {
        &self.head.prefix
    }

    /// Returns whether keys of another system may be imported. That switches off the check of the
    /// token format.
    #[must_use]
    pub(crate) fn allow_imported(&self) -> bool {
        self.head.allow_imported
    }

    /// Returns the URL of a page for consumers whose key is about to retire.
    #[must_use]
    pub(crate) fn help_url(&self) -> Option<&str> {
        self.head.help_url.as_deref()
    }

    #[must_use]
    pub(crate) fn created_at(&self) -> Timestamp {
        self.head.created_at
    }

    /// Returns the revision of the last change.
    #[must_use]
    pub(crate) fn revision(&self) -> Revision {
        self.head.revision
    }

    /// Returns the policy for all keys, except where a key overrides it.
    #[must_use]
    pub(crate) fn policy(&self) -> &RotationPolicy {
        &self.head.policy
    }

    /// Returns the policy for one of its keys, with the overrides of that key.
    #[must_use]
    pub(crate) fn policy_of(&self, key: &Key) -> Cow<'_, RotationPolicy> {
        match &key.policy {
            None => Cow::Borrowed(&self.head.policy),
            Some(overrides) => Cow::Owned(self.head.policy.with(overrides)),
        }
    }

    /// Returns the webhooks that receive events about its keys.
    #[must_use]
    pub(crate) fn webhooks(&self) -> &BTreeMap<WebhookId, Webhook> {
        &self.head.webhooks
    }

    /// Returns its consumers by id.
    #[must_use]
    pub(crate) const fn consumers(&self) -> &PagedMap<ConsumerId, Arc<Consumer>> {
        &self.consumers
    }

    /// Returns its keys by id.
    #[must_use]
    pub(crate) const fn keys(&self) -> &PagedMap<KeyId, Arc<Key>> {
        &self.keys
    }

    /// Returns the number of versions in all states.
    #[must_use]
    pub(crate) fn version_count(&self) -> usize {
        self.by_digest.len()
    }

    /// Returns the version with `digest`, in any state.
    #[must_use]
    pub(crate) fn find(&self, digest: &KeyDigest) -> Option<VersionRef> {
        let head = digest.table_hash();
        self.by_digest
            .range_from(&(head, VersionRef::LEAST))
            .map(|((held, which), ())| (*held, *which))
            .take_while(|(held, _)| *held == head)
            .map(|(_, which)| which)
            .find(|which| {
                self.version(*which)
                    .is_some_and(|(_, version)| version.digest == *digest)
            })
    }

    /// Returns the versions in a rotation: pending and retiring ones.
    pub(crate) fn moving(&self) -> impl Iterator<Item = (&Key, &KeyVersion)> {
        self.moving
            .keys()
            .filter_map(|version| self.version(*version))
    }

    /// Returns the active versions for which something is due by `now`, the earliest first.
    pub(crate) fn due(&self, now: Timestamp) -> impl Iterator<Item = (&Key, &KeyVersion)> {
        self.due
            .keys()
            .take_while(move |(at, _)| *at <= now)
            .filter_map(|(_, version)| self.version(*version))
    }

    /// Returns a version with its key.
    #[must_use]
    pub(crate) fn version(&self, which: VersionRef) -> Option<(&Key, &KeyVersion)> {
        let key = self.keys.get(&which.key_id)?;
        Some((key, key.versions.get(which.version)?))
    }

    /// Returns the record of one version for sidecars.
    #[must_use]
    pub(crate) fn record(&self, which: VersionRef) -> Option<KeyRecord> {
        self.version(which)
            .map(|(key, version)| key.record(version))
    }

    /// Returns the records of the few other versions of the same key that are accepted within their
    /// windows.
    pub(crate) fn siblings(&self, which: VersionRef) -> impl Iterator<Item = KeyRecord> {
        let key = self.keys.get(&which.key_id);
        key.into_iter()
            .flat_map(|key| key.versions.values().map(|version| key.record(version)))
            .filter(move |record| record.version != which.version && record.state.is_live())
    }

    /// Returns the records of all versions for sidecars, with retired and revoked versions as
    /// tombstones.
    pub(crate) fn records(&self) -> impl Iterator<Item = KeyRecord> {
        self.keys
            .values()
            .flat_map(|key| key.versions.values().map(|version| key.record(version)))
    }

    /// Returns everything except its consumers and keys.
    #[must_use]
    pub(crate) fn head(&self) -> &KeyringHead {
        &self.head
    }

    /// Creates a keyring without consumers and keys.
    #[must_use]
    pub(crate) fn new(head: KeyringHead) -> Self {
        Self {
            head: Arc::new(head),
            consumers: PagedMap::default(),
            keys: PagedMap::default(),
            by_digest: PagedMap::default(),
            moving: PagedMap::default(),
            due: PagedMap::default(),
            shared: Shared::default(),
        }
    }

    /// Creates a keyring from consumers, which hold the ids of their keys, and from those keys,
    /// both in any order. None if two keys have the same id, or two versions the same digest.
    #[must_use]
    pub(crate) fn restore(
        head: KeyringHead,
        mut consumers: Vec<(ConsumerId, Arc<Consumer>)>,
        mut keys: Vec<(KeyId, Arc<Key>)>,
    ) -> Option<Self> {
        // In order, so that every page is created once and is full.
        consumers.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        keys.sort_unstable_by_key(|(key_id, _)| *key_id);
        let mut keyring = Self::new(head);
        keyring.consumers.extend(consumers);
        let mut by_digest: Vec<((u64, VersionRef), ())> = Vec::with_capacity(keys.len());
        for (key_id, key) in keys {
            keyring.shared.learn(&key);
            if keyring.keys.insert(key_id, Arc::clone(&key)).is_some() {
                return None;
            }
            for version in key.versions.values() {
                let which = VersionRef {
                    key_id,
                    version: version.number,
                };
                by_digest.push(((version.digest.table_hash(), which), ()));
                keyring.index(which);
            }
        }
        by_digest.sort_unstable();
        keyring.by_digest.extend(by_digest);
        keyring.has_each_digest_once().then_some(keyring)
    }

    fn has_each_digest_once(&self) -> bool {
        let digest = |which| self.version(which).map(|(_, version)| version.digest);
        let mut former: Option<(u64, VersionRef)> = None;
        self.by_digest.keys().all(|(head, which)| {
            let former = former.replace((*head, *which));
            former.is_none_or(|(held, other)| held != *head || digest(other) != digest(*which))
        })
    }

    /// Adds a key to the keys of its consumer. Returns false if the consumer does not exist.
    fn own(&mut self, key: &Key) -> bool {
        let Some(owner) = self.consumers.get_mut(&key.consumer) else {
            return false;
        };
        Arc::make_mut(owner).keys.insert(key.id, ());
        true
    }

    /// Inserts a version, or replaces the one with the same number, and updates the indexes. The
    /// key must exist.
    fn put(&mut self, key_id: KeyId, version: KeyVersion) {
        let which = VersionRef {
            key_id,
            version: version.number,
        };
        self.leave_indexes(which);
        self.by_digest
            .insert((version.digest.table_hash(), which), ());
        let key = self.keys.get_mut(&key_id);
        let key = key.expect("the key of a version that is put exists");
        Arc::make_mut(key).versions.put(version);
        self.index(which);
    }

    /// Adds a version to the indexes of versions in a rotation and of versions that will be due.
    fn index(&mut self, which: VersionRef) {
        let Some((moves, due_at)) = self.stands(which) else {
            return;
        };
        if moves {
            self.moving.insert(which, ());
        }
        if let Some(at) = due_at {
            self.due.insert((at, which), ());
        }
    }

    /// Removes a version from these indexes, before the version or its policy changes.
    fn leave_indexes(&mut self, which: VersionRef) {
        let Some((moves, due_at)) = self.stands(which) else {
            return;
        };
        if moves {
            self.moving.remove(&which);
        }
        if let Some(at) = due_at {
            self.due.remove(&(at, which));
        }
    }

    /// Returns whether a version is in a rotation, and when something is due for it.
    fn stands(&self, which: VersionRef) -> Option<(bool, Option<Timestamp>)> {
        let (key, version) = self.version(which)?;
        let moves = match version.state {
            VersionState::Pending { .. } | VersionState::Retiring { .. } => true,
            VersionState::Active { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => false,
        };
        Some((moves, self.policy_of(key).due_at(version)))
    }
}

/// Compares everything except `shared`, which only saves memory.
impl PartialEq for Keyring {
    fn eq(&self, other: &Self) -> bool {
        self.head == other.head
            && self.consumers == other.consumers
            && self.keys == other.keys
            && self.by_digest == other.by_digest
            && self.moving == other.moving
            && self.due == other.due
    }
}

impl Eq for Keyring {}
