//! Why a request of ours was not answered.

use std::{error::Error, io, time::Duration};

use super::{Kind, Limits};

use crate::duration::written;

/// A request that was not made or not answered. Names the host, and nothing else of the URL.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    /// Plain http to where anybody may listen.
    #[error("{host} is to be called over plain http: use https, or allow private addresses")]
    Plaintext {
        /// The host.
        host: String,
    },
    /// The host is public, but the request is in plain text.
    #[error("{host} has a public address and is to be called over plain http: use https")]
    PublicPlaintext {
        /// The host.
        host: String,
    },
    /// The host is at a private address, and such are not allowed.
    #[error("{host} has a private address: use a public one, or allow private addresses")]
    PrivateAddress {
        /// The host.
        host: String,
    },
    /// The host is at an address where no server is called.
    #[error("{host} has an address that is never called, such as a link-local one")]
    SpecialAddress {
        /// The host.
        host: String,
    },
    /// The name has no address, or nobody could say.
    #[error("the name {host} cannot be resolved")]
    Unresolved {
        /// The host.
        host: String,
    },
    /// Nothing takes connections there.
    #[error("cannot connect to {host}")]
    Connect {
        /// The host.
        host: String,
        /// Why not.
        kind: io::ErrorKind,
    },
    /// The server's certificate is not trusted, or it does not speak TLS.
    #[error("TLS with {host} failed")]
    Tls {
        /// The host.
        host: String,
        /// Why.
        source: rustls::Error,
    },
    /// It took too long.
    #[error("{host} did not {} within {}", if *connecting { "take the connection" } else { "answer" }, written(*after))]
    TimedOut {
        /// The host.
        host: String,
        /// Whether it was not even connected to.
        connecting: bool,
        /// The time that it had.
        after: Duration,
    },
    /// The answer is no HTTP, or broke off.
    #[error("{host} did not give a whole answer")]
    Broken {
        /// The host.
        host: String,
    },
}

/// A client cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The certificates are no PEM.
    #[error("the certificates cannot be read: use a file in PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// There are none.
    #[error("there is no certificate in the file: use one in PEM")]
    NoCertificate,
    /// A certificate cannot be used, or TLS not be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
    /// The HTTP client cannot be made.
    #[error("the HTTP client cannot be made")]
    Client(#[source] reqwest::Error),
}

/// A name that leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unreachable {
    /// It has no address, or nobody could say.
    #[error("it cannot be resolved")]
    Unresolved,
    /// None of its addresses is accepted, the first being of this kind.
    #[error("no address of it may be called")]
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

    /// What an error of the HTTP client means. Its own text is not used: it tells the whole URL.
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

/// An error and its causes, with those that an I/O error wraps.
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
