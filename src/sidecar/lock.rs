//! The lock that a run of a sidecar holds exclusively until it has answered its last check.
//!
//! The next run of the node that acquires the lock thereby witnesses the end of this run. Every
//! thread that answers checks holds the lock, and so does the keeper of the snapshot file. The lock
//! is released with the last of them, at the latest by the end of the process.

use std::sync::Arc;

use super::node_socket::NodeSocket;
use crate::{
    clock::{BootTime, Clock},
    node_name::NodeName,
    proto::discovery::{self, lock::Place},
    snapshot::lock::FileLock,
};

/// The exclusive lock of a run. It is cheap to clone, and released with the last clone.
#[derive(Clone, Debug)]
pub(super) struct RunLock(Held);

#[derive(Clone, Debug)]
enum Held {
    File(Arc<FileLock>),
    Socket(Arc<NodeSocket>),
}

impl RunLock {
    /// Wraps the lock beside the snapshot file.
    pub(super) const fn of_file(lock: Arc<FileLock>) -> Self {
        Self(Held::File(lock))
    }

    /// Binds the socket of a node without a snapshot file. None, with a warning in the log, if
    /// another process holds it or it cannot be bound.
    pub(super) fn of_node(node: &NodeName, clock: &Clock) -> Option<Self> {
        match NodeSocket::bind(node, clock) {
            Ok(socket) => Some(Self(Held::Socket(Arc::new(socket)))),
            Err(error) => {
                tracing::warn!(
                    node = %node,
                    error = &error as &dyn std::error::Error,
                    "the socket of this node cannot be bound; another sidecar with this `node.id` may be running here: the control plane cannot know when this process ends"
                );
                None
            }
        }
    }

    /// Returns the lock as a Hello shows it; none if the system does not identify its boot clock,
    /// by which the lock was acquired.
    pub(super) fn to_wire(&self, clock: &Clock) -> Option<discovery::Lock> {
        let boot_clock = clock.boot_clock()?;
        let (place, acquired) = self.place();
        Some(discovery::Lock {
            boot_id: boot_clock.boot_id.to_string(),
            time_namespace: boot_clock.time_namespace,
            acquired_ns: acquired.as_nanos(),
            place: Some(place),
        })
    }

    fn place(&self) -> (Place, BootTime) {
        match &self.0 {
            Held::File(lock) => {
                let place = discovery::FileLock {
                    device: lock.device(),
                    inode: lock.inode(),
                };
                (Place::File(place), lock.acquired())
            }
            Held::Socket(socket) => {
                let place = discovery::SocketLock {
                    network_namespace: socket.network_namespace(),
                };
                (Place::Socket(place), socket.acquired())
            }
        }
    }
}
