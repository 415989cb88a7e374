//! The instruments of the snapshot file, read when they are scraped.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::snapshot::disk::Disk;

/// Reads how writing goes.
#[derive(Debug)]
pub(crate) struct SnapshotCollector {
    disk: Arc<Disk>,
}

impl SnapshotCollector {
    /// A collector of what is known of `disk`.
    #[must_use]
    pub(crate) const fn new(disk: Arc<Disk>) -> Self {
        Self { disk }
    }
}

impl Collector for SnapshotCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let health = self.disk.health();
        let mut writes = encoder.encode_descriptor(
            "relatch_snapshot_writes",
            "Writes to the snapshot file, by what became of them",
            None,
            MetricType::Counter,
        )?;
        for (outcome, count) in [("ok", health.written), ("failed", health.failed)] {
            ConstCounter::new(count).encode(writes.encode_family(&[("outcome", outcome)])?)?;
        }
        let failing = encoder.encode_descriptor(
            "relatch_snapshot_failing",
            "Whether the last write to the snapshot file failed",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(u64::from(health.problem.is_some())).encode(failing)?;
        let size = encoder.encode_descriptor(
            "relatch_snapshot_size_bytes",
            "The length of the snapshot file",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(health.size).encode(size)?;
        if let Some(at) = health.last_written_at {
            let written_at = encoder.encode_descriptor(
                "relatch_snapshot_last_write_timestamp_seconds",
                "When the snapshot file was last written to",
                None,
                MetricType::Gauge,
            )?;
            #[expect(
                clippy::cast_precision_loss,
                reason = "milliseconds are exact for three hundred thousand years"
            )]
            let seconds = at.as_millis() as f64 / 1_000.0;
            ConstGauge::new(seconds).encode(written_at)?;
        }
        Ok(())
    }
}
