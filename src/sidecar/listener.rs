//! The listener for Envoy: one accept loop that spreads connections over the workers.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

use super::{
    socket::Accepted,
    spread::{Ended, Spread},
};
use crate::{accept::Acceptor, config::Listen};

/// A bound listener that does not accept yet.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Bound,
    endpoint: Endpoint,
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
    /// Binds a listener. With port 0 the system chooses the port. A socket file on which no process
    /// listens any more is replaced.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound, or there is another file at the path of the socket.
    pub(crate) async fn bind(listen: &Listen) -> io::Result<Self> {
        match listen {
            Listen::Tcp(address) => {
                let listener = TcpListener::bind(address).await?;
                Ok(Self {
                    endpoint: Endpoint::Tcp(listener.local_addr()?),
                    socket: Bound::Tcp(listener),
                })
            }
            Listen::Unix(path) => {
                remove_stale(path)?;
                Ok(Self {
                    socket: Bound::Unix(UnixListener::bind(path)?),
                    endpoint: Endpoint::Unix(path.clone()),
                })
            }
        }
    }

    /// Returns the bound address.
    #[must_use]
    pub(crate) const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Accepts connections until `stop`, or until a worker has ended.
    pub(super) async fn accept(self, workers: Spread, stop: CancellationToken) {
        let _file = match &self.endpoint {
            Endpoint::Unix(path) => Some(SocketFile(path)),
            Endpoint::Tcp(_) => None,
        };
        tokio::select! {
            Ended = self.spread(workers) => {}
            () = stop.cancelled() => {}
        }
    }

    async fn spread(&self, mut workers: Spread) -> Ended {
        let mut acceptor = Acceptor::new("ext_authz");
        loop {
            let accepted = acceptor.next(|| self.socket.accept()).await;
            if let Err(ended) = workers.give(accepted).await {
                return ended;
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
    use crate::sidecar::spread::Intake;

    #[tokio::test]
    async fn a_socket_that_was_left_behind_is_replaced() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("authz.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
        assert!(path.exists(), "the file stays when its listener is gone");
        let listener = Listener::bind(&Listen::Unix(path.clone())).await;
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
            let error = Listener::bind(&Listen::Unix(path)).await;
            let error = error.expect_err("something is there");
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
    }

    #[tokio::test]
    async fn the_socket_goes_with_its_listener() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("authz.sock");
        let listener = Listener::bind(&Listen::Unix(path.clone())).await;
        let stop = CancellationToken::new();
        stop.cancel();
        let (worker, _arrivals) = Intake::new();
        let workers = Spread::new(vec![worker], 1, Counter::default());
        listener.expect("it is bound").accept(workers, stop).await;
        assert!(!path.exists());
    }
}
