//! What a sidecar says that it holds of a keyring.

use std::time::Duration;

use crate::key::{Epoch, Revision};

/// What a sidecar holds of a keyring as its stream begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// The history.
    pub(crate) epoch: Epoch,
    /// The revision, zero for nothing.
    pub(crate) revision: Revision,
    /// Every revocation up to here is in use.
    pub(crate) revoked_through: Revision,
    /// The digest of what it holds is that of the control plane at this revision.
    pub(crate) agrees: bool,
    /// Its own limit: it serves for no longer without an answer.
    pub(crate) deny_after: Duration,
    /// It may have the keyring. Of one that it may not have it is granted nothing, and counts for what it was granted before.
    pub(crate) is_admitted: bool,
    /// It holds the keys that it has looked up, and no file has them.
    pub(crate) is_on_demand: bool,
}
