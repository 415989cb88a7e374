//! An abstract Unix socket with the name of the node. Only one process in a network namespace can
//! bind it.

use std::{
    fs, io,
    net::Shutdown,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::MetadataExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

use sha2::{Digest as _, Sha256};

use crate::{
    clock::{BootTime, Clock},
    node_name::NodeName,
    secret_file::to_hex,
};

/// The socket of a node, held exclusively until this is dropped. A process that is killed also
/// releases it. It carries no data. See `unix(7)`, "Abstract sockets".
#[derive(Debug)]
pub(super) struct NodeSocket {
    _socket: UnixDatagram,
    network_namespace: u64,
    acquired: BootTime,
}

/// The file whose inode identifies the network namespace of this process.
const NETWORK_NAMESPACE: &str = "/proc/self/ns/net";
const PREFIX: &str = "relatch-sidecar";
/// The maximum length of the name of an abstract socket, in bytes: `sun_path` without its first
/// byte.
const MAX_NAME: usize = 107;

impl NodeSocket {
    /// Binds the socket of `node`.
    ///
    /// # Errors
    ///
    /// With [`io::ErrorKind::AddrInUse`] when another process holds the socket. With another kind
    /// when the network namespace cannot be read, or the socket cannot be bound.
    pub(super) fn bind(node: &NodeName, clock: &Clock) -> io::Result<Self> {
        let network_namespace = fs::metadata(NETWORK_NAMESPACE)?.ino();
        let address = SocketAddr::from_abstract_name(name(node.as_str()))?;
        let socket = UnixDatagram::bind_addr(&address)?;
        // Read the time after the bind: every former holder acquired the socket earlier.
        let acquired = clock.boot();
        socket.shutdown(Shutdown::Both)?;
        Ok(Self {
            _socket: socket,
            network_namespace,
            acquired,
        })
    }

    /// Returns the inode of the network namespace in which the name of the socket is unique.
    pub(super) const fn network_namespace(&self) -> u64 {
        self.network_namespace
    }

    /// Returns a time directly after the acquisition, at which the socket was held.
    pub(super) const fn acquired(&self) -> BootTime {
        self.acquired
    }
}

/// Returns the name of the socket of a node. A name that is too long is replaced by its SHA-256
/// hash.
fn name(node: &str) -> String {
    let name = format!("{PREFIX}/{node}");
    if name.len() <= MAX_NAME {
        name
    } else {
        format!("{PREFIX}#{}", to_hex(&Sha256::digest(node)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the name of a node that no other test uses.
    fn node() -> NodeName {
        let id = crate::key::RotationId::generate().expect("the random source works");
        format!("node-{}", id.as_str().to_lowercase())
            .parse()
            .expect("a name")
    }

    #[test]
    fn a_node_has_one_holder_at_a_time() {
        let clock = Clock::system();
        let (node, other) = (node(), node());
        let first = NodeSocket::bind(&node, &clock).expect("it is free");
        let error = NodeSocket::bind(&node, &clock).expect_err("it is held");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let _other = NodeSocket::bind(&other, &clock).expect("it is free");
        let (acquired, namespace) = (first.acquired(), first.network_namespace());
        drop(first);
        let second = NodeSocket::bind(&node, &clock).expect("it is free");
        assert!(second.acquired() > acquired);
        assert_eq!(second.network_namespace(), namespace);
    }

    #[test]
    fn names_fit_and_differ() {
        let long = |end| format!("{}{end}", "n".repeat(200));
        let names = [
            name("edge-1"),
            name("edge-2"),
            name(&long(1)),
            name(&long(2)),
        ];
        for (at, name) in names.iter().enumerate() {
            assert!(name.len() <= MAX_NAME, "{name}");
            assert!(!names[..at].contains(name), "{name}");
        }
    }
}
