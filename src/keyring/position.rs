//! Where a keyring is in its history, and which change may follow.

use super::view::KeyringView;
use crate::key::{Epoch, Revision};

/// What a mirror holds; all zero for nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// The history.
    pub(crate) epoch: Epoch,
    /// The revision in it.
    pub(crate) revision: Revision,
    /// The digest of what was announced.
    pub(crate) set_digest: u64,
}

/// A delta cannot be applied; nothing of it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It belongs to another history.
    #[error("a delta of epoch {found} came to a keyring of epoch {held}")]
    Epoch {
        /// Of the keyring.
        held: Epoch,
        /// Of the delta.
        found: Epoch,
    },
    /// It does not start where the keyring is.
    #[error("a delta from revision {from} came to a keyring at revision {held}")]
    Gap {
        /// Of the keyring.
        held: Revision,
        /// Where the delta starts.
        from: Revision,
    },
    /// It leads back, or nowhere.
    #[error("a delta from revision {from} leads to revision {to}, which is no later one")]
    Backwards {
        /// Where the delta starts.
        from: Revision,
        /// Where it ends.
        to: Revision,
    },
}

impl Position {
    /// Where a view is.
    #[must_use]
    pub(crate) const fn of(view: &KeyringView) -> Self {
        Self {
            epoch: view.epoch(),
            revision: view.revision(),
            set_digest: view.set_digest(),
        }
    }

    /// Whether a delta of `epoch` that starts at `from` follows, and leads on.
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
