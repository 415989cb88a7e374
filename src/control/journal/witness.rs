//! The observers of the commits of a journal.

use std::fmt;

use crate::key::Revision;

/// An observer of each state of a log that becomes visible: after a commit, whether its caller
/// still waits or not, and after a read of what others have committed.
pub(crate) trait Witness: fmt::Debug + Send + Sync + 'static {
    /// Notes that the state of `revision` is visible. It returns at once. A second call with the
    /// same revision changes nothing.
    fn published(&self, revision: Revision);
}

/// The report of a commit that the store has: its log line, its span, its count.
pub(crate) struct Report(Option<Box<dyn FnOnce(Revision) + Send>>);

impl Report {
    /// Returns a report that calls `report` with the commit's last revision. `report` returns at
    /// once.
    #[must_use]
    pub(crate) fn new(report: impl FnOnce(Revision) + Send + 'static) -> Self {
        Self(Some(Box::new(report)))
    }

    /// Returns a report of nothing.
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

/// The witness of a log without followers.
impl Witness for () {
    fn published(&self, _revision: Revision) {}
}
