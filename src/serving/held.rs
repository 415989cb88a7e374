//! The state of a keyring that a sidecar reports.

use std::time::Duration;

use crate::key::{Epoch, Revision};

/// The state of a keyring that a sidecar holds when its stream begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeldState {
    pub(crate) epoch: Epoch,
    /// The revision; zero when the sidecar holds nothing.
    pub(crate) revision: Revision,
    /// The revision up to which every revocation is in use.
    pub(crate) revoked_through: Revision,
    /// Whether its set digest equals the control plane's at this revision.
    pub(crate) agrees: bool,
    /// The sidecar's own limit: the longest time for which it serves without an answer.
    pub(crate) deny_after: Duration,
    /// Whether it may have the keyring. A keyring that it may not have is never granted, and counts
    /// only for its earlier grants.
    pub(crate) is_admitted: bool,
    /// Whether it holds only the keys that it has looked up; no file contains them.
    pub(crate) is_on_demand: bool,
}
