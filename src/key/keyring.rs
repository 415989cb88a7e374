//! A keyring as its log tells it.
//!
//! [`fold`] makes it from [`Change`](super::change::Change)s. What is to be looked at by the engine is indexed here.

mod fold;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{
    consumer::{Consumer, Key},
    digest::KeyDigest,
    id::{ConsumerId, KeyId, KeyringName, Revision, VersionRef},
    policy::RotationPolicy,
    record::KeyRecord,
    rotation,
    time::Timestamp,
    token::Prefix,
    version::{KeyVersion, VersionState},
    webhook::{Webhook, WebhookId},
};

pub use fold::ApplyError;

/// All consumers, keys and versions of one API, at a revision. Serialized, it is the state of its log at that revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyring {
    contents: Contents,
    by_digest: HashMap<KeyDigest, VersionRef>,
    /// The versions in a rotation: pending and retiring ones.
    moving: BTreeSet<VersionRef>,
    /// The active versions of which something will be due, the next first.
    due: BTreeSet<(Timestamp, VersionRef)>,
    /// Where a version stands in `due`.
    due_at: HashMap<VersionRef, Timestamp>,
}

/// What a keyring holds; the rest follows from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Contents {
    name: KeyringName,
    prefix: Prefix,
    allow_imported: bool,
    help_url: Option<String>,
    created_at: Timestamp,
    revision: Revision,
    policy: RotationPolicy,
    consumers: BTreeMap<ConsumerId, Consumer>,
    keys: BTreeMap<KeyId, Key>,
    webhooks: BTreeMap<WebhookId, Webhook>,
}

impl Keyring {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &KeyringName {
        &self.contents.name
    }

    /// What its tokens begin with.
    #[must_use]
    pub const fn prefix(&self) -> &Prefix {
        &self.contents.prefix
    }

    /// Whether keys of another system may be imported, which switches the format check off.
    #[must_use]
    pub const fn allow_imported(&self) -> bool {
        self.contents.allow_imported
    }

    /// A page for consumers whose key is about to retire.
    #[must_use]
    pub fn help_url(&self) -> Option<&str> {
        self.contents.help_url.as_deref()
    }

    /// When it was made.
    #[must_use]
    pub const fn created_at(&self) -> Timestamp {
        self.contents.created_at
    }

    /// Of the last change.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.contents.revision
    }

    /// How its keys are rotated.
    #[must_use]
    pub const fn policy(&self) -> &RotationPolicy {
        &self.contents.policy
    }

    /// How one of its keys is rotated.
    #[must_use]
    pub fn policy_of(&self, key: &Key) -> Cow<'_, RotationPolicy> {
        if key.policy.is_empty() {
            Cow::Borrowed(&self.contents.policy)
        } else {
            Cow::Owned(self.contents.policy.with(&key.policy))
        }
    }

    /// Who is told of what happens to its keys.
    #[must_use]
    pub const fn webhooks(&self) -> &BTreeMap<WebhookId, Webhook> {
        &self.contents.webhooks
    }

    /// Its consumers by id.
    #[must_use]
    pub const fn consumers(&self) -> &BTreeMap<ConsumerId, Consumer> {
        &self.contents.consumers
    }

    /// Its keys by id.
    #[must_use]
    pub const fn keys(&self) -> &BTreeMap<KeyId, Key> {
        &self.contents.keys
    }

    /// How many versions it holds, whatever their state.
    #[must_use]
    pub fn version_count(&self) -> usize {
        self.by_digest.len()
    }

    /// The version with `digest`, whatever its state.
    #[must_use]
    pub fn find(&self, digest: &KeyDigest) -> Option<VersionRef> {
        self.by_digest.get(digest).copied()
    }

    /// The versions in a rotation: pending and retiring ones.
    pub fn moving(&self) -> impl Iterator<Item = (&Key, &KeyVersion)> {
        self.moving
            .iter()
            .filter_map(|version| self.version(*version))
    }

    /// The active versions of which something is due by `now`, the earliest first.
    pub fn due(&self, now: Timestamp) -> impl Iterator<Item = (&Key, &KeyVersion)> {
        self.due
            .iter()
            .take_while(move |(at, _)| *at <= now)
            .filter_map(|(_, version)| self.version(*version))
    }

    /// One version with its key.
    #[must_use]
    pub fn version(&self, which: VersionRef) -> Option<(&Key, &KeyVersion)> {
        let key = self.contents.keys.get(&which.key_id)?;
        Some((key, key.versions.get(&which.version)?))
    }

    /// What sidecars are told of one version.
    #[must_use]
    pub fn record(&self, which: VersionRef) -> Option<KeyRecord> {
        self.version(which)
            .map(|(key, version)| key.record(version))
    }

    /// What sidecars are told: every version, the retired and revoked ones as tombstones.
    pub fn records(&self) -> impl Iterator<Item = KeyRecord> {
        self.contents
            .keys
            .values()
            .flat_map(|key| key.versions.values().map(|version| key.record(version)))
    }

    /// Puts a version in the place of its former self. The key must exist.
    fn put(&mut self, key_id: KeyId, version: KeyVersion) {
        let which = VersionRef {
            key_id,
            version: version.number,
        };
        self.by_digest.insert(version.digest, which);
        let key = self.contents.keys.get_mut(&key_id);
        let key = key.expect("the key of a version that is put exists");
        key.versions.insert(version.number, version);
        self.index(which);
    }

    /// Notes where a version stands among what is to be looked at.
    fn index(&mut self, which: VersionRef) {
        let Some((key, version)) = self.version(which) else {
            return;
        };
        let moves = match version.state {
            VersionState::Pending { .. } | VersionState::Retiring { .. } => true,
            VersionState::Active { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => false,
        };
        let due_at = rotation::due_at(version, &self.policy_of(key));
        if moves {
            self.moving.insert(which);
        } else {
            self.moving.remove(&which);
        }
        let former = match due_at {
            Some(at) => self.due_at.insert(which, at),
            None => self.due_at.remove(&which),
        };
        if let Some(former) = former {
            self.due.remove(&(former, which));
        }
        if let Some(at) = due_at {
            self.due.insert((at, which));
        }
    }
}

impl From<Contents> for Keyring {
    fn from(contents: Contents) -> Self {
        let versions: Vec<(KeyDigest, VersionRef)> = contents
            .keys
            .iter()
            .flat_map(|(key_id, key)| {
                key.versions.values().map(|version| {
                    let which = VersionRef {
                        key_id: *key_id,
                        version: version.number,
                    };
                    (version.digest, which)
                })
            })
            .collect();
        let mut keyring = Self {
            contents,
            by_digest: versions.iter().copied().collect(),
            moving: BTreeSet::new(),
            due: BTreeSet::new(),
            due_at: HashMap::new(),
        };
        for (_, which) in versions {
            keyring.index(which);
        }
        keyring
    }
}

impl Serialize for Keyring {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.contents.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Keyring {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Contents::deserialize(deserializer).map(Self::from)
    }
}
