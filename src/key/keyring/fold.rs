//! The fold: it applies one change after the other, and checks each against the state of the
//! keyring.

use std::{collections::BTreeMap, fmt, sync::Arc};

use super::{Keyring, KeyringHead};
use crate::key::{
    change::{Change, OldVersion},
    consumer::{Consumer, Key},
    id::{ConsumerId, KeyId, Revision, RotationId, VersionNumber, VersionRef},
    paged::PagedSet,
    policy::{PolicyOverrides, RotationPolicy},
    record::KeyRecord,
    time::Timestamp,
    version::{KeyVersion, NewVersion, ReinstateError, TransitionError, VersionState},
    versions::Versions,
    webhook::{Webhook, WebhookId},
};

/// A log that is not a possible history: a newer relatch wrote it, or somebody tampered with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// The first change does not create the keyring, or a later one does.
    #[error("revision {revision} is a change of kind {kind}, which is not possible at this place")]
    OutOfPlace {
        /// The revision of the change.
        revision: Revision,
        /// The name of the change.
        kind: &'static str,
    },
    /// The revision of the change is not the next one.
    #[error("revision {found} follows revision {held}")]
    Gap {
        /// The revision of the keyring.
        held: Revision,
        /// The revision of the change.
        found: Revision,
    },
    /// The change refers to something that does not exist.
    #[error("revision {revision} refers to {what}, which does not exist")]
    Unknown {
        /// The revision of the change.
        revision: Revision,
        /// A consumer, a key, a version, a webhook or a token.
        what: String,
    },
    /// The change creates something that exists already.
    #[error("revision {revision} creates {what}, which exists already")]
    Duplicate {
        /// The revision of the change.
        revision: Revision,
        /// A consumer, a key, a version, a digest or a webhook.
        what: String,
    },
    /// The state of the version does not allow the transition.
    #[error("revision {revision}: {source}")]
    Transition {
        /// The revision of the change.
        revision: Revision,
        /// The version and both states.
        source: TransitionError,
    },
    /// The version cannot become active again.
    #[error("revision {revision}: {source}")]
    Reinstate {
        /// The revision of the change.
        revision: Revision,
        /// Why the version cannot become active again.
        source: ReinstateError,
    },
}

/// A version whose record a change has replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Touched {
    /// The new record, for sidecars.
    pub(crate) record: KeyRecord,
    /// The record before; none for a new version.
    pub(crate) former: Option<KeyRecord>,
}

impl Keyring {
    /// Creates a keyring from the first change of its log.
    ///
    /// # Errors
    ///
    /// When `change` does not create a keyring.
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

    /// Applies the next change, and returns the versions whose records it changed, each with its
    /// former record.
    ///
    /// # Errors
    ///
    /// When the change is not possible. The keyring is then unchanged.
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

    /// Applies the next change.
    ///
    /// # Errors
    ///
    /// When the change is not possible. The keyring is then unchanged.
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
        let mut fold = Fold {
            keyring: self,
            revision,
            at,
        };
        fold.change(change)?;
        Arc::make_mut(&mut self.head).revision = revision;
        Ok(())
    }

    fn records_of(&self, key_id: KeyId) -> Vec<KeyRecord> {
        self.keys.get(&key_id).map_or_else(Vec::new, |key| {
            let versions = key.versions.values();
            versions.map(|version| key.record(version)).collect()
        })
    }
}

/// One change on its way into a keyring: the keyring, and what all parts of the change share. A method that returns an error
/// has left the keyring as it was.
struct Fold<'k> {
    keyring: &'k mut Keyring,
    revision: Revision,
    at: Timestamp,
}

impl Fold<'_> {
    fn change(&mut self, change: &Change) -> Result<(), ApplyError> {
        match change {
            Change::KeyringCreated { .. } => Err(ApplyError::OutOfPlace {
                revision: self.revision,
                kind: change.kind(),
            }),
            Change::ConsumerCreated { consumer, name } => self.create_consumer(consumer, name),
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
                self.create_key(key, version)
            }
            Change::VersionStaged {
                key_id,
                rotation,
                version,
                withdraw_after,
            } => self.stage_version(*key_id, *rotation, version, *withdraw_after),
            Change::HandedOver {
                key_id,
                rotation,
                version,
                old,
            } => self.hand_over(version_ref(*key_id, *version), *rotation, *old),
            Change::RolledBack {
                key_id,
                version,
                replaced,
                reason: _,
            } => self.roll_back(version_ref(*key_id, *version), *replaced),
            Change::VersionsRevoked {
                key_id,
                versions,
                reason,
            } => self.revoke(*key_id, versions, reason),
            Change::VersionWithdrawn {
                key_id,
                version,
                reason,
                ..
            } => self.transition(*key_id, *version, |version, at| {
                version.withdraw(at, Arc::clone(reason))
            }),
            Change::VersionRetired {
                key_id,
                version,
                reason,
                forced: _,
            } => self.transition(*key_id, *version, |version, at| {
                version.retire(at, Arc::clone(reason))
            }),
            Change::OverlapExtended {
                key_id,
                version,
                until,
                reason: _,
            } => self.transition(*key_id, *version, |version, _| version.extend(*until)),
            Change::DeliveryBegun {
                key_id,
                version,
                sink,
                withdraw_after,
                ..
            } => self.transition(*key_id, *version, |version, _| {
                version.begin_delivery(sink.clone(), *withdraw_after)
            }),
            Change::Noted {
                key_id,
                version,
                note,
            } => self.transition(*key_id, *version, |version, _| Ok(version.told_of(note))),
            Change::KeyringPolicySet { policy } => {
                self.set_keyring_policy(policy);
                Ok(())
            }
            Change::KeyPolicySet { key_id, overrides } => self.set_key_policy(*key_id, overrides),
            Change::WebhookAdded { webhook } => self.add_webhook(webhook),
            Change::WebhookRemoved { id } => self.remove_webhook(*id),
        }
    }

    fn create_consumer(&mut self, consumer: &ConsumerId, name: &str) -> Result<(), ApplyError> {
        if self.keyring.consumers.contains_key(consumer) {
            return Err(self.duplicate("consumer", consumer));
        }
        let created = Consumer {
            name: name.to_owned(),
            created_at: self.at,
            keys: PagedSet::default(),
        };
        self.keyring
            .consumers
            .insert(consumer.clone(), Arc::new(created));
        Ok(())
    }

    /// Creates a key with its first version, which is active.
    fn create_key(&mut self, key: Key, version: &NewVersion) -> Result<(), ApplyError> {
        let key_id = key.id;
        if self.keyring.keys.contains_key(&key_id) {
            return Err(self.duplicate("key", &key_id));
        }
        if self.keyring.find(&version.digest).is_some() {
            return Err(self.duplicate("digest of", &key_id));
        }
        if !self.keyring.own(&key) {
            return Err(self.unknown("consumer", &key.consumer));
        }
        let key = self.keyring.shared.key(key);
        self.keyring.keys.insert(key_id, Arc::new(key));
        let state = VersionState::Active { since: self.at };
        let version = version.clone().begin(self.at, state, None);
        self.keyring.put(key_id, version);
        Ok(())
    }

    fn stage_version(
        &mut self,
        key_id: KeyId,
        rotation: RotationId,
        version: &NewVersion,
        withdraw_after: Timestamp,
    ) -> Result<(), ApplyError> {
        if self
            .expect_key(key_id)?
            .versions
            .contains_key(version.number)
        {
            return Err(self.duplicate("version", &version.number));
        }
        if self.keyring.find(&version.digest).is_some() {
            return Err(self.duplicate("digest of", &key_id));
        }
        let state = VersionState::Pending {
            since: self.at,
            withdraw_after,
            sink: None,
        };
        let version = version.clone().begin(self.at, state, Some(rotation));
        self.keyring.put(key_id, version);
        Ok(())
    }

    fn hand_over(
        &mut self,
        new: VersionRef,
        rotation: RotationId,
        old: Option<OldVersion>,
    ) -> Result<(), ApplyError> {
        let VersionRef { key_id, version } = new;
        let new = self.expect_version(key_id, version)?;
        let new = new.activate(self.at).map_err(|e| self.wrong(e))?;
        if let Some(old) = old {
            let mut old = self.begin_retiring(key_id, old, version)?;
            old.rotation = Some(rotation);
            self.keyring.put(key_id, old);
        }
        self.keyring.put(key_id, new);
        Ok(())
    }

    fn roll_back(
        &mut self,
        old: VersionRef,
        replaced: Option<OldVersion>,
    ) -> Result<(), ApplyError> {
        let VersionRef { key_id, version } = old;
        let policy = self.keyring.policy_of(self.expect_key(key_id)?);
        let rollback_for = policy.rollback_for;
        let old = self
            .expect_version(key_id, version)?
            .reinstate(self.at, rollback_for)
            .map_err(|source| ApplyError::Reinstate {
                revision: self.revision,
                source,
            })?;
        if let Some(replaced) = replaced {
            let mut replaced = self.begin_retiring(key_id, replaced, version)?;
            replaced.rotation = replaced.rotation.or(old.rotation);
            self.keyring.put(key_id, replaced);
        }
        self.keyring.put(key_id, old);
        Ok(())
    }

    fn revoke(
        &mut self,
        key_id: KeyId,
        versions: &[VersionNumber],
        reason: &Arc<str>,
    ) -> Result<(), ApplyError> {
        let revoked = versions
            .iter()
            .map(|number| {
                self.expect_version(key_id, *number)?
                    .revoke(self.at, Arc::clone(reason))
                    .map_err(|e| self.wrong(e))
            })
            .collect::<Result<Vec<_>, _>>()?;
        for version in revoked {
            self.keyring.put(key_id, version);
        }
        Ok(())
    }

    fn set_keyring_policy(&mut self, policy: &RotationPolicy) {
        Arc::make_mut(&mut self.keyring.head).policy = policy.clone();
        self.keyring.due = PagedSet::default();
        let keys = self.keyring.keys.clone();
        for (key_id, key) in &keys {
            for version in key.versions.keys() {
                self.keyring.index(version_ref(*key_id, version));
            }
        }
    }

    fn set_key_policy(
        &mut self,
        key_id: KeyId,
        overrides: &PolicyOverrides,
    ) -> Result<(), ApplyError> {
        let versions: Vec<VersionRef> = self
            .expect_key(key_id)?
            .versions
            .keys()
            .map(|version| version_ref(key_id, version))
            .collect();
        for version in &versions {
            self.keyring.leave_indexes(*version);
        }
        let key = self.keyring.keys.get_mut(&key_id);
        let key = Arc::make_mut(key.expect("it was looked up"));
        key.policy = (!overrides.is_empty()).then(|| Arc::new(overrides.clone()));
        for version in versions {
            self.keyring.index(version);
        }
        Ok(())
    }

    fn add_webhook(&mut self, webhook: &Webhook) -> Result<(), ApplyError> {
        if self.keyring.webhooks().contains_key(&webhook.id) {
            return Err(self.duplicate("webhook", &webhook.id));
        }
        let head = Arc::make_mut(&mut self.keyring.head);
        head.webhooks.insert(webhook.id, webhook.clone());
        Ok(())
    }

    fn remove_webhook(&mut self, id: WebhookId) -> Result<(), ApplyError> {
        match Arc::make_mut(&mut self.keyring.head).webhooks.remove(&id) {
            Some(_) => Ok(()),
            None => Err(self.unknown("webhook", &id)),
        }
    }

    /// Changes the state of one version.
    fn transition(
        &mut self,
        key_id: KeyId,
        number: VersionNumber,
        to: impl FnOnce(KeyVersion, Timestamp) -> Result<KeyVersion, TransitionError>,
    ) -> Result<(), ApplyError> {
        let version = self.expect_version(key_id, number)?;
        let version = to(version, self.at).map_err(|e| self.wrong(e))?;
        self.keyring.put(key_id, version);
        Ok(())
    }

    /// The version `old`, which begins to retire in favour of `successor`.
    fn begin_retiring(
        &self,
        key_id: KeyId,
        old: OldVersion,
        successor: VersionNumber,
    ) -> Result<KeyVersion, ApplyError> {
        self.expect_version(key_id, old.version)?
            .begin_retiring(self.at, old.until.saturating_since(self.at), successor)
            .map_err(|e| self.wrong(e))
    }

    fn expect_key(&self, key_id: KeyId) -> Result<&Key, ApplyError> {
        let key = self.keyring.keys.get(&key_id);
        key.map(|key| &**key)
            .ok_or_else(|| self.unknown("key", &key_id))
    }

    fn expect_version(
        &self,
        key_id: KeyId,
        number: VersionNumber,
    ) -> Result<KeyVersion, ApplyError> {
        let version = self.expect_key(key_id)?.versions.get(number);
        version
            .cloned()
            .ok_or_else(|| self.unknown("version", &number))
    }

    fn duplicate(&self, what: &str, name: &dyn fmt::Display) -> ApplyError {
        ApplyError::Duplicate {
            revision: self.revision,
            what: format!("{what} {name}"),
        }
    }

    fn unknown(&self, what: &str, name: &dyn fmt::Display) -> ApplyError {
        ApplyError::Unknown {
            revision: self.revision,
            what: format!("{what} {name}"),
        }
    }

    const fn wrong(&self, source: TransitionError) -> ApplyError {
        ApplyError::Transition {
            revision: self.revision,
            source,
        }
    }
}

const fn version_ref(key_id: KeyId, version: VersionNumber) -> VersionRef {
    VersionRef { key_id, version }
}
