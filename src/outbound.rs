//! Requests that relatch sends: to servers of its operator and to webhook endpoints.
//!
//! A user who may name a URL must not thereby reach what only the machine of the control plane can
//! reach: its loopback interface, its network, the metadata service of its cloud. A client
//! therefore has a [`Reach`], which is checked against the address of each connection: one step
//! resolves the name and checks the addresses, for every new connection, so that a name whose
//! addresses change does not evade the check. The client follows no redirects, uses no proxies and
//! no cookies, and keeps no connections.

pub(crate) mod address;
mod error;
mod resolver;
mod url;

use std::{fmt, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

pub(crate) use self::error::{OutboundError, SetupError};
pub use self::url::OutboundUrl;
pub(crate) use self::url::{Scheme, UrlError};
use self::{
    address::Kind,
    resolver::{Accepted, Resolver},
};

/// A client that sends requests; cheap to clone.
#[derive(Clone)]
pub struct Outbound {
    any: reqwest::Client,
    public: reqwest::Client,
    public_or_private: reqwest::Client,
    private: reqwest::Client,
    reach: Reach,
    limits: Limits,
}

/// The addresses that a client may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// An operator of the control plane names the servers.
    Operator,
    /// A user who may administer a keyring names the servers.
    Guarded,
}

/// The time limits of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The limit for resolving the name, connecting and the TLS handshake.
    pub connect: Duration,
    /// The limit for the whole request, up to the last byte of the answer.
    pub total: Duration,
}

/// A request to send.
pub struct Request {
    /// The HTTP method.
    pub method: Method,
    /// The URL to call.
    pub url: OutboundUrl,
    /// Headers in addition to those that every request has.
    pub headers: HeaderMap,
    /// The body, which may be empty.
    pub body: Bytes,
    /// Whether a guarded client may call a private address with this request, and use plain http
    /// there.
    pub allow_private: bool,
}

/// The answer of a server, whatever its status.
pub struct Answer {
    /// The HTTP status.
    pub status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// The first [`MAX_ANSWER`] bytes of the body.
    pub(crate) body: Bytes,
    /// Whether the body was longer; the rest was not read.
    pub(crate) truncated: bool,
}

/// The most bytes of an answer that are read. The answers of webhook endpoints are not used at all,
/// and those of a secret store have some hundred bytes.
pub(crate) const MAX_ANSWER: usize = 64 << 10;

/// The header `user-agent` of every request.
const USER_AGENT: &str = concat!("relatch/", env!("CARGO_PKG_VERSION"));

impl Outbound {
    /// Creates a client for servers that an operator of the control plane has configured, at any
    /// address. Plain http reaches only private addresses. `ca` contains certificates in PEM that
    /// are trusted in addition to those of the system.
    ///
    /// # Errors
    ///
    /// When `ca` contains no certificates, or TLS cannot be set up.
    pub(crate) fn for_operator(limits: Limits, ca: Option<&[u8]>) -> Result<Self, SetupError> {
        Self::new(Reach::Operator, limits, ca)
    }

    /// Creates a client for URLs that come from elsewhere, such as webhook endpoints. It calls only
    /// public addresses over https, unless a request [may call](Request::allow_private) a private
    /// one.
    ///
    /// # Errors
    ///
    /// When TLS cannot be set up.
    pub fn guarded(limits: Limits) -> Result<Self, SetupError> {
        Self::new(Reach::Guarded, limits, None)
    }

    fn new(reach: Reach, limits: Limits, ca: Option<&[u8]>) -> Result<Self, SetupError> {
        let tls = tls_config(ca)?;
        let client = |accepted| {
            reqwest::Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .dns_resolver(Arc::new(Resolver::new(accepted)))
                .redirect(reqwest::redirect::Policy::none())
                .retry(reqwest::retry::never())
                .no_proxy()
                .referer(false)
                .user_agent(USER_AGENT)
                .connect_timeout(limits.connect)
                .timeout(limits.total)
                // Requests are hours apart: the other side would have closed a kept connection by
                // then.
                .pool_max_idle_per_host(0)
                .build()
                .map_err(SetupError::Client)
        };
        Ok(Self {
            any: client(Accepted::Any)?,
            public: client(Accepted::Public)?,
            public_or_private: client(Accepted::PublicOrPrivate)?,
            private: client(Accepted::Private)?,
            reach,
            limits,
        })
    }

    /// Sends a request and waits for the answer, which is returned whatever its status. Dropping
    /// the future cancels the request at its present point.
    ///
    /// # Errors
    ///
    /// When the server may not or cannot be reached, or does not answer in time. The error names
    /// the host, but no other part of the URL.
    pub async fn send(&self, request: Request) -> Result<Answer, OutboundError> {
        let host = request.url.host();
        let accepted = self.accepted(&request)?;
        // The resolver is not called for an address.
        if let Some(address) = request.url.address() {
            accepted.judge(&host, address)?;
        }
        let client = match accepted {
            Accepted::Any => &self.any,
            Accepted::Public => &self.public,
            Accepted::PublicOrPrivate => &self.public_or_private,
            Accepted::Private => &self.private,
        };
        let fail = |error: reqwest::Error| OutboundError::of(&host, self.limits, &error);
        let mut response = client
            .request(request.method, request.url.into_inner())
            .headers(request.headers)
            .body(request.body)
            .send()
            .await
            .map_err(fail)?;
        let (mut body, mut truncated) = (BytesMut::new(), false);
        while let Some(chunk) = response.chunk().await.map_err(fail)? {
            let room = MAX_ANSWER - body.len();
            body.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if chunk.len() > room {
                truncated = true;
                break;
            }
        }
        Ok(Answer {
            status: response.status(),
            headers: std::mem::take(response.headers_mut()),
            body: body.freeze(),
            truncated,
        })
    }

    /// Returns the addresses that a request may call.
    fn accepted(&self, request: &Request) -> Result<Accepted, OutboundError> {
        match (self.reach, request.url.scheme(), request.allow_private) {
            (Reach::Operator, Scheme::Https, _) => Ok(Accepted::Any),
            (Reach::Guarded, Scheme::Https, false) => Ok(Accepted::Public),
            (Reach::Guarded, Scheme::Https, true) => Ok(Accepted::PublicOrPrivate),
            (Reach::Operator, Scheme::Http, _) | (Reach::Guarded, Scheme::Http, true) => {
                Ok(Accepted::Private)
            }
            (Reach::Guarded, Scheme::Http, false) => Err(OutboundError::Plaintext {
                host: request.url.host(),
            }),
        }
    }
}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound")
            .field("reach", &self.reach)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("method", &self.method)
            .field("url", &self.url)
            .field("body_len", &self.body.len())
            .field("allow_private", &self.allow_private)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("status", &self.status)
            .field("body_len", &self.body.len())
            .field("truncated", &self.truncated)
            .finish_non_exhaustive()
    }
}

/// Creates a configuration for TLS 1.2 and 1.3 with the roots of the system and those of `ca`.
fn tls_config(ca: Option<&[u8]>) -> Result<ClientConfig, SetupError> {
    let mut roots = RootCertStore::empty();
    // Without any roots, every handshake fails with an error that reports it; plain http to private
    // addresses and `ca` still work.
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "some of the system's certificates cannot be read"
        );
    }
    roots.add_parsable_certificates(system.certs);
    if let Some(ca) = ca {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(ca)
            .collect::<Result<_, _>>()
            .map_err(SetupError::Pem)?;
        if certificates.is_empty() {
            return Err(SetupError::NoCertificate);
        }
        for certificate in certificates {
            roots.add(certificate).map_err(SetupError::Tls)?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(SetupError::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

#[cfg(test)]
mod tests;
