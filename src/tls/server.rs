//! The side that listens.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{ServerConfig, server::NoServerSessionStorage, version::TLS13};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    Certificate, Credentials, HandshakeError, Identity, TlsError, TlsStream, WallClock,
    handshake::CLIENT,
    material::Material,
    provider,
    turns::Turns,
    verifier::{ClientJudge, Shown},
};
use crate::key::Timestamp;

/// Performs handshakes with clients; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct TlsServer {
    credentials: Arc<Credentials>,
    turns: Turns,
    timeout: Duration,
    told: Arc<Mutex<Told>>,
}

/// The number of logged failures since a time: strangers must not fill the log.
#[derive(Debug)]
struct Told {
    since: Instant,
    lines: u32,
}

/// The other side of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Peer {
    /// The identity of its certificate; none if it has no certificate or the certificate has no
    /// identity.
    pub(crate) identity: Option<Identity>,
    /// The last moment at which its certificate is valid; none without a certificate.
    pub(crate) not_after: Option<Timestamp>,
}

/// The time for a handshake. Two round trips need a second over the worst of links; a client that
/// does not finish in five seconds will not finish.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
/// The maximum number of failures that are logged per [`WINDOW`]. The metrics count all failures.
const MAX_LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);
/// The maximum number of handshakes in progress. Each needs a file descriptor and some 40 KiB. If a
/// thousand sidecars reconnect at once, a few hundred of their handshakes finish before the first
/// one is cancelled; the other sidecars retry.
const MAX_UNDER_WAY: usize = 256;

impl TlsServer {
    /// Creates a server that presents and verifies certificates with `credentials`. If those name
    /// authorities, clients must have a certificate.
    #[must_use]
    pub(crate) fn new(credentials: Arc<Credentials>) -> Self {
        Self::with_limits(credentials, MAX_UNDER_WAY, TIMEOUT)
    }

    /// Creates a server with other limits: the number of handshakes in progress, and the time for
    /// one.
    #[must_use]
    pub(crate) fn with_limits(
        credentials: Arc<Credentials>,
        max: usize,
        timeout: Duration,
    ) -> Self {
        Self {
            credentials,
            turns: Turns::new(max),
            timeout,
            told: Arc::new(Mutex::new(Told {
                since: Instant::now(),
                lines: 0,
            })),
        }
    }

    /// Performs a handshake on a connection that was accepted from the address `from`, and logs a
    /// failure. Dropping the future closes the connection.
    ///
    /// # Errors
    ///
    /// When the handshake fails.
    pub(crate) async fn accept<S>(
        &self,
        socket: S,
        from: Option<SocketAddr>,
    ) -> Result<(TlsStream<S>, Peer), HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let turn = self.turns.begin();
        let accepted = tokio::select! {
            accepted = timeout(self.timeout, self.shake_hands(socket)) => {
                accepted.unwrap_or(Err(HandshakeError::Slow { peer: CLIENT, after: self.timeout }))
            }
            () = turn.given_up() => Err(HandshakeError::Crowded),
        };
        let credentials = &self.credentials;
        let (used, metrics) = (credentials.used(), credentials.metrics());
        metrics.shook_hands(used, accepted.as_ref().err());
        if let Err(error) = &accepted {
            self.tell(from, error);
        }
        accepted
    }

    fn tell(&self, from: Option<SocketAddr>, error: &HandshakeError) {
        // A check whether the port is open looks like this.
        if matches!(error, HandshakeError::Broken(_)) {
            tracing::debug!(
                tls.use = %self.credentials.used(),
                peer = from.map(tracing::field::display),
                error = error as &dyn std::error::Error,
                "no connection: the TLS handshake was broken off"
            );
            return;
        }
        let now = Instant::now();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(told.since) >= WINDOW {
            *told = Told {
                since: now,
                lines: 0,
            };
        }
        told.lines = told.lines.saturating_add(1);
        if told.lines <= MAX_LINES {
            tracing::warn!(
                tls.use = %self.credentials.used(),
                peer = from.map(tracing::field::display),
                error = error as &dyn std::error::Error,
                "no connection: the TLS handshake failed"
            );
        }
    }

    async fn shake_hands<S>(&self, socket: S) -> Result<(TlsStream<S>, Peer), HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let material = self.credentials.current();
        let shown = Shown::default();
        let config = self.config(&material, shown.clone())?;
        let accepted = TlsAcceptor::from(Arc::new(config)).accept(socket).await;
        let certificate = shown.take();
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                return Err(HandshakeError::from_io(CLIENT, error, certificate, None));
            }
        };
        if !self
            .credentials
            .used()
            .accepts(stream.get_ref().1.alpn_protocol())
        {
            return Err(HandshakeError::no_http2(CLIENT));
        }
        let not_after = certificate.as_ref().map(Certificate::not_after);
        let identity = match certificate {
            Some(certificate) => match Identity::of(&certificate) {
                Ok(identity) => Some(identity),
                Err(reason) if self.credentials.used().needs_identity() => {
                    return Err(HandshakeError::NoIdentity {
                        reason,
                        certificate: Box::new(certificate),
                    });
                }
                Err(_) => None,
            },
            None => None,
        };
        Ok((
            TlsStream::new(stream.into()),
            Peer {
                identity,
                not_after,
            },
        ))
    }

    /// Returns the configuration of one handshake: the current material, and a verifier that keeps
    /// the certificate that the client presents.
    fn config(&self, material: &Material, shown: Shown) -> Result<ServerConfig, TlsError> {
        let clock = Arc::new(WallClock(self.credentials.clock().clone()));
        let builder = ServerConfig::builder_with_details(provider(), clock)
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?;
        let builder = match material.clients() {
            Some(inner) => builder.with_client_cert_verifier(Arc::new(ClientJudge {
                inner: Arc::clone(inner),
                shown,
            })),
            None => builder.with_no_client_auth(),
        };
        let own = material.own.as_ref().ok_or_else(|| {
            TlsError::Setup(rustls::Error::General(
                "a server needs a certificate".into(),
            ))
        })?;
        let mut config = builder.with_cert_resolver(Arc::clone(&own.pair) as _);
        config.alpn_protocols = vec![self.credentials.used().protocol().to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.identity {
            Some(identity) => identity.fmt(f),
            None => f.write_str("nobody"),
        }
    }
}
