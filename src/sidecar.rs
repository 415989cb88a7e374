//! A whole sidecar: its start, its parts, and the addresses on which it listens.
//!
//! [`worker`]s answer checks. Each one is a thread with a runtime of its own. A [`listener`] for
//! Envoy, and another one for proxies that ask over HTTP, [`spread`] connections over them; [`grpc`]
//! or [`http_authz`] is what runs on each connection. Everything else, such as the stream to the
//! control plane, runs on the runtime that starts the sidecar. A [`monitor`] watches the health of
//! the sidecar, and each worker measures its own scheduling [`delay`]. The configuration file is
//! read again by [`reload`].

pub(crate) mod begin;
mod delay;
mod grpc;
mod http_authz;
mod inherited;
pub mod listener;
mod lock;
pub(crate) mod monitor;
mod node_socket;
pub(crate) mod reload;
mod socket;
mod spread;
#[cfg(test)]
mod testing;
mod worker;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tonic_health::pb::health_server::{Health, HealthServer};

use crate::{
    authz::{Authorizer, forward::ForwardAuth},
    clock::{Clock, LatestWall},
    config::{Listen, SidecarSettings, http_authz::HttpAuthzSettings},
    follow::{
        client::{Client, Hold},
        receiver::Receiver,
    },
    http::{HttpServer, Pages},
    key::RandomError,
    keyring::Keyrings,
    proto::discovery,
    readiness::Readiness,
    shutdown::Shutdown,
    snapshot::{disk::Disk, keeper::Keeper},
    telemetry::{
        check::CheckTelemetry,
        enforcement::EnforcementCollector,
        export::{ExportError, SpanPipeline, SpanSource},
        metrics::SidecarMetrics,
        process::ProcessCollector,
        snapshot::SnapshotCollector,
    },
    tls::{Credentials, TlsClient, TlsError, TlsFiles, TlsMetrics, TlsServer, TlsUse},
};
use begin::{BeginError, Begun, Empty, KeptFile};
use grpc::connection::Services;
use http_authz::{HttpAuthz, Profile};
pub use inherited::Inherited;
use inherited::InheritedError;
use listener::{Endpoint, Listener};
use lock::RunLock;
use monitor::{HttpAuthzStatus, Monitor, ProfileStatus};
use reload::Changeable;
use spread::{Intake, MAX_CONNECTIONS, MAX_HTTP_CONNECTIONS, Protocol, Spread};
use worker::{Life, Served};

/// A sidecar that is running.
#[derive(Debug)]
pub struct Sidecar {
    /// The addresses on which it listens.
    pub endpoints: SidecarEndpoints,
    /// What its file can change.
    pub(crate) changeable: Changeable,
    /// Whether it can answer checks.
    pub(crate) readiness: Readiness,
    /// The export of spans; none if no `otlp_endpoint` is configured.
    spans: Option<SpanPipeline>,
    /// Held until the sidecar is dropped.
    _lock: Option<RunLock>,
}

/// The lock of a run, and its snapshot file.
struct Holdings {
    lock: Option<RunLock>,
    /// The state of the snapshot file; none if no file is configured.
    disk: Option<Arc<Disk>>,
    /// The writer of the snapshot file; none if no file is configured, or another process uses it.
    keeper: Option<Keeper>,
    /// The lock and the file as the control plane sees them.
    hold: Hold,
}

/// The bound sockets, on which nobody answers yet.
struct Sockets {
    listeners: Listeners,
    http: TcpListener,
}

/// The listeners for checks.
struct Listeners {
    /// For Envoy.
    grpc: Listener,
    /// For proxies that ask over HTTP.
    http: Option<Listener>,
}

/// What spreads the connections of [`Listeners`].
struct Spreads {
    grpc: Spread,
    http: Spread,
}

/// The metrics and the clock for loading certificates.
struct Certificates {
    metrics: TlsMetrics,
    clock: Clock,
}

/// The addresses that a sidecar has bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SidecarEndpoints {
    /// External authorization and gRPC health.
    pub ext_authz: Endpoint,
    /// The questions of proxies that ask over HTTP; none if no listener for them is configured.
    pub(crate) http_authz: Option<Endpoint>,
    /// Metrics, probes and status.
    pub(crate) http: SocketAddr,
}

/// The reason why a sidecar cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// A server of checks cannot be bound.
    #[error("{field}: cannot listen on {listen}")]
    Listen {
        /// The field of the configuration that has the address.
        field: &'static str,
        /// The configured address or socket.
        listen: Listen,
        /// The error of the system.
        source: io::Error,
    },
    /// The HTTP server cannot be bound.
    #[error("http: cannot listen on {address}")]
    Http {
        /// The configured address.
        address: SocketAddr,
        /// The error of the system.
        source: io::Error,
    },
    /// A socket that systemd passes cannot be used.
    #[error(transparent)]
    Inherited(#[from] InheritedError),
    /// Certificates cannot be used.
    #[error("{field}.tls")]
    Tls {
        /// The field of the configuration that has `tls`: `control`, `listen` or
        /// `http_authz.listen`.
        field: &'static str,
        /// The certificate problem.
        source: TlsError,
    },
    /// The snapshot file or its key cannot be used.
    #[error(transparent)]
    Snapshot(#[from] BeginError),
    /// A worker cannot be started.
    #[error("cannot start a worker")]
    Worker(#[source] io::Error),
    /// The export of spans cannot start.
    #[error("telemetry.otlp_endpoint")]
    Export(#[from] ExportError),
    /// The operating system's random source failed.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The resource use of the process cannot be read.
    #[error("cannot read the resource use of this process")]
    Process(#[source] io::Error),
}

/// The longest time for which a starting sidecar accepts no connection, so that its first checks
/// find the keyrings. Envoy waits longer for a check (the sample: 250 ms).
const START_WAIT: Duration = Duration::from_millis(100);

impl Sidecar {
    /// Starts a sidecar. Its tasks belong to `shutdown`.
    ///
    /// # Errors
    ///
    /// When an address cannot be bound, a certificate or the snapshot file cannot be used, the
    /// export of spans cannot start, or the system creates no thread; see [`SidecarError`].
    pub async fn start(
        settings: &SidecarSettings,
        clock: Clock,
        shutdown: &Shutdown,
    ) -> Result<Self, SidecarError> {
        Self::start_on(settings, Inherited::default(), clock, shutdown).await
    }

    /// Starts a sidecar that uses inherited sockets where they have the configured addresses.
    ///
    /// # Errors
    ///
    /// Those of [`Sidecar::start`], and when a socket has another address.
    pub(crate) async fn start_on(
        settings: &SidecarSettings,
        inherited: Inherited,
        clock: Clock,
        shutdown: &Shutdown,
    ) -> Result<Self, SidecarError> {
        let Sockets { listeners, http } = Sockets::bind(settings, inherited).await?;
        let keyrings = Keyrings::of(settings.wanted());
        let mut registry = registry()?;
        let metrics = SidecarMetrics::register(&mut registry, &keyrings, clock.clone());
        let (tracer, spans) = start_spans(settings, &metrics)?.unzip();

        let latest = LatestWall::default();
        let mut receiver = receiver(&keyrings, &clock, &latest);
        let sidecar = Empty {
            node: &settings.node,
            keyrings: &keyrings,
            receiver: &mut receiver,
            latest: &latest,
            clock: &clock,
        };
        let Holdings {
            lock,
            disk,
            keeper,
            hold,
        } = Holdings::acquire(settings, sidecar)?;
        if let Some(disk) = &disk {
            registry.register_collector(Box::new(SnapshotCollector::new(Arc::clone(disk))));
        }
        let certificates = Certificates {
            metrics: TlsMetrics::register(&mut registry),
            clock: clock.clone(),
        };
        let client = start_client(settings, receiver, &certificates, shutdown)?.with_hold(hold);
        let readiness = Readiness::default();
        let observer = CheckTelemetry::new(metrics.clone(), tracer, clock.clone());
        let (authz, observer) = (settings.all_authz(), Arc::new(observer));
        let authorizer = Authorizer::new(authz, &keyrings, clock.clone(), observer);
        let authorizer = authorizer.judging_by(latest);
        let enforcement = EnforcementCollector::new(keyrings.clone(), authorizer.clone());
        registry.register_collector(Box::new(enforcement));
        let changeable = Changeable::new(keyrings, authorizer, metrics.clone(), clock);
        let monitor = Monitor::new(
            settings.node.id.clone(),
            changeable.clone(),
            Arc::clone(client.link()),
            readiness.clone(),
        )
        .with_disk(disk)
        .with_http_authz(http_authz_status(settings, listeners.http.as_ref()));
        let http = pages(http, settings, registry, &readiness, &monitor)?;
        let endpoints = SidecarEndpoints {
            ext_authz: listeners.grpc.endpoint().clone(),
            http_authz: listeners.http.as_ref().map(Listener::endpoint).cloned(),
            http: http.local_addr(),
        };

        let (reporter, health) = tonic_health::server::health_reporter();
        let authorizer = changeable.authorizer.clone();
        let served = served(settings, authorizer, health, &certificates, shutdown)?;
        let life = Life {
            stop: CancellationToken::new(),
            checks: TaskTracker::new(),
            lock: lock.clone(),
        };
        let workers = start_workers(settings, &served, &metrics, &life, shutdown)?;

        let guards = monitor.block();
        let early = shutdown.early();
        early.spawn(
            "drain",
            drain(settings.drain, early.token(), shutdown.token()),
        );
        let spreads = Spreads::new(workers, metrics.connections_refused());
        let (closed, stop) = (life.stop, shutdown.token());
        let answering = answer(listeners, spreads, monitor.clone(), closed, stop);
        shutdown.spawn("listener", answering);
        shutdown.spawn("sidecar http", http.serve(shutdown.token()));
        shutdown.spawn(
            "monitor",
            monitor.run(guards, reporter, metrics, early.token(), shutdown.token()),
        );
        shutdown.spawn(
            "discovery client",
            client.run(shutdown.token(), life.checks),
        );
        if let Some(keeper) = keeper {
            // The keeper stops last, so that it writes everything that the client has applied.
            let last = shutdown.last();
            last.spawn_fallible("snapshot keeper", keeper.run(last.token()));
        }
        Ok(Self {
            endpoints,
            changeable,
            readiness,
            spans,
            _lock: lock,
        })
    }

    /// Sends the last spans, within `deadline`. Call it after the tasks have ended.
    pub(crate) async fn flush(self, deadline: Duration) {
        if let Some(spans) = self.spans {
            spans.shutdown(deadline).await;
        }
    }
}

impl Holdings {
    /// Acquires the lock of the run, and loads the snapshot file if one is configured.
    ///
    /// If the lock of the file, or the socket of the node, cannot be acquired, the run holds no
    /// lock. It still serves.
    fn acquire(settings: &SidecarSettings, sidecar: Empty<'_>) -> Result<Self, BeginError> {
        let clock = sidecar.clock.clone();
        let Some(snapshot) = &settings.snapshot else {
            let lock = RunLock::of_node(&settings.node.id, &clock);
            let shown = lock.as_ref().and_then(|lock| lock.to_wire(&clock));
            return Ok(Self {
                lock,
                disk: None,
                keeper: None,
                hold: Hold {
                    lock: shown,
                    ..Hold::default()
                },
            });
        };
        let Begun { disk, kept } = begin::begin(snapshot, sidecar)?;
        let disk = Some(disk);
        let Some(KeptFile {
            keeper,
            closer,
            lock,
            id,
            begun_from_write,
        }) = kept
        else {
            return Ok(Self {
                lock: None,
                disk,
                keeper: None,
                hold: Hold::default(),
            });
        };
        let lock = lock.map(RunLock::of_file);
        let hold = Hold {
            lock: lock.as_ref().and_then(|lock| lock.to_wire(&clock)),
            snapshot_file: Some(discovery::SnapshotFile {
                id: id.as_bytes().to_vec().into(),
                begun_from_write,
            }),
            closer: Some(closer),
        };
        Ok(Self {
            lock,
            disk,
            keeper: Some(keeper),
            hold,
        })
    }
}

impl Certificates {
    /// Loads the certificates of one channel, and keeps them current until `shutdown`.
    fn load(
        &self,
        used: TlsUse,
        field: &'static str,
        files: TlsFiles,
        shutdown: &Shutdown,
    ) -> Result<Arc<Credentials>, SidecarError> {
        let (clock, metrics) = (self.clock.clone(), self.metrics.clone());
        let credentials = Credentials::load(used, files, clock, metrics)
            .map_err(|source| SidecarError::Tls { field, source })?;
        let kept = Arc::clone(&credentials).keep(shutdown.token());
        shutdown.spawn("certificates", kept);
        Ok(credentials)
    }
}

impl Sockets {
    /// Binds all addresses.
    async fn bind(
        settings: &SidecarSettings,
        mut inherited: Inherited,
    ) -> Result<Self, SidecarError> {
        let grpc = listen("listen", &settings.listen, &mut inherited).await?;
        let over_http = match &settings.http_authz {
            Some(http_authz) => {
                Some(listen("http_authz.listen", &http_authz.listen, &mut inherited).await?)
            }
            None => None,
        };
        let http = listener::tcp(settings.http, &mut inherited).await;
        let (http, _is_inherited) = http.map_err(|source| SidecarError::Http {
            address: settings.http,
            source,
        })?;
        inherited.check_used()?;
        let listeners = Listeners {
            grpc,
            http: over_http,
        };
        Ok(Self { listeners, http })
    }
}

impl Spreads {
    fn new(workers: Vec<Intake>, refused: &Counter) -> Self {
        let (max, refused_grpc) = (MAX_HTTP_CONNECTIONS, refused.clone());
        Self {
            http: Spread::new(Protocol::Http, workers.clone(), max, refused.clone()),
            grpc: Spread::new(Protocol::Grpc, workers, MAX_CONNECTIONS, refused_grpc),
        }
    }
}

async fn listen(
    field: &'static str,
    listen: &Listen,
    inherited: &mut Inherited,
) -> Result<Listener, SidecarError> {
    let listener = Listener::bind(listen, inherited).await;
    listener.map_err(|source| SidecarError::Listen {
        field,
        listen: listen.clone(),
        source,
    })
}

/// Creates a registry with the metrics of the process.
fn registry() -> Result<Registry, SidecarError> {
    let mut registry = Registry::default();
    let process = ProcessCollector::new().map_err(SidecarError::Process)?;
    registry.register_collector(Box::new(process));
    Ok(registry)
}

/// Creates the receiver of the control plane's messages.
fn receiver(keyrings: &Keyrings, clock: &Clock, latest: &LatestWall) -> Receiver {
    Receiver::new(keyrings, clock.clone()).telling(latest.clone())
}

/// Creates the server of metrics, probes and status. It does not answer yet.
fn pages(
    socket: TcpListener,
    settings: &SidecarSettings,
    registry: Registry,
    readiness: &Readiness,
    monitor: &Monitor,
) -> Result<HttpServer, SidecarError> {
    let pages = Pages {
        registry: Arc::new(registry),
        readiness: readiness.clone(),
        notes: None,
        status: Some(Arc::new(monitor.clone())),
    };
    HttpServer::on(socket, pages).map_err(|source| SidecarError::Http {
        address: settings.http,
        source,
    })
}

/// Creates the client of the control plane. It does not connect yet.
fn start_client(
    settings: &SidecarSettings,
    receiver: Receiver,
    certificates: &Certificates,
    shutdown: &Shutdown,
) -> Result<Client, SidecarError> {
    let endpoints = settings
        .control
        .iter()
        .map(|endpoint| endpoint.uri().clone());
    let client = Client::new(node(settings), endpoints.collect(), receiver)?;
    let Some(tls) = &settings.control_tls else {
        return Ok(client);
    };
    let (used, files) = (TlsUse::DiscoveryClient, tls.files.clone());
    let credentials = certificates.load(used, "control", files, shutdown)?;
    let client = client.with_tls(TlsClient::new(credentials, tls.server_identity.clone()));
    Ok(match &tls.token_file {
        Some(file) => client.with_token_file(file.clone()),
        None => client,
    })
}

/// Answers checks on the connections of both listeners until `stop`. Then the sockets are closed,
/// and `closed` tells the workers to end.
async fn answer(
    listeners: Listeners,
    spreads: Spreads,
    monitor: Monitor,
    closed: CancellationToken,
    stop: CancellationToken,
) {
    let _closed = closed.drop_guard();
    tokio::select! {
        // A check that came earlier would be denied.
        _usable_or_late = timeout(START_WAIT, monitor.until_usable()) => {}
        () = stop.cancelled() => {}
    }
    let over_http = async {
        if let Some(listener) = listeners.http {
            listener.accept(spreads.http, stop.clone()).await;
        }
    };
    let grpc = listeners.grpc.accept(spreads.grpc, stop.clone());
    tokio::join!(grpc, over_http);
}

/// Ends `drain_for` after `begin`, or when all others are told to stop.
async fn drain(drain_for: Duration, begin: CancellationToken, stop: CancellationToken) {
    begin.cancelled().await;
    tokio::select! {
        () = tokio::time::sleep(drain_for) => {}
        () = stop.cancelled() => {}
    }
}

/// Creates what the workers serve: the checks of `authorizer`, and `health`.
fn served(
    settings: &SidecarSettings,
    authorizer: Authorizer,
    health: HealthServer<impl Health>,
    certificates: &Certificates,
    shutdown: &Shutdown,
) -> Result<Served<Authorizer>, SidecarError> {
    let server = |used, field, files: &Option<TlsFiles>| match files {
        None => Ok(None),
        Some(files) => {
            let loaded = certificates.load(used, field, files.clone(), shutdown)?;
            Ok::<_, SidecarError>(Some(TlsServer::new(loaded)))
        }
    };
    let http = match &settings.http_authz {
        None => None,
        Some(http_authz) => {
            let (used, field) = (TlsUse::HttpAuthzServer, "http_authz.listen");
            let tls = server(used, field, &http_authz.listen_tls)?;
            Some(HttpAuthz::new(profiles(http_authz, &authorizer), tls))
        }
    };
    Ok(Served {
        grpc: Services::new(Arc::new(authorizer), Routes::new(health)),
        grpc_tls: server(TlsUse::ExtAuthzServer, "listen", &settings.listen_tls)?,
        http,
    })
}

/// Creates the profiles, which answer from the keyrings of `authorizer`.
fn profiles(settings: &HttpAuthzSettings, authorizer: &Authorizer) -> Vec<Profile> {
    let profiles = settings.profiles.iter().enumerate().map(|(at, profile)| {
        let authorizer = authorizer.of_profile(at);
        let (keyring, scopes) = (profile.keyring.clone(), &profile.scopes);
        Profile {
            name: profile.name.to_string(),
            checks: ForwardAuth::new(authorizer, keyring, scopes),
        }
    });
    profiles.collect()
}

fn http_authz_status(
    settings: &SidecarSettings,
    listener: Option<&Listener>,
) -> Option<HttpAuthzStatus> {
    let profiles = settings.http_authz.as_ref()?.profiles.iter();
    let profiles = profiles.map(|profile| ProfileStatus {
        path: format!("{}{}", http_authz::PREFIX, profile.name),
        dialect: profile.authz.dialect().as_str(),
        keyring: profile.keyring.to_string(),
        scopes: profile.scopes.to_string(),
        headers: Vec::new(),
    });
    Some(HttpAuthzStatus {
        address: listener?.endpoint().to_string(),
        profiles: profiles.collect(),
    })
}

/// Starts the workers.
fn start_workers(
    settings: &SidecarSettings,
    served: &Served<Authorizer>,
    metrics: &SidecarMetrics,
    life: &Life,
    shutdown: &Shutdown,
) -> Result<Vec<Intake>, SidecarError> {
    let workers = (0..settings.workers.get())
        .map(|index| {
            let delays = metrics.worker_delays().clone();
            worker::start(index, served.clone(), delays, life, shutdown)
        })
        .collect::<io::Result<Vec<_>>>()
        .map_err(SidecarError::Worker)?;
    life.checks.close();
    Ok(workers)
}

fn start_spans(
    settings: &SidecarSettings,
    metrics: &SidecarMetrics,
) -> Result<Option<(opentelemetry_sdk::trace::SdkTracer, SpanPipeline)>, ExportError> {
    let source = SpanSource {
        service_name: &settings.telemetry.service_name,
        instance: settings.node.id.as_str(),
        labels: &settings.node.labels,
    };
    settings
        .telemetry
        .otlp_endpoint
        .as_ref()
        .map(|endpoint| SpanPipeline::start(endpoint, &source, metrics.spans_dropped().clone()))
        .transpose()
}

fn node(settings: &SidecarSettings) -> discovery::Node {
    discovery::Node {
        id: settings.node.id.to_string(),
        cluster: settings.node.cluster.to_string(),
        labels: settings.node.labels.clone().into_iter().collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}
