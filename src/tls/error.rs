//! Why files of certificates cannot be used.

use std::{io, path::PathBuf};

use super::{Certificate, TrustDomain};
use crate::key::Timestamp;

/// Certificates, keys or authorities cannot be used as they are. Its text names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: cannot be read, check the path and its permissions", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is larger than any of its kind.
    #[error("{}: is larger than {limit} bytes, which no file of certificates is; check the path", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The most bytes that are read.
        limit: u64,
    },
    /// A private key is open to everybody.
    #[error("{}: every user of this machine can read this private key (mode {mode:03o}): `chmod o= {}`", path.display(), path.display())]
    Exposed {
        /// Which.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A file holds no certificate.
    #[error("{}: holds no certificate in PEM (`-----BEGIN CERTIFICATE-----`)", path.display())]
    NoCertificate {
        /// Which.
        path: PathBuf,
    },
    /// A file is PEM that is broken, or holds a certificate that is.
    #[error("{}: holds a certificate that cannot be read: it is damaged, or half written", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
    },
    /// A file holds no private key.
    #[error("{}: holds no private key in PEM that can be used (PKCS#8, SEC 1 or PKCS#1; ECDSA P-256 or P-384, Ed25519 or RSA)", path.display())]
    NoKey {
        /// Which.
        path: PathBuf,
    },
    /// Certificate and key are not of one pair.
    #[error("{} is not the key of the certificate in {}: {certificate}", key.display(), cert.display())]
    Mismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What it says of itself.
        certificate: Box<Certificate>,
    },
    /// A certificate is not valid any more.
    #[error("{}: the certificate has expired on {not_after}: {certificate}", path.display())]
    Expired {
        /// The certificate's file.
        path: PathBuf,
        /// When.
        not_after: Timestamp,
        /// What it says of itself.
        certificate: Box<Certificate>,
    },
    /// A certificate is not valid yet.
    #[error("{}: the certificate is not valid before {not_before}: {certificate}", path.display())]
    NotYetValid {
        /// The certificate's file.
        path: PathBuf,
        /// From when on it is.
        not_before: Timestamp,
        /// What it says of itself.
        certificate: Box<Certificate>,
    },
    /// The system trusts nobody.
    #[error("the system has no certificates of authorities: name a file with those to trust")]
    NoSystemRoots,
    /// An authority cannot be used.
    #[error("{}: holds an authority that cannot be used", path.display())]
    Authority {
        /// Its file.
        path: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// Two trust domains have one authority, which could sign for both.
    #[error("{}: the bundle of {domain} holds an authority that the bundle of {other} ({}) holds, too, so that it could sign for both: {authority}; give each trust domain authorities of its own", path.display(), other_path.display())]
    SharedAuthority {
        /// The file that is not used as a whole.
        path: PathBuf,
        /// Its trust domain.
        domain: TrustDomain,
        /// The other trust domain.
        other: TrustDomain,
        /// Its file.
        other_path: PathBuf,
        /// What the authority says of itself.
        authority: Box<Certificate>,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
    /// Authorities cannot be used to judge others by.
    #[error("the authorities cannot be used")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}
