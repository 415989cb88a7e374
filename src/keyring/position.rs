//! The position of a keyring in its history, and which delta may follow it.

use super::view::KeyringView;
use crate::key::{Epoch, Revision};

/// The position of a held keyring; all zero when none is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeyringPosition {
    pub(crate) epoch: Epoch,
    pub(crate) revision: Revision,
    /// The sum of the hashes of all announced items; 0 for a keyring that is held on demand.
    pub(crate) set_digest: u64,
}

/// Why a delta is rejected. Nothing of it was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// The delta is of another epoch.
    #[error("a delta is of epoch {found}, but the keyring is of epoch {held}")]
    Epoch {
        /// The epoch of the keyring.
        held: Epoch,
        /// The epoch of the delta.
        found: Epoch,
    },
    /// The delta does not start at the revision of the keyring.
    #[error("a delta starts at revision {from}, but the keyring is at revision {held}")]
    Gap {
        /// The revision of the keyring.
        held: Revision,
        /// The revision at which the delta starts.
        from: Revision,
    },
    /// The delta does not lead to a later revision.
    #[error("a delta starts at revision {from} and ends at revision {to}, which is not later")]
    Backwards {
        /// The revision at which the delta starts.
        from: Revision,
        /// The revision at which the delta ends.
        to: Revision,
    },
}

impl KeyringPosition {
    /// Returns the position of a view.
    #[must_use]
    pub(crate) const fn of(view: &KeyringView) -> Self {
        Self {
            epoch: view.epoch(),
            revision: view.revision(),
            set_digest: view.set_digest(),
        }
    }

    /// Checks that a delta of `epoch` starts at this position and leads to a later revision.
    pub(super) fn check(
        self,
        epoch: Epoch,
        from: Revision,
        to: Revision,
    ) -> Result<(), DeltaError> {
        if self.epoch != epoch {
            Err(DeltaError::Epoch {
                held: self.epoch,
                found: epoch,
            })
        } else if self.revision != from {
            Err(DeltaError::Gap {
                held: self.revision,
                from,
            })
        } else if to <= from {
            Err(DeltaError::Backwards { from, to })
        } else {
            Ok(())
        }
    }
}
