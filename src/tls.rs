//! TLS for every channel: between sidecars and the control plane, for operators, and for Envoy.
//!
//! Only TLS 1.3 and HTTP/2 (ALPN `h2`; HTTP/1.1 for proxies that ask over HTTP), without session resumption. A session in a ticket could
//! outlive the certificate with which it was agreed on, and connections live so long that the cost
//! of a full handshake does not matter.
//!
//! The process reads [`files`] and parses them into [`material`]; [`credentials`] keep the material
//! current. A [`server`] and a [`client`] use the current material for each handshake. A
//! [`handshake`] error reports which side refused which [`certificate`]. [`incoming`] and
//! [`connector`] pass connections to tonic, and [`turns`] limit the number of handshakes in
//! progress. An [`identity`] is the URI that a certificate speaks for; a [`trust_domain`]
//! determines which authorities may sign for it. [`dev`] creates certificates to try out TLS.

mod certificate;
pub(crate) mod client;
pub(crate) mod connector;
pub(crate) mod credentials;
pub(crate) mod dev;
mod error;
pub(crate) mod files;
mod handshake;
mod identity;
pub(crate) mod incoming;
mod material;
pub(crate) mod metrics;
pub(crate) mod server;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
mod trust_domain;
mod turns;
mod verifier;

use std::{sync::Arc, time::SystemTime};

use rustls::{crypto::CryptoProvider, pki_types::UnixTime, time_provider::TimeProvider};

pub(crate) use self::trust_domain::domain_text;
pub(crate) use self::{
    certificate::Certificate,
    client::TlsClient,
    credentials::Credentials,
    error::TlsError,
    files::TlsFiles,
    handshake::HandshakeError,
    identity::{Identity, IdentityError, IdentityPattern},
    metrics::TlsMetrics,
    server::{Peer, TlsServer},
    stream::TlsStream,
    trust_domain::{Authorities, TrustDomain},
};
use crate::clock::Clock;

/// The purpose of a pair of certificate and key. It has a name in metrics and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum TlsUse {
    /// The control plane, as the server of sidecars.
    DiscoveryServer,
    /// A sidecar, as a client of the control plane.
    DiscoveryClient,
    /// The control plane, as the server of operators.
    AdminServer,
    /// An operator, as a client of the control plane.
    AdminClient,
    /// A sidecar, as the server of Envoy.
    ExtAuthzServer,
    /// A sidecar, as the server of proxies that ask over HTTP.
    HttpAuthzServer,
}

/// The wall clock, against which the validity of certificates is checked.
#[derive(Debug)]
struct WallClock(Clock);

/// The ALPN protocol of every channel except that of proxies that ask over HTTP.
const HTTP2: &[u8] = b"h2";
/// The ALPN protocol of proxies that ask over HTTP. Some of them, such as nginx, offer none.
const HTTP1: &[u8] = b"http/1.1";

impl TlsUse {
    /// Whether the certificate of the other side must have an identity: for sidecars, it determines
    /// their rights.
    const fn needs_identity(self) -> bool {
        match self {
            Self::DiscoveryServer => true,
            Self::DiscoveryClient
            | Self::AdminServer
            | Self::AdminClient
            | Self::ExtAuthzServer
            | Self::HttpAuthzServer => false,
        }
    }

    /// Returns the ALPN protocol that a server offers.
    const fn protocol(self) -> &'static [u8] {
        match self {
            Self::DiscoveryServer
            | Self::DiscoveryClient
            | Self::AdminServer
            | Self::AdminClient
            | Self::ExtAuthzServer => HTTP2,
            Self::HttpAuthzServer => HTTP1,
        }
    }

    /// Returns whether a server accepts a client that has agreed on `protocol`; none if the client
    /// offers no protocols.
    fn accepts(self, protocol: Option<&[u8]>) -> bool {
        match self {
            Self::DiscoveryServer
            | Self::DiscoveryClient
            | Self::AdminServer
            | Self::AdminClient
            | Self::ExtAuthzServer => protocol == Some(HTTP2),
            Self::HttpAuthzServer => protocol.is_none_or(|protocol| protocol == HTTP1),
        }
    }

    /// Returns the name in metrics and logs.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::DiscoveryServer => "discovery_server",
            Self::DiscoveryClient => "discovery_client",
            Self::AdminServer => "admin_server",
            Self::AdminClient => "admin_client",
            Self::ExtAuthzServer => "ext_authz_server",
            Self::HttpAuthzServer => "http_authz_server",
        }
    }
}

impl std::fmt::Display for TlsUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        let now = self.0.system_time();
        let since = now.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

#[cfg(test)]
mod tests;
