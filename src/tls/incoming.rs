//! Accepted connections for gRPC servers, over TLS if that is configured.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{HandshakeError, Peer, TlsServer, TlsStream};
use crate::accept::Acceptor;

/// A connection of a client, plain or over TLS.
#[derive(Debug)]
pub(crate) struct Incoming {
    wire: Wire,
    peer: Peer,
}

#[derive(Debug)]
enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// The connections that a listener accepts. Each is returned as soon as its handshake is complete,
/// so a slow handshake does not delay other connections. Dropping this closes the connections whose
/// handshake is in progress.
#[derive(Debug)]
pub(crate) struct Listening {
    what: &'static str,
    listener: TcpListener,
    tls: Option<TlsServer>,
    /// The maximum number of unsent bytes that the system buffers for each connection; none: no
    /// such limit.
    max_unsent: Option<u32>,
    /// Bounded by [`TlsServer`].
    handshakes: JoinSet<Shaken>,
    acceptor: Acceptor,
}

/// The result of a handshake.
type Shaken = Result<(TlsStream<TcpStream>, Peer), HandshakeError>;

impl Listening {
    /// Creates the connections of `listener`, over `tls` if that is given. `what` names the
    /// listener in the log.
    #[must_use]
    pub(crate) fn new(what: &'static str, listener: TcpListener, tls: Option<TlsServer>) -> Self {
        Self {
            what,
            listener,
            tls,
            max_unsent: None,
            handshakes: JoinSet::new(),
            acceptor: Acceptor::new(what),
        }
    }

    /// Limits the unsent data in the buffer of each connection to `bytes` (`TCP_NOTSENT_LOWAT`,
    /// tcp(7)): later writes wait only behind this data and the data in flight.
    #[must_use]
    pub(crate) fn with_max_unsent(self, bytes: u32) -> Self {
        Self {
            max_unsent: Some(bytes),
            ..self
        }
    }

    /// Returns the next connection. Cancellation safe.
    pub(crate) async fn next(&mut self) -> Incoming {
        let accept = async || {
            let (socket, address) = self.listener.accept().await?;
            socket.set_nodelay(true)?;
            if let Some(bytes) = self.max_unsent {
                SockRef::from(&socket).set_tcp_notsent_lowat(bytes)?;
            }
            Ok((socket, address))
        };
        loop {
            tokio::select! {
                (socket, address) = self.acceptor.next(&accept) => match self.tls.clone() {
                    None => return Incoming::plain(socket),
                    Some(tls) => {
                        self.handshakes
                            .spawn(async move { tls.accept(socket, Some(address)).await });
                    }
                },
                Some(ended) = self.handshakes.join_next() => match ended {
                    Ok(Ok((stream, peer))) => {
                        return Incoming { wire: Wire::Tls(Box::new(stream)), peer };
                    }
                    // The server has already counted and, within its limit, logged this error.
                    Ok(Err(_)) => {}
                    Err(error) => tracing::error!(
                        listener = self.what,
                        error = &error as &dyn std::error::Error,
                        "a TLS handshake has failed"
                    ),
                },
            }
        }
    }
}

impl Incoming {
    fn plain(socket: TcpStream) -> Self {
        Self {
            wire: Wire::Plain(socket),
            peer: Peer::default(),
        }
    }

    /// Returns the identity of the other side.
    #[must_use]
    pub(crate) const fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl AsyncRead for Incoming {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().wire {
            Wire::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Wire::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Wire::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Wire::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.wire {
            Wire::Plain(stream) => stream.is_write_vectored(),
            Wire::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().wire {
            Wire::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().wire {
            Wire::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
