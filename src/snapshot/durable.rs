//! How much of a keyring is on the disk.

use crate::key::{Epoch, Revision};

/// Up to where a keyring is on the disk; all zero when it is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Durable {
    /// The history.
    pub(crate) epoch: Epoch,
    /// The newest revision in it.
    pub(crate) revision: Revision,
    /// Every revocation up to this revision is there.
    pub(crate) revoked_through: Revision,
}
