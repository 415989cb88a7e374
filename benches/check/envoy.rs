//! A real Envoy with one worker thread, one route that it answers itself, and one kind of authorization.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    cores::{Core, Cores},
    daemon::Place,
    keys::Keys,
    page,
    patience::until,
};

/// A running Envoy. It is killed on drop.
#[derive(Debug)]
pub(crate) struct Envoy {
    process: Process,
    /// The address for consumers.
    pub(crate) address: SocketAddr,
}

/// The kind of authorization.
#[derive(Clone, Debug)]
pub(crate) enum Filter<'a> {
    /// None.
    None,
    /// The filter `api_key_auth` of Envoy, with these keys.
    ApiKeyAuth(&'a Keys),
    /// A check of a server.
    ExtAuthz(&'a Place),
}

#[derive(Debug)]
struct Process(Child);

/// The longest start: Envoy needs a second or two, and more if it reads many keys.
const START_TIMEOUT: Duration = Duration::from_mins(1);

impl Envoy {
    /// Starts Envoy with its files in `directory`, under `name`.
    ///
    /// # Errors
    ///
    /// When `scripts/bench.sh` has not fetched it, or it does not start.
    pub(crate) fn start(
        cores: &Cores,
        directory: &Path,
        name: &str,
        filter: &Filter<'_>,
    ) -> Result<Self> {
        let program = program();
        ensure!(
            program.exists(),
            "{} is missing: scripts/bench.sh fetches it",
            program.display()
        );
        let config = directory.join(format!("envoy-{name}.json"));
        let admin_file = directory.join(format!("envoy-{name}.admin"));
        fs::write(&config, bootstrap(filter).to_string())?;
        let log = fs::File::create(directory.join(format!("envoy-{name}.log")))?;
        let mut command = Command::new(&program);
        command
            .args(["--concurrency", "1", "--disable-hot-restart"])
            .args(["--log-level", "warning", "--config-path"])
            .arg(config)
            .arg("--admin-address-path")
            .arg(&admin_file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut process = cores.on(Core::Measured, || {
            let child = command.spawn();
            Ok(Process(child.with_context(|| {
                format!("cannot run {}", program.display())
            })?))
        })?;
        let address = until("Envoy serves", START_TIMEOUT, || {
            let ended = process.0.try_wait()?;
            ensure!(ended.is_none(), "Envoy does not start: {ended:?}");
            Ok(listener(&admin_file))
        })?;
        Ok(Self { process, address })
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Envoy may already have ended.
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

/// The newest Envoy that relatch works with.
fn program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/envoy/1.40/bin/envoy")
}

/// The address on which it listens; none while it is not ready.
fn listener(admin_file: &Path) -> Option<SocketAddr> {
    let admin = fs::read_to_string(admin_file).ok()?.trim().parse().ok()?;
    let ready = page::get(admin, "/ready").ok()?;
    ready.contains("LIVE").then_some(())?;
    let listeners = page::get(admin, "/listeners?format=json").ok()?;
    let (_, rest) = listeners.split_once("\"port_value\":")?;
    let rest = rest.trim_start();
    let digits = rest.find(|digit: char| !digit.is_ascii_digit())?;
    let port = rest[..digits].parse::<u16>().ok()?;
    Some(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// The configuration of the listener. Envoy itself answers the route, after its filters: an upstream would need more time
/// than the compared parts.
fn bootstrap(filter: &Filter<'_>) -> Value {
    let router = json!({
        "name": "envoy.filters.http.router",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
        },
    });
    let filters: Vec<Value> = filter.to_json().into_iter().chain([router]).collect();
    json!({
        "admin": { "address": loopback() },
        "static_resources": {
            "listeners": [{
                "name": "api",
                "address": loopback(),
                "filter_chains": [{ "filters": [{
                    "name": "envoy.filters.network.http_connection_manager",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                        "stat_prefix": "api",
                        "codec_type": "HTTP2",
                        "route_config": { "virtual_hosts": [{
                            "name": "api",
                            "domains": ["*"],
                            "routes": [{
                                "match": { "prefix": "/" },
                                "direct_response": { "status": 200 },
                            }],
                        }] },
                        "http_filters": filters,
                    },
                }] }],
            }],
            "clusters": filter.cluster().into_iter().collect::<Vec<_>>(),
        },
    })
}

impl Filter<'_> {
    fn to_json(&self) -> Option<Value> {
        match self {
            Self::None => None,
            Self::ApiKeyAuth(keys) => {
                let credentials = (0..keys.len()).map(|number| {
                    let key = String::from_utf8_lossy(keys.get(number)).into_owned();
                    json!({ "key": key, "client": format!("consumer-{number}") })
                });
                Some(json!({
                    "name": "envoy.filters.http.api_key_auth",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth",
                        "credentials": credentials.collect::<Vec<_>>(),
                        "key_sources": [{ "header": "x-api-key" }],
                        "forwarding": { "header": "x-consumer", "hide_credentials": true },
                    },
                }))
            }
            Self::ExtAuthz(_) => Some(json!({
                "name": "envoy.filters.http.ext_authz",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
                    "transport_api_version": "V3",
                    // A busy machine must not turn a slow answer into a failure.
                    "grpc_service": { "envoy_grpc": { "cluster_name": "authz" }, "timeout": "5s" },
                    "failure_mode_allow": false,
                    "validate_mutations": true,
                },
            })),
        }
    }

    fn cluster(&self) -> Option<Value> {
        let address = match self {
            Self::None | Self::ApiKeyAuth(_) => return None,
            Self::ExtAuthz(Place::Tcp(address)) => json!({ "socket_address": {
                "address": address.ip(),
                "port_value": address.port(),
            } }),
            Self::ExtAuthz(Place::Unix(path)) => json!({ "pipe": { "path": path } }),
        };
        Some(json!({
            "name": "authz",
            "type": "STATIC",
            "connect_timeout": "5s",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": { "http2_protocol_options": {} },
                },
            },
            "load_assignment": {
                "cluster_name": "authz",
                "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address } }] }],
            },
        }))
    }
}

fn loopback() -> Value {
    json!({ "socket_address": { "address": "127.0.0.1", "port_value": 0 } })
}
