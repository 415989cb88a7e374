//! What a run has confirmed of a keyring.

use std::collections::BTreeMap;

use super::{Held, Target};
use crate::key::{Epoch, Revision, Timestamp};

/// What a run has confirmed of a keyring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The history.
    pub epoch: Epoch,
    /// The revision in use for checks.
    pub applied: Revision,
    /// Every revocation up to here is in use for checks.
    pub revoked_through: Revision,
    /// The revision in the snapshot file.
    pub durable: Revision,
    /// Every revocation up to here is in the snapshot file.
    pub durable_revoked_through: Revision,
    /// Since when `applied` is what it is.
    pub(crate) applied_at: Option<Timestamp>,
    /// The items that it has refused since its last snapshot, by name, with the reason.
    pub rejected: BTreeMap<String, String>,
    /// It has refused more than `rejected` names.
    pub(crate) has_more_rejected: bool,
    /// What it holds is not known to be what it should be: only a whole snapshot confirms.
    pub(crate) awaits_whole: bool,
}

/// What an answer of a sidecar confirms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Confirmation {
    /// The history.
    pub(crate) epoch: Epoch,
    /// The revision in use.
    pub(crate) applied: Revision,
    /// Every revocation up to here is in use.
    pub(crate) revoked_through: Revision,
    /// The revision in the snapshot file.
    pub(crate) durable: Revision,
    /// Every revocation up to here is in the snapshot file.
    pub(crate) durable_revoked_through: Revision,
    /// Whether it answers a whole snapshot.
    pub(crate) is_whole: bool,
    /// The items that it refused, with the reasons.
    pub(crate) rejected: Vec<(String, String)>,
    /// It refused more than `rejected` names.
    pub(crate) has_more_rejected: bool,
}

/// So many rejected items are remembered per run and keyring; one is enough to know that something is wrong.
pub(super) const MAX_REJECTED: usize = 100;

impl Progress {
    /// A stream begins: what the sidecar says that it holds counts only if its digest agrees.
    pub(super) fn greet(&mut self, held: &Held, now: Timestamp) {
        if held.agrees {
            *self = Self {
                epoch: held.epoch,
                applied: held.revision,
                revoked_through: held.revoked_through,
                applied_at: Some(now),
                ..Self::default()
            };
        } else {
            *self = Self {
                rejected: std::mem::take(&mut self.rejected),
                has_more_rejected: self.has_more_rejected,
                awaits_whole: true,
                ..Self::default()
            };
        }
    }

    pub(super) fn confirm(&mut self, confirmation: &Confirmation, now: Timestamp) {
        if confirmation.is_whole {
            self.awaits_whole = false;
            self.rejected.clear();
            self.has_more_rejected = false;
        }
        for (name, reason) in &confirmation.rejected {
            if self.rejected.len() < MAX_REJECTED {
                self.rejected.insert(name.clone(), reason.clone());
            } else if !self.rejected.contains_key(name) {
                self.has_more_rejected = true;
            }
        }
        self.has_more_rejected |= confirmation.has_more_rejected;
        if self.awaits_whole {
            return;
        }
        let Confirmation {
            epoch,
            applied,
            revoked_through,
            durable,
            durable_revoked_through,
            ..
        } = *confirmation;
        if self.epoch != epoch || self.applied != applied {
            self.applied_at = Some(now);
        }
        self.epoch = epoch;
        self.applied = applied;
        self.revoked_through = revoked_through;
        self.durable = durable;
        self.durable_revoked_through = durable_revoked_through;
    }

    pub(super) fn has_reached(&self, epoch: Epoch, target: Target, has_file: bool) -> bool {
        if self.epoch != epoch {
            return false;
        }
        let is_beyond = |in_use: Revision, on_disk: Revision| {
            in_use >= target.revision() && (!has_file || on_disk >= target.revision())
        };
        match target {
            Target::Applied(_, which) => {
                let refused = self.has_more_rejected
                    || (!self.rejected.is_empty()
                        && self.rejected.contains_key(&which.to_string()));
                !refused && is_beyond(self.applied, self.durable)
            }
            Target::Revoked(_) => is_beyond(self.revoked_through, self.durable_revoked_through),
        }
    }
}
