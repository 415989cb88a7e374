//! What may be asked of a rotation that is under way.

use super::{Refusal, check_reason};
use crate::key::{
    change::Change,
    consumer::Key,
    evidence::{Evidence, Idleness},
    id::{KeyId, VersionNumber, VersionRef},
    keyring::Keyring,
    rotation,
    time::{Position, Timestamp},
    version::{KeyVersion, VersionState},
};

impl Keyring {
    /// Gives up a rotation before its hand-over: its version is withdrawn, whoever waits for it is told.
    ///
    /// # Errors
    ///
    /// When no version of the key is pending.
    pub(crate) fn abort(&self, key_id: KeyId, reason: &str) -> Result<Vec<Change>, Refusal> {
        check_reason(reason)?;
        let key = self.key(key_id)?;
        let Some((version, rotation)) = key
            .pending()
            .and_then(|version| Some((version, version.rotation?)))
        else {
            let hint = if key.retiring().next().is_some() {
                "; what was handed over is undone by `relatch rotate rollback`"
            } else {
                ""
            };
            return Err(Refusal::Unsafe(format!(
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

    /// Retires an old version now, on evidence; with `force` also without.
    ///
    /// # Errors
    ///
    /// When it is not retiring, [`Refusal::InUse`] when it may be in use, or when nothing takes its place.
    pub(crate) fn retire(
        &self,
        key_id: KeyId,
        version: Option<VersionNumber>,
        evidence: &Evidence,
        force: Option<&str>,
        now: Timestamp,
    ) -> Result<Vec<Change>, Refusal> {
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
            .is_some_and(|active| active.window.position(now) == Position::Inside);
        let known = rotation::missing(idleness, idle_for);
        let reason = match (force, idleness) {
            (Some(reason), _) => format!("by force: {reason}; {known}"),
            (None, Idleness::Complete { .. }) if !successor => {
                return Err(Refusal::Unsafe(format!(
                    "no active version takes the place of version {} of key {key_id}; roll back or rotate, or retire it with --force",
                    version.number
                )));
            }
            (None, Idleness::Complete { .. }) => format!("by an operator; {known}"),
            (None, Idleness::Pending { .. } | Idleness::Unknown) => {
                return Err(Refusal::InUse {
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

    /// Moves the deadline of an old version to a later one, not beyond its own expiry.
    ///
    /// # Errors
    ///
    /// When it is not retiring, or no later deadline is possible.
    pub(crate) fn extend(
        &self,
        key_id: KeyId,
        version: Option<VersionNumber>,
        until: Timestamp,
        reason: &str,
    ) -> Result<Vec<Change>, Refusal> {
        check_reason(reason)?;
        let key = self.key(key_id)?;
        let (version, _) = retiring(key, version)?;
        let number = version.number;
        let held = version.ends_at();
        let longer = version
            .clone()
            .extend(until)
            .map_err(|error| Refusal::Unsafe(error.to_string()))?;
        match (held, longer.ends_at()) {
            (Some(held), Some(until)) if until > held => Ok(vec![Change::OverlapExtended {
                key_id,
                version: number,
                until,
                reason: reason.into(),
            }]),
            (Some(held), _) if version.window.expires_at == Some(held) => {
                Err(Refusal::Unsafe(format!(
                    "version {number} of key {key_id} expires at {held}; an overlap cannot outlast that"
                )))
            }
            (held, _) => Err(Refusal::Invalid {
                field: "until",
                problem: format!(
                    "the overlap already lasts until {}; give a later end",
                    held.map_or_else(String::new, |held| held.to_string())
                ),
            }),
        }
    }

    /// Makes the version that was replaced last the one to use again. The one that had replaced it begins to retire:
    /// who has switched to it goes on undisturbed.
    ///
    /// # Errors
    ///
    /// When a version is being staged, or none can come back.
    pub(crate) fn roll_back(
        &self,
        key_id: KeyId,
        reason: &str,
        now: Timestamp,
    ) -> Result<Vec<Change>, Refusal> {
        check_reason(reason)?;
        let key = self.key(key_id)?;
        if let Some(pending) = key.pending() {
            return Err(Refusal::Unsafe(format!(
                "version {} of key {key_id} is being staged; give that up first: relatch rotate abort {key_id}",
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
            return Err(Refusal::Unsafe(format!(
                "key {key_id} has no former version that could come back"
            )));
        };
        if old.window.position(now) == Position::After {
            return Err(Refusal::Unsafe(format!(
                "version {} of key {key_id} has expired and cannot come back",
                old.number
            )));
        }
        let accepted = key
            .accepted(now)
            .filter(|version| version.number != old.number)
            .count();
        if u32::try_from(accepted).is_ok_and(|accepted| accepted >= policy.max_versions) {
            return Err(Refusal::Unsafe(format!(
                "key {key_id} has {accepted} accepted versions, the most that it may have; revoke one first"
            )));
        }
        let back = old
            .clone()
            .reinstate(now, policy.rollback_for)
            .map_err(|error| Refusal::Unsafe(error.to_string()))?;
        Ok(vec![Change::RolledBack {
            key_id,
            version: back.number,
            replaced: rotation::old_version(key, &back, policy.overlap, now),
            reason: reason.into(),
        }])
    }
}

/// The version of a key that is retiring and asked for; the only one when none is named.
fn retiring(
    key: &Key,
    version: Option<VersionNumber>,
) -> Result<(&KeyVersion, Timestamp), Refusal> {
    let version = match version {
        Some(number) => named(key, number)?,
        None => only_retiring(key)?,
    };
    match version.state {
        VersionState::Retiring { since, .. } => Ok((version, since)),
        VersionState::Pending { .. }
        | VersionState::Active { .. }
        | VersionState::Retired { .. }
        | VersionState::Revoked { .. } => Err(Refusal::Unsafe(format!(
            "version {} of key {} is {}, not retiring",
            version.number,
            key.id,
            version.state.kind()
        ))),
    }
}

fn named(key: &Key, number: VersionNumber) -> Result<&KeyVersion, Refusal> {
    let version = VersionRef {
        key_id: key.id,
        version: number,
    };
    key.versions.get(number).ok_or(Refusal::NoVersion(version))
}

fn only_retiring(key: &Key) -> Result<&KeyVersion, Refusal> {
    let mut retiring = key.retiring();
    match (retiring.next(), retiring.next()) {
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => Err(Refusal::Invalid {
            field: "version",
            problem: "more than one version is retiring; name one".to_owned(),
        }),
        (None, _) => Err(Refusal::Unsafe(format!(
            "no version of key {} is retiring",
            key.id
        ))),
    }
}
