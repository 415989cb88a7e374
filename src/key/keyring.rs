//! A keyring as its log tells it.
//!
//! [`fold`] makes it from [`Change`](super::change::Change)s. What is to be looked at by the engine is indexed here.

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
/// A clone costs nothing and stays at its revision: the two share what neither of them changes.
#[derive(Clone, Debug)]
pub struct Keyring {
    head: Arc<KeyringHead>,
    consumers: PagedMap<ConsumerId, Arc<Consumer>>,
    keys: PagedMap<KeyId, Arc<Key>>,
    /// Every version by the beginning of its digest, which is enough to find the few that may have the whole one.
    by_digest: PagedSet<(u64, VersionRef)>,
    /// The versions in a rotation: pending and retiring ones.
    moving: PagedSet<VersionRef>,
    /// The active versions of which something will be due, the next first.
    due: PagedSet<(Timestamp, VersionRef)>,
    /// What many keys have in common, held once.
    shared: Shared,
}

/// What a keyring is beside its consumers and keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeyringHead {
    /// Its name.
    pub(crate) name: KeyringName,
    /// What its tokens begin with.
    pub(crate) prefix: Prefix,
    /// Whether keys of another system may be imported.
    pub(crate) allow_imported: bool,
    /// A page for consumers whose key is about to retire.
    pub(crate) help_url: Option<String>,
    /// When it was made.
    pub(crate) created_at: Timestamp,
    /// Of the last change.
    pub(crate) revision: Revision,
    /// How its keys are rotated.
    pub(crate) policy: RotationPolicy,
    /// Who is told of what happens to its keys.
    pub(crate) webhooks: BTreeMap<WebhookId, Webhook>,
}

impl Keyring {
    /// Its name.
    #[must_use]
    pub(crate) fn name(&self) -> &KeyringName {
        &self.head.name
    }

    /// What its tokens begin with.
    #[must_use]
    pub(crate) fn prefix(&self) -> &Prefix {
        &self.head.prefix
    }

    /// Whether keys of another system may be imported, which switches the format check off.
    #[must_use]
    pub(crate) fn allow_imported(&self) -> bool {
        self.head.allow_imported
    }

    /// A page for consumers whose key is about to retire.
    #[must_use]
    pub(crate) fn help_url(&self) -> Option<&str> {
        self.head.help_url.as_deref()
    }

    /// When it was made.
    #[must_use]
    pub(crate) fn created_at(&self) -> Timestamp {
        self.head.created_at
    }

    /// Of the last change.
    #[must_use]
    pub(crate) fn revision(&self) -> Revision {
        self.head.revision
    }

    /// How its keys are rotated.
    #[must_use]
    pub(crate) fn policy(&self) -> &RotationPolicy {
        &self.head.policy
    }

    /// How one of its keys is rotated.
    #[must_use]
    pub(crate) fn policy_of(&self, key: &Key) -> Cow<'_, RotationPolicy> {
        match &key.policy {
            None => Cow::Borrowed(&self.head.policy),
            Some(overrides) => Cow::Owned(self.head.policy.with(overrides)),
        }
    }

    /// Who is told of what happens to its keys.
    #[must_use]
    pub(crate) fn webhooks(&self) -> &BTreeMap<WebhookId, Webhook> {
        &self.head.webhooks
    }

    /// Its consumers by id.
    #[must_use]
    pub(crate) const fn consumers(&self) -> &PagedMap<ConsumerId, Arc<Consumer>> {
        &self.consumers
    }

    /// Its keys by id.
    #[must_use]
    pub(crate) const fn keys(&self) -> &PagedMap<KeyId, Arc<Key>> {
        &self.keys
    }

    /// How many versions it holds, whatever their state.
    #[must_use]
    pub(crate) fn version_count(&self) -> usize {
        self.by_digest.len()
    }

    /// The version with `digest`, whatever its state.
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

    /// The versions in a rotation: pending and retiring ones.
    pub(crate) fn moving(&self) -> impl Iterator<Item = (&Key, &KeyVersion)> {
        self.moving
            .keys()
            .filter_map(|version| self.version(*version))
    }

    /// The active versions of which something is due by `now`, the earliest first.
    pub(crate) fn due(&self, now: Timestamp) -> impl Iterator<Item = (&Key, &KeyVersion)> {
        self.due
            .keys()
            .take_while(move |(at, _)| *at <= now)
            .filter_map(|(_, version)| self.version(*version))
    }

    /// One version with its key.
    #[must_use]
    pub(crate) fn version(&self, which: VersionRef) -> Option<(&Key, &KeyVersion)> {
        let key = self.keys.get(&which.key_id)?;
        Some((key, key.versions.get(which.version)?))
    }

    /// What sidecars are told of one version.
    #[must_use]
    pub(crate) fn record(&self, which: VersionRef) -> Option<KeyRecord> {
        self.version(which)
            .map(|(key, version)| key.record(version))
    }

    /// What sidecars are told of the other versions of the same key that are accepted within their windows: a handful.
    pub(crate) fn siblings(&self, which: VersionRef) -> impl Iterator<Item = KeyRecord> {
        let key = self.keys.get(&which.key_id);
        key.into_iter()
            .flat_map(|key| key.versions.values().map(|version| key.record(version)))
            .filter(move |record| record.version != which.version && record.state.is_live())
    }

    /// What sidecars are told: every version, the retired and revoked ones as tombstones.
    pub(crate) fn records(&self) -> impl Iterator<Item = KeyRecord> {
        self.keys
            .values()
            .flat_map(|key| key.versions.values().map(|version| key.record(version)))
    }

    /// Everything but its consumers and keys.
    #[must_use]
    pub(crate) fn head(&self) -> &KeyringHead {
        &self.head
    }

    /// A keyring without consumers and keys.
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

    /// A keyring of consumers with the ids of their keys, and of those keys, in any order. None when two keys have one id
    /// or one digest.
    #[must_use]
    pub(crate) fn restore(
        head: KeyringHead,
        mut consumers: Vec<(ConsumerId, Arc<Consumer>)>,
        mut keys: Vec<(KeyId, Arc<Key>)>,
    ) -> Option<Self> {
        // In order, so that every page is made once and is full.
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

    /// Notes that a key is its consumer's. False when there is no such consumer.
    fn own(&mut self, key: &Key) -> bool {
        let Some(owner) = self.consumers.get_mut(&key.consumer) else {
            return false;
        };
        Arc::make_mut(owner).keys.insert(key.id, ());
        true
    }

    /// Puts a version in the place of its former self. The key must exist.
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

    /// Notes where a version stands among what is to be looked at.
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

    /// Takes a version out of what is to be looked at, before it or its policy changes.
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

    /// Whether a version is in a rotation, and when something of it is due.
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

/// What is shared is not compared: it is a matter of memory alone.
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
