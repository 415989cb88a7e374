//! Watches how a sidecar is doing: readiness, gRPC health, `/status`, and the alarms of staleness.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    clock::Clock,
    follow::client::Link,
    http::StatusSource,
    key::{Epoch, KeyState, KeyringName, Timestamp},
    keyring::{Freshness, Keyrings, Slot},
    node_name::NodeName,
    readiness::{Readiness, ReadinessGuard},
    snapshot::disk::Disk,
    telemetry::metrics::SidecarMetrics,
};

/// What is known of a sidecar's health.
#[derive(Clone, Debug)]
pub(crate) struct Monitor {
    node: NodeName,
    keyrings: Keyrings,
    link: Arc<Link>,
    readiness: Readiness,
    clock: Clock,
    /// None when nothing is kept on disk.
    disk: Option<Arc<Disk>>,
}

/// Whether a keyring can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Condition {
    /// Nothing came yet.
    Unavailable,
    Fresh,
    Warned,
    Stale,
}

#[derive(Serialize)]
struct Status<'a> {
    node: &'a str,
    version: &'static str,
    #[serde(rename = "status")]
    summary: &'static str,
    blocked_by: Vec<Arc<str>>,
    keyrings: Vec<KeyringStatus>,
    control: Vec<EndpointStatus>,
    reconnects: u64,
    clock_skew_ms: i64,
    usage: UsageStatus,
    /// Absent when nothing is kept on disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<SnapshotStatus>,
}

#[derive(Serialize)]
struct SnapshotStatus {
    /// Why the last write failed, or why nothing is written at all; null when neither is so.
    problem: Option<String>,
    /// Why the file was not taken at the start; null when it was, or there was none.
    refused: Option<String>,
    last_written_at: Option<Timestamp>,
    bytes: u64,
    writes: u64,
    failures: u64,
}

#[derive(Serialize)]
struct KeyringStatus {
    name: String,
    condition: Condition,
    epoch: u64,
    revision: u64,
    age_ms: Option<u128>,
    /// Up to where it is on the disk; absent when nothing is kept there.
    #[serde(skip_serializing_if = "Option::is_none")]
    durable_revision: Option<u64>,
    mode: &'static str,
    /// Why the control plane does not serve it.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_served: Option<String>,
    /// Of a keyring that is held in full: how many versions it has in each state.
    #[serde(skip_serializing_if = "Option::is_none")]
    keys: Option<BTreeMap<&'static str, usize>>,
    /// Of a keyring that is held on demand.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<CacheStatus>,
}

#[derive(Serialize)]
struct CacheStatus {
    entries: u64,
    bytes: u64,
    max_bytes: u64,
    /// Digests that nobody has.
    unknown: u64,
}

#[derive(Serialize)]
struct UsageStatus {
    /// The last report that is in the control plane's store.
    acked_sequence: u64,
    /// Versions that were reported and not acked yet.
    unacked_versions: usize,
    /// Versions that were used since the last report.
    unreported_versions: usize,
}

#[derive(Serialize)]
struct EndpointStatus {
    endpoint: String,
    connected: bool,
    /// Why it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Staleness is to show within a second of its limit.
const EVERY: Duration = Duration::from_millis(250);
/// What Envoy's health checker asks for.
const SERVICE: &str = "envoy.service.auth.v3.Authorization";

impl Monitor {
    /// A monitor of `keyrings`; they block `readiness` as long as they cannot be used.
    #[must_use]
    pub(crate) const fn new(
        node: NodeName,
        keyrings: Keyrings,
        link: Arc<Link>,
        readiness: Readiness,
        clock: Clock,
    ) -> Self {
        Self {
            node,
            keyrings,
            link,
            readiness,
            clock,
            disk: None,
        }
    }

    /// Tells of what is kept on `disk`, too.
    #[must_use]
    pub(crate) fn with_disk(self, disk: Option<Arc<Disk>>) -> Self {
        Self { disk, ..self }
    }

    /// Keeps readiness, health and the link's metrics true until `shutdown`; `guards` are those held at the start.
    pub(crate) async fn run(
        self,
        mut guards: BTreeMap<KeyringName, ReadinessGuard>,
        mut health: HealthReporter,
        metrics: SidecarMetrics,
        shutdown: CancellationToken,
    ) {
        let mut conditions = BTreeMap::new();
        let mut served = None;
        let mut reconnects = 0;
        loop {
            for slot in self.keyrings.iter() {
                if let Some(cache) = slot.cache() {
                    cache.tidy();
                }
                let condition = self.condition(slot);
                if conditions.insert(slot.name().clone(), condition) != Some(condition) {
                    self.tell(slot, condition);
                }
                if condition.is_usable() {
                    guards.remove(slot.name());
                } else {
                    guards
                        .entry(slot.name().clone())
                        .or_insert_with(|| self.readiness.block(blocker(slot.name())));
                }
            }
            self.measure(&metrics, &mut reconnects);
            let ready = self.readiness.is_ready();
            if served != Some(ready) {
                served = Some(ready);
                report(&health, ready).await;
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = shutdown.cancelled() => break,
            }
        }
        let _stopping = self.readiness.block("the sidecar is stopping");
        end_watches(&mut health).await;
    }

    /// Blocks readiness for every keyring, to begin with.
    #[must_use]
    pub(crate) fn block(&self) -> BTreeMap<KeyringName, ReadinessGuard> {
        self.keyrings
            .iter()
            .map(|slot| {
                let guard = self.readiness.block(blocker(slot.name()));
                (slot.name().clone(), guard)
            })
            .collect()
    }

    fn condition(&self, slot: &Slot) -> Condition {
        let now = self.clock.reading();
        if slot.age(now).is_none() || slot.load().is_none() {
            return Condition::Unavailable;
        }
        match slot.freshness(now) {
            Freshness::Fresh => Condition::Fresh,
            Freshness::Warned => Condition::Warned,
            Freshness::Stale => Condition::Stale,
        }
    }

    fn tell(&self, slot: &Slot, condition: Condition) {
        let keyring = slot.name();
        let age_ms = slot.age(self.clock.reading()).map(|age| age.as_millis());
        match condition {
            Condition::Unavailable => tracing::info!(
                auth.keyring = %keyring,
                "the keyring is not loaded yet; its checks are denied"
            ),
            Condition::Fresh => tracing::info!(auth.keyring = %keyring, "the keyring is fresh"),
            Condition::Warned => tracing::warn!(
                auth.keyring = %keyring,
                auth.keyring.age_ms = age_ms,
                "the control plane has not confirmed the keyring for a while; checks continue"
            ),
            Condition::Stale => tracing::error!(
                auth.keyring = %keyring,
                auth.keyring.age_ms = age_ms,
                "the keyring is stale; checks of it are denied until the control plane confirms it"
            ),
        }
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "a skew of years is still exact to the millisecond"
    )]
    fn measure(&self, metrics: &SidecarMetrics, reconnects: &mut u64) {
        for (endpoint, connected) in self.link.endpoints() {
            metrics.discovery_connected(&endpoint.to_string(), connected);
        }
        while *reconnects < self.link.reconnects() {
            *reconnects += 1;
            metrics.discovery_reconnected();
        }
        metrics.clock_skew(self.link.clock_skew_ms() as f64 / 1_000.0);
    }

    fn usage(&self) -> UsageStatus {
        let progress = self.link.usage();
        UsageStatus {
            acked_sequence: progress.acked,
            unacked_versions: progress.unacked,
            unreported_versions: self
                .keyrings
                .iter()
                .map(|slot| slot.usage().waiting())
                .sum(),
        }
    }

    fn snapshot(&self) -> Option<SnapshotStatus> {
        let health = self.disk.as_ref()?.health();
        Some(SnapshotStatus {
            problem: health.problem,
            refused: health.refused,
            last_written_at: health.last_written_at,
            bytes: health.size,
            writes: health.written,
            failures: health.failed,
        })
    }

    /// Up to where a keyring is on the disk, if it is of the history that checks see.
    fn durable_revision(&self, slot: &Slot, epoch: Option<Epoch>) -> Option<u64> {
        let durable = self.disk.as_ref()?.durable(slot.name());
        let is_of_history = epoch == Some(durable.epoch);
        Some(if is_of_history {
            durable.revision.get()
        } else {
            0
        })
    }

    fn describe(&self, slot: &Slot) -> KeyringStatus {
        let view = slot.load();
        let view = view.as_ref();
        KeyringStatus {
            name: slot.name().to_string(),
            condition: self.condition(slot),
            epoch: view.map_or(0, |view| view.epoch().get()),
            revision: view.map_or(0, |view| view.revision().get()),
            age_ms: slot.age(self.clock.reading()).map(|age| age.as_millis()),
            durable_revision: self.durable_revision(slot, view.map(|view| view.epoch())),
            mode: slot.cache().map_or("full", |_| "on_demand"),
            not_served: self.link.not_served(slot.name().as_str()),
            keys: slot.cache().is_none().then(|| {
                let states = KeyState::ALL.into_iter();
                states
                    .map(|state| (state.as_str(), view.map_or(0, |view| view.count(state))))
                    .collect()
            }),
            cache: slot.cache().map(|cache| CacheStatus {
                entries: cache.len(),
                bytes: cache.bytes(),
                max_bytes: cache.settings().max_size,
                unknown: cache.unknown_len(),
            }),
        }
    }
}

impl StatusSource for Monitor {
    fn status(&self) -> serde_json::Value {
        let keyrings: Vec<_> = self
            .keyrings
            .iter()
            .map(|slot| self.describe(slot))
            .collect();
        let is_degraded = keyrings
            .iter()
            .any(|keyring| keyring.condition == Condition::Warned);
        let status = Status {
            node: self.node.as_str(),
            version: env!("CARGO_PKG_VERSION"),
            summary: match (self.readiness.is_ready(), is_degraded) {
                (false, _) => "not ready",
                (true, true) => "degraded",
                (true, false) => "ready",
            },
            blocked_by: self.readiness.blocked_by(),
            keyrings,
            control: self
                .link
                .endpoints()
                .zip(self.link.problems())
                .map(|((endpoint, connected), problem)| EndpointStatus {
                    endpoint: endpoint.to_string(),
                    connected,
                    problem,
                })
                .collect(),
            reconnects: self.link.reconnects(),
            clock_skew_ms: self.link.clock_skew_ms(),
            usage: self.usage(),
            snapshot: self.snapshot(),
        };
        serde_json::to_value(status).expect("a status has text keys only")
    }
}

impl Condition {
    const fn is_usable(self) -> bool {
        match self {
            Self::Fresh | Self::Warned => true,
            Self::Unavailable | Self::Stale => false,
        }
    }
}

async fn report(health: &HealthReporter, ready: bool) {
    let status = if ready {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    health.set_service_status("", status).await;
    health.set_service_status(SERVICE, status).await;
}

/// Reports for the last time, and ends the streams of those who watch: they would hold the drain up.
async fn end_watches(health: &mut HealthReporter) {
    report(health, false).await;
    for service in ["", SERVICE] {
        health.clear_service_status(service).await;
    }
    report(health, false).await;
}

fn blocker(keyring: &KeyringName) -> String {
    format!("keyring {keyring} is not loaded, or is stale")
}
