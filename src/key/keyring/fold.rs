//! The fold: one change after the other, each checked against what is there.

use std::{collections::BTreeMap, fmt, sync::Arc};

use super::{Keyring, KeyringHead};
use crate::key::{
    change::{Change, OldVersion},
    consumer::{Consumer, Key},
    digest::KeyDigest,
    id::{KeyId, Revision, RotationId, VersionNumber, VersionRef},
    paged::PagedSet,
    policy::RotationPolicy,
    record::KeyRecord,
    time::Timestamp,
    version::{KeyVersion, ReinstateError, TransitionError, VersionState},
    versions::Versions,
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

/// A version whose record a change has made another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Touched {
    /// What sidecars are to be told now.
    pub(crate) record: KeyRecord,
    /// What they were told before; none of a version that is new.
    pub(crate) former: Option<KeyRecord>,
}

impl Keyring {
    /// Begins a keyring from the first change of its log.
    ///
    /// # Errors
    ///
    /// When `change` does not make a keyring.
    pub(crate) fn begin(at: Timestamp, change: &Change) -> Result<Self, ApplyError> {
        match change {
            Change::KeyringCreated {
                name,
                prefix,
                allow_imported,
                help_url,
            } => Ok(Self::new(KeyringHead {
                name: name.clone(),
                prefix: prefix.clone(),
                allow_imported: *allow_imported,
                help_url: help_url.clone(),
                created_at: at,
                revision: Revision::new(1),
                policy: RotationPolicy::default(),
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

    /// Folds the next change in and returns the versions whose records it changed, each with its former record.
    ///
    /// # Errors
    ///
    /// When the change is not possible; the keyring is then as before.
    pub(crate) fn apply(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &Change,
    ) -> Result<Vec<Touched>, ApplyError> {
        let key_id = change.key_id();
        let before = key_id.map_or_else(Vec::new, |key_id| self.records_of(key_id));
        self.advance(revision, at, change)?;
        let after = key_id.map_or_else(Vec::new, |key_id| self.records_of(key_id));
        let former_of = |record: &KeyRecord| {
            let mut before = before.iter();
            before.find(|former| former.version == record.version)
        };
        Ok(after
            .into_iter()
            .filter_map(|record| {
                let former = former_of(&record).cloned();
                (former.as_ref() != Some(&record)).then_some(Touched { record, former })
            })
            .collect())
    }

    /// Folds the next change in.
    ///
    /// # Errors
    ///
    /// When the change is not possible; the keyring is then as before.
    pub(crate) fn advance(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &Change,
    ) -> Result<(), ApplyError> {
        if revision != self.head.revision.next() {
            return Err(ApplyError::Gap {
                held: self.head.revision,
                found: revision,
            });
        }
        self.fold(revision, at, change)?;
        Arc::make_mut(&mut self.head).revision = revision;
        Ok(())
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
                if self.consumers.contains_key(consumer) {
                    return Err(duplicate(revision, "consumer", consumer));
                }
                let made = Consumer {
                    name: name.clone(),
                    created_at: at,
                    keys: PagedSet::default(),
                };
                self.consumers.insert(consumer.clone(), Arc::new(made));
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
                    policy: None,
                    versions: Versions::default(),
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
                if key.versions.contains_key(version.number) {
                    return Err(duplicate(revision, "version", &version.number));
                }
                if self.find(&version.digest).is_some() {
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
                v.withdraw(at, Arc::clone(reason))
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
                Arc::make_mut(&mut self.head).policy = policy.clone();
                self.due = PagedSet::default();
                let keys = self.keys.clone();
                for (key_id, key) in &keys {
                    for version in key.versions.keys() {
                        let key_id = *key_id;
                        self.index(VersionRef { key_id, version });
                    }
                }
                Ok(())
            }
            Change::KeyPolicySet { key_id, overrides } => {
                let numbers: Vec<VersionNumber> = self
                    .expect_key(revision, *key_id)?
                    .versions
                    .keys()
                    .collect();
                let versions = numbers.into_iter().map(|version| VersionRef {
                    key_id: *key_id,
                    version,
                });
                for which in versions.clone() {
                    self.leave_indexes(which);
                }
                let key = self.keys.get_mut(key_id);
                let key = Arc::make_mut(key.expect("it was looked up"));
                key.policy = (!overrides.is_empty()).then(|| Arc::new(overrides.clone()));
                for which in versions {
                    self.index(which);
                }
                Ok(())
            }
            Change::WebhookAdded { webhook } => {
                if self.webhooks().contains_key(&webhook.id) {
                    return Err(duplicate(revision, "webhook", &webhook.id));
                }
                let webhook = webhook.clone();
                let head = Arc::make_mut(&mut self.head);
                head.webhooks.insert(webhook.id, webhook);
                Ok(())
            }
            Change::WebhookRemoved { id } => {
                match Arc::make_mut(&mut self.head).webhooks.remove(id) {
                    Some(_) => Ok(()),
                    None => Err(unknown(revision, "webhook", id)),
                }
            }
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
        if self.keys.contains_key(&key.id) {
            return Err(duplicate(revision, "key", &key.id));
        }
        if self.find(&digest).is_some() {
            return Err(duplicate(revision, "digest of", &key.id));
        }
        if !self.own(&key) {
            return Err(unknown(revision, "consumer", &key.consumer));
        }
        let key = self.shared.key(key);
        self.keys.insert(key.id, Arc::new(key));
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
        self.keys
            .get(&key_id)
            .map(|key| &**key)
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
            .get(number)
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

    fn records_of(&self, key_id: KeyId) -> Vec<KeyRecord> {
        self.keys.get(&key_id).map_or_else(Vec::new, |key| {
            let versions = key.versions.values();
            versions.map(|version| key.record(version)).collect()
        })
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
