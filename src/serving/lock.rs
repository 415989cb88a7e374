//! The proof that a process has ended: another process holds the lock that it held.

use serde::{Deserialize, Serialize};

/// A lock that a run holds exclusively until it has answered its last check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lock {
    /// The locked object.
    pub(crate) place: LockPlace,
    /// When the run acquired it, in nanoseconds by the boot clock of the machine.
    pub(crate) acquired_ns: u64,
}

/// The locked object. Two places are equal only where one kernel enforces both locks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LockPlace {
    /// The boot id of the kernel.
    pub(crate) boot_id: String,
    /// The inode of the time namespace: the boot clocks of different ones cannot be compared.
    pub(crate) time_namespace: u64,
    /// The object on that machine.
    pub(crate) at: LockAt,
}

/// The locked object on its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LockAt {
    /// The lock file beside the snapshot file.
    File {
        /// The number of its device.
        device: u64,
        /// The number of its inode.
        inode: u64,
    },
    /// An abstract socket named after the node.
    Socket {
        /// The inode of the network namespace.
        network_namespace: u64,
        /// The node id.
        node: String,
    },
}

impl Lock {
    /// Returns whether the holder of this lock has witnessed the end of the process that held
    /// `other`.
    pub(super) fn succeeds(&self, other: &Self) -> bool {
        self.place == other.place && self.acquired_ns > other.acquired_ns
    }
}
