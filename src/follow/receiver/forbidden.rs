//! Keyrings that the sidecar may not have any more.

use std::collections::BTreeMap;

use crate::{
    key::KeyringName,
    proto::discovery,
    snapshot::{journal::Removal, recorder::Recorder},
};

/// Keyrings that the sidecar may not have: they were dropped from memory, and are reported as dropped once no file has them.
#[derive(Debug, Default)]
pub(super) struct Forbidden(BTreeMap<KeyringName, Dropping>);

#[derive(Debug)]
struct Dropping {
    /// The number of the `NotServed` that was not answered yet, of the open stream.
    not_served: Option<u64>,
    /// Its removal from the file; none when nothing is kept on disk.
    removal: Option<Removal>,
}

impl Forbidden {
    /// Notes that `keyring` was dropped from memory, as the `NotServed` of this number says, and has it removed from the file.
    pub(super) fn forbid(
        &mut self,
        keyring: KeyringName,
        not_served: u64,
        recorder: Option<&Recorder>,
    ) {
        // One that was removed and did not come back is not removed again on every new stream.
        let former = self.0.get(&keyring).and_then(|former| former.removal);
        let removal = former.or_else(|| recorder.map(|recorder| recorder.removed(&keyring)));
        let dropping = Dropping {
            not_served: Some(not_served),
            removal,
        };
        self.0.insert(keyring, dropping);
    }

    /// The keyring is served again.
    pub(super) fn allow(&mut self, keyring: &KeyringName) {
        self.0.remove(keyring);
    }

    /// What the stream has asked for, which has ended, the next one asks for again.
    pub(super) fn disconnected(&mut self) {
        for dropping in self.0.values_mut() {
            dropping.not_served = None;
        }
    }

    /// Whether there is one to report.
    pub(super) fn has_next(&self, recorder: Option<&Recorder>) -> bool {
        self.0.values().any(|dropping| dropping.is_due(recorder))
    }

    /// The next one to report: neither memory nor file have it.
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
