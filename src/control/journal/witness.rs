//! Who hears about the commits of a journal.

use std::fmt;

use crate::key::Revision;

/// Who hears about each state of a log that becomes visible: after a commit, whether its caller still waits or not, and
/// after a read of what others have committed.
pub(crate) trait Witness: fmt::Debug + Send + Sync + 'static {
    /// The state of `revision` is visible. It returns at once. To hear about a revision twice changes nothing.
    fn published(&self, revision: Revision);
}

/// What reports a commit that the store has: its log line, its span, its count.
pub(crate) struct Report(Option<Box<dyn FnOnce(Revision) + Send>>);

impl Report {
    /// Calls `report` with the commit's last revision. It returns at once.
    #[must_use]
    pub(crate) fn new(report: impl FnOnce(Revision) + Send + 'static) -> Self {
        Self(Some(Box::new(report)))
    }

    /// Nothing is reported.
    #[must_use]
    pub(crate) const fn none() -> Self {
        Self(None)
    }

    pub(super) fn send(self, revision: Revision) {
        if let Some(report) = self.0 {
            report(revision);
        }
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Report").finish_non_exhaustive()
    }
}

/// Nobody follows the log.
impl Witness for () {
    fn published(&self, _revision: Revision) {}
}
