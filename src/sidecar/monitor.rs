//! The health of a sidecar: readiness, gRPC health, `/status`, and the log lines about staleness.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use super::reload::{Changeable, ReloadState, ReloadStatus};
use crate::{
    authz::{AddressSource, AllSettings, Authorizer, Settings, TrustedProxies},
    clock::Clock,
    follow::client::Link,
    http::StatusSource,
    key::{Epoch, KeyState, KeyringName, Timestamp},
    keyring::{Freshness, Keyrings, Slot, Slots, Wanted},
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
    /// Has the settings in use.
    authorizer: Authorizer,
    reload: ReloadState,
    /// The listener for proxies that ask over HTTP; none if it is not configured.
    http_authz: Option<HttpAuthzStatus>,
    /// The state of the snapshot file; none if no file is configured.
    disk: Option<Arc<Disk>>,
}

/// The guards of a monitor: what blocks readiness.
#[derive(Debug)]
pub(crate) struct Guards {
    keyrings: BTreeMap<KeyringName, ReadinessGuard>,
    /// The guard of the patterns, with its name.
    patterns: Option<(String, ReadinessGuard)>,
    /// The keyrings that could be used once.
    loaded: BTreeSet<KeyringName>,
    /// Whether the sidecar has been ready. From then on, a keyring that a pattern finds blocks
    /// readiness only after it could be used once: a new keyring makes no sidecar unready.
    was_ready: bool,
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
    /// Absent without patterns.
    #[serde(skip_serializing_if = "Option::is_none")]
    patterns: Option<PatternsStatus<'a>>,
    client_address: ClientAddressStatus<'a>,
    /// Absent without a configuration file.
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<ReloadStatus>,
    /// Absent if there is no listener for proxies that ask over HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    http_authz: Option<HttpAuthzStatus>,
    control: Vec<EndpointStatus>,
    reconnects: u64,
    clock_skew_ms: i64,
    usage: UsageStatus,
    /// Absent if no snapshot file is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<SnapshotStatus>,
}

/// The patterns that find keyrings.
#[derive(Serialize)]
struct PatternsStatus<'a> {
    #[serde(rename = "match")]
    patterns: Vec<&'a str>,
    /// The number of keyrings that the control plane lists; absent before its first list.
    #[serde(skip_serializing_if = "Option::is_none")]
    matching: Option<usize>,
    /// The number of keyrings that match and that the sidecar does not hold, because they are too
    /// many.
    left_out: usize,
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

/// The listener for proxies that ask over HTTP.
#[derive(Clone, Debug, Serialize)]
pub(super) struct HttpAuthzStatus {
    /// The bound address.
    pub(super) address: String,
    pub(super) profiles: Vec<ProfileStatus>,
}

impl HttpAuthzStatus {
    /// Returns the status with the headers of the settings in use.
    fn now(&self, settings: &AllSettings) -> Self {
        let profiles = self.profiles.iter().enumerate().map(|(at, profile)| {
            let headers = settings.of(Some(at)).listed_headers();
            ProfileStatus {
                headers: headers.map(ToString::to_string).collect(),
                ..profile.clone()
            }
        });
        Self {
            address: self.address.clone(),
            profiles: profiles.collect(),
        }
    }
}

/// What such a proxy asks for at one path.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ProfileStatus {
    pub(super) path: String,
    pub(super) dialect: &'static str,
    pub(super) keyring: String,
    pub(super) scopes: String,
    /// The headers that the proxy must take from the answer, and remove where the answer lacks them.
    pub(super) headers: Vec<String>,
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
    /// Creates a monitor of what is `watched`. Each keyring blocks `readiness` while it cannot be used.
    #[must_use]
    pub(crate) fn new(
        node: NodeName,
        watched: Changeable,
        link: Arc<Link>,
        readiness: Readiness,
    ) -> Self {
        let Changeable {
            keyrings,
            authorizer,
            metrics: _,
            clock,
            state,
        } = watched;
        Self {
            node,
            keyrings,
            link,
            readiness,
            clock,
            authorizer,
            reload: state,
            http_authz: None,
            disk: None,
        }
    }

    /// Adds the state of the snapshot file to `/status`.
    #[must_use]
    pub(crate) fn with_disk(self, disk: Option<Arc<Disk>>) -> Self {
        Self { disk, ..self }
    }

    /// Adds the listener for proxies that ask over HTTP to `/status`.
    #[must_use]
    pub(super) fn with_http_authz(self, http_authz: Option<HttpAuthzStatus>) -> Self {
        Self { http_authz, ..self }
    }

    /// Waits until every keyring can be used. Cancellation safe.
    pub(crate) async fn until_usable(&self) {
        let is_usable = |slot: &Arc<Slot>| self.condition(slot).is_usable();
        loop {
            // It listens before the look, so that no message is missed in between.
            let mut applied = pin!(self.link.applied().notified());
            applied.as_mut().enable();
            let slots = self.keyrings.load();
            if self.pattern_blocker(&slots).is_none() && slots.iter().all(is_usable) {
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
        mut guards: Guards,
        mut health: HealthReporter,
        metrics: SidecarMetrics,
        drain: CancellationToken,
        stop: CancellationToken,
    ) {
        let mut stopping = None;
        let mut conditions = BTreeMap::new();
        let mut trials = BTreeSet::new();
        let mut served = None;
        let mut reconnects = 0;
        loop {
            let slots = self.keyrings.load();
            conditions.retain(|name: &KeyringName, _| slots.get(name.as_str()).is_some());
            for slot in slots.iter() {
                if let Some(cache) = slot.cache() {
                    cache.tidy();
                }
                let condition = self.condition(slot);
                if conditions.insert(slot.name().clone(), condition) != Some(condition) {
                    self.tell(slot, condition);
                }
            }
            announce_trials(&slots, self.authorizer.settings().envoy(), &mut trials);
            self.guard(&slots, &mut guards);
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

    /// Blocks readiness for every keyring at the start. [`Monitor::run`] releases each guard when
    /// the keyring can be used.
    #[must_use]
    pub(crate) fn block(&self) -> Guards {
        let slots = self.keyrings.load();
        let block = |slot: &Arc<Slot>| {
            let guard = self.readiness.block(blocker(slot.name()));
            (slot.name().clone(), guard)
        };
        let mut guards = Guards {
            keyrings: slots.iter().map(block).collect(),
            patterns: None,
            loaded: BTreeSet::new(),
            was_ready: false,
        };
        self.guard_patterns(&slots, &mut guards);
        guards
    }

    /// Blocks readiness for what cannot be used, and for nothing else.
    fn guard(&self, slots: &Slots, guards: &mut Guards) {
        let is_held = |name: &KeyringName| slots.get(name.as_str()).is_some();
        guards.loaded.retain(is_held);
        guards.keyrings.retain(|name, _| is_held(name));
        for slot in slots.iter() {
            let name = slot.name();
            if self.condition(slot).is_usable() {
                guards.loaded.insert(name.clone());
                guards.keyrings.remove(name);
            } else if guards.loaded.contains(name) || !guards.was_ready {
                let guard = guards.keyrings.entry(name.clone());
                guard.or_insert_with(|| self.readiness.block(blocker(name)));
            }
        }
        self.guard_patterns(slots, guards);
        guards.was_ready |= self.readiness.is_ready();
    }

    fn guard_patterns(&self, slots: &Slots, guards: &mut Guards) {
        let blocker = self.pattern_blocker(slots);
        if guards.patterns.as_ref().map(|(name, _)| name) == blocker.as_ref() {
            return;
        }
        guards.patterns = blocker.map(|name| {
            tracing::info!("not ready: {name}");
            let guard = self.readiness.block(name.as_str());
            (name, guard)
        });
    }

    /// Returns why the patterns block readiness. They do not before the first list if the snapshot
    /// file has keyrings: the sidecar serves these, and the control plane may be away.
    fn pattern_blocker(&self, slots: &Slots) -> Option<String> {
        let wanted = self.keyrings.wanted();
        if wanted.rules().is_empty() {
            return None;
        }
        let patterns: Vec<_> = wanted
            .rules()
            .iter()
            .map(|rule| rule.pattern.as_str())
            .collect();
        let patterns = patterns.join(", ");
        let is_kept = || slots.iter().any(|slot| slot.confirmation().is_some());
        match self.link.listed() {
            None if is_kept() => None,
            None => Some(format!(
                "the control plane has not listed the keyrings that match {patterns}"
            )),
            Some(_) if slots.is_empty() => Some(format!(
                "the control plane serves no keyring that matches {patterns} and that this sidecar may have"
            )),
            Some(_) => None,
        }
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
        let has_patterns = !self.keyrings.wanted().rules().is_empty();
        let listed = self.link.listed().filter(|_| has_patterns);
        metrics.keyrings_left_out(listed.map_or(0, |listed| listed.left_out));
    }

    fn usage(&self) -> UsageStatus {
        let progress = self.link.usage();
        UsageStatus {
            acked_sequence: progress.acked,
            unacked_versions: progress.unacked,
            unreported_versions: self
                .keyrings
                .load()
                .iter()
                .map(|slot| slot.usage().waiting())
                .sum(),
        }
    }

    fn patterns<'w>(&self, wanted: &'w Wanted) -> Option<PatternsStatus<'w>> {
        let listed = self.link.listed();
        (!wanted.rules().is_empty()).then(|| PatternsStatus {
            patterns: wanted
                .rules()
                .iter()
                .map(|rule| rule.pattern.as_str())
                .collect(),
            matching: listed.map(|listed| listed.matching),
            left_out: listed.map_or(0, |listed| listed.left_out),
        })
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

    fn describe(&self, slot: &Slot, settings: &Settings) -> KeyringStatus {
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
            enforced: settings.enforces(slot.name()),
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
        let (wanted, settings) = (self.keyrings.wanted(), self.authorizer.settings());
        let keyrings: Vec<_> = self
            .keyrings
            .load()
            .iter()
            .map(|slot| self.describe(slot, settings.envoy()))
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
            patterns: self.patterns(&wanted),
            client_address: ClientAddressStatus::of(settings.envoy().client_address()),
            config: self.reload.status(),
            http_authz: self.http_authz.as_ref().map(|it| it.now(&settings)),
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

/// Warns of each keyring that has begun a trial, and notes each that has ended one. `trials` are the
/// keyrings that are in a trial.
fn announce_trials(slots: &Slots, settings: &Settings, trials: &mut BTreeSet<KeyringName>) {
    trials.retain(|name| slots.get(name.as_str()).is_some());
    for slot in slots.iter() {
        let name = slot.name();
        let is_enforced = settings.enforces(name);
        if !is_enforced && trials.insert(name.clone()) {
            tracing::warn!(
                auth.keyring = %name,
                "the keyring is not enforced, or one of its routes is not: requests that should be denied pass"
            );
        } else if is_enforced && trials.remove(name) {
            tracing::info!(auth.keyring = %name, "the keyring is enforced");
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
