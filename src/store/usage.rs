//! Saved usage of key versions.

use crate::key::{KeyringName, Timestamp, VersionRef};

/// The number of checks with which one process of a sidecar saw a version used, since the process
/// started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRow {
    /// The keyring of the version.
    pub keyring: KeyringName,
    /// The key and the number of the version.
    pub version: VersionRef,
    /// The process; [`UsageRow::FOLDED`] for all processes that were folded.
    pub run_id: String,
    /// Checks that presented the version; at most [`UsageRow::MAX_COUNT`] for one process.
    pub requests: u64,
    /// The checks among them that were denied.
    pub denied: u64,
    /// The time of the first check.
    pub first_used: Option<Timestamp>,
    /// The time of the last check.
    pub last_used: Option<Timestamp>,
}

/// The most frequent callers of a version, as one process of a sidecar reports them.
#[derive(Clone, PartialEq, Eq)]
pub struct CallersRow {
    /// The keyring of the version.
    pub keyring: KeyringName,
    /// The key and the number of the version.
    pub version: VersionRef,
    /// The process, as in [`UsageRow::run_id`].
    pub run_id: String,
    /// The callers, in a format that the store does not read; if empty, the row is deleted.
    pub payload: Vec<u8>,
}

/// All saved usage of key versions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredUsage {
    /// The counts, in no particular order.
    pub counts: Vec<UsageRow>,
    /// The callers, in no particular order.
    pub callers: Vec<CallersRow>,
    /// The processes whose rows were folded, as long as the store remembers them
    /// ([`FOLDED_FOR`](super::FOLDED_FOR)).
    pub folded: Vec<String>,
}

impl UsageRow {
    /// In place of a process: the sum of all processes that were folded.
    pub const FOLDED: &str = "";

    /// The largest count of one process: 2^48. Ten million requests per second need 325 days to
    /// reach it, and 16,000 such processes can be folded before their sum reaches its bound in the
    /// store.
    pub(crate) const MAX_COUNT: u64 = 1 << 48;
}

impl std::fmt::Debug for CallersRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallersRow")
            .field("keyring", &self.keyring)
            .field("version", &self.version)
            .field("run_id", &self.run_id)
            .field("payload_len", &self.payload.len())
            .finish()
    }
}
