//! What a scrape tells of the keyrings that are held on demand.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::keyring::{
    Keyrings,
    on_demand::{KeyCache, LookupOutcome, ReadOutcome, Refusal},
};

/// Reads the caches of keyrings when it is asked.
#[derive(Debug)]
pub(super) struct CacheCollector(Keyrings);

/// A family of metrics.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    help: &'static str,
    metric: MetricType,
    /// Beside that of the keyring; none where there is one number for each.
    label: Option<&'static str>,
}

impl CacheCollector {
    /// A collector of those of `keyrings` that are held on demand.
    pub(super) const fn new(keyrings: Keyrings) -> Self {
        Self(keyrings)
    }

    fn caches(&self) -> impl Iterator<Item = (&str, &KeyCache)> {
        let slots = self.0.iter();
        slots.filter_map(|slot| Some((slot.name().as_str(), &**slot.cache()?)))
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
        for (keyring, cache) in self.caches() {
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

    fn tell_of_room(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let entries = Family {
            name: "relatch_on_demand_entries",
            help: "What the cache of a keyring holds: versions of keys, and digests that nobody has",
            metric: MetricType::Gauge,
            label: Some("kind"),
        };
        self.tell(encoder, entries, |cache| {
            [("key", cache.len()), ("unknown", cache.unknown_len())]
        })?;
        let bytes = Family {
            name: "relatch_on_demand_bytes",
            help: "What the versions take that the cache of a keyring holds",
            metric: MetricType::Gauge,
            label: None,
        };
        self.tell(encoder, bytes, |cache| [("", cache.bytes())])?;
        let evictions = Family {
            name: "relatch_on_demand_evictions",
            help: "Versions that went, or were not let in, for want of room",
            metric: MetricType::Counter,
            label: None,
        };
        self.tell(encoder, evictions, |cache| {
            [("", cache.stats().evictions())]
        })
    }

    fn tell_of_checks(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let reads = Family {
            name: "relatch_on_demand_reads",
            help: "Checks that looked into the cache of a keyring, by what they found",
            metric: MetricType::Counter,
            label: Some("outcome"),
        };
        self.tell(encoder, reads, |cache| {
            ReadOutcome::ALL.map(|outcome| (outcome.as_str(), cache.stats().reads(outcome)))
        })?;
        let denials = Family {
            name: "relatch_on_demand_denials",
            help: "Checks that were denied because their key was not looked up, or not in time",
            metric: MetricType::Counter,
            label: Some("cause"),
        };
        self.tell(encoder, denials, |cache| {
            let stats = cache.stats();
            let [offline, over_budget, crowded] =
                Refusal::ALL.map(|refusal| (refusal.as_str(), stats.refusals(refusal)));
            [offline, over_budget, crowded, ("timeout", stats.timeouts())]
        })
    }

    fn tell_of_lookups(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let lookups = Family {
            name: "relatch_on_demand_lookups",
            help: "Lookups at the control plane, by what became of them",
            metric: MetricType::Counter,
            label: Some("outcome"),
        };
        self.tell(encoder, lookups, |cache| {
            LookupOutcome::ALL.map(|outcome| (outcome.as_str(), cache.stats().lookups(outcome)))
        })?;
        let refreshes = Family {
            name: "relatch_on_demand_refreshes",
            help: "Lookups of versions that are held and in use, ahead of the end of their entries",
            metric: MetricType::Counter,
            label: None,
        };
        self.tell(encoder, refreshes, |cache| {
            [("", cache.stats().refreshes())]
        })?;
        let mut durations = encoder.encode_descriptor(
            "relatch_on_demand_lookup_duration_seconds",
            "From a lookup to its answer, in seconds",
            None,
            MetricType::Histogram,
        )?;
        for (keyring, cache) in self.caches() {
            let labels = [("keyring", keyring)];
            let encoder = durations.encode_family(&labels)?;
            cache.stats().durations().encode(encoder)?;
        }
        Ok(())
    }
}

impl Collector for CacheCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if self.caches().next().is_none() {
            return Ok(());
        }
        self.tell_of_room(&mut encoder)?;
        self.tell_of_checks(&mut encoder)?;
        self.tell_of_lookups(&mut encoder)
    }
}
