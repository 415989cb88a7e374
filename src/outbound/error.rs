//! The reasons that a request was not answered.

use std::{error::Error, io, time::Duration};

use super::{Kind, Limits};

use crate::duration::written;

/// A request that was not sent or not answered. It names the host, and no other part of the URL.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    /// The request uses plain http, which is allowed only for private addresses.
    #[error("the URL of {host} uses plain http: use https, or allow private addresses")]
    Plaintext {
        /// The host, with a port other than the default.
        host: String,
    },
    /// The host has a public address, but the request uses plain http.
    #[error("{host} has a public address, but its URL uses plain http: use https")]
    PublicPlaintext {
        /// The host, with a port other than the default.
        host: String,
    },
    /// The host has a private address, and those are not allowed.
    #[error("{host} has a private address: use a public one, or allow private addresses")]
    PrivateAddress {
        /// The host, with a port other than the default.
        host: String,
    },
    /// The host has an address that is never called.
    #[error("{host} has an address that is never called, such as a link-local one")]
    SpecialAddress {
        /// The host, with a port other than the default.
        host: String,
    },
    /// The name has no address, or its lookup failed.
    #[error("the name {host} cannot be resolved")]
    Unresolved {
        /// The host, with a port other than the default.
        host: String,
    },
    /// The connection was refused, or failed in another way.
    #[error("cannot connect to {host}")]
    Connect {
        /// The host, with a port other than the default.
        host: String,
        /// The kind of the system's error.
        kind: io::ErrorKind,
    },
    /// The server's certificate is not trusted, or it does not speak TLS.
    #[error("TLS with {host} failed")]
    Tls {
        /// The host, with a port other than the default.
        host: String,
        /// The error of rustls.
        source: rustls::Error,
    },
    /// The host was too slow.
    #[error("{host} did not {} within {}", if *connecting { "accept the connection" } else { "answer" }, written(*after))]
    TimedOut {
        /// The host, with a port other than the default.
        host: String,
        /// Whether the connection was not yet complete.
        connecting: bool,
        /// The time limit.
        after: Duration,
    },
    /// The answer is not HTTP, or ended early.
    #[error("{host} did not send a complete answer")]
    Broken {
        /// The host, with a port other than the default.
        host: String,
    },
}

/// The reason that a client cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The certificates are not in PEM.
    #[error("the certificates cannot be read: use a file in PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// The file contains no certificate.
    #[error("there is no certificate in the file: use one in PEM")]
    NoCertificate,
    /// A certificate cannot be used, or TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
    /// The HTTP client cannot be created.
    #[error("the HTTP client cannot be created")]
    Client(#[source] reqwest::Error),
}

/// The reason that a name has no address to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unreachable {
    /// The name has no address, or its lookup failed.
    #[error("it cannot be resolved")]
    Unresolved,
    /// None of its addresses is accepted; the first one is of this kind.
    #[error("none of its addresses may be called")]
    Refused(Kind),
}

impl OutboundError {
    pub(super) fn unreachable(host: &str, why: Unreachable) -> Self {
        let host = host.to_owned();
        match why {
            Unreachable::Unresolved => Self::Unresolved { host },
            Unreachable::Refused(Kind::Public) => Self::PublicPlaintext { host },
            Unreachable::Refused(Kind::Private) => Self::PrivateAddress { host },
            Unreachable::Refused(Kind::Special) => Self::SpecialAddress { host },
        }
    }

    /// Explains an error of the HTTP client. Its own text is not used, because it contains the
    /// whole URL.
    pub(super) fn of(host: &str, limits: Limits, error: &reqwest::Error) -> Self {
        let connecting = error.is_connect();
        if error.is_timeout() {
            return Self::TimedOut {
                host: host.to_owned(),
                connecting,
                after: if connecting {
                    limits.connect
                } else {
                    limits.total
                },
            };
        }
        let mut io = None;
        for cause in Causes(Some(error)) {
            if let Some(why) = cause.downcast_ref::<Unreachable>() {
                return Self::unreachable(host, *why);
            }
            if let Some(tls) = cause.downcast_ref::<rustls::Error>() {
                return Self::Tls {
                    host: host.to_owned(),
                    source: tls.clone(),
                };
            }
            if let Some(error) = cause.downcast_ref::<io::Error>() {
                io.get_or_insert(error.kind());
            }
        }
        let host = host.to_owned();
        match io {
            Some(kind) if connecting => Self::Connect { host, kind },
            Some(_) | None => Self::Broken { host },
        }
    }
}

/// An error and its causes, including those that an I/O error wraps.
struct Causes<'a>(Option<&'a (dyn Error + 'static)>);

impl<'a> Iterator for Causes<'a> {
    type Item = &'a (dyn Error + 'static);

    fn next(&mut self) -> Option<Self::Item> {
        let error = self.0?;
        let wrapped = error
            .downcast_ref::<io::Error>()
            .and_then(|error| error.get_ref())
            .map(|inner| inner as &(dyn Error + 'static));
        self.0 = wrapped.or_else(|| error.source());
        Some(error)
    }
}
