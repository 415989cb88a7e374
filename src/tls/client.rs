//! The side that connects.

use std::{sync::Arc, time::Duration};

use rustls::{ClientConfig, client::Resumption, pki_types::ServerName, version::TLS13};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::{
    Credentials, HTTP2, HandshakeError, Identity, TlsError, TlsStream, WallClock,
    handshake::SERVER,
    provider,
    verifier::{ServerJudge, Shown},
};

/// Performs handshakes with servers; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct TlsClient {
    credentials: Arc<Credentials>,
    server_identity: Option<Identity>,
}

/// The time for a handshake, the same as on the server's side.
const TIMEOUT: Duration = super::server::TIMEOUT;
/// The time for which the client waits for the first bytes of a server; after that, the server may
/// be one that waits for the client.
const PATIENCE: Duration = Duration::from_secs(1);

impl TlsClient {
    /// Creates a client that presents and verifies certificates with `credentials`. The certificate
    /// of a server must be valid for the host under which the server is reached and, if
    /// `server_identity` is given, must have this identity.
    #[must_use]
    pub(crate) const fn new(
        credentials: Arc<Credentials>,
        server_identity: Option<Identity>,
    ) -> Self {
        Self {
            credentials,
            server_identity,
        }
    }

    /// Performs a handshake with the server at `host`, a name or an address, and waits for its
    /// first bytes. In TLS 1.3 a server verifies the certificate of a client after the client could
    /// already send: a rejection arrives in place of these bytes. Some proxies wait for the client
    /// to send first; the client waits for them at most a second.
    ///
    /// # Errors
    ///
    /// When the handshake fails.
    pub(crate) async fn connect<S>(
        &self,
        host: &str,
        socket: S,
    ) -> Result<TlsStream<S>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let shaken = timeout(TIMEOUT, self.shake_hands(host, socket)).await;
        let shaken = shaken.unwrap_or(Err(HandshakeError::Slow {
            peer: SERVER,
            after: TIMEOUT,
        }));
        let credentials = &self.credentials;
        let (used, metrics) = (credentials.used(), credentials.metrics());
        metrics.shook_hands(used, shaken.as_ref().err());
        shaken
    }

    async fn shake_hands<S>(&self, host: &str, socket: S) -> Result<TlsStream<S>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| {
            HandshakeError::Incompatible(format!("{host} is neither a host name nor an address"))
        })?;
        let shown = Shown::default();
        let config = self.config(shown.clone())?;
        let ours = self.credentials.describe();
        match TlsConnector::from(Arc::new(config))
            .connect(name, socket)
            .await
        {
            Ok(stream) if stream.get_ref().1.alpn_protocol() == Some(HTTP2) => {
                let mut stream = TlsStream::new(stream.into());
                match timeout(PATIENCE, stream.hear()).await {
                    Ok(Err(error)) => Err(HandshakeError::from_io(SERVER, error, None, ours)),
                    Ok(Ok(())) | Err(_) => Ok(stream),
                }
            }
            Ok(_) => Err(HandshakeError::no_http2(SERVER)),
            Err(error) => Err(HandshakeError::from_io(SERVER, error, shown.take(), ours)),
        }
    }

    fn config(&self, shown: Shown) -> Result<ClientConfig, TlsError> {
        let material = self.credentials.current();
        let clock = Arc::new(WallClock(self.credentials.clock().clone()));
        let judge = ServerJudge {
            inner: material.servers()?,
            shown,
            expected: self.server_identity.clone(),
        };
        let builder = ClientConfig::builder_with_details(provider(), clock)
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(judge));
        let mut config = match &material.own {
            Some(own) => builder.with_client_cert_resolver(Arc::clone(&own.pair) as _),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![HTTP2.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }
}
