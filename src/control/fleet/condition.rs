//! The condition of a sidecar of a keyring, in one word.

use crate::{
    key::{Epoch, Revision},
    serving::{Holding, Presence, Run},
};

/// The condition of a sidecar of a keyring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Connected, and at the newest revision.
    Current,
    /// Connected, and behind.
    Lagging,
    /// Without a stream; it may still serve the keyring.
    Lost,
    /// Ended, with a snapshot file from which it may serve again.
    Stopped,
    /// Gone without its last report of uses.
    Gap,
}

impl Condition {
    pub(crate) const ALL: [Self; 5] = [
        Self::Current,
        Self::Lagging,
        Self::Lost,
        Self::Stopped,
        Self::Gap,
    ];

    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Lagging => "lagging",
            Self::Lost => "lost",
            Self::Stopped => "stopped",
            Self::Gap => "gap",
        }
    }

    /// Returns the condition of a run that may serve a keyring with the newest revision `head`;
    /// `holding` is the run's state of that keyring.
    pub(super) fn of(run: &Run, holding: &Holding, epoch: Epoch, head: Revision) -> Self {
        let progress = &holding.progress;
        match run.presence() {
            Presence::Lost(_) => Self::Lost,
            Presence::Stopped(_) => Self::Stopped,
            Presence::Connected if progress.epoch == epoch && progress.applied >= head => {
                Self::Current
            }
            Presence::Connected => Self::Lagging,
        }
    }
}
