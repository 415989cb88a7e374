//! Staged versions that a control plane left behind when it stopped.
//!
//! The secret of a version is only in the memory of the process that staged it. When that process
//! is gone, the version cannot be handed over any more. If its secret never left the process, it is
//! withdrawn. If the secret may have arrived in a sink, people are informed, because only a use of
//! the version or an operator can show what the sink holds.

use super::super::{
    change::Change, id::VersionRef, keyring::Keyring, note::Note, sink_name::SinkName,
    version::VersionState,
};

/// Returns all pending versions.
pub(crate) fn staged(keyring: &Keyring) -> impl Iterator<Item = VersionRef> {
    keyring.moving().filter_map(|(key, version)| {
        matches!(version.state, VersionState::Pending { .. }).then_some(VersionRef {
            key_id: key.id,
            version: version.number,
        })
    })
}

/// Returns the changes, at most `limit`, that settle those of `versions` that are still pending.
/// The process that staged `versions` is gone.
///
/// When all of the changes are applied, it returns nothing.
#[must_use]
pub(crate) fn settle_left_behind(
    keyring: &Keyring,
    versions: &[VersionRef],
    limit: usize,
) -> Vec<Change> {
    let settle = |which: &VersionRef| {
        let (_, version) = keyring.version(*which)?;
        let VersionState::Pending { since, sink, .. } = &version.state else {
            return None;
        };
        match sink {
            None => Some(Change::VersionWithdrawn {
                key_id: which.key_id,
                rotation: version.rotation?,
                version: which.version,
                reason: "the control plane stopped before the hand-over; nothing was handed out"
                    .into(),
            }),
            Some(sink) if !version.told.secret_lost => Some(Change::Noted {
                key_id: which.key_id,
                version: which.version,
                note: Note::SecretLost {
                    sink: sink.clone(),
                    since: *since,
                },
            }),
            Some(_) => None,
        }
    };
    versions.iter().filter_map(settle).take(limit).collect()
}

/// Returns the condition that a version with a lost secret waits for, with the command that ends
/// the wait.
#[must_use]
pub(crate) fn secret_lost(which: VersionRef, sink: &SinkName) -> String {
    let VersionRef { key_id, version } = which;
    format!(
        "an operator: the control plane stopped before sink {sink} confirmed the secret of version {version}, and relatch no longer has it; \
         if the sink holds it, the first use of version {version} completes the rotation; if not: relatch rotate abort {key_id} --reason TEXT"
    )
}
