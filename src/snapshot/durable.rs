//! The state of a keyring on the disk.

use crate::key::{Epoch, Revision};

/// The state of a keyring on the disk; all zero if the keyring is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Durable {
    /// The epoch.
    pub(crate) epoch: Epoch,
    /// The newest revision.
    pub(crate) revision: Revision,
    /// Every revocation up to this revision is on the disk.
    pub(crate) revoked_through: Revision,
}
