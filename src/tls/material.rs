//! The content of the certificate files, parsed and checked for handshakes.

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

/// The result of parsing the content of the files.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) material: Material,
    /// The reasons that changed bundles are not used, or not as a whole. For a bundle that cannot
    /// be used, the material contains the previous bundle; for a bundle with an authority of
    /// another trust domain, it contains the other authorities.
    pub(super) problems: Vec<TlsError>,
}

#[derive(Debug)]
pub(super) struct Own {
    pub(super) pair: Arc<SingleCertAndKey>,
    pub(super) certificate: Certificate,
    fingerprint: Fingerprint,
}

/// Authorities, and the verifiers that use them.
#[derive(Debug)]
struct Trusted {
    authorities: Authorities<Arc<Roots>>,
    judges: Judges,
}

/// The authorities of one file.
#[derive(Debug)]
struct Roots {
    path: PathBuf,
    /// Empty for a file of authorities for all trust domains: only bundles are compared with each
    /// other.
    authorities: Vec<Authority>,
    /// None if no authority of a bundle is left: no certificate of its trust domain is trusted
    /// then.
    judges: Option<Judges>,
    fingerprint: Fingerprint,
}

/// One authority of a bundle.
#[derive(Clone, Debug)]
struct Authority {
    der: CertificateDer<'static>,
    certificate: Certificate,
}

/// The trust domains whose bundles contain one key, in order and each once.
#[derive(Debug, Default)]
struct Holders<'a>(Vec<(&'a TrustDomain, &'a Path)>);

/// The verifiers of clients and of servers.
#[derive(Clone, Debug)]
struct Judges {
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<dyn ServerCertVerifier>,
}

impl Material {
    /// Parses the content of the files. For a bundle that cannot be used, the bundle `in_use` stays
    /// in use, because another party may write that file: its fault must not prevent the renewal of
    /// a certificate. A bundle that newly contains an authority of another trust domain is used
    /// without that authority. Everything else is used as a whole, or not at all.
    ///
    /// # Errors
    ///
    /// When the rest cannot be used, or a bundle without a previous version cannot be used. If
    /// nothing was in use before, also when two bundles contain the same authority.
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

    /// Whether both were created from the same content.
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

    /// Checks that the certificate is valid at `now`.
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

    /// Returns the verifier of clients; none if clients are not asked for a certificate.
    pub(super) fn clients(&self) -> Option<&Arc<dyn ClientCertVerifier>> {
        self.trusted.as_ref().map(|trusted| &trusted.judges.clients)
    }

    /// Returns the verifier of servers, which uses the authorities of the files, or else those of
    /// the system.
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
            let parsed = Roots::parse(content, domain);
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
        let Authorities::Bundles(bundles) = authorities else {
            return Ok(Self::new(authorities));
        };
        let mut shared = Vec::new();
        let bundles = withhold_shared(&bundles, in_use, &mut shared)?;
        match (shared.pop(), in_use) {
            // At a start no bundle was in use before, so no bundle can be preferred.
            (Some(problem), None) => Err(problem),
            (last, _) => {
                problems.extend(shared.into_iter().chain(last));
                Ok(Self::new(Authorities::Bundles(bundles)))
            }
        }
    }

    fn new(authorities: Authorities<Arc<Roots>>) -> Self {
        let judges = match &authorities {
            Authorities::Flat(roots) => roots.judges.clone().expect(
                "a file without a certificate is refused, and nothing is withheld from this one",
            ),
            Authorities::Bundles(bundles) => Judges::by_domain(bundles),
        };
        Self {
            authorities,
            judges,
        }
    }
}

/// Checks that the file at `path` contains a private key that can be used, for any certificate.
pub(super) fn check_key(path: &Path) -> Result<(), TlsError> {
    signing_key(&files::read_key(path)?, path).map(drop)
}

/// Returns the private key in `pem`, the content of the file at `path`.
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
    /// Parses the authorities for all trust domains, or the bundle of one.
    fn parse(
        AuthorityContent { path, pem }: AuthorityContent,
        domain: Option<&TrustDomain>,
    ) -> Result<Self, TlsError> {
        let pem = pem?;
        let found = certificates(&pem, &path)?;
        // A certificate that cannot be read cannot be compared with those of the other bundles
        // either.
        let read = |der: &CertificateDer<'static>| {
            let der = der.clone();
            match Certificate::read(&der) {
                Some(certificate) => Ok(Authority { der, certificate }),
                None => Err(TlsError::Damaged { path: path.clone() }),
            }
        };
        let authorities = match domain {
            Some(_) => found.iter().map(read).collect::<Result<_, _>>()?,
            None => Vec::new(),
        };
        Ok(Self {
            authorities,
            judges: Some(Judges::by(store(found, &path)?)?),
            fingerprint: fingerprint(&[&pem]),
            path,
        })
    }

    /// Returns the bundle with only these authorities; without any, it trusts no certificate.
    fn with_only(&self, authorities: Vec<Authority>) -> Result<Self, TlsError> {
        let found: Vec<_> = authorities.iter().map(|one| one.der.clone()).collect();
        let parts: Vec<&[u8]> = found.iter().map(|der| &**der).collect();
        let fingerprint = fingerprint(&parts);
        let judges = if found.is_empty() {
            None
        } else {
            Some(Judges::by(store(found, &self.path)?)?)
        };
        Ok(Self {
            path: self.path.clone(),
            authorities,
            judges,
            fingerprint,
        })
    }

    fn holds(&self, key: &[u8]) -> bool {
        let mut authorities = self.authorities.iter();
        authorities.any(|authority| authority.key() == key)
    }
}

impl Authority {
    /// Returns the public key. Two authorities with the same key are the same, whatever their names
    /// are.
    fn key(&self) -> &[u8] {
        self.certificate.public_key()
    }
}

impl<'a> Holders<'a> {
    /// Returns the holders of each key.
    fn of_each(bundles: &'a BTreeMap<TrustDomain, Arc<Roots>>) -> HashMap<&'a [u8], Self> {
        let mut all: HashMap<&[u8], Self> = HashMap::new();
        for (domain, roots) in bundles {
            for authority in &roots.authorities {
                let Self(holders) = all.entry(authority.key()).or_default();
                if holders.last().is_none_or(|(last, _)| *last != domain) {
                    holders.push((domain, &roots.path));
                }
            }
        }
        all
    }

    /// Returns the trust domain because of which the key is not trusted for `domain`, and its file:
    /// one that held the key before, or else any other holder. Returns none if `domain` is the only
    /// holder, or the only one that held the key before.
    fn rival(
        &self,
        domain: &TrustDomain,
        held: impl Fn(&TrustDomain) -> bool,
    ) -> Option<(&'a TrustDomain, &'a Path)> {
        let Self(holders) = self;
        let others = || {
            holders
                .iter()
                .copied()
                .filter(|(other, _)| *other != domain)
        };
        let earlier = others().find(|(other, _)| held(other));
        match (earlier, held(domain)) {
            (None, true) => None,
            (earlier, _) => earlier.or_else(|| others().next()),
        }
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
            let judges = roots.judges.as_ref();
            let of_clients = judges.map(|judges| Arc::clone(&judges.clients));
            let of_servers = judges.map(|judges| Arc::clone(&judges.servers));
            clients.insert(domain.clone(), of_clients);
            servers.insert(domain.clone(), of_servers);
        }
        Self {
            clients: Arc::new(DomainJudge::new(clients)),
            servers: Arc::new(DomainJudge::new(servers)),
        }
    }
}

/// Returns the bundles with each authority in one of them at most, because a shared authority could
/// sign for all of its trust domains. An authority stays with the trust domain that held it before,
/// so that a copy in another bundle cannot take it away. If no trust domain held it before, its
/// owner is unknown, and it is trusted for none. No bundle keeps an authority that its file no
/// longer contains: an operator who deletes an authority from a file relies on that, whatever the
/// other files contain.
///
/// Each bundle that is not used as a whole is a problem, with one of its authorities as the
/// example.
fn withhold_shared(
    bundles: &BTreeMap<TrustDomain, Arc<Roots>>,
    in_use: Option<&Trusted>,
    problems: &mut Vec<TlsError>,
) -> Result<BTreeMap<TrustDomain, Arc<Roots>>, TlsError> {
    let holders = Holders::of_each(bundles);
    let held = |domain: &TrustDomain, key: &[u8]| {
        let before = in_use.and_then(|in_use| in_use.authorities.of(domain));
        before.is_some_and(|roots| roots.holds(key))
    };
    let mut used = BTreeMap::new();
    for (domain, roots) in bundles {
        let rival = |authority: &Authority| {
            let holders = holders.get(authority.key())?;
            holders.rival(domain, |holder| held(holder, authority.key()))
        };
        let mut example = None;
        let mut kept = Vec::new();
        for authority in &roots.authorities {
            match rival(authority) {
                None => kept.push(authority.clone()),
                Some(other) => {
                    example.get_or_insert((authority, other));
                }
            }
        }
        let roots = match example {
            None => Arc::clone(roots),
            Some((authority, (other, other_path))) => {
                problems.push(TlsError::SharedAuthority {
                    path: roots.path.clone(),
                    domain: domain.clone(),
                    other: other.clone(),
                    other_path: other_path.to_owned(),
                    authority: Box::new(authority.certificate.clone()),
                });
                Arc::new(roots.with_only(kept)?)
            }
        };
        used.insert(domain.clone(), roots);
    }
    Ok(used)
}

/// Returns the authorities of the file at `path`.
fn store(found: Vec<CertificateDer<'static>>, path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in found {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Authority {
                path: path.to_owned(),
                source,
            })?;
    }
    Ok(roots)
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
