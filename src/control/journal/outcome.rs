//! The outcome of a commit, as metrics and spans name it.

use super::CommitError;

/// The outcome of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CommitOutcome {
    /// The commit is in the log.
    Committed,
    /// The commit was refused.
    Refused,
    /// The store or the log failed.
    Failed,
}

impl CommitOutcome {
    pub(crate) const ALL: [Self; 3] = [Self::Committed, Self::Refused, Self::Failed];

    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }

    /// Returns the outcome of a commit with this result.
    #[must_use]
    pub(crate) const fn of<T>(committed: &Result<T, CommitError>) -> Self {
        match committed {
            Ok(_) => Self::Committed,
            Err(CommitError::Refused(_)) => Self::Refused,
            Err(CommitError::Contended | CommitError::Log(_) | CommitError::Random(_)) => {
                Self::Failed
            }
        }
    }
}
