//! The counters of a keyring's checks.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts the checks of a keyring by their result. The metrics define the meaning of each counter.
///
/// The counters are in the slot of the keyring, so that a check needs no search to count.
#[derive(Debug)]
pub(crate) struct Tally([AtomicU64; Tally::LEN]);

impl Tally {
    /// The number of counters, with room for more results: 2.5 KiB for each keyring.
    pub(crate) const LEN: usize = 320;

    /// Adds 1 to a counter.
    pub(crate) fn count(&self, counter: usize) {
        self.0[counter].fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the value of a counter.
    #[must_use]
    pub(crate) fn get(&self, counter: usize) -> u64 {
        self.0[counter].load(Ordering::Relaxed)
    }
}

impl Default for Tally {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}
