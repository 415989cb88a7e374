//! The metrics that are read at a scrape: the use of keys, their rotations, and the fleet. Only
//! these metrics have consumers as labels.
//!
//! The series of keys are bounded. Versions beyond the bound are summed up in series whose labels
//! are `__overflow__`.

use std::{
    collections::{BTreeSet, HashSet},
    fmt,
    sync::Arc,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::{
    catalog::Catalog,
    fleet::{Condition, Fleet},
    pace::Pace,
    served::ServedKeyring,
    usage::UsageBook,
};
use crate::key::{
    Evidence, Key, KeyVersion, Keyring, KeyringName, Timestamp, Use, VersionRef, VersionState,
    rotation::{self, Phase},
};

/// The collector of the metrics that are read at a scrape.
#[derive(Debug)]
struct KeyCollector {
    catalog: Arc<Catalog>,
    usage: Arc<UsageBook>,
    fleet: Arc<Fleet>,
    pace: Arc<Pace>,
    max_versions: usize,
}

/// The versions that a scrape lists.
struct VersionLines {
    lines: Vec<Line>,
    /// The most lines.
    room: usize,
    /// The sum of the versions without a line.
    rest: Option<Use>,
}

/// One version of a scrape.
struct Line {
    labels: Labels,
    used: Option<Use>,
    retires_at: Option<Timestamp>,
    denied_from: Option<Timestamp>,
    phase: Option<Phase>,
}

#[derive(Clone)]
struct Labels {
    keyring: String,
    consumer: String,
    key_id: String,
    version: String,
    state: &'static str,
}

/// The most versions with series of their own: some ten thousand series are a page of a few
/// megabytes, which Prometheus reads in well under a second.
const MAX_VERSIONS: usize = 5_000;
/// The versions that are read in one go, so that commits and reports do not wait for all of them.
const CHUNK: usize = 1_000;
/// The label value of the versions beyond the bound.
const OVERFLOW: &str = "__overflow__";

/// Registers the metrics that are read at a scrape.
pub(crate) fn register(
    registry: &mut Registry,
    catalog: Arc<Catalog>,
    usage: Arc<UsageBook>,
    fleet: Arc<Fleet>,
    pace: Arc<Pace>,
) {
    registry.register_collector(Box::new(KeyCollector {
        catalog,
        usage,
        fleet,
        pace,
        max_versions: MAX_VERSIONS,
    }));
}

impl KeyCollector {
    /// Returns the versions in rotations first, then the others that are in use, up to the bound;
    /// and the sum of the rest.
    fn versions(&self) -> VersionLines {
        let now = self.pace.now();
        let mut lines = VersionLines {
            lines: Vec::new(),
            room: self.max_versions,
            rest: None,
        };
        let keyrings = self.catalog.list();
        let moving: Vec<HashSet<VersionRef>> = keyrings
            .iter()
            .map(|served| self.add_moving(served, now, &mut lines))
            .collect();
        for (served, moving) in keyrings.iter().zip(moving) {
            self.add_settled(served, &moving, now, &mut lines);
        }
        lines
    }

    /// Adds the versions in rotations, and returns them.
    fn add_moving(
        &self,
        served: &ServedKeyring,
        now: Timestamp,
        lines: &mut VersionLines,
    ) -> HashSet<VersionRef> {
        let moving: Vec<VersionRef> = {
            let state = served.journal().state();
            let moving = state.keyring.moving();
            moving.map(|(key, version)| name(key, version)).collect()
        };
        // The coverage is read before the counts, which then include everything that the coverage
        // speaks of.
        let coverage = self.fleet.coverage(served.name(), now);
        for chunk in moving.chunks(CHUNK) {
            let evidence = Evidence {
                coverage,
                uses: self.usage.uses_of(served.name(), chunk),
            };
            let state = served.journal().state();
            for which in chunk {
                let Some((key, version)) = state.keyring.version(*which) else {
                    continue;
                };
                let used = evidence.uses.get(which).copied();
                lines.add(used, || {
                    let outlook = rotation::outlook(&state.keyring, *which, &evidence, now);
                    Line {
                        denied_from: rotation::denied_from(&state.keyring, key, version, now),
                        phase: outlook.map(|outlook| outlook.phase),
                        ..Line::of(&state.keyring, key, version, used)
                    }
                });
            }
        }
        moving.into_iter().collect()
    }

    /// Adds the versions that are used and not in `moving`. A version that has ended is added for
    /// `rollback_for` after its end: as long as a roll-back could make a retired one active again.
    fn add_settled(
        &self,
        served: &ServedKeyring,
        moving: &HashSet<VersionRef>,
        now: Timestamp,
        lines: &mut VersionLines,
    ) {
        // The versions are sorted, so that the same ones have series of their own at the next
        // scrape.
        let mut versions = self.usage.used(served.name());
        versions.sort_unstable();
        for chunk in versions.chunks(CHUNK) {
            let counts = self.usage.uses_of(served.name(), chunk);
            let state = served.journal().state();
            for which in chunk.iter().filter(|which| !moving.contains(which)) {
                let Some((key, version)) = state.keyring.version(*which) else {
                    continue;
                };
                let is_shown = match version.state {
                    VersionState::Pending { .. }
                    | VersionState::Active { .. }
                    | VersionState::Retiring { .. } => true,
                    VersionState::Retired { since, .. } | VersionState::Revoked { since, .. } => {
                        let shown_for = state.keyring.policy_of(key).rollback_for;
                        now < since.saturating_add(shown_for)
                    }
                };
                if is_shown {
                    let used = counts.get(which).copied();
                    lines.add(used, || Line::of(&state.keyring, key, version, used));
                }
            }
        }
    }

    fn encode_unreadable(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut unreadable = encoder.encode_descriptor(
            "relatch_keyring_unreadable",
            "1 while the keyring cannot be read from the store, else 0; its sidecars deny its keys when their grants are over",
            None,
            MetricType::Gauge,
        )?;
        let keyrings = self.catalog.list();
        let problems = self.catalog.unreadable();
        let names: BTreeSet<&KeyringName> = keyrings
            .iter()
            .map(|served| served.name())
            .chain(problems.iter().map(|(name, _)| name))
            .collect();
        for name in names {
            let is_unreadable = problems.iter().any(|(other, _)| other == name);
            let labels = [("keyring", name.as_str())];
            gauge_of(usize::from(is_unreadable)).encode(unreadable.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn encode_fleet(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut sidecars = encoder.encode_descriptor(
            "relatch_sidecars",
            "Number of processes of sidecars with the keyring by status: current, lagging, lost and stopped may serve it; gap is gone without a last report",
            None,
            MetricType::Gauge,
        )?;
        for served in self.catalog.list() {
            let name: &KeyringName = served.name();
            let conditions = self
                .fleet
                .conditions(name, served.epoch(), served.revision());
            for condition in Condition::ALL {
                let count = conditions
                    .iter()
                    .filter(|other| **other == condition)
                    .count();
                let labels = [("keyring", name.as_str()), ("status", condition.as_str())];
                gauge_of(count).encode(sidecars.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

impl Collector for KeyCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let VersionLines { lines, rest, .. } = self.versions();
        let overflow = Labels::overflow();
        let mut requests = encoder.encode_descriptor(
            "relatch_key_requests",
            "Number of requests that presented the key version, as reported by sidecars, denied ones included",
            None,
            MetricType::Counter,
        )?;
        for line in &lines {
            let count = line.used.unwrap_or_default().requests;
            line.labels
                .encode(&mut requests, &ConstCounter::new(count))?;
        }
        if let Some(rest) = rest {
            overflow.encode(&mut requests, &ConstCounter::new(rest.requests))?;
        }
        let mut last_used = encoder.encode_descriptor(
            "relatch_key_last_used_timestamp_seconds",
            "Time at which the control plane received the last report of a use of the key version, in seconds since the Unix epoch",
            None,
            MetricType::Gauge,
        )?;
        for line in &lines {
            if let Some(at) = line.used.and_then(|used| used.last_used) {
                line.labels.encode(&mut last_used, &gauge_at(at))?;
            }
        }
        if let Some(at) = rest.and_then(|rest| rest.last_used) {
            overflow.encode(&mut last_used, &gauge_at(at))?;
        }
        let mut retires = encoder.encode_descriptor(
            "relatch_key_retires_timestamp_seconds",
            "End of the overlap of a retiring key version, in seconds since the Unix epoch",
            None,
            MetricType::Gauge,
        )?;
        for line in &lines {
            if let Some(at) = line.retires_at {
                line.labels.encode(&mut retires, &gauge_at(at))?;
            }
        }
        let mut denied = encoder.encode_descriptor(
            "relatch_key_denied_from_timestamp_seconds",
            "Time from which requests with a retiring key version are denied although it is in use, in seconds since the Unix epoch: its deadline or its own expiry",
            None,
            MetricType::Gauge,
        )?;
        for line in &lines {
            if let Some(at) = line.denied_from {
                line.labels.encode(&mut denied, &gauge_at(at))?;
            }
        }
        let mut phases = encoder.encode_descriptor(
            "relatch_rotation_phase",
            "1 for the current phase of the rotation of a key version",
            None,
            MetricType::Gauge,
        )?;
        for line in &lines {
            if let Some(phase) = line.phase {
                let Labels {
                    keyring,
                    consumer,
                    key_id,
                    version,
                    state: _,
                } = &line.labels;
                let labels = [
                    ("keyring", keyring.as_str()),
                    ("consumer", consumer),
                    ("key_id", key_id),
                    ("version", version),
                    ("phase", phase.as_str()),
                ];
                ConstGauge::new(1_i64).encode(phases.encode_family(&labels)?)?;
            }
        }
        self.encode_unreadable(&mut encoder)?;
        self.encode_fleet(&mut encoder)
    }
}

impl VersionLines {
    /// Adds a version, as a line while there is room.
    fn add(&mut self, used: Option<Use>, line: impl FnOnce() -> Line) {
        if self.lines.len() < self.room {
            self.lines.push(line());
        } else if let Some(used) = used {
            let rest = self.rest.get_or_insert_default();
            rest.requests = rest.requests.saturating_add(used.requests);
            rest.last_used = rest.last_used.max(used.last_used);
        }
    }
}

impl Line {
    fn of(keyring: &Keyring, key: &Key, version: &KeyVersion, used: Option<Use>) -> Self {
        Self {
            labels: Labels {
                keyring: keyring.name().to_string(),
                consumer: key.consumer.to_string(),
                key_id: key.id.to_string(),
                version: version.number.to_string(),
                state: version.state.kind().as_str(),
            },
            used,
            retires_at: match version.state {
                VersionState::Retiring { until, .. } => Some(until),
                VersionState::Pending { .. }
                | VersionState::Active { .. }
                | VersionState::Retired { .. }
                | VersionState::Revoked { .. } => None,
            },
            denied_from: None,
            phase: None,
        }
    }
}

impl Labels {
    fn overflow() -> Self {
        Self {
            keyring: OVERFLOW.to_owned(),
            consumer: OVERFLOW.to_owned(),
            key_id: OVERFLOW.to_owned(),
            version: OVERFLOW.to_owned(),
            state: OVERFLOW,
        }
    }

    fn encode(
        &self,
        encoder: &mut MetricEncoder<'_>,
        metric: &impl EncodeMetric,
    ) -> Result<(), fmt::Error> {
        let labels = [
            ("keyring", self.keyring.as_str()),
            ("consumer", &self.consumer),
            ("key_id", &self.key_id),
            ("version", &self.version),
            ("state", self.state),
        ];
        metric.encode(encoder.encode_family(&labels)?)
    }
}

const fn name(key: &Key, version: &KeyVersion) -> VersionRef {
    VersionRef {
        key_id: key.id,
        version: version.number,
    }
}

fn gauge_of(count: usize) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds until the year 9999 are exact in a double"
)]
fn gauge_at(at: Timestamp) -> ConstGauge<f64> {
    ConstGauge::new(at.as_millis() as f64 / 1_000.0)
}

#[cfg(test)]
mod tests;
