//! The operations on a keyring. Each operation checks a request against the present state of the
//! keyring, and returns the changes to commit. It does not apply them.

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

/// The reason why an operation is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperationRefusal {
    /// The request refers to something that does not exist.
    #[error("{what} {name:?} does not exist")]
    NotFound {
        /// The kind of the missing thing, for example `key`.
        what: &'static str,
        /// The name or id of the missing thing.
        name: String,
    },
    /// The request would create something that exists already.
    #[error("{what} {name:?} already exists")]
    AlreadyExists {
        /// The kind of the existing thing, for example `consumer`.
        what: &'static str,
        /// The name or id of the existing thing.
        name: String,
    },
    /// The key has no version of this number.
    #[error("key {key_id} has no version {version}", key_id = .0.key_id, version = .0.version)]
    NoVersion(VersionRef),
    /// An earlier request has done this already.
    #[error("{0}")]
    DoneBefore(String),
    /// A value of the request is not valid.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field of the request.
        field: &'static str,
        /// The problem, or what to use instead.
        problem: String,
    },
    /// The operation would put requests or a key at risk, or the state of a rotation does not allow
    /// it.
    #[error("{0}")]
    Unsafe(String),
    /// The operation would retire a version that may be in use.
    #[error("version {version} of key {key_id} may be in use: {why}; --force retires it anyway", key_id = version.key_id, version = version.version)]
    InUse {
        /// The retiring version.
        version: VersionRef,
        /// The evidence that is missing, as a clause.
        why: String,
    },
}

/// A new key.
#[derive(Clone, Debug)]
pub struct KeySpec {
    /// The id, new in the keyring.
    pub key_id: KeyId,
    /// The owner of the key.
    pub consumer: ConsumerId,
    /// The name for people, at most 128 bytes; may be empty.
    pub name: String,
    /// The permissions of the key.
    pub scopes: Scopes,
    /// The addresses that the key may be used from.
    pub allowed_sources: AllowedSources,
    /// The validity of the first version.
    pub window: Window,
    /// Whether the secret comes from another system. The keyring has to allow imported keys.
    pub imported: bool,
}

/// A version to stage.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StageSpec {
    pub(crate) key_id: KeyId,
    /// The rotation that begins with the version.
    pub(crate) rotation: RotationId,
    /// The validity of the version.
    pub(crate) window: Window,
    /// The time at which the version is withdrawn if it is not handed over.
    pub(crate) withdraw_after: Timestamp,
}

/// The end of the old version after a hand-over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OldEnds {
    /// The old version stays accepted at least for this overlap; none: for the overlap of the
    /// policy.
    AfterOverlap(Option<Duration>),
    /// The old version is revoked in the commit of the hand-over, for this reason.
    AtOnce(Arc<str>),
}

/// The versions of a key to revoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Only this version.
    Version(VersionNumber),
    /// All versions of the key.
    All,
}

/// The maximum length of a name for people, in bytes.
pub(crate) const MAX_NAME_LEN: usize = 128;
/// The maximum length of a reason, in bytes.
pub(crate) const MAX_REASON_LEN: usize = 512;

/// Creates a keyring: returns the first change of its log.
///
/// # Errors
///
/// When `help_url` is not valid.
pub fn create_keyring(
    name: KeyringName,
    prefix: Prefix,
    allow_imported: bool,
    help_url: Option<String>,
) -> Result<Change, OperationRefusal> {
    if let Some(url) = &help_url {
        let is_url = url.starts_with("https://") || url.starts_with("http://");
        let is_safe = url
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"<>\"".contains(&b));
        if !is_url || !is_safe || url.len() > 512 {
            return Err(OperationRefusal::Invalid {
                field: "help_url",
                problem: "use an http or https URL of at most 512 characters".to_owned(),
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
    /// Creates a consumer.
    ///
    /// # Errors
    ///
    /// When the consumer exists, or its name for people is not valid.
    pub fn create_consumer(
        &self,
        consumer: ConsumerId,
        name: String,
    ) -> Result<Vec<Change>, OperationRefusal> {
        if self.consumers().contains_key(&consumer) {
            return Err(OperationRefusal::AlreadyExists {
                what: "consumer",
                name: consumer.as_str().to_owned(),
            });
        }
        check_name(&name)?;
        Ok(vec![Change::ConsumerCreated { consumer, name }])
    }

    /// Creates a key as [`create_key`](Self::create_key) does, and first its consumer if it does
    /// not exist.
    ///
    /// # Errors
    ///
    /// Those of [`create_key`](Self::create_key), except that the consumer need not exist.
    pub(crate) fn create_key_and_consumer(
        &self,
        spec: KeySpec,
        secret: &PresentedKey<'_>,
        pepper: &Pepper,
        now: Timestamp,
    ) -> Result<Vec<Change>, OperationRefusal> {
        let mut changes = Vec::new();
        if !self.consumers().contains_key(&spec.consumer) {
            changes = self.create_consumer(spec.consumer.clone(), String::new())?;
        }
        changes.push(self.key_created(spec, secret, pepper, now)?);
        Ok(changes)
    }

    /// Creates a key whose first version is active, for a secret that the caller has generated or
    /// received.
    ///
    /// # Errors
    ///
    /// When the consumer does not exist, the name for people is not valid, the keyring already
    /// holds the secret, the key is imported and the keyring does not allow that, or the window is
    /// empty or over.
    pub fn create_key(
        &self,
        spec: KeySpec,
        secret: &PresentedKey<'_>,
        pepper: &Pepper,
        now: Timestamp,
    ) -> Result<Vec<Change>, OperationRefusal> {
        if !self.consumers().contains_key(&spec.consumer) {
            return Err(OperationRefusal::NotFound {
                what: "consumer",
                name: spec.consumer.as_str().to_owned(),
            });
        }
        Ok(vec![self.key_created(spec, secret, pepper, now)?])
    }

    /// Returns the change that creates a key. Its consumer exists when the change is applied.
    fn key_created(
        &self,
        spec: KeySpec,
        secret: &PresentedKey<'_>,
        pepper: &Pepper,
        now: Timestamp,
    ) -> Result<Change, OperationRefusal> {
        if spec.imported && !self.allow_imported() {
            return Err(OperationRefusal::Unsafe(format!(
                "keyring {:?} does not allow imported keys; create one with --allow-imported",
                self.name().as_str()
            )));
        }
        check_name(&spec.name)?;
        check_window(&spec.window, now)?;
        let digest = pepper.digest(secret);
        if let Some(held) = self.find(&digest) {
            return Err(OperationRefusal::DoneBefore(format!(
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

    /// Returns the key with id `key_id`.
    ///
    /// # Errors
    ///
    /// When the key does not exist.
    pub(crate) fn key(&self, key_id: KeyId) -> Result<&Key, OperationRefusal> {
        let key = self.keys().get(&key_id).map(|key| &**key);
        key.ok_or_else(|| OperationRefusal::NotFound {
            what: "key",
            name: key_id.as_str().to_owned(),
        })
    }

    /// Begins a rotation: stages a version whose secret is not handed out yet. Sidecars accept it.
    ///
    /// # Errors
    ///
    /// When the key does not exist, one of its versions is already staged, the maximum number of
    /// versions is accepted, or the window is empty or over.
    pub(crate) fn stage(
        &self,
        spec: StageSpec,
        secret: &PresentedKey<'_>,
        pepper: &Pepper,
        now: Timestamp,
    ) -> Result<Vec<Change>, OperationRefusal> {
        let StageSpec {
            key_id,
            rotation,
            window,
            withdraw_after,
        } = spec;
        let key = self.key(key_id)?;
        if let Some(pending) = key.pending() {
            return Err(OperationRefusal::Unsafe(format!(
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
            return Err(OperationRefusal::Unsafe(format!(
                "key {key_id} has {accepted} accepted versions{which}, and its policy allows {max_versions}: retire one with `relatch rotate retire`, revoke one with `relatch revoke`, or allow more with `relatch policy set {key_id} --max-versions {}`",
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

    /// Hands a staged version over: it becomes active, and the version that was active begins to
    /// retire, or is revoked.
    ///
    /// # Errors
    ///
    /// When the key does not exist, or the version is not pending any more.
    pub(crate) fn hand_over(
        &self,
        key_id: KeyId,
        rotation: RotationId,
        old_ends: &OldEnds,
        now: Timestamp,
    ) -> Result<Vec<Change>, OperationRefusal> {
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

    /// Records that the delivery of a staged version's secret to a sink begins. From
    /// `withdraw_after` on, a use of the version hands it over.
    ///
    /// # Errors
    ///
    /// When the key does not exist, or the version is not pending any more.
    pub(crate) fn begin_delivery(
        &self,
        key_id: KeyId,
        rotation: RotationId,
        sink: SinkName,
        withdraw_after: Timestamp,
    ) -> Result<Vec<Change>, OperationRefusal> {
        let (_, version) = self.staged(key_id, rotation)?;
        Ok(vec![Change::DeliveryBegun {
            key_id,
            rotation,
            version: version.number,
            sink,
            withdraw_after,
        }])
    }

    /// Notes, only once, that a staged version is held before its hand-over.
    ///
    /// # Errors
    ///
    /// When the key does not exist, or the version is not pending any more.
    pub(crate) fn hold_staged(
        &self,
        key_id: KeyId,
        rotation: RotationId,
        reason: Arc<str>,
        now: Timestamp,
    ) -> Result<Vec<Change>, OperationRefusal> {
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

    /// Withdraws a staged version.
    ///
    /// # Errors
    ///
    /// When the key does not exist, or the version is not pending any more.
    pub(crate) fn withdraw(
        &self,
        key_id: KeyId,
        rotation: RotationId,
        reason: Arc<str>,
    ) -> Result<Vec<Change>, OperationRefusal> {
        let (_, version) = self.staged(key_id, rotation)?;
        Ok(vec![Change::VersionWithdrawn {
            key_id,
            rotation,
            version: version.number,
            reason,
        }])
    }

    /// Revokes versions of a key. Versions that are already revoked need no change.
    ///
    /// # Errors
    ///
    /// When the key or the version does not exist, or the reason is not valid.
    pub fn revoke(
        &self,
        key_id: KeyId,
        which: Which,
        reason: &str,
    ) -> Result<Vec<Change>, OperationRefusal> {
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

    /// Returns the versions of a key that `which` selects.
    ///
    /// # Errors
    ///
    /// When the key or the version does not exist.
    pub(crate) fn asked_for(
        &self,
        key_id: KeyId,
        which: Which,
    ) -> Result<Vec<&KeyVersion>, OperationRefusal> {
        let key = self.key(key_id)?;
        match which {
            Which::All => Ok(key.versions.values().collect()),
            Which::Version(number) => match key.versions.get(number) {
                Some(version) => Ok(vec![version]),
                None => Err(OperationRefusal::NoVersion(VersionRef {
                    key_id,
                    version: number,
                })),
            },
        }
    }

    fn staged(
        &self,
        key_id: KeyId,
        rotation: RotationId,
    ) -> Result<(&Key, &KeyVersion), OperationRefusal> {
        let key = self.key(key_id)?;
        key.pending()
            .filter(|version| version.rotation == Some(rotation))
            .map(|version| (key, version))
            .ok_or_else(|| {
                OperationRefusal::Unsafe(format!(
                    "rotation {rotation} of key {key_id} has no pending version: it was handed over, withdrawn or revoked",
                ))
            })
    }
}

fn check_reason(reason: &str) -> Result<(), OperationRefusal> {
    if reason.trim().is_empty() || reason.len() > MAX_REASON_LEN {
        return Err(OperationRefusal::Invalid {
            field: "reason",
            problem: format!("use 1 to {MAX_REASON_LEN} bytes, and not only spaces"),
        });
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), OperationRefusal> {
    if name.len() <= MAX_NAME_LEN && !name.contains(printable::is_unsafe) {
        Ok(())
    } else {
        Err(OperationRefusal::Invalid {
            field: "name",
            problem: format!(
                "use at most {MAX_NAME_LEN} bytes, without control characters, invisible characters and characters that change the direction of text"
            ),
        })
    }
}

fn check_window(window: &Window, now: Timestamp) -> Result<(), OperationRefusal> {
    let problem = match (window.not_before, window.expires_at) {
        (_, Some(end)) if end <= now => format!("it would have expired at {end}, before now"),
        (Some(start), Some(end)) if end <= start => {
            format!("it would expire at {end}, before it becomes valid at {start}")
        }
        _ => return Ok(()),
    };
    Err(OperationRefusal::Invalid {
        field: "expires_in",
        problem,
    })
}
