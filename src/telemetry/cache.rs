//! The metrics of keyrings on demand.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::keyring::{
    Keyrings,
    on_demand::{KeyCache, LookupOutcome, LookupRefusal, ReadOutcome},
};

/// Reads the caches of keyrings at a scrape.
#[derive(Debug)]
pub(super) struct CacheCollector(Keyrings);

/// A family of metrics.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    help: &'static str,
    metric: MetricType,
    /// The second label, after that of the keyring. None if each keyring has one number.
    label: Option<&'static str>,
}

impl CacheCollector {
    /// Returns a collector for the keyrings that are held on demand.
    pub(super) const fn new(keyrings: Keyrings) -> Self {
        Self(keyrings)
    }

    fn tell<const N: usize>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        family: Family,
        read: impl Fn(&KeyCache) -> [(&'static str, u64); N],
    ) -> Result<(), fmt::Error> {
        let Family {
            name,
            help,
            metric,
            label,
        } = family;
        let mut numbers = encoder.encode_descriptor(name, help, None, metric)?;
        let slots = self.0.load();
        let caches = slots
            .iter()
            .filter_map(|slot| Some((slot.name().as_str(), &**slot.cache()?)));
        for (keyring, cache) in caches {
            for (value, number) in read(cache) {
                let labels = [("keyring", keyring), (label.unwrap_or_default(), value)];
                let labels = &labels[..=usize::from(label.is_some())];
                let encoder = numbers.encode_family(&labels)?;
                match metric {
                    MetricType::Counter => ConstCounter::new(number).encode(encoder)?,
                    MetricType::Gauge
                    | MetricType::Histogram
                    | MetricType::Info
                    | MetricType::Unknown => ConstGauge::new(number).encode(encoder)?,
                }
            }
        }
        Ok(())
    }

    fn report_room(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let entries = Family {
            name: "relatch_on_demand_entries",
            help: "Number of entries in the cache of a keyring: key versions, or digests that no key has (unknown)",
            metric: MetricType::Gauge,
            label: Some("kind"),
        };
        self.tell(encoder, entries, |cache| {
            [("key", cache.len()), ("unknown", cache.unknown_len())]
        })?;
        let bytes = Family {
            name: "relatch_on_demand_bytes",
            help: "Memory of the key versions in the cache of a keyring, in bytes",
            metric: MetricType::Gauge,
            label: None,
        };
        self.tell(encoder, bytes, |cache| [("", cache.bytes())])?;
        let evictions = Family {
            name: "relatch_on_demand_evictions",
            help: "Number of key versions that were evicted, or not cached, because of max_size",
            metric: MetricType::Counter,
            label: None,
        };
        self.tell(encoder, evictions, |cache| {
            [("", cache.stats().evictions())]
        })
    }

    fn report_checks(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let reads = Family {
            name: "relatch_on_demand_reads",
            help: "Number of checks by the result in the cache of a keyring",
            metric: MetricType::Counter,
            label: Some("outcome"),
        };
        self.tell(encoder, reads, |cache| {
            ReadOutcome::ALL.map(|outcome| (outcome.as_str(), cache.stats().reads(outcome)))
        })?;
        let denials = Family {
            name: "relatch_on_demand_denials",
            help: "Number of checks that were denied because their key was not looked up, or not in time, by cause",
            metric: MetricType::Counter,
            label: Some("cause"),
        };
        self.tell(encoder, denials, |cache| {
            let stats = cache.stats();
            let [offline, over_budget, crowded] =
                LookupRefusal::ALL.map(|refusal| (refusal.as_str(), stats.refusals(refusal)));
            [offline, over_budget, crowded, ("timeout", stats.timeouts())]
        })
    }

    fn report_lookups(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let lookups = Family {
            name: "relatch_on_demand_lookups",
            help: "Number of lookups at the control plane by outcome",
            metric: MetricType::Counter,
            label: Some("outcome"),
        };
        self.tell(encoder, lookups, |cache| {
            LookupOutcome::ALL.map(|outcome| (outcome.as_str(), cache.stats().lookups(outcome)))
        })?;
        let refreshes = Family {
            name: "relatch_on_demand_refreshes",
            help: "Number of lookups of key versions in use before their cache entries expire",
            metric: MetricType::Counter,
            label: None,
        };
        self.tell(encoder, refreshes, |cache| {
            [("", cache.stats().refreshes())]
        })?;
        let mut durations = encoder.encode_descriptor(
            "relatch_on_demand_lookup_duration_seconds",
            "Time from a lookup to its answer, in seconds",
            None,
            MetricType::Histogram,
        )?;
        let slots = self.0.load();
        let caches = slots
            .iter()
            .filter_map(|slot| Some((slot.name().as_str(), &**slot.cache()?)));
        for (keyring, cache) in caches {
            let labels = [("keyring", keyring)];
            let encoder = durations.encode_family(&labels)?;
            cache.stats().durations().encode(encoder)?;
        }
        Ok(())
    }
}

impl Collector for CacheCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let slots = self.0.load();
        if slots.iter().all(|slot| slot.cache().is_none()) {
            return Ok(());
        }
        self.report_room(&mut encoder)?;
        self.report_checks(&mut encoder)?;
        self.report_lookups(&mut encoder)
    }
}
