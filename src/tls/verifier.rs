//! Verifies the certificate of the other side, and keeps its fields for errors: the errors of
//! rustls do not contain it.

use std::{
    collections::BTreeMap,
    error::Error as StdError,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::{Certificate, Identity, TrustDomain, provider};

/// The certificate that the other side of one handshake presented.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown(Arc<Mutex<Option<Certificate>>>);

/// Verifies the client of one handshake.
#[derive(Debug)]
pub(super) struct ClientJudge {
    pub(super) inner: Arc<dyn ClientCertVerifier>,
    pub(super) shown: Shown,
}

/// Verifies the server of one handshake.
#[derive(Debug)]
pub(super) struct ServerJudge {
    pub(super) inner: Arc<dyn ServerCertVerifier>,
    pub(super) shown: Shown,
    /// The identity that the certificate must have, in addition to the host.
    pub(super) expected: Option<Identity>,
}

/// Verifies each certificate with the authorities of its own trust domain, and with no others. The
/// trust domain is read from the certificate before the verification: a certificate that lies about
/// its trust domain is verified with authorities that did not sign it.
#[derive(Debug)]
pub(super) struct DomainJudge<V: ?Sized> {
    /// None: the bundle exists, but none of its authorities can be used.
    domains: BTreeMap<TrustDomain, Option<Arc<V>>>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// There is no bundle for the trust domain of a certificate.
#[derive(Debug, thiserror::Error)]
#[error("there is no bundle for its trust domain {0}")]
struct UnknownDomain(TrustDomain);

/// The bundle of a trust domain has no authority that can be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "no authority in the bundle of its trust domain {0} can be used: see the log of this process"
)]
struct NoAuthority(TrustDomain);

/// The server has another identity than it must have.
#[derive(Debug, thiserror::Error)]
#[error("its identity is {found}, not {expected}")]
struct WrongIdentity {
    found: String,
    expected: Identity,
}

impl Shown {
    pub(super) fn take(&self) -> Option<Certificate> {
        self.lock().take()
    }

    fn keep(&self, certificate: &CertificateDer<'_>) {
        *self.lock() = Certificate::read(certificate);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Certificate>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServerJudge {
    /// Checks that the server has the expected identity.
    ///
    /// # Errors
    ///
    /// When the presented certificate has another identity, or none.
    fn check_identity(&self) -> Result<(), Error> {
        let Some(expected) = &self.expected else {
            return Ok(());
        };
        let found = match self.shown.lock().as_ref().map(Identity::of) {
            Some(Ok(found)) if found == *expected => return Ok(()),
            Some(Ok(found)) => found.to_string(),
            Some(Err(_)) | None => "missing".to_owned(),
        };
        let wrong = WrongIdentity {
            found,
            expected: expected.clone(),
        };
        Err(refusal(wrong))
    }
}

impl<V: ?Sized> DomainJudge<V> {
    pub(super) fn new(domains: BTreeMap<TrustDomain, Option<Arc<V>>>) -> Self {
        Self {
            domains,
            algorithms: provider().signature_verification_algorithms,
        }
    }

    /// Returns the verifier for the trust domain of a certificate.
    fn judge_of(&self, end_entity: &CertificateDer<'_>) -> Result<&V, Error> {
        let certificate = Certificate::read(end_entity).ok_or(CertificateError::BadEncoding)?;
        let identity = Identity::of(&certificate).map_err(refusal)?;
        let domain = TrustDomain::of(&identity).map_err(refusal)?;
        match self.domains.get(&domain) {
            Some(Some(judge)) => Ok(judge),
            Some(None) => Err(refusal(NoAuthority(domain))),
            None => Err(refusal(UnknownDomain(domain))),
        }
    }
}

impl ClientCertVerifier for DomainJudge<dyn ClientCertVerifier> {
    /// No hint: a client may present any certificate, and the names of all authorities could fill a
    /// message.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let judge = self.judge_of(end_entity)?;
        judge.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for DomainJudge<dyn ServerCertVerifier> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let judge = self.judge_of(end_entity)?;
        judge.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for ClientJudge {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.shown.keep(end_entity);
        self.inner
            .verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

impl ServerCertVerifier for ServerJudge {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.shown.keep(end_entity);
        let verified = self.inner.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        self.check_identity()?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Converts one of this module's errors about a certificate.
fn refusal(error: impl StdError + Send + Sync + 'static) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}
