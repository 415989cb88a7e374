//! Where servers of a test listen: any port of an address that no other test uses.

use std::net::SocketAddr;

use tokio::net::TcpListener;

use super::reserved::own_address;

/// Any port of an address that only the caller uses. What listened there and has ended is never mistaken for somebody
/// else's server: nobody else is given the address.
pub(crate) fn any_port() -> SocketAddr {
    (own_address(), 0).into()
}

/// A listener on [`any_port`], and where it listens.
pub(crate) async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(any_port()).await;
    let listener = listener.expect("a port of loopback is free");
    let address = listener.local_addr().expect("it is bound");
    (listener, address)
}
