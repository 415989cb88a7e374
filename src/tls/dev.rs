//! Certificates to try out TLS: an authority whose key is in a file, and certificates that it
//! signs.
//!
//! In production, the issuer of the mesh (SPIRE, cert-manager, Vault) creates certificates that are
//! valid for hours, renews them automatically, and keeps the key of its authority out of files.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::{Certificate, Identity};
use crate::key::Timestamp;

/// An authority that signs certificates.
pub(crate) struct DevAuthority {
    issuer: Issuer<'static, KeyPair>,
    pair: DevPair,
    /// The end of its validity. No certificate that it signs is valid for longer.
    not_after: Timestamp,
}

/// The owner of a certificate.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// The common name, for people.
    pub(crate) name: String,
    /// DNS names and IP addresses, for servers.
    pub(crate) hosts: Vec<String>,
    /// The URI that the certificate speaks for.
    pub(crate) identity: Option<Identity>,
    /// Whether the certificate is for servers; otherwise it is for clients.
    pub(crate) is_server: bool,
}

/// A certificate and its key, in PEM.
pub(crate) struct DevPair {
    pub(crate) cert: String,
    pub(crate) key: Zeroizing<String>,
}

/// The reason that a certificate cannot be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DevError {
    /// A name is not valid in a certificate, or the random source failed.
    #[error("the certificate of {name} cannot be created")]
    Make {
        /// The name of the certificate's subject.
        name: String,
        source: rcgen::Error,
    },
    /// The files of the authority do not come from an earlier call.
    #[error("ca.pem and ca.key were not created by this command: choose another directory")]
    Authority,
    /// The authority has expired.
    #[error("the authority in ca.pem expired on {not_after}: choose another directory")]
    Ended {
        /// The end of its validity.
        not_after: Timestamp,
    },
}

/// The common name by which a later call recognizes its own authority in a file.
const AUTHORITY: &str = "relatch certs dev";
/// The validity of the authority, in lives of a certificate: longer, so that certificates can be
/// replaced under the same authority.
const AUTHORITY_LIVES: u32 = 10;
/// The validity starts this long ago, so that a machine whose clock is a little behind accepts the
/// certificates at once.
const BACKDATED: Duration = Duration::from_mins(5);

impl DevAuthority {
    /// Creates an authority that is valid for ten times `life` from `now` on.
    ///
    /// # Errors
    ///
    /// When the random source fails.
    pub(crate) fn new(now: Timestamp, life: Duration) -> Result<Self, DevError> {
        let not_after = now.saturating_add(life.saturating_mul(AUTHORITY_LIVES));
        let params = authority(now, not_after);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(cannot(AUTHORITY))?;
        let cert = params.self_signed(&key).map_err(cannot(AUTHORITY))?.pem();
        let pair = DevPair {
            cert,
            key: Zeroizing::new(key.serialize_pem()),
        };
        Ok(Self {
            issuer: Issuer::new(params, key),
            pair,
            not_after,
        })
    }

    /// Returns the authority of an earlier call, from its certificate and key in PEM.
    ///
    /// # Errors
    ///
    /// When they are not a pair from an earlier call, or the authority has expired at `now`.
    pub(crate) fn from_pem(pair: DevPair, now: Timestamp) -> Result<Self, DevError> {
        let der = CertificateDer::from_pem_slice(pair.cert.as_bytes());
        let der = der.map_err(|_| DevError::Authority)?;
        let certificate = Certificate::read(&der).ok_or(DevError::Authority)?;
        let key = KeyPair::from_pem(&pair.key).map_err(|_| DevError::Authority)?;
        let is_ours = certificate.subject() == format!("CN={AUTHORITY}")
            && certificate.public_key() == key.public_key_raw();
        if !is_ours {
            return Err(DevError::Authority);
        }
        let not_after = certificate.not_after();
        if now >= not_after {
            return Err(DevError::Ended { not_after });
        }
        Ok(Self {
            issuer: Issuer::new(authority(now, not_after), key),
            pair,
            not_after,
        })
    }

    /// Returns its certificate, which others trust, and its key.
    #[must_use]
    pub(crate) const fn pair(&self) -> &DevPair {
        &self.pair
    }

    /// Creates a certificate with a new key, valid for `life` from `now` on, but no longer than the
    /// authority.
    ///
    /// # Errors
    ///
    /// When a name is not valid in a certificate, or the random source fails.
    pub(crate) fn issue(
        &self,
        subject: &Subject,
        now: Timestamp,
        life: Duration,
    ) -> Result<DevPair, DevError> {
        let name = subject.name.as_str();
        let hosts = CertificateParams::new(subject.hosts.clone()).map_err(cannot(name))?;
        let not_after = now.saturating_add(life).min(self.not_after);
        let mut params = params(name, now, not_after);
        params.subject_alt_names = hosts.subject_alt_names;
        if let Some(identity) = &subject.identity {
            let uri = identity.as_str().try_into().map_err(cannot(name))?;
            params.subject_alt_names.push(SanType::URI(uri));
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![if subject.is_server {
            ExtendedKeyUsagePurpose::ServerAuth
        } else {
            ExtendedKeyUsagePurpose::ClientAuth
        }];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(cannot(name))?;
        let cert = params.signed_by(&key, &self.issuer).map_err(cannot(name))?;
        let cert = cert.pem();
        Ok(DevPair {
            cert,
            key: Zeroizing::new(key.serialize_pem()),
        })
    }
}

impl std::fmt::Debug for DevPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DevPair(redacted)")
    }
}

impl std::fmt::Debug for DevAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DevAuthority(redacted)")
    }
}

fn authority(now: Timestamp, not_after: Timestamp) -> CertificateParams {
    let mut params = params(AUTHORITY, now, not_after);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn params(name: &str, now: Timestamp, not_after: Timestamp) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = second(now.saturating_sub(BACKDATED));
    params.not_after = second(not_after);
    params
}

fn second(at: Timestamp) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(at.as_millis() / 1_000)
        .expect("a timestamp lies within the years 1970 to 9999")
}

fn cannot(name: &str) -> impl FnOnce(rcgen::Error) -> DevError {
    let name = name.to_owned();
    move |source| DevError::Make { name, source }
}
