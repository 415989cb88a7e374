//! What handshakes are made of: the content of the files, parsed and found to fit.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SigningKey, SingleCertAndKey},
};

use super::{
    Authorities, Certificate, TlsError, TlsFiles, TrustDomain,
    files::{self, AuthorityContent, Content, Fingerprint, OwnContent, OwnFiles, fingerprint},
    provider,
    verifier::DomainJudge,
};
use crate::key::Timestamp;

/// Certificates, a key and authorities that fit each other.
#[derive(Debug)]
pub(super) struct Material {
    pub(super) own: Option<Own>,
    trusted: Option<Trusted>,
}

/// What came of the content of the files.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) material: Material,
    /// Why bundles that have changed are not used. The material has what those held before.
    pub(super) problems: Vec<TlsError>,
}

/// A certificate and its key.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) pair: Arc<SingleCertAndKey>,
    pub(super) certificate: Certificate,
    fingerprint: Fingerprint,
}

/// Authorities, and who judges by them.
#[derive(Debug)]
struct Trusted {
    authorities: Authorities<Arc<Roots>>,
    judges: Judges,
}

/// The authorities of one file.
#[derive(Debug)]
struct Roots {
    path: PathBuf,
    certificates: Vec<Certificate>,
    judges: Judges,
    fingerprint: Fingerprint,
}

/// Who judges each side.
#[derive(Clone, Debug)]
struct Judges {
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<dyn ServerCertVerifier>,
}

impl Material {
    /// Parses what the files held. A bundle that cannot be used stays as it is `in_use`, so that a trust domain whose bundle
    /// somebody else writes keeps nobody from renewing a certificate. Everything else is used as a whole, or not at all.
    ///
    /// # Errors
    ///
    /// When that whole cannot be used, or a bundle that was not in use before.
    pub(super) fn parse(
        content: Content,
        files: &TlsFiles,
        in_use: Option<&Self>,
    ) -> Result<Parsed, TlsError> {
        let own = match (&content.own, &files.own) {
            (Some(content), Some(files)) => Some(Own::parse(content, files)?),
            (Some(_) | None, Some(_) | None) => None,
        };
        let in_use = in_use.and_then(|material| material.trusted.as_ref());
        let mut problems = Vec::new();
        let trusted = match content.ca {
            Some(content) => Some(Trusted::parse(content, in_use, &mut problems)?),
            None => None,
        };
        let material = Self { own, trusted };
        Ok(Parsed { material, problems })
    }

    /// Whether it was made of the same content.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.fingerprints() == other.fingerprints()
    }

    fn fingerprints(&self) -> Vec<Fingerprint> {
        let own = self.own.iter().map(|own| own.fingerprint);
        let trusted = self.trusted.iter();
        let roots = trusted.flat_map(|trusted| trusted.authorities.iter());
        own.chain(roots.map(|(_, roots)| roots.fingerprint))
            .collect()
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
        self.trusted.as_ref().map(|trusted| &trusted.judges.clients)
    }

    /// Who judges servers, by the authorities of the files or else by those of the system.
    pub(super) fn servers(&self) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        if let Some(trusted) = &self.trusted {
            return Ok(Arc::clone(&trusted.judges.servers));
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(TlsError::NoSystemRoots);
        }
        Ok(Judges::by(roots)?.servers)
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
        let key = signing_key(&content.key, &files.key)?;
        let pair = CertifiedKey::new(chain, key);
        match pair.keys_match() {
            Ok(()) => Ok(Self {
                pair: Arc::new(SingleCertAndKey::from(pair)),
                certificate,
                fingerprint: content.fingerprint(),
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

impl Trusted {
    fn parse(
        content: Authorities<AuthorityContent>,
        in_use: Option<&Self>,
        problems: &mut Vec<TlsError>,
    ) -> Result<Self, TlsError> {
        let authorities = content.try_map(|domain, content| {
            let parsed = Roots::parse(content);
            match (
                parsed,
                domain.and_then(|domain| in_use?.authorities.of(domain)),
            ) {
                (Ok(roots), _) => Ok(Arc::new(roots)),
                (Err(problem), Some(in_use)) => {
                    problems.push(problem);
                    Ok(Arc::clone(in_use))
                }
                (Err(problem), None) => Err(problem),
            }
        })?;
        match (refuse_shared(&authorities), in_use) {
            (Ok(()), _) => Ok(Self::new(authorities)),
            (Err(problem), Some(in_use)) => {
                problems.push(problem);
                Ok(Self::new(in_use.authorities.clone()))
            }
            (Err(problem), None) => Err(problem),
        }
    }

    fn new(authorities: Authorities<Arc<Roots>>) -> Self {
        let judges = match &authorities {
            Authorities::Flat(roots) => roots.judges.clone(),
            Authorities::Bundles(bundles) => Judges::by_domain(bundles),
        };
        Self {
            authorities,
            judges,
        }
    }
}

/// Whether the file at `path` holds a private key that can be used, whatever certificate it is of.
pub(super) fn check_key(path: &Path) -> Result<(), TlsError> {
    signing_key(&files::read_key(path)?, path).map(drop)
}

/// The private key in `pem`, which the file at `path` holds.
fn signing_key(pem: &[u8], path: &Path) -> Result<Arc<dyn SigningKey>, TlsError> {
    let no_key = || TlsError::NoKey {
        path: path.to_owned(),
    };
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|_| no_key())?;
    provider()
        .key_provider
        .load_private_key(key)
        .map_err(|_| no_key())
}

impl Roots {
    fn parse(AuthorityContent { path, pem }: AuthorityContent) -> Result<Self, TlsError> {
        let pem = pem?;
        let found = certificates(&pem, &path)?;
        let read = found.iter().filter_map(|der| Certificate::read(der));
        let certificates = read.collect();
        let mut roots = RootCertStore::empty();
        for certificate in found {
            roots
                .add(certificate)
                .map_err(|source| TlsError::Authority {
                    path: path.clone(),
                    source,
                })?;
        }
        Ok(Self {
            path,
            certificates,
            judges: Judges::by(roots)?,
            fingerprint: fingerprint(&[&pem]),
        })
    }
}

impl Judges {
    fn by(roots: RootCertStore) -> Result<Self, TlsError> {
        let roots = Arc::new(roots);
        Ok(Self {
            clients: WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
                .build()?,
            servers: WebPkiServerVerifier::builder_with_provider(roots, provider()).build()?,
        })
    }

    fn by_domain(bundles: &BTreeMap<TrustDomain, Arc<Roots>>) -> Self {
        let (mut clients, mut servers) = (BTreeMap::new(), BTreeMap::new());
        for (domain, roots) in bundles {
            let judges = &roots.judges;
            clients.insert(domain.clone(), Arc::clone(&judges.clients));
            servers.insert(domain.clone(), Arc::clone(&judges.servers));
        }
        Self {
            clients: Arc::new(DomainJudge::new(clients)),
            servers: Arc::new(DomainJudge::new(servers)),
        }
    }
}

/// Refuses a key that two trust domains have for an authority, whatever it is called in each.
fn refuse_shared(authorities: &Authorities<Arc<Roots>>) -> Result<(), TlsError> {
    let mut seen: HashMap<&[u8], (&TrustDomain, &Path)> = HashMap::new();
    for (domain, roots) in authorities.iter() {
        let Some(domain) = domain else {
            return Ok(());
        };
        for authority in &roots.certificates {
            let (other, other_path) = *seen
                .entry(authority.public_key())
                .or_insert((domain, &roots.path));
            if other != domain {
                return Err(TlsError::SharedAuthority {
                    path: roots.path.clone(),
                    other: other.clone(),
                    other_path: other_path.to_owned(),
                    authority: Box::new(authority.clone()),
                });
            }
        }
    }
    Ok(())
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
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
