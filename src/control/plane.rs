//! A whole control plane: starts on its data, and reports the addresses that it has bound.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{
    admin::{AdminApi, AdminParts},
    bearers::Bearers,
    calls::Calls,
    catalog::Catalog,
    data::Data,
    fleet::Fleet,
    journal::LogError,
    keeper::Keeper,
    key_collector,
    metrics::ControlMetrics,
    pace::Pace,
    port::Port,
    reconciler::Reconciler,
    rotation::Rotations,
    schedule::Schedule,
    sink::{SinkError, Sinks},
    spans::ControlTracer,
    token::Tokens,
    usage::UsageBook,
    webhook::{Webhooks, metrics::WebhookMetrics},
};
use crate::{
    clock::Clock,
    config::ControlSettings,
    control::stream::{server::DiscoveryServer, session::Terms},
    http::{HttpServer, Pages},
    key::MasterPepper,
    node_name::NodeName,
    outbound::SetupError,
    proto,
    readiness::Readiness,
    serving::RowError,
    shutdown::{Shutdown, unless_left_behind},
    store::{StoreError, StoreOwner},
    telemetry::{
        export::{ExportError, SpanPipeline, SpanSource},
        process::ProcessCollector,
    },
    tls::{Credentials, TlsError, TlsFiles, TlsMetrics, TlsServer, TlsUse},
    wire::token::TokenFileError,
};

/// A control plane that is running.
#[derive(Debug)]
pub struct ControlPlane {
    /// The addresses that it has bound.
    pub endpoints: ControlEndpoints,
    /// The number of complete rounds of its reconciler. A round that cannot read the store does not
    /// count.
    pub rounds: watch::Receiver<u64>,
    spans: Option<SpanPipeline>,
    /// While this is held, no other process serves from the store or changes it.
    _owner: Arc<StoreOwner>,
}

/// The parts of a control plane that are loaded from its data.
struct Loaded {
    owner: Arc<StoreOwner>,
    pepper: MasterPepper,
    catalog: Arc<Catalog>,
    tokens: Arc<Tokens>,
    usage: Arc<UsageBook>,
    fleet: Arc<Fleet>,
    pace: Arc<Pace>,
}

/// The metrics and the clock that each load of certificates needs.
struct Certificates {
    metrics: TlsMetrics,
    clock: Clock,
}

/// The settings of a gRPC port.
struct Planned<'a> {
    /// The name of its setting and of its task.
    name: &'static str,
    address: SocketAddr,
    used: TlsUse,
    files: Option<&'a TlsFiles>,
}

/// The addresses that a control plane has bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlEndpoints {
    /// The address for sidecars (gRPC).
    pub discovery: SocketAddr,
    /// The address of the admin API (gRPC).
    pub admin: SocketAddr,
    /// The address of `/metrics`, `/livez` and `/readyz`.
    pub(crate) http: SocketAddr,
}

/// The reasons why a control plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A log of the store cannot be followed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The states of the sidecars in the store cannot be read.
    #[error(transparent)]
    Fleet(#[from] RowError),
    /// The token file of a sidecar cannot be used.
    #[error("discovery.tokens")]
    Token(#[from] TokenFileError),
    /// A sink cannot be used.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// An address cannot be bound.
    #[error("{field}: cannot listen on {address}")]
    Bind {
        /// The name of the setting.
        field: &'static str,
        /// The configured address.
        address: SocketAddr,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// Certificates cannot be used.
    #[error("{field}.tls")]
    Tls {
        /// The name of the setting with the `tls` section.
        field: &'static str,
        /// Why the certificates cannot be used.
        source: TlsError,
    },
    /// The descriptors of the admin API are invalid.
    #[error("reflection cannot be served")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The resource use of the process cannot be read.
    #[error("cannot read the resource use of this process")]
    Process(#[source] std::io::Error),
    /// The address of the OpenTelemetry collector cannot be used.
    #[error(transparent)]
    Spans(#[from] ExportError),
    /// The HTTP client for webhooks cannot be created.
    #[error("cannot create the HTTP client for webhooks")]
    Webhooks(#[source] SetupError),
}

/// The service that health checks on the admin port name, and that its reflection describes.
const ADMIN_SERVICE: &str = "relatch.admin.v1.Admin";
/// The instance in spans of a machine whose host name is not a valid node id.
const UNNAMED: &str = "unnamed";

impl ControlPlane {
    /// Starts a control plane on its data, which it then owns. Its tasks belong to `shutdown`.
    ///
    /// # Errors
    ///
    /// When the store, a file, an address or another part cannot be used, as [`PlaneError`] lists
    /// them.
    pub async fn start(
        data: Data,
        settings: &ControlSettings,
        clock: Clock,
        shutdown: &Shutdown,
    ) -> Result<Self, PlaneError> {
        let mut registry = registry_of_process()?;
        let metrics = ControlMetrics::register(&mut registry);
        let (tracer, spans) = start_spans(settings, &metrics)?;
        let Loaded {
            owner,
            pepper,
            catalog,
            tokens,
            usage,
            fleet,
            pace,
        } = Loaded::from(data, settings, &clock, metrics, &tracer).await?;

        let reconciler = Reconciler::new(
            Arc::clone(&catalog),
            Arc::clone(&tokens),
            Arc::clone(&fleet),
            Arc::clone(&usage),
            Arc::clone(&pace),
        );
        let calls = TaskTracker::new();
        let discovery = DiscoveryServer::new(
            Arc::clone(&catalog),
            Arc::clone(&fleet),
            Arc::clone(&usage),
            terms(settings),
            calls.clone(),
            shutdown.token(),
        );
        let discovery = admitting(discovery, settings, &pepper, shutdown)?;
        let rotations = Rotations::new(
            Arc::clone(&catalog),
            Arc::clone(&fleet),
            Arc::new(Sinks::new(&settings.sinks)?),
            shutdown.token(),
        );
        let webhooks = Webhooks::new(
            Arc::clone(&catalog),
            pepper.clone(),
            WebhookMetrics::register(&mut registry),
        );
        let webhooks = Arc::new(webhooks.map_err(PlaneError::Webhooks)?);
        let answers = Arc::new(Calls::new(&pepper, clock.clone()));
        let parts = AdminParts {
            catalog: Arc::clone(&catalog),
            fleet: Arc::clone(&fleet),
            usage: Arc::clone(&usage),
            tokens: Arc::clone(&tokens),
            rotations: rotations.clone(),
            webhooks: Arc::clone(&webhooks),
            pace: Arc::clone(&pace),
            calls: Arc::clone(&answers),
        };
        let admin = AdminApi::new(parts, calls.clone());
        let discovery = Routes::new(discovery.into_service());
        let (admin, health) = admin_routes(admin).await?;

        let certificates = Certificates::new(&mut registry, clock);
        key_collector::register(
            &mut registry,
            Arc::clone(&catalog),
            Arc::clone(&usage),
            Arc::clone(&fleet),
            Arc::clone(&pace),
        );
        let http = bind_http(settings.http, registry, Arc::clone(&catalog)).await?;
        let endpoints = ControlEndpoints {
            discovery: Planned::discovery(settings)
                .serve(discovery, &certificates, shutdown)
                .await?,
            admin: Planned::admin(settings)
                .serve(admin, &certificates, shutdown)
                .await?,
            http: http.local_addr(),
        };
        shutdown.spawn("control http", http.serve(shutdown.token()));
        let streams_ended = CancellationToken::new();
        let reports = Arc::clone(&usage).run(Arc::clone(&fleet), streams_ended.clone());
        shutdown.spawn("usage", reports);
        let schedule = Schedule::new(
            Arc::clone(&catalog),
            rotations,
            Arc::clone(&pace),
            calls.clone(),
        );
        shutdown.spawn("schedule", schedule.run(shutdown.token()));
        let keeper = Keeper::new(Arc::clone(&catalog), answers);
        let rounds = spawn_upkeep(reconciler, keeper, &catalog, shutdown);
        shutdown.spawn("webhooks", Arc::clone(&webhooks).run(shutdown.token()));
        let calls = end_calls(calls, health, streams_ended, shutdown.token());
        shutdown.spawn("calls", calls);
        shutdown.spawn("owner", note_stop(Arc::clone(&owner), shutdown.token()));
        Ok(Self {
            endpoints,
            rounds,
            spans,
            _owner: owner,
        })
    }

    /// Sends the last spans, for at most `deadline`. To be called after the tasks have ended.
    pub(crate) async fn flush(self, deadline: Duration) {
        if let Some(spans) = self.spans {
            spans.shutdown(deadline).await;
        }
    }
}

impl Loaded {
    async fn from(
        data: Data,
        settings: &ControlSettings,
        clock: &Clock,
        metrics: ControlMetrics,
        tracer: &ControlTracer,
    ) -> Result<Self, PlaneError> {
        let Data {
            owner,
            pepper,
            store,
            tokens,
        } = data;
        let known = store.load_presence().await?;
        let catalog = Catalog::open(Arc::clone(&store), clock.clone(), pepper.clone(), metrics);
        let catalog = Arc::new(catalog.await?.with_tracer(tracer.clone()));
        let pace = Arc::new(Pace::new(clock.clone()));
        let usage = UsageBook::open(Arc::clone(&store), clock.clone(), Arc::clone(&pace), &known);
        let usage = usage.await?;
        let fleet = Fleet::new(clock.clone(), settings.max_serve_for, known)?;
        Ok(Self {
            owner: Arc::new(owner),
            catalog,
            tokens: Arc::new(tokens.with_tracer(tracer.clone())),
            usage: Arc::new(usage),
            fleet: Arc::new(fleet),
            pace,
            pepper,
        })
    }
}

impl<'a> Planned<'a> {
    fn discovery(settings: &'a ControlSettings) -> Self {
        Self {
            name: "discovery",
            address: settings.discovery,
            used: TlsUse::DiscoveryServer,
            files: settings.discovery_tls.as_ref(),
        }
    }

    fn admin(settings: &'a ControlSettings) -> Self {
        Self {
            name: "admin",
            address: settings.admin,
            used: TlsUse::AdminServer,
            files: settings.admin_tls.as_ref(),
        }
    }

    /// Serves `routes` on its address until the shutdown, and returns the bound address.
    async fn serve(
        &self,
        routes: Routes,
        certificates: &Certificates,
        shutdown: &Shutdown,
    ) -> Result<SocketAddr, PlaneError> {
        let (name, address) = (self.name, self.address);
        let tls = certificates.load(self, shutdown)?;
        let port = Port::bind(name, address)
            .await
            .map_err(bind_error(name, address))?;
        let bound = port.address();
        let stop = shutdown.token();
        shutdown.spawn(name, async move {
            let serving = Box::pin(port.serve(tls, routes, stop.clone()));
            unless_left_behind(name, stop, serving).await;
        });
        Ok(bound)
    }
}

impl Certificates {
    fn new(registry: &mut Registry, clock: Clock) -> Self {
        Self {
            metrics: TlsMetrics::register(registry),
            clock,
        }
    }

    /// Loads the certificates of a port and keeps them current. Returns none for a port without
    /// TLS.
    fn load(
        &self,
        port: &Planned<'_>,
        shutdown: &Shutdown,
    ) -> Result<Option<TlsServer>, PlaneError> {
        let Some(files) = port.files else {
            return Ok(None);
        };
        let (clock, metrics) = (self.clock.clone(), self.metrics.clone());
        let loaded = Credentials::load(port.used, files.clone(), clock, metrics);
        let credentials = loaded.map_err(|source| PlaneError::Tls {
            field: port.name,
            source,
        })?;
        let kept = Arc::clone(&credentials).keep(shutdown.token());
        shutdown.spawn("certificates", kept);
        Ok(Some(TlsServer::new(credentials)))
    }
}

/// Restricts `discovery` to the sidecars that the settings name, by certificates or by tokens. The
/// tokens are kept current.
fn admitting(
    discovery: DiscoveryServer,
    settings: &ControlSettings,
    pepper: &MasterPepper,
    shutdown: &Shutdown,
) -> Result<DiscoveryServer, TokenFileError> {
    let discovery = discovery.with_admission(settings.admission.clone());
    if settings.sidecar_tokens.is_empty() {
        return Ok(discovery);
    }
    let files = settings.sidecar_tokens.clone();
    let bearers = Bearers::load(files, pepper.for_sidecar_tokens())?;
    let kept = Arc::clone(&bearers).keep(shutdown.token());
    shutdown.spawn("sidecar tokens", kept);
    Ok(discovery.with_bearers(bearers))
}

/// Creates a registry with the metrics of every process.
fn registry_of_process() -> Result<Registry, PlaneError> {
    let mut registry = Registry::default();
    let process = ProcessCollector::new().map_err(PlaneError::Process)?;
    registry.register_collector(Box::new(process));
    Ok(registry)
}

fn start_spans(
    settings: &ControlSettings,
    metrics: &ControlMetrics,
) -> Result<(ControlTracer, Option<SpanPipeline>), ExportError> {
    let Some(endpoint) = &settings.telemetry.otlp_endpoint else {
        return Ok((ControlTracer::default(), None));
    };
    let host = NodeName::of_host().ok();
    let source = SpanSource {
        service_name: &settings.telemetry.service_name,
        instance: host.as_ref().map_or(UNNAMED, NodeName::as_str),
        labels: &BTreeMap::new(),
    };
    let (tracer, spans) = SpanPipeline::start(endpoint, &source, metrics.spans_dropped().clone())?;
    Ok((ControlTracer::new(Some(tracer)), Some(spans)))
}

async fn admin_routes(admin: AdminApi) -> Result<(Routes, HealthReporter), PlaneError> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .with_service_name(ADMIN_SERVICE)
        .build_v1()?;
    let admin = admin.into_service();
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter
        .set_service_status(ADMIN_SERVICE, ServingStatus::Serving)
        .await;
    let routes = Routes::new(admin)
        .add_service(health)
        .add_service(reflection);
    Ok((routes, reporter))
}

/// At `stop`, ends the health watches and waits for the calls in progress, then reports in
/// `streams_ended` that no stream is open. [`unless_left_behind`] limits the wait.
async fn end_calls(
    calls: TaskTracker,
    health: HealthReporter,
    streams_ended: CancellationToken,
    stop: CancellationToken,
) {
    stop.cancelled().await;
    end_watches(health).await;
    calls.close();
    unless_left_behind("calls", stop, calls.wait()).await;
    streams_ended.cancel();
}

/// Returns the heartbeat that sidecars are asked for, and the longest time for which they may
/// serve.
const fn terms(settings: &ControlSettings) -> Terms {
    Terms {
        beat_every: settings.heartbeat,
        max_serve_for: settings.max_serve_for,
    }
}

/// Starts the reconciler, the reads that sidecars ask for and the keeper. Returns the number of
/// complete rounds of the reconciler.
fn spawn_upkeep(
    reconciler: Reconciler,
    keeper: Keeper,
    catalog: &Arc<Catalog>,
    shutdown: &Shutdown,
) -> watch::Receiver<u64> {
    let rounds = reconciler.rounds();
    shutdown.spawn("reconciler", reconciler.run(shutdown.token()));
    let reads = Arc::clone(catalog).read_for_those_who_ask(shutdown.token());
    shutdown.spawn("reads", reads);
    shutdown.spawn("keeper", keeper.run(shutdown.token()));
    rounds
}

/// At `stop`, announces to processes that wait for the store that it will be free soon.
async fn note_stop(owner: Arc<StoreOwner>, stop: CancellationToken) {
    stop.cancelled().await;
    owner.note_stop();
}

/// Reports `NotServing` as the last status, and ends the streams of health watchers: otherwise they
/// would delay the drain.
async fn end_watches(mut health: HealthReporter) {
    for service in ["", ADMIN_SERVICE] {
        let status = ServingStatus::NotServing;
        health.set_service_status(service, status).await;
        health.clear_service_status(service).await;
        health.set_service_status(service, status).await;
    }
}

/// Binds the port of metrics and probes.
async fn bind_http(
    address: SocketAddr,
    registry: Registry,
    catalog: Arc<Catalog>,
) -> Result<HttpServer, PlaneError> {
    let pages = Pages {
        registry: Arc::new(registry),
        readiness: Readiness::default(),
        notes: Some(catalog),
        status: None,
    };
    HttpServer::bind(address, pages)
        .await
        .map_err(bind_error("http", address))
}

fn bind_error(
    field: &'static str,
    address: SocketAddr,
) -> impl FnOnce(std::io::Error) -> PlaneError {
    move |source| PlaneError::Bind {
        field,
        address,
        source,
    }
}
