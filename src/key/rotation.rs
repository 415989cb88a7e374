//! What a keyring's policy and the time make due.

use super::{
    change::Change,
    keyring::Keyring,
    time::Timestamp,
    version::{KeyVersion, VersionState},
};

/// The changes that are due at `now`, the earliest first, at most `limit`.
///
/// A staged version that was not handed over in time is withdrawn: whoever had its secret is gone. A retiring version
/// whose overlap is over is retired, which its sidecars have enforced already. Planning again after the changes are
/// applied plans nothing new.
#[must_use]
pub fn plan(keyring: &Keyring, now: Timestamp, limit: usize) -> Vec<Change> {
    keyring
        .due(now)
        .filter_map(|(key, version)| {
            let KeyVersion {
                number, rotation, ..
            } = version;
            match version.state {
                VersionState::Pending { .. } => Some(Change::VersionWithdrawn {
                    key_id: key.id,
                    rotation: (*rotation)?,
                    version: *number,
                    reason: "the rotation was not handed over in time".into(),
                }),
                VersionState::Retiring { .. } => Some(Change::VersionRetired {
                    key_id: key.id,
                    version: *number,
                    reason: "the overlap is over".into(),
                }),
                VersionState::Active { .. }
                | VersionState::Retired { .. }
                | VersionState::Revoked { .. } => None,
            }
        })
        .take(limit)
        .collect()
}
