//! The state of a keyring that a run has confirmed.

use std::collections::BTreeMap;

use super::{HeldState, Target};
use crate::key::{Epoch, Revision, Timestamp};

/// The state of a keyring that a run has confirmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The epoch of the revisions.
    pub epoch: Epoch,
    /// The revision in use for checks.
    pub applied: Revision,
    /// The revision up to which every revocation is in use for checks.
    pub revoked_through: Revision,
    /// The revision in the snapshot file.
    pub durable: Revision,
    /// The revision up to which every revocation is in the snapshot file.
    pub durable_revoked_through: Revision,
    /// The time at which `applied` reached its value.
    pub(crate) applied_at: Option<Timestamp>,
    /// The items that it has rejected since its last snapshot, by name, with the reason; at most
    /// 100.
    pub rejected: BTreeMap<String, String>,
    /// Whether it has rejected more items than `rejected` names.
    pub(crate) has_more_rejected: bool,
    /// Whether its state may differ from the control plane's: only a complete snapshot confirms
    /// then.
    pub(crate) awaits_whole: bool,
}

/// The state that an answer of a sidecar confirms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Confirmation {
    pub(crate) epoch: Epoch,
    /// The revision in use.
    pub(crate) applied: Revision,
    /// The revision up to which every revocation is in use.
    pub(crate) revoked_through: Revision,
    /// The revision in the snapshot file.
    pub(crate) durable: Revision,
    /// The revision up to which every revocation is in the snapshot file.
    pub(crate) durable_revoked_through: Revision,
    /// Whether it answers a complete snapshot.
    pub(crate) is_whole: bool,
    /// The items that it rejected, by name, with the reasons.
    pub(crate) rejected: Vec<(String, String)>,
    /// Whether it rejected more items than `rejected` names.
    pub(crate) has_more_rejected: bool,
}

/// The most rejected items that are remembered for each run and keyring. One is enough to show that
/// something is wrong.
pub(super) const MAX_REJECTED: usize = 100;

impl Progress {
    /// Records that a stream begins. The state that the sidecar reports counts only if its digest
    /// agrees.
    pub(super) fn greet(&mut self, held: &HeldState, now: Timestamp) {
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
