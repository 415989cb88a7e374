//! Where Envoy connects: one accept loop that spreads connections over the workers.

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

/// Where a listener is bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// What lies where a Unix socket is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occupant {
    /// Nothing.
    Nothing,
    /// A socket that nobody listens on any more: it is replaced.
    StaleSocket,
    /// A live socket, or another kind of file: it is left alone, and the socket cannot be bound.
    Other,
}

/// A Unix socket's file, removed when its listener goes.
struct SocketFile<'a>(&'a Path);

impl Listener {
    /// Binds; port 0 lets the system choose. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound, or something else lies where the socket should.
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

    /// Where it is bound.
    #[must_use]
    pub(crate) const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Accepts until `stop`, or until the workers have ended.
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

/// As the configuration writes it.
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

/// Removes a socket that a process left behind; a live one, or another kind of file, is left alone, so that binding
/// fails.
fn remove_stale(path: &Path) -> io::Result<()> {
    match Occupant::of(path)? {
        Occupant::StaleSocket => fs::remove_file(path),
        Occupant::Nothing | Occupant::Other => Ok(()),
    }
}

impl Occupant {
    /// What lies at `path`. A socket is asked whether anybody listens on it.
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
