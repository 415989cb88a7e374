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
    Certificate, Credentials, HTTP2, HandshakeError, Identity, TlsError, TlsStream, WallClock,
    handshake::CLIENT,
    material::Material,
    provider,
    turns::Turns,
    verifier::{ClientJudge, Shown},
};
use crate::key::Timestamp;

/// Makes handshakes with clients; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct TlsServer {
    credentials: Arc<Credentials>,
    turns: Turns,
    timeout: Duration,
    told: Arc<Mutex<Told>>,
}

/// How many failures were told of since when: strangers must not fill the log.
#[derive(Debug)]
struct Told {
    since: Instant,
    lines: u32,
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Whom its certificate speaks for; none without a certificate, or for nobody.
    pub(crate) identity: Option<Identity>,
    /// The last moment at which that is so.
    pub(crate) not_after: Option<Timestamp>,
}

/// Two round trips take a second over the worst of links, and a client that does not finish in five will not.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
/// Failures that are told of in so long a time. The metrics count all of them.
const MAX_LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);
/// The most handshakes under way. Each takes a file and some 40 KiB; a thousand sidecars that come back at once finish
/// a few hundred of theirs before the first of them is given up, and try again.
const MAX_UNDER_WAY: usize = 256;

impl TlsServer {
    /// A server that shows and judges by `credentials`. Clients have to have a certificate where those name
    /// authorities.
    #[must_use]
    pub(crate) fn new(credentials: Arc<Credentials>) -> Self {
        Self::with_limits(credentials, MAX_UNDER_WAY, TIMEOUT)
    }

    /// The same, with other limits on handshakes: how many may be under way, and how long one may take.
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

    /// Makes a handshake on a connection that was accepted `from` somewhere, and tells of it when it fails. Cancelled,
    /// it closes the connection.
    ///
    /// # Errors
    ///
    /// When no connection comes of it.
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
        // As whoever only looks whether the port is open does it.
        if matches!(error, HandshakeError::Broken(_)) {
            tracing::debug!(
                tls.use = %self.credentials.used(),
                peer = from.map(tracing::field::display),
                error = error as &dyn std::error::Error,
                "no connection: the TLS handshake was given up"
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
        if stream.get_ref().1.alpn_protocol() != Some(HTTP2) {
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

    /// For one handshake: what is current, and who keeps what the client has shown.
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
            TlsError::Setup(rustls::Error::General("a server has a certificate".into()))
        })?;
        let mut config = builder.with_cert_resolver(Arc::clone(&own.pair) as _);
        config.alpn_protocols = vec![HTTP2.to_vec()];
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
