//! Addresses of this machine that belong to one test, whatever else runs on it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use tokio::net::TcpSocket;

/// An address that stays the test's own while programs that listen there end and start again.
///
/// The system gives its port to nobody else, neither to a listener that asks for any port nor to an outgoing connection: a
/// socket is bound to it that never listens. A program that sets `SO_REUSEADDR`, as servers do, can listen there. While none
/// does, connections are refused. Dropping it gives the port back.
#[derive(Debug)]
pub(crate) struct Reserved {
    address: SocketAddr,
    _socket: TcpSocket,
}

/// How many addresses a process uses before those of the next process id begin. A run of all tests uses a few hundred.
const PER_PROCESS: u32 = 1 << 10;

impl Reserved {
    /// Reserves a port of an address that only this test uses.
    pub(crate) fn new() -> Self {
        Self::at(own_address())
    }

    /// Reserves a port of `address`.
    pub(crate) fn at(address: Ipv4Addr) -> Self {
        let bound = TcpSocket::new_v4().and_then(|socket| {
            socket.set_reuseaddr(true)?;
            socket.bind((address, 0).into())?;
            Ok((socket.local_addr()?, socket))
        });
        let (address, socket) = bound.expect("a port of loopback is free");
        Self {
            address,
            _socket: socket,
        }
    }

    /// The address, with its port.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }
}

/// An address of loopback that no other test uses at the same time, in this process or in another one: 127.x.y.z, made of
/// the process id and a counter. It is never 127.0.0.1, where every outgoing connection has its port. Linux needs no setup for
/// that: the whole of 127.0.0.0/8 is loopback.
pub(crate) fn own_address() -> Ipv4Addr {
    static USED: AtomicU32 = AtomicU32::new(0);
    let used = USED.fetch_add(1, Ordering::Relaxed) % PER_PROCESS;
    nth_address(process::id().wrapping_mul(PER_PROCESS).wrapping_add(used))
}

/// Neighbours differ. The second part is at least 1, so that 127.0.0.0/16 stays everybody's, and the last one is neither
/// that of a network nor that of a broadcast.
fn nth_address(n: u32) -> Ipv4Addr {
    let part = |n: u32, least: u32, count: u32| {
        u8::try_from(least + n % count).expect("a part is below 256")
    };
    let (last, rest) = (part(n, 1, 254), n / 254);
    Ipv4Addr::new(127, part(rest / 256, 1, 254), part(rest, 0, 256), last)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, io::ErrorKind};

    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn no_two_addresses_are_alike_and_none_is_everybodys() {
        for process in [1, 77, 4_194_303] {
            let first = PER_PROCESS.wrapping_mul(process);
            let addresses = (0..2 * PER_PROCESS).map(|n| nth_address(first.wrapping_add(n)));
            let addresses: HashSet<Ipv4Addr> = addresses.collect();
            assert_eq!(addresses.len(), 2 * PER_PROCESS as usize);
            for address in addresses {
                assert!(
                    address.is_loopback() && address.octets()[1] > 0,
                    "{address}"
                );
            }
        }
        assert_ne!(own_address(), own_address());
    }

    #[tokio::test]
    async fn a_reserved_address_is_refused_until_a_listener_comes_and_after_it_has_gone() {
        let reserved = Reserved::new();
        for _ in 0..2 {
            let refused = TcpStream::connect(reserved.address()).await;
            let refused = refused.expect_err("nobody listens");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            let listener = TcpListener::bind(reserved.address()).await;
            let _listener = listener.expect("it is reserved for us");
            let connected = TcpStream::connect(reserved.address()).await;
            connected.expect("somebody listens");
        }
    }

    #[tokio::test]
    async fn another_program_can_have_the_same_port_of_another_address_only() {
        let mut reserved = Reserved::new();
        let mut port = reserved.address().port();
        // An outgoing connection of somebody may have this port at that address.
        while TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .is_err()
        {
            reserved = Reserved::new();
            port = reserved.address().port();
        }
        let everywhere = TcpSocket::new_v4().expect("a socket");
        everywhere.set_reuseaddr(false).expect("it is new");
        let taken = everywhere.bind((Ipv4Addr::UNSPECIFIED, port).into());
        assert_eq!(
            taken.map_err(|error| error.kind()),
            Err(ErrorKind::AddrInUse)
        );
    }
}
