//! What a run of a sidecar holds exclusively until it has answered its last check.
//!
//! The next run of the node that holds it has thereby witnessed the end of this one. Every thread that answers checks holds it,
//! and so does whoever keeps the snapshot file: it is released with the last of them, by the end of the process at the latest.

use std::sync::Arc;

use super::node_socket::NodeSocket;
use crate::{
    clock::{BootTime, Clock},
    node_name::NodeName,
    proto::discovery::{self, lock::Place},
    snapshot::lock::FileLock,
};

/// What a run holds exclusively; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct RunLock(Held);

#[derive(Clone, Debug)]
enum Held {
    File(Arc<FileLock>),
    Socket(Arc<NodeSocket>),
}

impl RunLock {
    /// The lock beside the snapshot file.
    pub(super) const fn of_file(lock: Arc<FileLock>) -> Self {
        Self(Held::File(lock))
    }

    /// The socket of a node without a snapshot file; none, with a warning, when another process holds it.
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

    /// As a Hello shows it; none when the system does not tell by which clock it was acquired.
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
