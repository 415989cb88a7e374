//! A point that every sidecar of a keyring is to reach.

use crate::key::{Revision, VersionRef};

/// A point that every sidecar is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Everything up to the revision is in use, and this version was not refused.
    Applied(Revision, VersionRef),
    /// Every revocation up to the revision is in use.
    Revoked(Revision),
}

impl Target {
    /// The revision that is to be reached.
    #[must_use]
    pub(crate) const fn revision(self) -> Revision {
        match self {
            Self::Applied(revision, _) | Self::Revoked(revision) => revision,
        }
    }
}
