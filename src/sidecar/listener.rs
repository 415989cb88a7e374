//! The listeners for Envoy and for other proxies, each with one accept loop that
//! spreads connections over the workers.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

use super::{
    inherited::Inherited,
    socket::Accepted,
    spread::{Ended, Spread},
};
use crate::{accept::Acceptor, config::Listen};

/// A bound listener that does not accept yet.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Bound,
    endpoint: Endpoint,
    is_inherited: bool,
}

/// The address of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP address, with the port that was bound.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The file at the path of a Unix socket before it is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occupant {
    Nothing,
    /// A socket on which no process listens any more. It is replaced.
    StaleSocket,
    /// A live socket, or another kind of file. It is not touched, and the socket cannot be bound.
    Other,
}

/// The file of a Unix socket. It is removed when this is dropped.
struct SocketFile<'a>(&'a Path);

impl Listener {
    /// Binds a listener, or uses an inherited socket with the same address. With port 0 the system
    /// chooses the port. A socket file on which no process listens any more is replaced.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound, or there is another file at the path of the socket.
    pub(crate) async fn bind(listen: &Listen, inherited: &mut Inherited) -> io::Result<Self> {
        match listen {
            Listen::Tcp(address) => {
                let (listener, is_inherited) = tcp(*address, inherited).await?;
                Ok(Self {
                    endpoint: Endpoint::Tcp(listener.local_addr()?),
                    socket: Bound::Tcp(listener),
                    is_inherited,
                })
            }
            Listen::Unix(path) => {
                let (listener, is_inherited) = if let Some(listener) = inherited.unix(path) {
                    listener.set_nonblocking(true)?;
                    (UnixListener::from_std(listener)?, true)
                } else {
                    remove_stale(path)?;
                    (UnixListener::bind(path)?, false)
                };
                Ok(Self {
                    socket: Bound::Unix(listener),
                    endpoint: Endpoint::Unix(path.clone()),
                    is_inherited,
                })
            }
        }
    }

    /// Returns the bound address.
    #[must_use]
    pub(crate) const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Accepts connections until `stop`, or until a worker has ended. At the stop, it closes the
    /// socket after it has accepted the connections that wait for it: they would be reset.
    /// Connections that wait for an inherited socket are left to the next process.
    pub(super) async fn accept(self, mut workers: Spread, stop: CancellationToken) {
        let _file = match &self.endpoint {
            Endpoint::Unix(path) if !self.is_inherited => Some(SocketFile(path)),
            Endpoint::Unix(_) | Endpoint::Tcp(_) => None,
        };
        let mut acceptor = Acceptor::new(workers.protocol().as_str());
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = acceptor.next(|| self.socket.accept()) => accepted,
            };
            if let Err(Ended) = workers.give(accepted).await {
                return;
            }
        }
        if !self.is_inherited {
            for accepted in self.socket.close() {
                if let Err(Ended) = workers.give(accepted).await {
                    return;
                }
            }
        }
    }
}

impl Bound {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Accepted::Tcp(stream.into_std()?))
            }
            Self::Unix(listener) => {
                let (stream, _peer) = listener.accept().await?;
                Ok(Accepted::Unix(stream.into_std()?))
            }
        }
    }

    /// Closes the socket, and returns the connections that waited for it.
    fn close(self) -> Vec<Accepted> {
        match self {
            Self::Tcp(listener) => listener.into_std().map_or_else(
                |_| Vec::new(),
                |listener| {
                    waiting(|| {
                        let (stream, _peer) = listener.accept()?;
                        stream.set_nodelay(true)?;
                        stream.set_nonblocking(true)?;
                        Ok(Accepted::Tcp(stream))
                    })
                },
            ),
            Self::Unix(listener) => listener.into_std().map_or_else(
                |_| Vec::new(),
                |listener| {
                    waiting(|| {
                        let (stream, _peer) = listener.accept()?;
                        stream.set_nonblocking(true)?;
                        Ok(Accepted::Unix(stream))
                    })
                },
            ),
        }
    }
}

/// Writes the address as in the configuration.
impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl Drop for SocketFile<'_> {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(self.0) {
            tracing::warn!(
                path = %self.0.display(),
                error = &error as &dyn std::error::Error,
                "cannot remove the socket"
            );
        }
    }
}

/// Accepts until no connection waits. A connection that cannot be accepted is skipped.
fn waiting(accept: impl FnMut() -> io::Result<Accepted>) -> Vec<Accepted> {
    /// More than the queue of the system has by default (`net.core.somaxconn`).
    const MOST: usize = 8_192;

    let is_last = |accepted: &io::Result<_>| {
        let error = accepted.as_ref().err();
        error.is_some_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    };
    std::iter::repeat_with(accept)
        .take(MOST)
        .take_while(|accepted| !is_last(accepted))
        .flatten()
        .collect()
}

/// Binds a TCP address, or uses an inherited socket with that address; also returns whether it is
/// inherited.
///
/// # Errors
///
/// When the address cannot be bound.
pub(super) async fn tcp(
    address: SocketAddr,
    inherited: &mut Inherited,
) -> io::Result<(TcpListener, bool)> {
    match inherited.tcp(address) {
        Some(listener) => {
            listener.set_nonblocking(true)?;
            Ok((TcpListener::from_std(listener)?, true))
        }
        None => Ok((TcpListener::bind(address).await?, false)),
    }
}

/// Removes a socket that a process left behind. A live socket, or another kind of file, is not
/// touched, so that binding fails.
fn remove_stale(path: &Path) -> io::Result<()> {
    match Occupant::of(path)? {
        Occupant::StaleSocket => fs::remove_file(path),
        Occupant::Nothing | Occupant::Other => Ok(()),
    }
}

impl Occupant {
    /// Examines the file at `path`. A connection attempt shows whether a process listens on a
    /// socket.
    ///
    /// # Errors
    ///
    /// When the metadata of the file cannot be read.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let is_socket = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata.file_type().is_socket(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Nothing),
            Err(error) => return Err(error),
        };
        let refused = std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        Ok(if is_socket && refused {
            Self::StaleSocket
        } else {
            Self::Other
        })
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::sidecar::spread::{Intake, Protocol};

    #[tokio::test]
    async fn a_socket_that_was_left_behind_is_replaced() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("authz.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
        assert!(path.exists(), "the file stays when its listener is gone");
        let listener = Listener::bind(&Listen::Unix(path.clone()), &mut Inherited::default()).await;
        assert_eq!(
            listener.expect("it is replaced").endpoint(),
            &Endpoint::Unix(path)
        );
    }

    #[tokio::test]
    async fn a_live_socket_and_other_files_are_left_alone() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let live = dir.path().join("live.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&live).expect("a socket");
        let file = dir.path().join("file");
        fs::write(&file, "precious").expect("writable");
        for path in [live, file] {
            let error = Listener::bind(&Listen::Unix(path), &mut Inherited::default()).await;
            let error = error.expect_err("something is there");
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
    }

    #[tokio::test]
    async fn the_socket_goes_with_its_listener() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("authz.sock");
        let listener = Listener::bind(&Listen::Unix(path.clone()), &mut Inherited::default()).await;
        let stop = CancellationToken::new();
        stop.cancel();
        let (worker, _arrivals) = Intake::new();
        let workers = Spread::new(Protocol::Grpc, vec![worker], 1, Counter::default());
        listener.expect("it is bound").accept(workers, stop).await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn connections_that_wait_at_a_stop_are_accepted() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("authz.sock");
        let any = Listen::Tcp((std::net::Ipv4Addr::LOCALHOST, 0).into());
        for listen in [any, Listen::Unix(path.clone())] {
            let listener = Listener::bind(&listen, &mut Inherited::default()).await;
            let listener = listener.expect("it is bound");
            let clients: Vec<Box<dyn Send>> = (0..3)
                .map(|_| match listener.endpoint() {
                    Endpoint::Tcp(address) => {
                        let client = std::net::TcpStream::connect(address).expect("it listens");
                        Box::new(client) as Box<dyn Send>
                    }
                    Endpoint::Unix(path) => {
                        let client = std::os::unix::net::UnixStream::connect(path);
                        Box::new(client.expect("it listens")) as Box<dyn Send>
                    }
                })
                .collect();
            let stop = CancellationToken::new();
            stop.cancel();
            let (worker, mut arrivals) = Intake::new();
            let workers = Spread::new(Protocol::Grpc, vec![worker], 10, Counter::default());
            listener.accept(workers, stop).await;
            let mut arrived = 0;
            while arrivals.try_recv().is_ok() {
                arrived += 1;
            }
            assert_eq!(arrived, clients.len());
        }
    }

    #[tokio::test]
    async fn an_inherited_socket_and_its_connections_stay_for_the_next_process() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("authz.sock");
        let socket = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let mut inherited = Inherited::of_unix(&path, socket.try_clone().expect("a descriptor"));
        let listener = Listener::bind(&Listen::Unix(path.clone()), &mut inherited).await;
        let _client = std::os::unix::net::UnixStream::connect(&path).expect("it listens");
        let stop = CancellationToken::new();
        stop.cancel();
        let (worker, mut arrivals) = Intake::new();
        let workers = Spread::new(Protocol::Grpc, vec![worker], 10, Counter::default());
        listener
            .expect("it is inherited")
            .accept(workers, stop)
            .await;
        assert!(arrivals.try_recv().is_err());
        assert!(path.exists());
        socket.accept().expect("the client still waits");
    }
}
