//! The metrics of TLS.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{Certificate, HandshakeError, TlsUse};

/// The metrics of handshakes, reloads and the validity of certificates; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct TlsMetrics {
    not_before: Family<[(&'static str, &'static str); 1], Gauge>,
    not_after: Family<[(&'static str, &'static str); 1], Gauge>,
    reloads: Family<[(&'static str, &'static str); 2], Counter>,
    handshakes: Family<[(&'static str, &'static str); 2], Counter>,
}

impl TlsMetrics {
    /// Registers the metrics.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "relatch_tls_certificate_not_before_seconds",
            "Start of the validity of the certificate in use, in seconds since the Unix epoch",
            metrics.not_before.clone(),
        );
        registry.register(
            "relatch_tls_certificate_not_after_seconds",
            "End of the validity of the certificate in use, in seconds since the Unix epoch",
            metrics.not_after.clone(),
        );
        registry.register(
            "relatch_tls_reloads",
            "Number of times that changed TLS files were loaded (taken) or refused",
            metrics.reloads.clone(),
        );
        registry.register(
            "relatch_tls_handshakes",
            "Number of TLS handshakes by result",
            metrics.handshakes.clone(),
        );
        metrics
    }

    pub(super) fn uses(&self, used: TlsUse, certificate: &Certificate) {
        for (gauge, time) in [
            (&self.not_before, certificate.not_before()),
            (&self.not_after, certificate.not_after()),
        ] {
            gauge
                .get_or_create(&[("use", used.as_str())])
                .set(time.as_millis() / 1_000);
        }
    }

    pub(super) fn reloaded(&self, used: TlsUse, taken: bool) {
        let result = if taken { "taken" } else { "refused" };
        self.reloads
            .get_or_create(&[("use", used.as_str()), ("result", result)])
            .inc();
    }

    pub(super) fn shook_hands(&self, used: TlsUse, failure: Option<&HandshakeError>) {
        let result = failure.map_or("done", HandshakeError::as_str);
        self.handshakes
            .get_or_create(&[("use", used.as_str()), ("result", result)])
            .inc();
    }
}
