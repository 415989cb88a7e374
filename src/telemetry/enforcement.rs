//! The metric that shows trials: keyrings whose denials are not enforced.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};

use crate::{authz::Settings, keyring::Keyrings};

/// Reads the settings of each keyring.
#[derive(Debug)]
pub(crate) struct EnforcementCollector {
    keyrings: Keyrings,
    settings: Arc<Settings>,
}

impl EnforcementCollector {
    /// A collector for `keyrings`.
    #[must_use]
    pub(crate) const fn new(keyrings: Keyrings, settings: Arc<Settings>) -> Self {
        Self { keyrings, settings }
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
        for slot in self.keyrings.load().iter() {
            let is_enforced = self.settings.enforces(slot.name());
            let labels = [("keyring", slot.name().as_str())];
            ConstGauge::new(u64::from(is_enforced)).encode(enforced.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
