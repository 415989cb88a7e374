//! The metrics of the snapshot file, read at a scrape.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::snapshot::disk::Disk;

/// Reads the state of the writes to the snapshot file.
#[derive(Debug)]
pub(crate) struct SnapshotCollector {
    disk: Arc<Disk>,
}

impl SnapshotCollector {
    /// A collector for the state of `disk`.
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
            "Number of writes to the snapshot file by outcome",
            None,
            MetricType::Counter,
        )?;
        for (outcome, count) in [("ok", health.written), ("failed", health.failed)] {
            ConstCounter::new(count).encode(writes.encode_family(&[("outcome", outcome)])?)?;
        }
        let failing = encoder.encode_descriptor(
            "relatch_snapshot_failing",
            "1 while the snapshot file cannot be written, or another process uses it, else 0",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(u64::from(health.problem.is_some())).encode(failing)?;
        let size = encoder.encode_descriptor(
            "relatch_snapshot_size_bytes",
            "Length of the snapshot file, in bytes",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(health.size).encode(size)?;
        if let Some(at) = health.last_written_at {
            let written_at = encoder.encode_descriptor(
                "relatch_snapshot_last_write_timestamp_seconds",
                "Time of the last write to the snapshot file, in seconds since the Unix epoch",
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
