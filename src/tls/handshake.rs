//! Errors of handshakes: which side refused which certificate, and why.

use std::{io, time::Duration};

use rustls::{AlertDescription, CertificateError, Error};

use super::{Certificate, IdentityError, TlsError};
use crate::{duration::written, key::Timestamp};

/// The reason that a handshake failed. The text is for the operator of this side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The other side was too slow.
    #[error("the {peer} did not finish the TLS handshake within {}", written(*.after))]
    Slow {
        peer: &'static str,
        /// The time that it had.
        after: Duration,
    },
    /// Too many handshakes were in progress, and this was the oldest.
    #[error("the TLS handshake was cancelled: too many were in progress, and this was the oldest")]
    Crowded,
    /// The other side sent bytes that are not TLS.
    #[error("the {peer} does not speak TLS: {hint}")]
    NotTls {
        peer: &'static str,
        /// The probable cause.
        hint: &'static str,
    },
    /// This side does not accept the certificate of the other side.
    #[error("the certificate of the {peer} is not accepted: {reason}{}", shown(.certificate.as_deref()))]
    Refused {
        peer: &'static str,
        reason: String,
        certificate: Option<Box<Certificate>>,
    },
    /// The client presented no certificate, but this side requires one.
    #[error("the client presented no certificate, but this port requires one")]
    NoCertificate,
    /// The other side does not accept this side.
    #[error("the {peer} refuses the connection: {reason}{}", ours(.certificate.as_deref()))]
    RefusedByPeer {
        peer: &'static str,
        reason: String,
        /// The certificate that this side presented, with its file.
        certificate: Option<String>,
    },
    /// The two sides have no TLS version, cipher suite or protocol in common.
    #[error("{0}")]
    Incompatible(String),
    /// The certificate of the client has no identity, or several.
    #[error("the certificate of the client is not accepted: {reason}{}", shown(Some(.certificate)))]
    NoIdentity {
        reason: IdentityError,
        certificate: Box<Certificate>,
    },
    /// The connection was lost.
    #[error("the connection broke during the TLS handshake")]
    Broken(#[source] io::Error),
    /// The TLS configuration of this side cannot be used.
    #[error(transparent)]
    Setup(#[from] TlsError),
    /// Another error of TLS.
    #[error("the TLS handshake with the {peer} failed: {source}")]
    Other {
        peer: &'static str,
        /// The error of rustls.
        source: Error,
    },
}

/// The names of the two sides in errors.
pub(super) const CLIENT: &str = "client";
pub(super) const SERVER: &str = "server";

impl HandshakeError {
    /// Returns the name of the error in metrics.
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

    /// Explains a failed read or write of a handshake, or of the connection after it. `theirs` is
    /// the certificate that the other side presented; `ours` describes the one of this side.
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
                    "it may use http://, but this port needs https://"
                } else {
                    "the port may use plaintext, or belong to another service"
                },
            },
            Error::PeerIncompatible(_) => Self::Incompatible(format!(
                "the {peer} does not speak TLS 1.3, or no cipher suite that relatch supports"
            )),
            Error::NoApplicationProtocol => Self::no_http2(peer),
            source => Self::Other { peer, source },
        }
    }

    /// Returns the error for a side that does not agree on HTTP/2.
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
                "it requires a certificate, but none is configured here".to_owned()
            }
            AlertDescription::CertificateExpired => {
                "it reports that our certificate has expired, or is not valid yet".to_owned()
            }
            AlertDescription::UnknownCA => {
                "it does not trust the issuer of our certificate".to_owned()
            }
            AlertDescription::AccessDenied => "it denies access to our certificate".to_owned(),
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRevoked => {
                format!("it does not accept our certificate ({alert:?}); see its log")
            }
            AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
                return Self::Incompatible(format!(
                    "the {peer} does not speak TLS 1.3, or no cipher suite that relatch supports"
                ));
            }
            AlertDescription::NoApplicationProtocol => return Self::no_http2(peer),
            other => format!("TLS alert {other:?}; see its log"),
        };
        Self::RefusedByPeer {
            peer,
            reason,
            certificate,
        }
    }
}

/// Returns the error of rustls within an error of the connection.
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
        // The enum of rustls is not exhaustive. Errors of our own verifiers are `Other`.
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
