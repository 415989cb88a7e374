//! The metric that shows trials: keyrings whose denials are not enforced.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};

use crate::{authz::Authorizer, keyring::Keyrings};

/// Reads the settings of each keyring.
#[derive(Debug)]
pub(crate) struct EnforcementCollector {
    keyrings: Keyrings,
    /// Has the settings in use.
    authorizer: Authorizer,
}

impl EnforcementCollector {
    /// A collector for `keyrings` and the settings of `authorizer`.
    #[must_use]
    pub(crate) const fn new(keyrings: Keyrings, authorizer: Authorizer) -> Self {
        Self {
            keyrings,
            authorizer,
        }
    }
}

impl Collector for EnforcementCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut enforced = encoder.encode_descriptor(
            "relatch_keyring_enforced",
            "0 while the sidecar's file does not enforce the denials of the keyring or of one of its routes, else 1",
            None,
            MetricType::Gauge,
        )?;
        let settings = self.authorizer.settings();
        for slot in self.keyrings.load().iter() {
            let is_enforced = settings.envoy().enforces(slot.name());
            let labels = [("keyring", slot.name().as_str())];
            ConstGauge::new(u64::from(is_enforced)).encode(enforced.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
