//! TLS for every channel: between sidecars and the control plane, for operators, and for Envoy.
//!
//! TLS 1.3 alone, HTTP/2 alone (ALPN `h2`), and no resumption: what was agreed on with a certificate must not outlive
//! it in a ticket, and a connection lives so long that a full handshake costs nothing.
//!
//! [`files`] are read into [`material`], which [`credentials`] keep current while the process runs. A [`server`] and a
//! [`client`] make a handshake of what is current then, and say in a [`handshake`] error which side refused which
//! [`certificate`]. [`incoming`] and [`connector`] put connections into tonic's hands, and [`turns`] bound how many
//! handshakes are under way. An [`identity`] is who a certificate speaks for; a
//! [`trust_domain`] says whose authorities may sign for it. [`dev`] makes certificates for trying
//! out.

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

/// What a pair of certificate and key is for: its name in metrics and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum TlsUse {
    /// The control plane towards sidecars.
    DiscoveryServer,
    /// A sidecar towards the control plane.
    DiscoveryClient,
    /// The control plane towards operators.
    AdminServer,
    /// An operator towards the control plane.
    AdminClient,
    /// A sidecar towards Envoy.
    ExtAuthzServer,
}

/// The wall clock, by which certificates are judged.
#[derive(Debug)]
struct WallClock(Clock);

/// The protocol of every channel.
const HTTP2: &[u8] = b"h2";

impl TlsUse {
    /// Whether whoever connects has to speak for somebody: what it may do depends on who it is.
    const fn needs_identity(self) -> bool {
        match self {
            Self::DiscoveryServer => true,
            Self::DiscoveryClient
            | Self::AdminServer
            | Self::AdminClient
            | Self::ExtAuthzServer => false,
        }
    }

    /// Its name.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::DiscoveryServer => "discovery_server",
            Self::DiscoveryClient => "discovery_client",
            Self::AdminServer => "admin_server",
            Self::AdminClient => "admin_client",
            Self::ExtAuthzServer => "ext_authz_server",
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
