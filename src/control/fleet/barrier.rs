//! How far the sidecars of a keyring are from a point that all of them are to reach.

use crate::key::{Revision, Timestamp, VersionRef};

/// A point that every sidecar is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Everything up to the revision is in use, and this version was not refused.
    Applied(Revision, VersionRef),
    /// Every revocation up to the revision is in use.
    Revoked(Revision),
}

/// How far the live sidecars of a keyring are from a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Barrier {
    /// How many are there.
    pub applied: usize,
    /// How many there are.
    pub total: usize,
    /// The others.
    pub laggards: Vec<Laggard>,
}

/// A sidecar that is not there yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Laggard {
    /// The sidecar.
    pub node: String,
    /// Its cluster.
    pub cluster: String,
    /// Whether its stream is open.
    pub connected: bool,
    /// By how many revisions it lags.
    pub behind: u64,
    /// When it was last heard of.
    pub last_seen: Timestamp,
}

impl Barrier {
    /// Whether every live sidecar is there.
    #[must_use]
    pub const fn is_passed(&self) -> bool {
        self.laggards.is_empty()
    }
}
