//! Staged versions that a control plane left behind when it stopped.
//!
//! A version's secret is only in the memory of the process that staged it. Where that process is gone, the version
//! cannot be handed over any more: one whose secret never left it is withdrawn, and of one whose secret may have arrived
//! in a sink people are told, since only its use or an operator can say what the sink holds.

use super::super::{
    change::Change, id::VersionRef, keyring::Keyring, note::Note, sink_name::SinkName,
    version::VersionState,
};

/// All versions that are being staged.
pub(crate) fn staged(keyring: &Keyring) -> impl Iterator<Item = VersionRef> {
    keyring.moving().filter_map(|(key, version)| {
        matches!(version.state, VersionState::Pending { .. }).then_some(VersionRef {
            key_id: key.id,
            version: version.number,
        })
    })
}

/// The changes, at most `limit`, that settle those of `versions` that are still staged; the process that staged them is gone.
///
/// Once all of them are applied, it returns nothing.
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

/// What a version waits for whose secret is lost, with the command that helps.
#[must_use]
pub(crate) fn secret_lost(which: VersionRef, sink: &SinkName) -> String {
    let VersionRef { key_id, version } = which;
    format!(
        "an operator: the control plane stopped before sink {sink} confirmed the secret of version {version}, and relatch no longer has it; \
         if the sink holds it, the first use of version {version} completes the rotation; if not: relatch rotate abort {key_id} --reason TEXT"
    )
}
