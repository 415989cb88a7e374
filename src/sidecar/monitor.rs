//! The health of a sidecar: readiness, gRPC health, `/status`, and the log lines about staleness.

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    authz::{AddressSource, Settings, TrustedProxies},
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

/// Watches the health of a sidecar.
#[derive(Clone, Debug)]
pub(crate) struct Monitor {
    node: NodeName,
    keyrings: Keyrings,
    link: Arc<Link>,
    readiness: Readiness,
    clock: Clock,
    settings: Arc<Settings>,
    /// The state of the snapshot file; none if no file is configured.
    disk: Option<Arc<Disk>>,
}

/// Whether a keyring can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Condition {
    /// The keyring is not loaded, or was never confirmed.
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
    client_address: ClientAddressStatus<'a>,
    control: Vec<EndpointStatus>,
    reconnects: u64,
    clock_skew_ms: i64,
    usage: UsageStatus,
    /// Absent if no snapshot file is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<SnapshotStatus>,
}

#[derive(Serialize)]
struct SnapshotStatus {
    /// The reason why the last write failed, or why nothing is written at all; null if there is no
    /// problem.
    problem: Option<String>,
    /// The reason why the file was refused at the start; null if it was loaded, or if there was
    /// none.
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
    /// The revision in the snapshot file; 0 if the file has no revision of the same epoch. Absent
    /// if no snapshot file is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    durable_revision: Option<u64>,
    mode: &'static str,
    /// Whether all its denials are enforced, as far as the sidecar's file decides it.
    enforced: bool,
    /// The reason that the control plane reported for not serving the keyring; absent if there is
    /// none.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_served: Option<String>,
    /// The number of versions in each state; absent for a keyring on demand.
    #[serde(skip_serializing_if = "Option::is_none")]
    keys: Option<BTreeMap<&'static str, usize>>,
    /// Absent unless the keyring is on demand.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<CacheStatus>,
}

#[derive(Serialize)]
struct CacheStatus {
    entries: u64,
    bytes: u64,
    max_bytes: u64,
    /// The number of cached digests that the control plane does not know.
    unknown: u64,
}

/// Where the address of the client is found.
#[derive(Serialize)]
struct ClientAddressStatus<'a> {
    /// The name of the header, or `source.address`.
    from: &'a str,
    /// Absent if no header is read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    trusted: Vec<String>,
    /// Absent if proxies are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    hops: Option<u8>,
    /// Absent if proxies are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    envoy_appends: Option<bool>,
}

#[derive(Serialize)]
struct UsageStatus {
    /// The sequence number of the last report that is in the control plane's store.
    acked_sequence: u64,
    /// The number of versions in reports that are not acknowledged yet.
    unacked_versions: usize,
    /// The number of versions that were used since the last report.
    unreported_versions: usize,
}

#[derive(Serialize)]
struct EndpointStatus {
    endpoint: String,
    connected: bool,
    /// The reason why it is not connected, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// The interval of the measurements. Staleness must show within a second of its limit.
const EVERY: Duration = Duration::from_millis(250);
/// The service name that Envoy's health checker asks for.
const SERVICE: &str = "envoy.service.auth.v3.Authorization";

impl Monitor {
    /// Creates a monitor of `keyrings`. Each keyring blocks `readiness` while it cannot be used.
    #[must_use]
    pub(crate) const fn new(
        node: NodeName,
        keyrings: Keyrings,
        link: Arc<Link>,
        readiness: Readiness,
        clock: Clock,
        settings: Arc<Settings>,
    ) -> Self {
        Self {
            node,
            keyrings,
            link,
            readiness,
            clock,
            settings,
            disk: None,
        }
    }

    /// Adds the state of the snapshot file to `/status`.
    #[must_use]
    pub(crate) fn with_disk(self, disk: Option<Arc<Disk>>) -> Self {
        Self { disk, ..self }
    }

    /// Waits until every keyring can be used. Cancellation safe.
    pub(crate) async fn until_usable(&self) {
        let is_usable = |slot: &Arc<Slot>| self.condition(slot).is_usable();
        loop {
            // It listens before the look, so that no message is missed in between.
            let mut applied = pin!(self.link.applied().notified());
            applied.as_mut().enable();
            if self.keyrings.iter().all(is_usable) {
                return;
            }
            applied.await;
        }
    }

    /// Keeps readiness, health and the link's metrics current until `stop`. From `drain` on, the
    /// sidecar is not ready, although it still answers checks. `guards` are those of
    /// [`Monitor::block`].
    pub(crate) async fn run(
        self,
        mut guards: BTreeMap<KeyringName, ReadinessGuard>,
        mut health: HealthReporter,
        metrics: SidecarMetrics,
        drain: CancellationToken,
        stop: CancellationToken,
    ) {
        let mut stopping = None;
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
                () = drain.cancelled(), if stopping.is_none() => {
                    stopping = Some(self.readiness.block("the sidecar is stopping"));
                }
                () = stop.cancelled() => break,
            }
        }
        end_watches(&mut health).await;
    }

    /// Warns of each keyring whose denials are not enforced.
    pub(crate) fn announce_trials(&self) {
        for slot in self.keyrings.iter() {
            if !self.settings.enforces(slot.name().as_str()) {
                tracing::warn!(
                    auth.keyring = %slot.name(),
                    "the keyring is not enforced, or one of its routes is not: requests that should be denied pass"
                );
            }
        }
    }

    /// Blocks readiness for every keyring at the start. [`Monitor::run`] releases each guard when
    /// the keyring can be used.
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

    /// Returns the revision of a keyring in the snapshot file; 0 if the file has another epoch than
    /// `epoch`. None if no snapshot file is configured.
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
            enforced: self.settings.enforces(slot.name().as_str()),
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
            client_address: ClientAddressStatus::of(self.settings.client_address()),
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

impl<'a> ClientAddressStatus<'a> {
    fn of(source: &'a AddressSource) -> Self {
        let trusted = source.trusted().into_iter().flat_map(TrustedProxies::iter);
        Self {
            from: source.header().unwrap_or("source.address"),
            trusted: trusted.map(ToString::to_string).collect(),
            hops: source.hops().map(|hops| hops.count),
            envoy_appends: source.hops().map(|hops| hops.envoy_appends),
        }
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

/// Reports for the last time, and ends the streams of the clients that watch: they would delay the
/// drain.
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
