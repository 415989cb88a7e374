//! How long the secret of a version is valid.

use std::time::Duration;

use super::time::Timestamp;

/// How long a version lives from its first moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lifetime {
    /// This long.
    Limited(Duration),
    /// It does not expire.
    Unlimited,
}

impl Lifetime {
    /// When a version that begins at `start` expires; none: never.
    #[must_use]
    pub(crate) fn end(self, start: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Limited(duration) => Some(start.saturating_add(duration)),
            Self::Unlimited => None,
        }
    }
}
