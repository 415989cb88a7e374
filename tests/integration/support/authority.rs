//! Authorities of a test's own, for certificates that `relatch certs dev` does not make: of several trust domains, and with
//! short lives.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use relatch::clock::Clock;
use time::{Duration, OffsetDateTime};

/// An authority that signs whatever a test asks for.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate is valid from this long ago: clocks of one machine agree, and a rounded second is not in the future.
const BACKDATED: Duration = Duration::seconds(1);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        let issuer = Issuer::new(params, key);
        Self { issuer, pem }
    }

    /// Writes its own certificate.
    pub(crate) fn write(&self, path: &Path) {
        replace(path, &self.pem);
    }

    /// Writes `NAME.pem` and `NAME.key` for `identity`, at localhost and on both sides of a connection, that end after
    /// `life`.
    pub(crate) fn issue(&self, dir: &Path, name: &str, identity: &str, life: Duration) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        let uri = identity.try_into().expect("ASCII");
        params.subject_alt_names.push(SanType::URI(uri));
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let now = Clock::system().wall().as_millis() / 1_000;
        let now = OffsetDateTime::from_unix_timestamp(now).expect("now is a time");
        params.not_before = now - BACKDATED;
        params.not_after = now + life;
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        // The key first: what is read in between does not fit, and is read again.
        replace(&dir.join(format!("{name}.key")), &key.serialize_pem());
        replace(&dir.join(format!("{name}.pem")), &certificate.pem());
    }
}

/// Puts a file in the place of another one, so that whoever reads it finds it whole.
fn replace(path: &Path, content: &str) {
    let draft = path.with_extension("draft");
    fs::write(&draft, content).expect("the test's directory can be written to");
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o600)).expect("it is ours");
    fs::rename(&draft, path).expect("the test's directory can be written to");
}
