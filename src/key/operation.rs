//! What may be asked of a keyring: each operation checks the request against the keyring as it is, and returns the
//! changes to commit. Nothing here changes anything.

mod overlap;
mod policy;
mod webhook;

use std::{sync::Arc, time::Duration};

use super::{
    change::Change,
    consumer::Key,
    digest::Pepper,
    id::{ConsumerId, KeyId, KeyringName, RotationId, VersionNumber, VersionRef},
    keyring::Keyring,
    note::Note,
    permission::{AllowedSources, Scopes},
    rotation,
    sink_name::SinkName,
    time::{Timestamp, Window},
    token::{Prefix, PresentedKey},
    version::{KeyVersion, NewVersion, VersionState},
};
use crate::printable;

/// Why an operation is not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It speaks of something that is not there.
    #[error("{what} {name:?} does not exist")]
    NotFound {
        /// A consumer, a key or a version.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// It would make something that is there already.
    #[error("{what} {name:?} already exists")]
    AlreadyExists {
        /// A consumer or a key.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The key has no version of this number.
    #[error("key {key_id} has no version {version}", key_id = .0.key_id, version = .0.version)]
    NoVersion(VersionRef),
    /// It was done before.
    #[error("{0}")]
    DoneBefore(String),
    /// A value of the request cannot be.
    #[error("{field}: {problem}")]
    Invalid {
        /// Where it stands in the request.
        field: &'static str,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// It would put requests or a key at risk, or a rotation is in the way.
    #[error("{0}")]
    Unsafe(String),
    /// It would end a version that may be in use.
    #[error("version {version} of key {key_id} may be in use: {why}; --force retires it anyway", key_id = version.key_id, version = version.version)]
    InUse {
        /// The version.
        version: VersionRef,
        /// What is known of its use.
        why: String,
    },
}

/// What a new key shall be.
#[derive(Clone, Debug)]
pub struct KeySpec {
    /// Its id.
    pub key_id: KeyId,
    /// Whose it is.
    pub consumer: ConsumerId,
    /// For people.
    pub name: String,
    /// What it may do.
    pub scopes: Scopes,
    /// From where.
    pub allowed_sources: AllowedSources,
    /// When its first version is valid.
    pub window: Window,
    /// Whether its secret comes from another system.
    pub imported: bool,
}

/// What a version to stage shall be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StageSpec {
    /// Of which key.
    pub(crate) key_id: KeyId,
    /// The rotation that it begins.
    pub(crate) rotation: RotationId,
    /// When the version is valid.
    pub(crate) window: Window,
    /// When it is withdrawn unless it was handed over.
    pub(crate) withdraw_after: Timestamp,
}

/// What becomes of the old version at a hand-over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OldEnds {
    /// It stays accepted for so long at least; as the policy says when absent.
    AfterOverlap(Option<Duration>),
    /// It is revoked at once, for this reason.
    AtOnce(Arc<str>),
}

/// Which versions of a key to revoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// One.
    Version(VersionNumber),
    /// Every one.
    All,
}

/// The longest name for people, in bytes.
pub(crate) const MAX_NAME_LEN: usize = 128;
/// The longest reason, in bytes.
pub(crate) const MAX_REASON_LEN: usize = 512;

/// Makes a keyring: the first change of its log.
///
/// # Errors
///
/// When a value cannot be.
pub fn create_keyring(
    name: KeyringName,
    prefix: Prefix,
    allow_imported: bool,
    help_url: Option<String>,
) -> Result<Change, Refusal> {
    if let Some(url) = &help_url {
        let is_url = url.starts_with("https://") || url.starts_with("http://");
        let is_safe = url
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"<>\"".contains(&b));
        if !is_url || !is_safe || url.len() > 512 {
            return Err(Refusal::Invalid {
                field: "help_url",
                problem: "give an http or https address of at most 512 characters".to_owned(),
            });
        }
    }
    Ok(Change::KeyringCreated {
        name,
        prefix,
        allow_imported,
        help_url,
    })
}

impl Keyring {
    /// Makes a consumer.
    ///
    /// # Errors
    ///
    /// When it exists, or its name for people cannot be.
    pub fn create_consumer(
        &self,
        consumer: ConsumerId,
        name: String,
    ) -> Result<Vec<Change>, Refusal> {
        if self.consumers().contains_key(&consumer) {
            return Err(Refusal::AlreadyExists {
                what: "consumer",
                name: consumer.as_str().to_owned(),
            });
        }
        check_name(&name)?;
        Ok(vec![Change::ConsumerCreated { consumer, name }])
    }

    /// Creates a key as [`create_key`](Self::create_key) does, and its consumer first where it does not exist.
    ///
    /// # Errors
    ///
    /// As those of [`create_key`](Self::create_key), except that the consumer need not exist.
    pub(crate) fn create_key_and_consumer(
        &self,
        spec: KeySpec,
        secret: &PresentedKey<'_>,
        pepper: &Pepper,
        now: Timestamp,
    ) -> Result<Vec<Change>, Refusal> {
        let mut changes = Vec::new();
        if !self.consumers().contains_key(&spec.consumer) {
            changes = self.create_consumer(spec.consumer.clone(), String::new())?;
        }
        changes.push(self.key_created(spec, secret, pepper, now)?);
        Ok(changes)
    }

    /// Makes a key whose first version is active, for a secret that the caller has made or was handed.
    ///
    /// # Errors
    ///
    /// When the consumer does not exist, the secret is held already, the keyring does not take imported keys, or the
    /// window is empty or over.
    pub fn create_key(
        &self,
        spec: KeySpec,
        secret: &PresentedKey<'_>,
        pepper: &Pepper,
        now: Timestamp,
    ) -> Result<Vec<Change>, Refusal> {
        if !self.consumers().contains_key(&spec.consumer) {
            return Err(Refusal::NotFound {
                what: "consumer",
                name: spec.consumer.as_str().to_owned(),
            });
        }
        Ok(vec![self.key_created(spec, secret, pepper, now)?])
    }

    /// The change that creates a key for a consumer that exists by then.
    fn key_created(
        &self,
        spec: KeySpec,
        secret: &PresentedKey<'_>,
        pepper: &Pepper,
        now: Timestamp,
    ) -> Result<Change, Refusal> {
        if spec.imported && !self.allow_imported() {
            return Err(Refusal::Unsafe(format!(
                "keyring {:?} does not allow imported keys; create one with --allow-imported",
                self.name().as_str()
            )));
        }
        check_name(&spec.name)?;
        check_window(&spec.window, now)?;
        let digest = pepper.digest(secret);
        if let Some(held) = self.find(&digest) {
            return Err(Refusal::DoneBefore(format!(
                "this secret is already imported, as key {}",
                held.key_id
            )));
        }
        Ok(Change::KeyCreated {
            key_id: spec.key_id,
            consumer: spec.consumer,
            name: spec.name,
            imported: spec.imported,
            scopes: spec.scopes,
            allowed_sources: spec.allowed_sources,
            version: NewVersion {
                number: VersionNumber::FIRST,
                digest,
                pepper: pepper.id(),
                window: spec.window,
            },
        })
    }

    /// One key.
    ///
    /// # Errors
    ///
    /// When it does not exist.
    pub(crate) fn key(&self, key_id: KeyId) -> Result<&Key, Refusal> {
        let key = self.keys().get(&key_id).map(|key| &**key);
        key.ok_or_else(|| Refusal::NotFound {
            what: "key",
            name: key_id.as_str().to_owned(),
        })
    }

    /// Begins a rotation: stages a version that sidecars accept but nobody holds the secret of.
    ///
    /// # Errors
    ///
    /// When the key does not exist, a rotation of it is being staged, as many versions are accepted as may be, or the
    /// window is over.
    pub(crate) fn stage(
        &self,
        spec: StageSpec,
        secret: &PresentedKey<'_>,
        pepper: &Pepper,
        now: Timestamp,
    ) -> Result<Vec<Change>, Refusal> {
        let StageSpec {
            key_id,
            rotation,
            window,
            withdraw_after,
        } = spec;
        let key = self.key(key_id)?;
        if let Some(pending) = key.pending() {
            return Err(Refusal::Unsafe(format!(
                "version {} of key {key_id} is being rolled out; wait until that rotation is handed over or withdrawn",
                pending.number
            )));
        }
        let accepted = key.accepted(now).count();
        let max_versions = self.policy_of(key).max_versions;
        if u32::try_from(accepted).is_ok_and(|accepted| accepted >= max_versions) {
            let retiring: Vec<String> = key
                .retiring()
                .map(|version| version.number.to_string())
                .collect();
            let which = match retiring.as_slice() {
                [] => String::new(),
                numbers => format!(" (retiring: {})", numbers.join(", ")),
            };
            return Err(Refusal::Unsafe(format!(
                "key {key_id} has {accepted} accepted versions{which}, the most that it may have: end one with `relatch rotate retire` or `relatch revoke`, or allow more with `relatch policy set {key_id} --max-versions {}`",
                accepted + 1
            )));
        }
        check_window(&window, now)?;
        Ok(vec![Change::VersionStaged {
            key_id,
            rotation,
            version: NewVersion {
                number: key.next_number(),
                digest: pepper.digest(secret),
                pepper: pepper.id(),
                window,
            },
            withdraw_after,
        }])
    }

    /// Ends the staging of a rotation: its version becomes active, the one that was active begins to retire, or is
    /// revoked.
    ///
    /// # Errors
    ///
    /// When the version is not pending any more.
    pub(crate) fn hand_over(
        &self,
        key_id: KeyId,
        rotation: RotationId,
        old_ends: &OldEnds,
        now: Timestamp,
    ) -> Result<Vec<Change>, Refusal> {
        let (key, version) = self.staged(key_id, rotation)?;
        let overlap = match old_ends {
            OldEnds::AfterOverlap(overlap) => overlap.unwrap_or(self.policy_of(key).overlap),
            OldEnds::AtOnce(_) => Duration::ZERO,
        };
        let old = rotation::old_version(key, version, overlap, now);
        let handed_over = Change::HandedOver {
            key_id,
            rotation,
            version: version.number,
            old,
        };
        let revoked = match (old_ends, old) {
            (OldEnds::AtOnce(reason), Some(old)) => Some(Change::VersionsRevoked {
                key_id,
                versions: vec![old.version],
                reason: Arc::clone(reason),
            }),
            (OldEnds::AtOnce(_), None) | (OldEnds::AfterOverlap(_), _) => None,
        };
        Ok(std::iter::once(handed_over).chain(revoked).collect())
    }

    /// Notes that the secret of a staged version goes out to a sink from now on. After `withdraw_after` the version is
    /// handed over once it is used.
    ///
    /// # Errors
    ///
    /// When the version is not pending any more.
    pub(crate) fn begin_delivery(
        &self,
        key_id: KeyId,
        rotation: RotationId,
        sink: SinkName,
        withdraw_after: Timestamp,
    ) -> Result<Vec<Change>, Refusal> {
        let (_, version) = self.staged(key_id, rotation)?;
        Ok(vec![Change::DeliveryBegun {
            key_id,
            rotation,
            version: version.number,
            sink,
            withdraw_after,
        }])
    }

    /// Notes, once, that a staged version is held before its hand-over.
    ///
    /// # Errors
    ///
    /// When the version is not pending any more.
    pub(crate) fn hold_staged(
        &self,
        key_id: KeyId,
        rotation: RotationId,
        reason: Arc<str>,
        now: Timestamp,
    ) -> Result<Vec<Change>, Refusal> {
        let (_, version) = self.staged(key_id, rotation)?;
        if version.told.held_at.is_some() {
            return Ok(Vec::new());
        }
        Ok(vec![Change::Noted {
            key_id,
            version: version.number,
            note: Note::Held {
                deadline: now,
                reason,
            },
        }])
    }

    /// Takes a staged version back.
    ///
    /// # Errors
    ///
    /// When it is not pending any more.
    pub(crate) fn withdraw(
        &self,
        key_id: KeyId,
        rotation: RotationId,
        reason: Arc<str>,
    ) -> Result<Vec<Change>, Refusal> {
        let (_, version) = self.staged(key_id, rotation)?;
        Ok(vec![Change::VersionWithdrawn {
            key_id,
            rotation,
            version: version.number,
            reason,
        }])
    }

    /// Ends versions of a key at once. What is revoked already stays so and needs no change.
    ///
    /// # Errors
    ///
    /// When the key or the version does not exist, or no reason is given.
    pub fn revoke(
        &self,
        key_id: KeyId,
        which: Which,
        reason: &str,
    ) -> Result<Vec<Change>, Refusal> {
        check_reason(reason)?;
        let versions: Vec<VersionNumber> = self
            .asked_for(key_id, which)?
            .into_iter()
            .filter(|version| !matches!(version.state, VersionState::Revoked { .. }))
            .map(|version| version.number)
            .collect();
        if versions.is_empty() {
            return Ok(Vec::new());
        }
        Ok(vec![Change::VersionsRevoked {
            key_id,
            versions,
            reason: reason.into(),
        }])
    }

    /// The versions of a key that are asked for.
    ///
    /// # Errors
    ///
    /// When the key or the version does not exist.
    pub(crate) fn asked_for(
        &self,
        key_id: KeyId,
        which: Which,
    ) -> Result<Vec<&KeyVersion>, Refusal> {
        let key = self.key(key_id)?;
        match which {
            Which::All => Ok(key.versions.values().collect()),
            Which::Version(number) => match key.versions.get(number) {
                Some(version) => Ok(vec![version]),
                None => Err(Refusal::NoVersion(VersionRef {
                    key_id,
                    version: number,
                })),
            },
        }
    }

    fn staged(&self, key_id: KeyId, rotation: RotationId) -> Result<(&Key, &KeyVersion), Refusal> {
        let key = self.key(key_id)?;
        key.pending()
            .filter(|version| version.rotation == Some(rotation))
            .map(|version| (key, version))
            .ok_or_else(|| {
                Refusal::Unsafe(format!(
                    "rotation {rotation:?} of key {key_id} is no longer being staged: its version was withdrawn or revoked meanwhile",
                ))
            })
    }
}

fn check_reason(reason: &str) -> Result<(), Refusal> {
    if reason.trim().is_empty() || reason.len() > MAX_REASON_LEN {
        return Err(Refusal::Invalid {
            field: "reason",
            problem: format!("say why, in at most {MAX_REASON_LEN} bytes"),
        });
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), Refusal> {
    if name.len() <= MAX_NAME_LEN && !name.contains(printable::is_unsafe) {
        Ok(())
    } else {
        Err(Refusal::Invalid {
            field: "name",
            problem: format!(
                "give at most {MAX_NAME_LEN} bytes without control characters and without characters that are invisible or change the direction of text"
            ),
        })
    }
}

fn check_window(window: &Window, now: Timestamp) -> Result<(), Refusal> {
    let problem = match (window.not_before, window.expires_at) {
        (_, Some(end)) if end <= now => format!("it would have expired at {end}, before now"),
        (Some(start), Some(end)) if end <= start => {
            format!("it would expire at {end}, before it becomes valid at {start}")
        }
        _ => return Ok(()),
    };
    Err(Refusal::Invalid {
        field: "expires_in",
        problem,
    })
}
