//! Errors of certificate files.

use std::{io, path::PathBuf};

use super::{Certificate, TrustDomain};
use crate::key::Timestamp;

/// The reason that certificates, keys or authorities cannot be used. The text names the file and
/// the remedy.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: cannot be read, check the path and its permissions", path.display())]
    Read {
        /// The path of the file.
        path: PathBuf,
        source: io::Error,
    },
    /// A file is larger than certificate files are.
    #[error("{}: is larger than {limit} bytes, too large for certificates; check the path", path.display())]
    TooLarge {
        path: PathBuf,
        /// The maximum number of bytes.
        limit: u64,
    },
    /// Every user of the machine can use a private key.
    #[error("{}: every user of this machine can read this private key (mode {mode:03o}): `chmod o= {}`", path.display(), path.display())]
    Exposed {
        path: PathBuf,
        /// The permission bits of the file.
        mode: u32,
    },
    /// A file contains no certificate.
    #[error("{}: holds no certificate in PEM (`-----BEGIN CERTIFICATE-----`)", path.display())]
    NoCertificate {
        /// The path of the file.
        path: PathBuf,
    },
    /// The PEM or a certificate in a file cannot be parsed.
    #[error("{}: holds a certificate that cannot be read: it is damaged, or half written", path.display())]
    Damaged {
        /// The path of the file.
        path: PathBuf,
    },
    /// A file contains no private key.
    #[error("{}: holds no private key in PEM that can be used (PKCS#8, SEC 1 or PKCS#1; ECDSA P-256 or P-384, Ed25519 or RSA)", path.display())]
    NoKey {
        /// The path of the file.
        path: PathBuf,
    },
    /// Certificate and key do not match.
    #[error("{} is not the key of the certificate in {}: {certificate}", key.display(), cert.display())]
    Mismatch {
        /// The file of the certificate.
        cert: PathBuf,
        /// The file of the key.
        key: PathBuf,
        certificate: Box<Certificate>,
    },
    /// A certificate has expired.
    #[error("{}: the certificate expired on {not_after}: {certificate}", path.display())]
    Expired {
        /// The file of the certificate.
        path: PathBuf,
        /// The end of its validity.
        not_after: Timestamp,
        certificate: Box<Certificate>,
    },
    /// A certificate is not yet valid.
    #[error("{}: the certificate is not valid before {not_before}: {certificate}", path.display())]
    NotYetValid {
        /// The file of the certificate.
        path: PathBuf,
        /// The start of its validity.
        not_before: Timestamp,
        certificate: Box<Certificate>,
    },
    /// The system trusts no authority.
    #[error("the system has no certificates of authorities: name a file with those to trust")]
    NoSystemRoots,
    /// An authority cannot be used.
    #[error("{}: holds an authority that cannot be used", path.display())]
    Authority {
        path: PathBuf,
        source: rustls::Error,
    },
    /// The bundles of two trust domains contain the same authority, which could sign for both.
    #[error("{}: the bundle of {domain} holds an authority that the bundle of {other} ({}) holds, too, so that it could sign for both: {authority}; give each trust domain authorities of its own", path.display(), other_path.display())]
    SharedAuthority {
        /// The file that is not used as a whole.
        path: PathBuf,
        /// The trust domain of this file.
        domain: TrustDomain,
        other: TrustDomain,
        /// The file of the other trust domain.
        other_path: PathBuf,
        authority: Box<Certificate>,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
    /// No verifier can be built from the authorities.
    #[error("the authorities cannot be used")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}
