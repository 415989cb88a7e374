//! Requests that relatch itself makes: to servers of its operator and to webhook endpoints.
//!
//! Who may name a URL must not thereby reach what only the control plane's machine can reach: its loopback, its
//! network, the metadata service of its cloud. A client therefore has a [`Reach`], held against the very address that
//! is connected to: a name is resolved and judged in one step, for every connection anew, so that a name that changes
//! its mind gains nothing. Redirects are never followed, proxies and cookies not known, connections not kept.

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

/// Makes requests; cheap to clone.
#[derive(Clone)]
pub struct Outbound {
    any: reqwest::Client,
    public: reqwest::Client,
    public_or_private: reqwest::Client,
    private: reqwest::Client,
    reach: Reach,
    limits: Limits,
}

/// How far a client's requests may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// An operator of the control plane names the servers.
    Operator,
    /// Whoever may administer a keyring names the servers.
    Guarded,
}

/// How long a request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Resolving the name, connecting and the TLS handshake.
    pub connect: Duration,
    /// All of it, to the last byte of the answer.
    pub total: Duration,
}

/// A request.
pub struct Request {
    /// The method.
    pub method: Method,
    /// Where to.
    pub url: OutboundUrl,
    /// Beside those that every request has.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// Whether a guarded client may go to a private address with it.
    pub allow_private: bool,
}

/// What a server answered, whatever its status.
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub(crate) headers: HeaderMap,
    /// The body's first [`MAX_ANSWER`] bytes.
    pub(crate) body: Bytes,
    /// Whether more followed, which was not read.
    pub(crate) truncated: bool,
}

/// The most bytes of an answer that are read. Those of webhook endpoints are not used at all, those of a secret store
/// are some hundred bytes.
pub(crate) const MAX_ANSWER: usize = 64 << 10;

/// As servers see us.
const USER_AGENT: &str = concat!("relatch/", env!("CARGO_PKG_VERSION"));

impl Outbound {
    /// A client for servers that an operator of the control plane has configured: at any address. Plain http only
    /// reaches private addresses. `ca` holds certificates in PEM that are trusted beside those of the system.
    ///
    /// # Errors
    ///
    /// When `ca` holds no certificates, or TLS cannot be set up.
    pub(crate) fn for_operator(limits: Limits, ca: Option<&[u8]>) -> Result<Self, SetupError> {
        Self::new(Reach::Operator, limits, ca)
    }

    /// A client for URLs that come from elsewhere, such as webhook endpoints: only at public addresses and over https,
    /// unless a request [may go](Request::allow_private) to a private one.
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
                // Requests are hours apart; a connection kept would only be found closed by the other side.
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

    /// Sends a request and waits for its answer, which is returned whatever its status. Dropping the future ends the
    /// request where it is.
    ///
    /// # Errors
    ///
    /// When the server may not or cannot be reached, or does not answer in time. What is named is the host, never more
    /// of the URL.
    pub async fn send(&self, request: Request) -> Result<Answer, OutboundError> {
        let host = request.url.host();
        let accepted = self.accepted(&request)?;
        // The resolver is not asked about an address.
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

    /// The addresses to which a request may go.
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

/// TLS 1.2 and 1.3 with the system's roots and those of `ca`.
fn tls_config(ca: Option<&[u8]>) -> Result<ClientConfig, SetupError> {
    let mut roots = RootCertStore::empty();
    // Without any, every handshake fails and says so; plain http on loopback and `ca` still work.
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
