//! Listening sockets that the process has inherited (systemd's socket activation, `sd_listen_fds(3)`).
//!
//! Such a socket exists before the sidecar starts and after it stops. Connections that arrive in
//! between wait in the queue of the system, so that a restart refuses none.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
};

use listenfd::ListenFd;
use socket2::SockRef;

/// Listening sockets that the process has inherited and that no listener has taken yet.
#[derive(Debug, Default)]
pub struct Inherited {
    tcp: Vec<(SocketAddr, TcpListener)>,
    unix: Vec<(PathBuf, UnixListener)>,
}

/// An inherited socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritedError {
    /// A file descriptor is not a listening socket for TCP or of Unix.
    #[error(
        "the socket number {number} that systemd passes (LISTEN_FDS) is no listening TCP or Unix socket"
    )]
    NotASocket {
        /// The number of the socket, from 1 on.
        number: usize,
    },
    /// The system does not say whether and where a socket listens.
    #[error("cannot read the state of the socket number {number} that systemd passes (LISTEN_FDS)")]
    Address {
        /// The number of the socket, from 1 on.
        number: usize,
        /// The error of the system.
        source: io::Error,
    },
    /// Nothing listens where the socket does.
    #[error(
        "systemd passes a socket for {0}, but none of `listen`, `http_authz.listen` and `http` is this address: make the addresses equal"
    )]
    Unused(String),
}

impl Inherited {
    /// Takes the sockets that `LISTEN_FDS` announces for this process; none without it.
    ///
    /// # Errors
    ///
    /// When one of them is not a listening socket.
    pub(crate) fn from_env() -> Result<Self, InheritedError> {
        let mut passed = ListenFd::from_env();
        let mut inherited = Self::default();
        for at in 0..passed.len() {
            let number = at + 1;
            let address = |source| InheritedError::Address { number, source };
            if let Ok(Some(socket)) = passed.take_tcp_listener(at) {
                check_listens(&SockRef::from(&socket), number)?;
                let local = socket.local_addr().map_err(address)?;
                inherited.tcp.push((local, socket));
            } else if let Ok(Some(socket)) = passed.take_unix_listener(at) {
                check_listens(&SockRef::from(&socket), number)?;
                let local = socket.local_addr().map_err(address)?;
                let path = local.as_pathname().unwrap_or(Path::new("")).to_owned();
                inherited.unix.push((path, socket));
            } else {
                return Err(InheritedError::NotASocket { number });
            }
        }
        Ok(inherited)
    }

    /// Inherits one socket, for tests.
    #[cfg(test)]
    pub(super) fn of_unix(path: &Path, socket: UnixListener) -> Self {
        Self {
            unix: vec![(path.to_owned(), socket)],
            ..Self::default()
        }
    }

    /// Takes the socket that listens on a TCP address; none if there is none.
    pub(crate) fn tcp(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let at = self.tcp.iter().position(|(local, _)| *local == address)?;
        Some(self.tcp.swap_remove(at).1)
    }

    /// Takes the socket that listens on a path; none if there is none.
    pub(crate) fn unix(&mut self, path: &Path) -> Option<UnixListener> {
        let at = self.unix.iter().position(|(local, _)| local == path)?;
        Some(self.unix.swap_remove(at).1)
    }

    /// Checks that each socket was taken.
    ///
    /// # Errors
    ///
    /// When one was not: connections to it would never be accepted.
    pub(crate) fn check_used(&self) -> Result<(), InheritedError> {
        let tcp = self.tcp.iter().map(|(address, _)| address.to_string());
        let mut unused = tcp.chain(self.unix.iter().map(|(path, _)| path.display().to_string()));
        match unused.next() {
            Some(address) => Err(InheritedError::Unused(address)),
            None => Ok(()),
        }
    }
}

fn check_listens(socket: &SockRef<'_>, number: usize) -> Result<(), InheritedError> {
    match socket.is_listener() {
        Ok(true) => Ok(()),
        Ok(false) => Err(InheritedError::NotASocket { number }),
        Err(source) => Err(InheritedError::Address { number, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_does_not_listen_is_refused() {
        let listening = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listening.local_addr().expect("it is bound");
        let connected = std::net::TcpStream::connect(address).expect("it listens");
        assert!(check_listens(&SockRef::from(&listening), 1).is_ok());
        let refused = check_listens(&SockRef::from(&connected), 2).expect_err("it is connected");
        assert!(
            refused.to_string().starts_with("the socket number 2"),
            "{refused}"
        );
    }

    #[test]
    fn a_socket_is_taken_by_its_address() {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = socket.local_addr().expect("it is bound");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("authz.sock");
        let mut inherited = Inherited {
            tcp: vec![(address, socket)],
            unix: vec![(path.clone(), UnixListener::bind(&path).expect("a socket"))],
        };
        assert!(
            inherited
                .tcp("127.0.0.1:1".parse().expect("an address"))
                .is_none()
        );
        assert!(inherited.unix(Path::new("/nowhere")).is_none());
        let unused = inherited.check_used().expect_err("both are left");
        assert!(
            unused.to_string().contains(&address.to_string()),
            "{unused}"
        );
        assert!(inherited.tcp(address).is_some());
        assert!(inherited.tcp(address).is_none(), "it is taken once");
        let unused = inherited.check_used().expect_err("one is left");
        assert!(unused.to_string().contains("authz.sock"), "{unused}");
        assert!(inherited.unix(&path).is_some());
        assert!(inherited.check_used().is_ok());
    }
}
