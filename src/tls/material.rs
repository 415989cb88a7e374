//! What handshakes are made of: the content of the files, parsed and found to fit.

use std::sync::Arc;

use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};

use super::{
    Certificate, TlsError, TlsFiles,
    files::{Content, OwnContent, OwnFiles},
    provider,
};
use crate::key::Timestamp;

/// Certificates, a key and authorities that fit each other.
#[derive(Debug)]
pub(super) struct Material {
    pub(super) own: Option<Own>,
    roots: Option<Roots>,
}

/// A certificate and its key.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) pair: Arc<SingleCertAndKey>,
    pub(super) certificate: Certificate,
}

/// The authorities, as each side judges by them.
#[derive(Debug)]
struct Roots {
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<dyn ServerCertVerifier>,
}

impl Material {
    /// Parses what the files held.
    pub(super) fn parse(content: &Content, files: &TlsFiles) -> Result<Self, TlsError> {
        let own = match (&content.own, &files.own) {
            (Some(content), Some(files)) => Some(Own::parse(content, files)?),
            (Some(_) | None, Some(_) | None) => None,
        };
        let roots = match (&content.ca, &files.ca) {
            (Some(pem), Some(path)) => {
                let mut roots = RootCertStore::empty();
                let certificates = certificates(pem, path)?;
                for certificate in certificates {
                    roots
                        .add(certificate)
                        .map_err(|source| TlsError::Authority {
                            path: path.clone(),
                            source,
                        })?;
                }
                Some(Roots::new(roots)?)
            }
            (Some(_) | None, Some(_) | None) => None,
        };
        Ok(Self { own, roots })
    }

    /// Whether its certificate is valid at `now`.
    pub(super) fn check_validity(&self, files: &TlsFiles, now: Timestamp) -> Result<(), TlsError> {
        let (Some(own), Some(files)) = (&self.own, &files.own) else {
            return Ok(());
        };
        let (not_before, not_after) = (own.certificate.not_before(), own.certificate.not_after());
        let (path, certificate) = (files.cert.clone(), Box::new(own.certificate.clone()));
        if now < not_before {
            Err(TlsError::NotYetValid {
                path,
                not_before,
                certificate,
            })
        } else if now > not_after {
            Err(TlsError::Expired {
                path,
                not_after,
                certificate,
            })
        } else {
            Ok(())
        }
    }

    /// Who judges clients; none when they are not asked for a certificate.
    pub(super) fn clients(&self) -> Option<&Arc<dyn ClientCertVerifier>> {
        self.roots.as_ref().map(|roots| &roots.clients)
    }

    /// Who judges servers, by the authorities of the files or else by those of the system.
    pub(super) fn servers(&self) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        if let Some(roots) = &self.roots {
            return Ok(Arc::clone(&roots.servers));
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(TlsError::NoSystemRoots);
        }
        Ok(Roots::new(roots)?.servers)
    }
}

impl Own {
    fn parse(content: &OwnContent, files: &OwnFiles) -> Result<Self, TlsError> {
        let chain = certificates(&content.cert, &files.cert)?;
        let damaged = || TlsError::Damaged {
            path: files.cert.clone(),
        };
        let certificate = chain
            .first()
            .and_then(|first| Certificate::read(first))
            .ok_or_else(damaged)?;
        let no_key = || TlsError::NoKey {
            path: files.key.clone(),
        };
        let key = PrivateKeyDer::from_pem_slice(&content.key).map_err(|_| no_key())?;
        let key = provider()
            .key_provider
            .load_private_key(key)
            .map_err(|_| no_key())?;
        let pair = CertifiedKey::new(chain, key);
        match pair.keys_match() {
            Ok(()) => Ok(Self {
                pair: Arc::new(SingleCertAndKey::from(pair)),
                certificate,
            }),
            Err(rustls::Error::InconsistentKeys(_)) => Err(TlsError::Mismatch {
                cert: files.cert.clone(),
                key: files.key.clone(),
                certificate: Box::new(certificate),
            }),
            Err(_) => Err(damaged()),
        }
    }
}

impl Roots {
    fn new(roots: RootCertStore) -> Result<Self, TlsError> {
        let roots = Arc::new(roots);
        Ok(Self {
            clients: WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
                .build()?,
            servers: WebPkiServerVerifier::builder_with_provider(roots, provider()).build()?,
        })
    }
}

fn certificates(
    pem: &[u8],
    path: &std::path::Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certificates = certificates.map_err(|_| TlsError::Damaged {
        path: path.to_owned(),
    })?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate {
            path: path.to_owned(),
        });
    }
    Ok(certificates)
}
