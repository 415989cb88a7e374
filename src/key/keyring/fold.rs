//! The fold: one change after the other, each checked against what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use super::{Contents, Keyring};
use crate::key::{
    change::{Change, OldVersion},
    consumer::{Consumer, Key},
    digest::KeyDigest,
    id::{KeyId, Revision, RotationId, VersionNumber, VersionRef},
    policy::{PolicyOverrides, RotationPolicy},
    record::KeyRecord,
    time::Timestamp,
    version::{KeyVersion, ReinstateError, TransitionError, VersionState},
};

/// A log that does not tell a possible history: it was written by a newer relatch, or was tampered with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// The first change does not make the keyring, or a later one does.
    #[error("revision {revision} holds {kind}, which is out of place there")]
    OutOfPlace {
        /// Of the change.
        revision: Revision,
        /// The change's name.
        kind: &'static str,
    },
    /// Changes must come one by one.
    #[error("revision {found} follows revision {held}")]
    Gap {
        /// Of the keyring.
        held: Revision,
        /// Of the change.
        found: Revision,
    },
    /// The change speaks of something that is not there.
    #[error("revision {revision} speaks of {what}, which does not exist")]
    Unknown {
        /// Of the change.
        revision: Revision,
        /// A consumer, a key or a version.
        what: String,
    },
    /// The change makes something that is there already.
    #[error("revision {revision} makes {what}, which exists already")]
    Duplicate {
        /// Of the change.
        revision: Revision,
        /// A consumer, a key, a version or a digest.
        what: String,
    },
    /// The version's state does not have the transition.
    #[error("revision {revision}: {source}")]
    Transition {
        /// Of the change.
        revision: Revision,
        /// Which transition.
        source: TransitionError,
    },
    /// The version cannot come back.
    #[error("revision {revision}: {source}")]
    Reinstate {
        /// Of the change.
        revision: Revision,
        /// Why not.
        source: ReinstateError,
    },
}

impl Keyring {
    /// Begins a keyring from the first change of its log.
    ///
    /// # Errors
    ///
    /// When `change` does not make a keyring.
    pub fn begin(at: Timestamp, change: &Change) -> Result<Self, ApplyError> {
        match change {
            Change::KeyringCreated {
                name,
                prefix,
                allow_imported,
                help_url,
            } => Ok(Self::from(Contents {
                name: name.clone(),
                prefix: prefix.clone(),
                allow_imported: *allow_imported,
                help_url: help_url.clone(),
                created_at: at,
                revision: Revision::new(1),
                policy: RotationPolicy::default(),
                consumers: BTreeMap::new(),
                keys: BTreeMap::new(),
                webhooks: BTreeMap::new(),
            })),
            Change::ConsumerCreated { .. }
            | Change::KeyCreated { .. }
            | Change::VersionStaged { .. }
            | Change::HandedOver { .. }
            | Change::VersionWithdrawn { .. }
            | Change::VersionRetired { .. }
            | Change::OverlapExtended { .. }
            | Change::RolledBack { .. }
            | Change::DeliveryBegun { .. }
            | Change::Noted { .. }
            | Change::KeyringPolicySet { .. }
            | Change::KeyPolicySet { .. }
            | Change::WebhookAdded { .. }
            | Change::WebhookRemoved { .. }
            | Change::VersionsRevoked { .. } => Err(ApplyError::OutOfPlace {
                revision: Revision::new(1),
                kind: change.kind(),
            }),
        }
    }

    /// Folds the next change in and returns the versions whose records it changed.
    ///
    /// # Errors
    ///
    /// When the change is not possible; the keyring is then as before.
    pub fn apply(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &Change,
    ) -> Result<Vec<VersionRef>, ApplyError> {
        if revision != self.contents.revision.next() {
            return Err(ApplyError::Gap {
                held: self.contents.revision,
                found: revision,
            });
        }
        let key_id = change.key_id();
        let before = key_id.map_or_else(BTreeMap::new, |key_id| self.records_of(key_id));
        self.fold(revision, at, change)?;
        self.contents.revision = revision;
        let after = key_id.map_or_else(BTreeMap::new, |key_id| self.records_of(key_id));
        Ok(after
            .iter()
            .filter(|(which, record)| before.get(which) != Some(*record))
            .map(|(which, _)| *which)
            .collect())
    }

    #[expect(clippy::too_many_lines, reason = "one arm a change, each short")]
    fn fold(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &Change,
    ) -> Result<(), ApplyError> {
        match change {
            Change::KeyringCreated { .. } => Err(ApplyError::OutOfPlace {
                revision,
                kind: change.kind(),
            }),
            Change::ConsumerCreated { consumer, name } => {
                if self.contents.consumers.contains_key(consumer) {
                    return Err(duplicate(revision, "consumer", consumer));
                }
                self.contents.consumers.insert(
                    consumer.clone(),
                    Consumer {
                        name: name.clone(),
                        created_at: at,
                        keys: BTreeSet::new(),
                    },
                );
                Ok(())
            }
            Change::KeyCreated {
                key_id,
                consumer,
                name,
                imported,
                scopes,
                allowed_sources,
                version,
            } => {
                let key = Key {
                    id: *key_id,
                    consumer: consumer.clone(),
                    name: name.clone(),
                    imported: *imported,
                    scopes: scopes.clone(),
                    allowed_sources: allowed_sources.clone(),
                    policy: PolicyOverrides::default(),
                    versions: BTreeMap::new(),
                };
                self.insert_key(revision, key, version.digest)?;
                let state = VersionState::Active { since: at };
                let version = version.clone().begin(at, state, None);
                self.put(*key_id, version);
                Ok(())
            }
            Change::VersionStaged {
                key_id,
                rotation,
                version,
                withdraw_after,
            } => {
                let key = self.expect_key(revision, *key_id)?;
                if key.versions.contains_key(&version.number) {
                    return Err(duplicate(revision, "version", &version.number));
                }
                if self.by_digest.contains_key(&version.digest) {
                    return Err(duplicate(revision, "digest of", key_id));
                }
                let state = VersionState::Pending {
                    since: at,
                    withdraw_after: *withdraw_after,
                    sink: None,
                };
                let version = version.clone().begin(at, state, Some(*rotation));
                self.put(*key_id, version);
                Ok(())
            }
            Change::HandedOver {
                key_id,
                rotation,
                version,
                old,
            } => {
                let which = VersionRef {
                    key_id: *key_id,
                    version: *version,
                };
                self.hand_over_to(revision, at, which, *rotation, *old)
            }
            Change::VersionWithdrawn {
                key_id,
                version,
                reason,
                ..
            } => self.transition(revision, *key_id, *version, |v| {
                v.revoke(at, Arc::clone(reason))
            }),
            Change::VersionRetired {
                key_id,
                version,
                reason,
                forced: _,
            } => self.transition(revision, *key_id, *version, |v| {
                v.retire(at, Arc::clone(reason))
            }),
            Change::OverlapExtended {
                key_id,
                version,
                until,
                reason: _,
            } => self.transition(revision, *key_id, *version, |v| v.extend(*until)),
            Change::RolledBack {
                key_id,
                version,
                replaced,
                reason: _,
            } => {
                let which = VersionRef {
                    key_id: *key_id,
                    version: *version,
                };
                self.roll_back_to(revision, at, which, *replaced)
            }
            Change::DeliveryBegun {
                key_id,
                version,
                sink,
                withdraw_after,
                ..
            } => self.transition(revision, *key_id, *version, |v| {
                v.begin_delivery(sink.clone(), *withdraw_after)
            }),
            Change::Noted {
                key_id,
                version,
                note,
            } => self.transition(revision, *key_id, *version, |v| Ok(v.told_of(note))),
            Change::KeyringPolicySet { policy } => {
                self.contents.policy = policy.clone();
                let all: Vec<VersionRef> = self.by_digest.values().copied().collect();
                for which in all {
                    self.index(which);
                }
                Ok(())
            }
            Change::KeyPolicySet { key_id, overrides } => {
                self.expect_key(revision, *key_id)?;
                let key = self.contents.keys.get_mut(key_id);
                let key = key.expect("it was looked up");
                key.policy = overrides.clone();
                let numbers: Vec<VersionNumber> = key.versions.keys().copied().collect();
                for version in numbers {
                    self.index(VersionRef {
                        key_id: *key_id,
                        version,
                    });
                }
                Ok(())
            }
            Change::WebhookAdded { webhook } => {
                if self.contents.webhooks.contains_key(&webhook.id) {
                    return Err(duplicate(revision, "webhook", &webhook.id));
                }
                let webhook = webhook.clone();
                self.contents.webhooks.insert(webhook.id, webhook);
                Ok(())
            }
            Change::WebhookRemoved { id } => match self.contents.webhooks.remove(id) {
                Some(_) => Ok(()),
                None => Err(unknown(revision, "webhook", id)),
            },
            Change::VersionsRevoked {
                key_id,
                versions,
                reason,
            } => {
                let revoked = versions
                    .iter()
                    .map(|number| {
                        self.expect_version(revision, *key_id, *number)?
                            .revoke(at, Arc::clone(reason))
                            .map_err(|e| wrong(revision, e))
                    })
                    .collect::<Result<Vec<_>, _>>()?;
                for version in revoked {
                    self.put(*key_id, version);
                }
                Ok(())
            }
        }
    }

    fn insert_key(
        &mut self,
        revision: Revision,
        key: Key,
        digest: KeyDigest,
    ) -> Result<(), ApplyError> {
        if self.contents.keys.contains_key(&key.id) {
            return Err(duplicate(revision, "key", &key.id));
        }
        if self.by_digest.contains_key(&digest) {
            return Err(duplicate(revision, "digest of", &key.id));
        }
        let owner = self
            .contents
            .consumers
            .get_mut(&key.consumer)
            .ok_or_else(|| unknown(revision, "consumer", &key.consumer))?;
        owner.keys.insert(key.id);
        self.contents.keys.insert(key.id, key);
        Ok(())
    }

    fn hand_over_to(
        &mut self,
        revision: Revision,
        at: Timestamp,
        new: VersionRef,
        rotation: RotationId,
        old: Option<OldVersion>,
    ) -> Result<(), ApplyError> {
        let VersionRef { key_id, version } = new;
        let new = self.expect_version(revision, key_id, version)?;
        let new = new.activate(at).map_err(|e| wrong(revision, e))?;
        if let Some(OldVersion {
            version: number,
            until,
        }) = old
        {
            let mut old = self
                .expect_version(revision, key_id, number)?
                .begin_retiring(at, until.saturating_since(at), version)
                .map_err(|e| wrong(revision, e))?;
            old.rotation = Some(rotation);
            self.put(key_id, old);
        }
        self.put(key_id, new);
        Ok(())
    }

    fn roll_back_to(
        &mut self,
        revision: Revision,
        at: Timestamp,
        old: VersionRef,
        replaced: Option<OldVersion>,
    ) -> Result<(), ApplyError> {
        let VersionRef { key_id, version } = old;
        let rollback_for = self
            .policy_of(self.expect_key(revision, key_id)?)
            .rollback_for;
        let old = self
            .expect_version(revision, key_id, version)?
            .reinstate(at, rollback_for)
            .map_err(|source| ApplyError::Reinstate { revision, source })?;
        if let Some(OldVersion {
            version: number,
            until,
        }) = replaced
        {
            let mut replaced = self
                .expect_version(revision, key_id, number)?
                .begin_retiring(at, until.saturating_since(at), version)
                .map_err(|e| wrong(revision, e))?;
            replaced.rotation = replaced.rotation.or(old.rotation);
            self.put(key_id, replaced);
        }
        self.put(key_id, old);
        Ok(())
    }

    fn expect_key(&self, revision: Revision, key_id: KeyId) -> Result<&Key, ApplyError> {
        self.contents
            .keys
            .get(&key_id)
            .ok_or_else(|| unknown(revision, "key", &key_id))
    }

    fn expect_version(
        &self,
        revision: Revision,
        key_id: KeyId,
        number: VersionNumber,
    ) -> Result<KeyVersion, ApplyError> {
        self.expect_key(revision, key_id)?
            .versions
            .get(&number)
            .cloned()
            .ok_or_else(|| unknown(revision, "version", &number))
    }

    fn transition(
        &mut self,
        revision: Revision,
        key_id: KeyId,
        number: VersionNumber,
        to: impl FnOnce(KeyVersion) -> Result<KeyVersion, TransitionError>,
    ) -> Result<(), ApplyError> {
        let version = self.expect_version(revision, key_id, number)?;
        let version = to(version).map_err(|e| wrong(revision, e))?;
        self.put(key_id, version);
        Ok(())
    }

    fn records_of(&self, key_id: KeyId) -> BTreeMap<VersionRef, KeyRecord> {
        self.contents
            .keys
            .get(&key_id)
            .into_iter()
            .flat_map(|key| key.versions.values().map(|version| key.record(version)))
            .map(|record| (record.version_ref(), record))
            .collect()
    }
}

fn duplicate(revision: Revision, what: &str, name: &dyn fmt::Display) -> ApplyError {
    ApplyError::Duplicate {
        revision,
        what: format!("{what} {name}"),
    }
}

fn unknown(revision: Revision, what: &str, name: &dyn fmt::Display) -> ApplyError {
    ApplyError::Unknown {
        revision,
        what: format!("{what} {name}"),
    }
}

const fn wrong(revision: Revision, source: TransitionError) -> ApplyError {
    ApplyError::Transition { revision, source }
}
