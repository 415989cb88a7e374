//! What the store keeps of the use of key versions.

use crate::key::{KeyringName, Timestamp, VersionRef};

/// How often one process of a sidecar saw a version used, from its begin on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRow {
    /// The keyring of the version.
    pub keyring: KeyringName,
    /// The version.
    pub version: VersionRef,
    /// The process; [`UsageRow::FOLDED`] for all that have ended.
    pub run_id: String,
    /// Checks that presented the version; of one process at most [`UsageRow::MAX_COUNT`].
    pub requests: u64,
    /// Those of them that were denied.
    pub denied: u64,
    /// When the first was.
    pub first_used: Option<Timestamp>,
    /// When the last was.
    pub last_used: Option<Timestamp>,
}

/// Who uses a version most, as one process of a sidecar tells it.
#[derive(Clone, PartialEq, Eq)]
pub struct CallersRow {
    /// The keyring of the version.
    pub keyring: KeyringName,
    /// The version.
    pub version: VersionRef,
    /// The process, as in [`UsageRow::run_id`].
    pub run_id: String,
    /// The callers, in the form of whoever reads them; nothing to remove the row.
    pub payload: Vec<u8>,
}

/// All that is kept of the use of key versions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredUsage {
    /// The counts, in no order.
    pub counts: Vec<UsageRow>,
    /// The callers, in no order.
    pub callers: Vec<CallersRow>,
    /// The processes whose rows were folded, as long as that is remembered.
    pub folded: Vec<String>,
}

impl UsageRow {
    /// In place of a process: the sum of all that have ended.
    pub const FOLDED: &str = "";

    /// The largest count that is kept of a process. Ten million requests per second need a year to reach it, and a
    /// million such processes can be added up without an overflow.
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
