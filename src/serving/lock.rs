//! What proves that a process has ended: another one holds the lock that it held.

use serde::{Deserialize, Serialize};

/// A lock that a run holds exclusively until it has answered its last check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lock {
    /// What is locked.
    pub(crate) place: LockPlace,
    /// When the run acquired it, in nanoseconds by the boot clock of the machine.
    pub(crate) acquired_ns: u64,
}

/// What a lock is on. Two are the same only where one kernel enforces both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LockPlace {
    /// The boot of the kernel.
    pub(crate) boot_id: String,
    /// The inode of the time namespace: the boot clocks of different ones cannot be compared.
    pub(crate) time_namespace: u64,
    /// On that machine.
    pub(crate) at: LockAt,
}

/// What a lock is on, on its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LockAt {
    /// The file beside the snapshot file.
    File {
        /// Its device.
        device: u64,
        /// Its inode.
        inode: u64,
    },
    /// An abstract socket named after the node.
    Socket {
        /// The inode of the network namespace.
        network_namespace: u64,
        /// The node.
        node: String,
    },
}

impl Lock {
    /// Whether whoever holds this lock has witnessed the end of the process that held `other`.
    pub(super) fn succeeds(&self, other: &Self) -> bool {
        self.place == other.place && self.acquired_ns > other.acquired_ns
    }
}
