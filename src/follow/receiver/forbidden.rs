//! Keyrings that the sidecar must not hold any more.

use std::collections::BTreeMap;

use crate::{
    key::KeyringName,
    proto::discovery,
    snapshot::{journal::Removal, recorder::Recorder},
};

/// Keyrings that the sidecar must not hold. They are dropped from memory, and are reported as
/// dropped once the file does not contain them either.
#[derive(Debug, Default)]
pub(super) struct Forbidden(BTreeMap<KeyringName, Dropping>);

#[derive(Debug)]
struct Dropping {
    /// The number of the `NotServed` on the open stream that is not answered yet.
    not_served: Option<u64>,
    /// The removal from the file; none if nothing is kept on disk.
    removal: Option<Removal>,
}

impl Forbidden {
    /// Notes that `keyring` was dropped from memory because of the `NotServed` with this number,
    /// and removes it from the file.
    pub(super) fn forbid(
        &mut self,
        keyring: KeyringName,
        not_served: u64,
        recorder: Option<&Recorder>,
    ) {
        // A keyring that was removed and did not come back is not removed again on every new
        // stream.
        let former = self.0.get(&keyring).and_then(|former| former.removal);
        let removal = former.or_else(|| recorder.map(|recorder| recorder.removed(&keyring)));
        let dropping = Dropping {
            not_served: Some(not_served),
            removal,
        };
        self.0.insert(keyring, dropping);
    }

    /// Notes that the keyring is served again.
    pub(super) fn allow(&mut self, keyring: &KeyringName) {
        self.0.remove(keyring);
    }

    /// Notes that the stream has ended: the next stream refuses the keyring again.
    pub(super) fn disconnected(&mut self) {
        for dropping in self.0.values_mut() {
            dropping.not_served = None;
        }
    }

    /// Returns whether there is a dropped keyring to report.
    pub(super) fn has_next(&self, recorder: Option<&Recorder>) -> bool {
        self.0.values().any(|dropping| dropping.is_due(recorder))
    }

    /// Returns the next dropped keyring to report: neither memory nor the file contains it.
    pub(super) fn next(&mut self, recorder: Option<&Recorder>) -> Option<discovery::Dropped> {
        let mut keyrings = self.0.iter_mut();
        let (keyring, dropping) = keyrings.find(|(_, dropping)| dropping.is_due(recorder))?;
        Some(discovery::Dropped {
            keyring: keyring.to_string(),
            not_served: dropping.not_served.take()?,
        })
    }
}

impl Dropping {
    fn is_due(&self, recorder: Option<&Recorder>) -> bool {
        let is_removed = match (self.removal, recorder) {
            (Some(removal), Some(recorder)) => recorder.disk().has_removed(removal),
            (None, _) | (_, None) => true,
        };
        self.not_served.is_some() && is_removed
    }
}
