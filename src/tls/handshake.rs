//! How a handshake fails: which side refused which certificate, and why.

use std::{io, time::Duration};

use rustls::{AlertDescription, CertificateError, Error};

use super::{Certificate, IdentityError, TlsError};
use crate::{duration::written, key::Timestamp};

/// No connection came of a handshake. Its text is for the operator of this side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The other side took too long.
    #[error("the {peer} did not finish the TLS handshake within {}", written(*.after))]
    Slow {
        /// Who.
        peer: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// It was the oldest of too many.
    #[error("the TLS handshake was given up: too many were under way, and this was the oldest")]
    Crowded,
    /// What came is not TLS.
    #[error("the {peer} does not speak TLS: {hint}")]
    NotTls {
        /// Who.
        peer: &'static str,
        /// What to look at.
        hint: &'static str,
    },
    /// We do not accept the certificate of the other side.
    #[error("the certificate of the {peer} is not accepted: {reason}{}", shown(.certificate.as_deref()))]
    Refused {
        /// Whose.
        peer: &'static str,
        /// Why not.
        reason: String,
        /// What it says of itself.
        certificate: Option<Box<Certificate>>,
    },
    /// The other side has shown no certificate.
    #[error("the client has shown no certificate, and this port asks for one")]
    NoCertificate,
    /// The other side does not accept us.
    #[error("the {peer} refuses the connection: {reason}{}", ours(.certificate.as_deref()))]
    RefusedByPeer {
        /// Who.
        peer: &'static str,
        /// Why.
        reason: String,
        /// What we have shown, with its file.
        certificate: Option<String>,
    },
    /// The two have no version or no protocol in common.
    #[error("{0}")]
    Incompatible(String),
    /// The certificate speaks for nobody.
    #[error("the certificate of the client is not accepted: {reason}{}", shown(Some(.certificate)))]
    NoIdentity {
        /// Why.
        reason: IdentityError,
        /// What it says of itself.
        certificate: Box<Certificate>,
    },
    /// The connection broke.
    #[error("the connection broke during the TLS handshake")]
    Broken(#[source] io::Error),
    /// Our own side is not set up.
    #[error(transparent)]
    Setup(#[from] TlsError),
    /// Something else about TLS.
    #[error("the TLS handshake with the {peer} failed: {source}")]
    Other {
        /// Who.
        peer: &'static str,
        /// What rustls says.
        source: Error,
    },
}

/// The two sides, as each calls the other.
pub(super) const CLIENT: &str = "client";
pub(super) const SERVER: &str = "server";

impl HandshakeError {
    /// A name for a metric.
    #[must_use]
    pub(crate) const fn as_str(&self) -> &'static str {
        match self {
            Self::Slow { .. } => "slow",
            Self::Crowded => "crowded",
            Self::NotTls { .. } => "not_tls",
            Self::Refused { .. } | Self::NoIdentity { .. } => "certificate_refused",
            Self::NoCertificate => "no_certificate",
            Self::RefusedByPeer { .. } => "refused_by_peer",
            Self::Incompatible(_) => "incompatible",
            Self::Broken(_) => "broken",
            Self::Setup(_) | Self::Other { .. } => "other",
        }
    }

    /// What a failed read or write of a handshake, or of the connection after it, means. `theirs` is what the other
    /// side has shown, `ours` what we have.
    pub(super) fn from_io(
        peer: &'static str,
        error: io::Error,
        theirs: Option<Certificate>,
        ours: Option<String>,
    ) -> Self {
        match tls_error(&error) {
            Some(cause) => Self::from_tls(peer, cause.clone(), theirs, ours),
            None => Self::Broken(error),
        }
    }

    fn from_tls(
        peer: &'static str,
        error: Error,
        theirs: Option<Certificate>,
        ours: Option<String>,
    ) -> Self {
        match error {
            Error::InvalidCertificate(error) => Self::Refused {
                peer,
                reason: reason(&error),
                certificate: theirs.map(Box::new),
            },
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::AlertReceived(alert) => Self::from_alert(peer, alert, ours),
            Error::InvalidMessage(_) => Self::NotTls {
                peer,
                hint: if peer == CLIENT {
                    "it may have been given http:// where this port wants https://"
                } else {
                    "the port may be a plaintext one, or another service's"
                },
            },
            Error::PeerIncompatible(_) => Self::Incompatible(format!(
                "the {peer} does not speak TLS 1.3, or no cipher that is known here"
            )),
            Error::NoApplicationProtocol => Self::no_http2(peer),
            source => Self::Other { peer, source },
        }
    }

    /// The other side does not agree on HTTP/2.
    pub(super) fn no_http2(peer: &str) -> Self {
        Self::Incompatible(format!(
            "the {peer} does not agree on HTTP/2 (ALPN h2): it may be another service"
        ))
    }

    fn from_alert(
        peer: &'static str,
        alert: AlertDescription,
        certificate: Option<String>,
    ) -> Self {
        let reason = match alert {
            AlertDescription::CertificateRequired => {
                "it asks for a certificate, and none is configured here".to_owned()
            }
            AlertDescription::CertificateExpired => {
                "it says that our certificate has expired, or is not valid yet".to_owned()
            }
            AlertDescription::UnknownCA => {
                "it does not trust the issuer of our certificate".to_owned()
            }
            AlertDescription::AccessDenied => "it does not let our certificate in".to_owned(),
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRevoked => {
                format!("it does not accept our certificate ({alert:?}); its log says why")
            }
            AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
                return Self::Incompatible(format!(
                    "the {peer} does not speak TLS 1.3, or no cipher that is known here"
                ));
            }
            AlertDescription::NoApplicationProtocol => return Self::no_http2(peer),
            other => format!("TLS alert {other:?}; its log says why"),
        };
        Self::RefusedByPeer {
            peer,
            reason,
            certificate,
        }
    }
}

/// The error of rustls in an error of the connection.
pub(super) fn tls_error(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

fn reason(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired".to_owned()
        }
        CertificateError::NotValidYet => "it is not valid yet".to_owned(),
        CertificateError::NotValidYetContext { time, .. } => {
            let now = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
            let now = Timestamp::from_millis(now.saturating_mul(1_000));
            format!("it is not valid yet by the clock of this machine, {now}")
        }
        CertificateError::UnknownIssuer => {
            "its issuer is not among the authorities that are trusted here".to_owned()
        }
        CertificateError::BadSignature => {
            "its signature is not that of the authority that it names".to_owned()
        }
        CertificateError::NotValidForName => "it is for another host".to_owned(),
        CertificateError::NotValidForNameContext { expected, .. } => {
            format!("it is not for the host {}", expected.to_str())
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "it is for another use (a server needs serverAuth, a client clientAuth)".to_owned()
        }
        // rustls' own enum, open to additions, and errors of our verifiers.
        CertificateError::Other(other) => other.to_string(),
        other => other.to_string(),
    }
}

fn shown(certificate: Option<&Certificate>) -> String {
    certificate.map_or_else(String::new, |certificate| format!("; it is {certificate}"))
}

fn ours(certificate: Option<&str>) -> String {
    certificate.map_or_else(String::new, |certificate| {
        format!("; ours is {certificate}")
    })
}
