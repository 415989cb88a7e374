//! A point that every sidecar of a keyring must reach.

use crate::key::{Revision, VersionRef};

/// A point that every sidecar must reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Every change up to the revision is in use, and this version was not rejected.
    Applied(Revision, VersionRef),
    /// Every revocation up to the revision is in use.
    Revoked(Revision),
}

impl Target {
    /// Returns the revision that must be reached.
    #[must_use]
    pub(crate) const fn revision(self) -> Revision {
        match self {
            Self::Applied(revision, _) | Self::Revoked(revision) => revision,
        }
    }
}
