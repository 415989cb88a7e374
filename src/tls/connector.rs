//! Connections for tonic's channels. tonic's own TLS has no deadlines, no reloads and no
//! identities.

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

use super::{HandshakeError, TlsClient, TlsStream};

/// Opens channels to endpoints over TLS; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Connector(TlsClient);

/// The reason that a channel could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The TCP connection failed.
    #[error("cannot connect to {host}")]
    Connect {
        /// The host and the port.
        host: String,
        source: std::io::Error,
    },
    /// The TLS handshake failed.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
}

impl Connector {
    /// Creates a connector that connects with `tls`.
    #[must_use]
    pub(crate) const fn new(tls: TlsClient) -> Self {
        Self(tls)
    }

    /// Opens a channel to the host of `endpoint`.
    ///
    /// # Errors
    ///
    /// When the connection fails; a [`ConnectError`] is among the causes.
    pub(crate) async fn open(
        &self,
        endpoint: &Endpoint,
    ) -> Result<Channel, tonic::transport::Error> {
        let this = self.clone();
        let connect = tower::service_fn(move |uri: Uri| {
            let this = this.clone();
            async move { this.connect(&uri).await.map(TokioIo::new) }
        });
        endpoint.connect_with_connector(connect).await
    }

    async fn connect(&self, uri: &Uri) -> Result<TlsStream<TcpStream>, ConnectError> {
        let host = uri.host().unwrap_or_default();
        let host = host.trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(443);
        let connected = TcpStream::connect((host, port)).await;
        let socket = connected.and_then(|socket| {
            socket.set_nodelay(true)?;
            Ok(socket)
        });
        let socket = socket.map_err(|source| ConnectError::Connect {
            host: format!("{host}:{port}"),
            source,
        })?;
        Ok(self.0.connect(host, socket).await?)
    }
}
