//! The operations on a rotation in progress.

use super::{OperationRefusal, check_reason};
use crate::key::{
    change::Change,
    consumer::Key,
    evidence::{Evidence, Idleness},
    id::{KeyId, VersionNumber, VersionRef},
    keyring::Keyring,
    rotation,
    time::{Timestamp, WindowPosition},
    version::{KeyVersion, VersionState},
};

impl Keyring {
    /// Aborts a rotation before its hand-over: withdraws its version.
    ///
    /// # Errors
    ///
    /// When the key does not exist, no version of it is pending, or the reason is not valid.
    pub(crate) fn abort(
        &self,
        key_id: KeyId,
        reason: &str,
    ) -> Result<Vec<Change>, OperationRefusal> {
        check_reason(reason)?;
        let key = self.key(key_id)?;
        let Some((version, rotation)) = key
            .pending()
            .and_then(|version| Some((version, version.rotation?)))
        else {
            let hint = if key.retiring().next().is_some() {
                "; to undo a hand-over, use `relatch rotate rollback`"
            } else {
                ""
            };
            return Err(OperationRefusal::Unsafe(format!(
                "no version of key {key_id} is being staged{hint}"
            )));
        };
        Ok(vec![Change::VersionWithdrawn {
            key_id,
            rotation,
            version: version.number,
            reason: reason.into(),
        }])
    }

    /// Retires an old version now, if the evidence shows that it is unused and the key has an
    /// active version within its window. With `force`, the reason of an operator, retires it
    /// without these conditions. Without `version`, the key must have exactly one retiring version.
    ///
    /// # Errors
    ///
    /// When the key or the version does not exist, the version is not retiring, or `force` is not a
    /// valid reason. Without `force`: [`OperationRefusal::InUse`] when it may be in use, or
    /// [`OperationRefusal::Unsafe`] when no active version replaces it.
    pub(crate) fn retire(
        &self,
        key_id: KeyId,
        version: Option<VersionNumber>,
        evidence: &Evidence,
        force: Option<&str>,
        now: Timestamp,
    ) -> Result<Vec<Change>, OperationRefusal> {
        if let Some(reason) = force {
            check_reason(reason)?;
        }
        let key = self.key(key_id)?;
        let (version, since) = retiring(key, version)?;
        let which = VersionRef {
            key_id,
            version: version.number,
        };
        let idle_for = self.policy_of(key).idle_for;
        let idleness = evidence.idleness(which, since, idle_for);
        let successor = key
            .active()
            .is_some_and(|active| active.window.position(now) == WindowPosition::Inside);
        let known = rotation::missing(idleness, idle_for);
        let reason = match (force, idleness) {
            (Some(reason), _) => format!("by force: {reason}; {known}"),
            (None, Idleness::Complete { .. }) if !successor => {
                return Err(OperationRefusal::Unsafe(format!(
                    "no active version replaces version {} of key {key_id}; roll back or rotate, or retire it with --force",
                    version.number
                )));
            }
            (None, Idleness::Complete { .. }) => format!("by an operator; {known}"),
            (None, Idleness::Pending { .. } | Idleness::Unknown) => {
                return Err(OperationRefusal::InUse {
                    version: which,
                    why: known,
                });
            }
        };
        Ok(vec![Change::VersionRetired {
            key_id,
            version: version.number,
            reason: reason.into(),
            forced: force.is_some(),
        }])
    }

    /// Moves the end of the overlap of an old version to a later time, at most to the expiry of the
    /// version.
    ///
    /// # Errors
    ///
    /// When the key or the version does not exist, the version is not retiring, the reason is not
    /// valid, or the end would not be later than before.
    pub(crate) fn extend(
        &self,
        key_id: KeyId,
        version: Option<VersionNumber>,
        until: Timestamp,
        reason: &str,
    ) -> Result<Vec<Change>, OperationRefusal> {
        check_reason(reason)?;
        let key = self.key(key_id)?;
        let (version, _) = retiring(key, version)?;
        let number = version.number;
        let held = version.ends_at();
        let longer = version
            .clone()
            .extend(until)
            .map_err(|error| OperationRefusal::Unsafe(error.to_string()))?;
        match (held, longer.ends_at()) {
            (Some(held), Some(until)) if until > held => Ok(vec![Change::OverlapExtended {
                key_id,
                version: number,
                until,
                reason: reason.into(),
            }]),
            (Some(held), _) if version.window.expires_at == Some(held) => {
                Err(OperationRefusal::Unsafe(format!(
                    "version {number} of key {key_id} expires at {held}; an overlap cannot outlast that"
                )))
            }
            (held, _) => Err(OperationRefusal::Invalid {
                field: "until",
                problem: format!(
                    "the overlap already lasts until {}; give a later end",
                    held.map_or_else(String::new, |held| held.to_string())
                ),
            }),
        }
    }

    /// Rolls back: makes the version that was replaced last active again. The version that replaced
    /// it begins to retire, so consumers that have switched to it can still use it.
    ///
    /// # Errors
    ///
    /// When the key does not exist, the reason is not valid, a version is staged, no former version
    /// can become active again, or the maximum number of versions is accepted.
    pub(crate) fn roll_back(
        &self,
        key_id: KeyId,
        reason: &str,
        now: Timestamp,
    ) -> Result<Vec<Change>, OperationRefusal> {
        check_reason(reason)?;
        let key = self.key(key_id)?;
        if let Some(pending) = key.pending() {
            return Err(OperationRefusal::Unsafe(format!(
                "version {} of key {key_id} is being staged; abort that rotation first: relatch rotate abort {key_id} --reason TEXT",
                pending.number
            )));
        }
        let policy = self.policy_of(key);
        let replaced = key.active();
        let Some(old) = key.versions.values().rev().find(|version| {
            let successor = match version.state {
                VersionState::Retiring { replaced_by, .. }
                | VersionState::Retired { replaced_by, .. } => replaced_by,
                VersionState::Pending { .. }
                | VersionState::Active { .. }
                | VersionState::Revoked { .. } => return false,
            };
            replaced.is_none_or(|active| active.number == successor)
        }) else {
            return Err(OperationRefusal::Unsafe(format!(
                "key {key_id} has no former version that can become active again"
            )));
        };
        if old.window.position(now) == WindowPosition::After {
            return Err(OperationRefusal::Unsafe(format!(
                "version {} of key {key_id} has expired and cannot become active again",
                old.number
            )));
        }
        let accepted = key
            .accepted(now)
            .filter(|version| version.number != old.number)
            .count();
        if u32::try_from(accepted).is_ok_and(|accepted| accepted >= policy.max_versions) {
            return Err(OperationRefusal::Unsafe(format!(
                "key {key_id} has {accepted} other accepted versions, and its policy does not allow more; revoke one first"
            )));
        }
        let back = old
            .clone()
            .reinstate(now, policy.rollback_for)
            .map_err(|error| OperationRefusal::Unsafe(error.to_string()))?;
        Ok(vec![Change::RolledBack {
            key_id,
            version: back.number,
            replaced: rotation::old_version(key, &back, policy.overlap, now),
            reason: reason.into(),
        }])
    }
}

/// Returns the retiring version `version` of a key, with the time since which it is retiring.
/// Without `version`, the key must have exactly one retiring version.
fn retiring(
    key: &Key,
    version: Option<VersionNumber>,
) -> Result<(&KeyVersion, Timestamp), OperationRefusal> {
    let version = match version {
        Some(number) => named(key, number)?,
        None => only_retiring(key)?,
    };
    match version.state {
        VersionState::Retiring { since, .. } => Ok((version, since)),
        VersionState::Pending { .. }
        | VersionState::Active { .. }
        | VersionState::Retired { .. }
        | VersionState::Revoked { .. } => Err(OperationRefusal::Unsafe(format!(
            "version {} of key {} is {}, not retiring",
            version.number,
            key.id,
            version.state.kind()
        ))),
    }
}

fn named(key: &Key, number: VersionNumber) -> Result<&KeyVersion, OperationRefusal> {
    let version = VersionRef {
        key_id: key.id,
        version: number,
    };
    key.versions
        .get(number)
        .ok_or(OperationRefusal::NoVersion(version))
}

fn only_retiring(key: &Key) -> Result<&KeyVersion, OperationRefusal> {
    let mut retiring = key.retiring();
    match (retiring.next(), retiring.next()) {
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => Err(OperationRefusal::Invalid {
            field: "version",
            problem: "more than one version is retiring; name one".to_owned(),
        }),
        (None, _) => Err(OperationRefusal::Unsafe(format!(
            "no version of key {} is retiring",
            key.id
        ))),
    }
}
