//! The link from a key version to its counters.

use std::sync::atomic::{AtomicU32, Ordering};

/// The index of a version's counters in their [`Ledger`](super::usage::Ledger).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UsageIndex(pub(super) u32);

/// The index of a held version's counters; none before its first use.
#[derive(Debug, Default)]
pub(super) struct UsageCell(AtomicU32);

impl UsageCell {
    pub(super) fn get(&self) -> Option<UsageIndex> {
        self.0
            .load(Ordering::Acquire)
            .checked_sub(1)
            .map(UsageIndex)
    }

    pub(super) fn set(&self, UsageIndex(index): UsageIndex) {
        self.0.store(index + 1, Ordering::Release);
    }
}

/// A view that is copied while a check sets the index may miss it. The next check of the version
/// then asks the ledger again.
impl Clone for UsageCell {
    fn clone(&self) -> Self {
        Self(AtomicU32::new(self.0.load(Ordering::Acquire)))
    }
}
