//! The lifetime of a version's secret.

use std::time::Duration;

use super::time::Timestamp;

/// The lifetime of a version, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lifetime {
    /// The version expires after this time.
    Limited(Duration),
    /// The version does not expire.
    Unlimited,
}

impl Lifetime {
    /// Returns the time at which a version that starts at `start` expires; none: never.
    #[must_use]
    pub(crate) fn end(self, start: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Limited(duration) => Some(start.saturating_add(duration)),
            Self::Unlimited => None,
        }
    }
}
