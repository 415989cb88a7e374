//! Certificates of every kind, right and wrong, for tests.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};

use super::{Authorities, Credentials, TlsFiles, TlsMetrics, TlsUse, files::OwnFiles};
use crate::clock::Clock;

/// An authority that signs every certificate that a test asks for.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// The content of a certificate.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    name: String,
    hosts: Vec<String>,
    uris: Vec<String>,
    usage: Vec<ExtendedKeyUsagePurpose>,
    /// The validity, in days from now.
    valid: (i64, i64),
}

/// A certificate and its key.
#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) cert: String,
    pub(crate) key: String,
    der: Vec<u8>,
}

/// A directory of files of certificates.
#[derive(Debug)]
pub(crate) struct Files(TempDir);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// An authority whose certificate this one has signed.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer);
        Self {
            pem: certificate.expect("a certificate").pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// An authority whose certificate has subject alternative names that cannot be parsed.
    pub(crate) fn malformed(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let names =
            CustomExtension::from_oid_content(&[2, 5, 29, 17], vec![0x30, 0x02, 0x82, 0x7f]);
        params.custom_extensions.push(names);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// The certificate of the authority.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    pub(crate) fn issue(&self, leaf: &Leaf) -> Issued {
        let mut params = CertificateParams::new(leaf.hosts.clone()).expect("right names");
        params.distinguished_name = common_name(&leaf.name);
        for uri in &leaf.uris {
            let uri = uri.as_str().try_into().expect("ASCII");
            params.subject_alt_names.push(SanType::URI(uri));
        }
        params.extended_key_usages.clone_from(&leaf.usage);
        let now = now();
        params.not_before = now + Duration::days(leaf.valid.0);
        params.not_after = now + Duration::days(leaf.valid.1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer);
        let certificate = certificate.expect("a certificate");
        Issued {
            cert: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().to_vec(),
        }
    }
}

impl Leaf {
    pub(crate) fn server(hosts: &[&str]) -> Self {
        Self {
            hosts: hosts.iter().map(|&host| host.to_owned()).collect(),
            usage: vec![ExtendedKeyUsagePurpose::ServerAuth],
            ..Self::named(hosts.first().expect("a server has a host"))
        }
    }

    pub(crate) fn client(name: &str) -> Self {
        Self {
            usage: vec![ExtendedKeyUsagePurpose::ClientAuth],
            ..Self::named(name)
        }
    }

    pub(crate) fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            hosts: Vec::new(),
            uris: Vec::new(),
            usage: Vec::new(),
            valid: (-1, 30),
        }
    }

    pub(crate) fn uri(&self, uri: &str) -> Self {
        let mut leaf = self.clone();
        leaf.uris.push(uri.to_owned());
        leaf
    }

    /// Sets the validity, in days from now.
    pub(crate) fn valid(&self, from: i64, to: i64) -> Self {
        Self {
            valid: (from, to),
            ..self.clone()
        }
    }
}

impl Issued {
    /// Adds more certificates to the chain.
    pub(crate) fn with(mut self, pem: &str) -> Self {
        self.cert.push_str(pem);
        self
    }

    pub(crate) fn der(&self) -> &[u8] {
        &self.der
    }
}

impl Files {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Replaces a file at once.
    pub(crate) fn write(&self, name: &str, content: &str) -> PathBuf {
        let (path, draft) = (self.path(name), self.path("draft"));
        fs::write(&draft, content).expect("writable");
        set_mode(&draft, 0o600);
        fs::rename(&draft, &path).expect("writable");
        path
    }

    /// A certificate and key as `NAME.pem` and `NAME.key`.
    pub(crate) fn pair(&self, name: &str, issued: &Issued) -> OwnFiles {
        OwnFiles {
            cert: self.write(&format!("{name}.pem"), &issued.cert),
            key: self.write(&format!("{name}.key"), &issued.key),
        }
    }

    /// Writes and loads the files of one side.
    pub(crate) fn credentials(
        &self,
        used: TlsUse,
        own: Option<&Issued>,
        ca: Option<&Authority>,
    ) -> Arc<Credentials> {
        let authorities =
            ca.map(|ca| Authorities::Flat(self.write(&format!("{used}-ca.pem"), ca.pem())));
        self.load(used, own, authorities)
    }

    /// As [`credentials`](Self::credentials), but each trust domain has a bundle, which is written
    /// to `NAME.bundle.pem`.
    pub(crate) fn with_bundles(
        &self,
        used: TlsUse,
        own: &Issued,
        bundles: &[(&str, &Authority)],
    ) -> Arc<Credentials> {
        let bundles = bundles.iter().map(|(name, ca)| {
            let path = self.write(&format!("{name}.bundle.pem"), ca.pem());
            (name.parse().expect("a trust domain"), path)
        });
        let bundles = Authorities::Bundles(bundles.collect());
        self.load(used, Some(own), Some(bundles))
    }

    fn load(
        &self,
        used: TlsUse,
        own: Option<&Issued>,
        ca: Option<Authorities<PathBuf>>,
    ) -> Arc<Credentials> {
        let files = TlsFiles {
            own: own.map(|issued| self.pair(used.as_str(), issued)),
            ca,
        };
        Credentials::load(used, files, Clock::system(), TlsMetrics::default())
            .unwrap_or_else(|error| panic!("{error}"))
    }
}

pub(crate) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("our own file");
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn now() -> OffsetDateTime {
    let seconds = Clock::system().wall().as_millis() / 1_000;
    OffsetDateTime::from_unix_timestamp(seconds).expect("now is a time")
}
