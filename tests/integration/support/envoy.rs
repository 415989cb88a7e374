//! A real Envoy with the `ext_authz` filter in front of an upstream.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    client::{Connection, Request, Response},
    eventually::eventually,
    loopback::any_port,
    process::Process,
};

/// A running Envoy. Dropping it kills the process and removes its files.
#[derive(Debug)]
pub(crate) struct Envoy {
    addr: SocketAddr,
    files: TempDir,
    _process: Process,
}

/// An Envoy release line that `scripts/test.sh` has fetched; the exact releases are named there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EnvoyVersion {
    V1_36,
    V1_40,
}

/// How an [`Envoy`] is set up.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of Envoy's")]
pub(crate) struct EnvoyOptions {
    version: EnvoyVersion,
    authz: Vec<AuthzAddress>,
    /// Where the certificates are with which it is asked over TLS.
    authz_certs: Option<PathBuf>,
    upstream: SocketAddr,
    routes: Vec<Route>,
    raw_headers: bool,
    failure_mode_allow: bool,
    timeout: Duration,
    collector: Option<SocketAddr>,
    /// The names of the headers that the check has; none: all of them.
    shown_headers: Option<Vec<String>>,
    body: Option<PassedBody>,
    max_headers_kb: Option<u32>,
    grpc_web: bool,
    tunnels: bool,
    retries: bool,
    use_remote_address: bool,
    trusted_hops: u32,
    /// Whose requests are internal; none: nobody's.
    internal: Option<IpAddr>,
    /// From which address Envoy connects to the upstream; none: from any.
    source: Option<IpAddr>,
    /// The origin whose scripts may call the API; none: no CORS filter.
    cors: Option<String>,
    websockets: bool,
    redirects: Option<Redirects>,
    /// The prefix of a route without an `ext_authz` filter; none: no such route.
    unchecked: Option<String>,
}

/// Where Envoy follows the redirects of the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Redirects {
    /// In the listener that asks `ext_authz`.
    Checked,
    /// In a listener of its own behind the one that asks `ext_authz`.
    Behind,
}

/// `ExtAuthz.with_request_body`
#[derive(Clone, Copy, Debug)]
struct PassedBody {
    max_bytes: u32,
    as_bytes: bool,
}

/// Where the `ext_authz` server listens.
#[derive(Clone, Debug)]
pub(crate) enum AuthzAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Clone, Debug)]
struct Route {
    prefix: String,
    context_extensions: Vec<(String, String)>,
}

impl Envoy {
    /// Starts Envoy and waits until it serves.
    ///
    /// # Panics
    ///
    /// When `scripts/test.sh` has not fetched that Envoy, or it does not come up.
    pub(crate) async fn start(options: EnvoyOptions) -> Self {
        let program = options.version.program();
        assert!(
            program.exists(),
            "{} is missing: run scripts/test.sh once, it fetches the Envoys that the tests run",
            program.display()
        );
        let files = tempfile::tempdir().expect("a directory can be made");
        let config = files.path().join("envoy.json");
        let admin_file = files.path().join("admin");
        let any_port = any_port();
        std::fs::write(
            &config,
            options.bootstrap(any_port, files.path()).to_string(),
        )
        .expect("the test's directory can be written to");
        let mut process = Process::start(
            Command::new(program)
                .args(["--concurrency", "1", "--disable-hot-restart"])
                .args(["--log-level", "warning", "--file-flush-interval-msec", "20"])
                .arg("--config-path")
                .arg(config)
                .arg("--admin-address-path")
                .arg(&admin_file),
        );
        let addr = eventually("Envoy serves", async || {
            let ended = process.ended();
            assert!(ended.is_none(), "Envoy does not start: {ended:?}");
            let admin = std::fs::read_to_string(&admin_file)
                .ok()?
                .trim()
                .parse()
                .ok()?;
            let ready = ask(admin, "/ready").await?;
            (ready.text().trim() == "LIVE").then_some(())?;
            let listeners: Value = ask(admin, "/listeners?format=json").await?.json();
            let socket = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
            let port = u16::try_from(socket["port_value"].as_u64()?).ok()?;
            Some(SocketAddr::new(any_port.ip(), port))
        })
        .await;
        Self {
            addr,
            files,
            _process: process,
        }
    }

    /// Where consumers connect, with HTTP/1.1 or HTTP/2.
    pub(crate) const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Waits until the access log has `count` lines and returns all of them.
    pub(crate) async fn access_log(&self, count: usize) -> Vec<Value> {
        let path = access_log(self.files.path());
        eventually("lines in the access log", async || {
            let text = std::fs::read_to_string(&path).ok()?;
            // The last line may be half written.
            let complete = text.rsplit_once('\n')?.0;
            let line = |line| serde_json::from_str(line).expect("Envoy writes JSON");
            let lines: Vec<Value> = complete.lines().map(line).collect();
            (lines.len() >= count).then_some(lines)
        })
        .await
    }
}

impl EnvoyVersion {
    /// The oldest release line that relatch works with, and the newest.
    pub(crate) const ALL: [Self; 2] = [Self::V1_36, Self::V1_40];

    fn program(self) -> PathBuf {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        target.join(format!("envoy/{self}/bin/envoy"))
    }
}

impl fmt::Display for EnvoyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1_36 => "1.36",
            Self::V1_40 => "1.40",
        })
    }
}

impl EnvoyOptions {
    /// The newest Envoy as a load balancer without an `ext_authz` filter: it connects to the upstream from `source`, and
    /// appends the address of whoever connects to it to `x-forwarded-for`.
    pub(crate) fn balancer(source: IpAddr, upstream: SocketAddr) -> Self {
        Self {
            authz: Vec::new(),
            source: Some(source),
            ..Self::new(upstream, upstream)
        }
        .use_remote_address()
    }

    /// The newest Envoy with one route, which fails closed and waits 30 s for a verdict: a busy machine is slow, and
    /// no test must mistake that for a denial.
    pub(crate) fn new(authz: impl Into<AuthzAddress>, upstream: SocketAddr) -> Self {
        Self {
            version: EnvoyVersion::V1_40,
            authz: vec![authz.into()],
            authz_certs: None,
            upstream,
            routes: Vec::new(),
            raw_headers: false,
            failure_mode_allow: false,
            timeout: Duration::from_secs(30),
            collector: None,
            shown_headers: None,
            body: None,
            max_headers_kb: None,
            grpc_web: false,
            tunnels: false,
            retries: false,
            use_remote_address: false,
            trusted_hops: 0,
            internal: None,
            source: None,
            cors: None,
            websockets: false,
            redirects: None,
            unchecked: None,
        }
    }

    /// Adds an `ext_authz` server; Envoy asks one after the other.
    pub(crate) fn and_authz(mut self, authz: impl Into<AuthzAddress>) -> Self {
        self.authz.push(authz.into());
        self
    }

    /// Asks over mutual TLS, with the certificates that `relatch certs dev` has made in `dir`.
    pub(crate) fn authz_over_tls(mut self, dir: &Path) -> Self {
        self.authz_certs = Some(dir.to_owned());
        self
    }

    pub(crate) const fn version(mut self, version: EnvoyVersion) -> Self {
        self.version = version;
        self
    }

    /// Adds a route for paths that begin with `prefix`. The first that matches wins; a plain one for `/` comes last.
    pub(crate) fn route(mut self, prefix: &str, context_extensions: &[(&str, &str)]) -> Self {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        self.routes.push(Route {
            prefix: prefix.to_owned(),
            context_extensions: context_extensions.iter().map(owned).collect(),
        });
        self
    }

    /// `ExtAuthz.encode_raw_headers`
    pub(crate) const fn raw_headers(mut self) -> Self {
        self.raw_headers = true;
        self
    }

    /// `ExtAuthz.failure_mode_allow`
    pub(crate) const fn failure_mode_allow(mut self) -> Self {
        self.failure_mode_allow = true;
        self
    }

    /// How long Envoy waits for a verdict.
    pub(crate) const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Traces every request to the OTLP collector at `addr`, as service `envoy`.
    pub(crate) const fn tracing(mut self, addr: SocketAddr) -> Self {
        self.collector = Some(addr);
        self
    }

    /// `ExtAuthz.allowed_headers`: the check has no other headers than these.
    pub(crate) fn shows_only(mut self, names: &[&str]) -> Self {
        self.shown_headers = Some(names.iter().map(|name| (*name).to_owned()).collect());
        self
    }

    /// `ExtAuthz.with_request_body`: the check has the body, as bytes or as text.
    pub(crate) const fn with_body(mut self, max_bytes: u32, as_bytes: bool) -> Self {
        self.body = Some(PassedBody {
            max_bytes,
            as_bytes,
        });
        self
    }

    /// Raises the limit on the headers of a request, in KiB.
    pub(crate) const fn max_headers_kb(mut self, limit: u32) -> Self {
        self.max_headers_kb = Some(limit);
        self
    }

    /// Translates gRPC-Web to gRPC, before it asks.
    pub(crate) const fn grpc_web(mut self) -> Self {
        self.grpc_web = true;
        self
    }

    /// Asks another `ext_authz` server where one cannot be reached, as the sample does.
    pub(crate) const fn retries(mut self) -> Self {
        self.retries = true;
        self
    }

    /// Opens a tunnel to the upstream for CONNECT.
    pub(crate) const fn tunnels(mut self) -> Self {
        self.tunnels = true;
        self
    }

    /// `HttpConnectionManager.use_remote_address`
    pub(crate) const fn use_remote_address(mut self) -> Self {
        self.use_remote_address = true;
        self
    }

    /// `HttpConnectionManager.xff_num_trusted_hops`
    pub(crate) const fn trusted_hops(mut self, hops: u32) -> Self {
        self.trusted_hops = hops;
        self
    }

    /// `HttpConnectionManager.internal_address_config`: requests of this address are internal.
    pub(crate) const fn internal(mut self, address: IpAddr) -> Self {
        self.internal = Some(address);
        self
    }

    /// Answers CORS preflights itself, and lets scripts of `origin` read answers and their rotation notices. The filter
    /// stands before `ext_authz`.
    pub(crate) fn cors(mut self, origin: &str) -> Self {
        self.cors = Some(origin.to_owned());
        self
    }

    /// Lets clients upgrade to WebSocket.
    pub(crate) const fn websockets(mut self) -> Self {
        self.websockets = true;
        self
    }

    /// Follows redirects of the upstream.
    pub(crate) const fn redirects(mut self, redirects: Redirects) -> Self {
        self.redirects = Some(redirects);
        self
    }

    /// Adds a route without a check, as the sample has one: it removes identity headers.
    pub(crate) fn unchecked(mut self, prefix: &str) -> Self {
        self.unchecked = Some(prefix.to_owned());
        self
    }

    fn bootstrap(&self, any_port: SocketAddr, files: &Path) -> Value {
        let authz: Vec<Value> = self.authz.iter().map(AuthzAddress::to_json).collect();
        let mut clusters = vec![
            cluster("upstream", &[tcp(self.upstream)], false),
            cluster("authz", &authz, true),
        ];
        if let Some(source) = self.source {
            clusters[0]["upstream_bind_config"] =
                json!({ "source_address": { "address": source, "port_value": 0 } });
        }
        if let Some(certs) = &self.authz_certs {
            clusters[1]["transport_socket"] = upstream_tls(certs);
        }
        clusters.extend(
            self.collector
                .map(|addr| cluster("collector", &[tcp(addr)], true)),
        );
        let mut listeners = vec![listener(
            "api",
            &tcp(any_port),
            &self.connection_manager(files),
        )];
        if self.redirects == Some(Redirects::Behind) {
            let socket = json!({ "pipe": { "path": files.join("behind.sock") } });
            clusters.push(cluster("behind", std::slice::from_ref(&socket), false));
            listeners.push(listener("behind", &socket, &redirecting()));
        }
        json!({
            "admin": { "address": tcp(any_port) },
            "layered_runtime": { "layers": [{
                "name": "tests",
                // A span is sent as soon as it has ended.
                "static_layer": { "tracing.opentelemetry.min_flush_spans": 1 },
            }] },
            "static_resources": {
                "listeners": listeners,
                "clusters": clusters,
            },
        })
    }

    fn connection_manager(&self, files: &Path) -> Value {
        let tunnel = json!({
            "match": { "connect_matcher": {} },
            "route": {
                "cluster": "upstream",
                "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }],
            },
        });
        let tunnel = self.tunnels.then_some(tunnel);
        let unchecked = self.unchecked.as_ref().map(|prefix| {
            json!({
                "name": prefix,
                "match": { "prefix": prefix },
                "route": { "cluster": "upstream" },
                "request_headers_to_remove": IDENTITY,
                "typed_per_filter_config": { FILTER: {
                    "@type": EXT_AUTHZ_PER_ROUTE,
                    "disabled": true,
                } },
            })
        });
        let routes = tunnel
            .into_iter()
            .chain(unchecked)
            .chain(self.routes.iter().map(Route::to_json));
        let cluster = match self.redirects {
            Some(Redirects::Behind) => "behind",
            Some(Redirects::Checked) | None => "upstream",
        };
        let mut last = json!({ "match": { "prefix": "/" }, "route": { "cluster": cluster } });
        if self.redirects == Some(Redirects::Checked) {
            last["route"]["internal_redirect_policy"] = redirect_policy();
        }
        let mut manager = json!({
            "@type": HTTP_CONNECTION_MANAGER,
            "stat_prefix": "api",
            "codec_type": "AUTO",
            "route_config": { "virtual_hosts": [{
                "name": "api",
                "domains": ["*"],
                "routes": routes.chain([last]).collect::<Vec<_>>(),
            }] },
            "http_filters": self.http_filters(),
            "access_log": [access_logger(files)],
        });
        if self.use_remote_address {
            manager["use_remote_address"] = true.into();
        }
        if let Some(origin) = &self.cors {
            let policy = json!({
                "@type": CORS_POLICY,
                "allow_origin_string_match": [{ "exact": origin }],
                "allow_methods": "GET, POST",
                "allow_headers": "x-api-key",
                "expose_headers": "api-key-rotation, link, www-authenticate, retry-after",
            });
            manager["route_config"]["virtual_hosts"][0]["typed_per_filter_config"] =
                json!({ CORS_FILTER: policy });
        }
        if self.websockets {
            manager["upgrade_configs"] = json!([{ "upgrade_type": "websocket" }]);
        }
        if let Some(address) = self.internal {
            let range = json!({ "address_prefix": address, "prefix_len": 32 });
            manager["internal_address_config"] = json!({ "cidr_ranges": [range] });
        }
        if self.trusted_hops > 0 {
            manager["xff_num_trusted_hops"] = self.trusted_hops.into();
        }
        if let Some(limit) = self.max_headers_kb {
            manager["max_request_headers_kb"] = limit.into();
        }
        if self.tunnels {
            manager["upgrade_configs"] = json!([{ "upgrade_type": "CONNECT" }]);
        }
        if self.collector.is_some() {
            manager["tracing"] = json!({
                "random_sampling": { "value": 100.0 },
                "custom_tags": [{
                    "tag": "auth.consumer.id",
                    "metadata": {
                        "kind": { "request": {} },
                        "metadata_key": { "key": FILTER, "path": [{ "key": "consumer" }] },
                    },
                }],
                "provider": {
                    "name": "envoy.tracers.opentelemetry",
                    "typed_config": {
                        "@type": OPENTELEMETRY,
                        "service_name": "envoy",
                        "grpc_service": grpc_service("collector", Duration::from_secs(5)),
                    },
                },
            });
        }
        manager
    }

    fn http_filters(&self) -> Vec<Value> {
        let filter = || json!({ "name": FILTER, "typed_config": self.filter() });
        let mut filters: Vec<Value> = (!self.authz.is_empty()).then(filter).into_iter().collect();
        if self.grpc_web {
            let config = json!({ "@type": GRPC_WEB });
            filters.insert(
                0,
                json!({ "name": "envoy.filters.http.grpc_web", "typed_config": config }),
            );
        }
        if self.cors.is_some() {
            let config = json!({ "@type": CORS });
            filters.insert(0, json!({ "name": CORS_FILTER, "typed_config": config }));
        }
        filters.push(
            json!({ "name": "envoy.filters.http.router", "typed_config": { "@type": ROUTER } }),
        );
        filters
    }

    fn filter(&self) -> Value {
        let mut filter = json!({
            "@type": EXT_AUTHZ,
            "transport_api_version": "V3",
            "grpc_service": grpc_service("authz", self.timeout),
            "failure_mode_allow": self.failure_mode_allow,
            "encode_raw_headers": self.raw_headers,
            "status_on_error": { "code": 503 },
            "validate_mutations": true,
        });
        if self.retries {
            filter["grpc_service"]["retry_policy"] = json!({
                "retry_on": "connect-failure,refused-stream,reset,unavailable",
                // A start takes longer on a busy machine than the retries of the sample.
                "num_retries": 200,
                "retry_back_off": { "base_interval": "0.01s", "max_interval": "0.05s" },
            });
        }
        if let Some(names) = &self.shown_headers {
            let exact: Vec<_> = names.iter().map(|name| json!({ "exact": name })).collect();
            filter["allowed_headers"] = json!({ "patterns": exact });
        }
        if let Some(body) = self.body {
            filter["with_request_body"] = json!({
                "max_request_bytes": body.max_bytes,
                "allow_partial_message": true,
                "pack_as_bytes": body.as_bytes,
            });
        }
        filter
    }
}

impl AuthzAddress {
    fn to_json(&self) -> Value {
        match self {
            Self::Tcp(addr) => tcp(*addr),
            Self::Unix(path) => json!({ "pipe": { "path": path } }),
        }
    }
}

impl From<SocketAddr> for AuthzAddress {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(addr)
    }
}

impl From<PathBuf> for AuthzAddress {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

impl Route {
    fn to_json(&self) -> Value {
        let pairs = self.context_extensions.iter();
        let extensions: Value = pairs
            .map(|(key, value)| (key.clone(), Value::from(value.clone())))
            .collect::<serde_json::Map<_, _>>()
            .into();
        json!({
            "name": self.prefix,
            "match": { "prefix": self.prefix },
            "route": { "cluster": "upstream" },
            "typed_per_filter_config": { FILTER: {
                "@type": EXT_AUTHZ_PER_ROUTE,
                "check_settings": { "context_extensions": extensions },
            } },
        })
    }
}

const FILTER: &str = "envoy.filters.http.ext_authz";
const CORS_FILTER: &str = "envoy.filters.http.cors";
const CORS: &str = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors";
const CORS_POLICY: &str = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy";
/// The identity headers that the sample removes on routes without a check.
const IDENTITY: [&str; 4] = [
    "x-relatch-consumer",
    "x-relatch-key-id",
    "x-relatch-key-version",
    "x-relatch-scopes",
];
const EXT_AUTHZ: &str = "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz";
const EXT_AUTHZ_PER_ROUTE: &str =
    "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute";
const HTTP_CONNECTION_MANAGER: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const GRPC_WEB: &str = "type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb";
const FILE_ACCESS_LOG: &str =
    "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog";
const OPENTELEMETRY: &str = "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig";
const UPSTREAM_TLS: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const HTTP_PROTOCOL_OPTIONS: &str =
    "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// An answer of the admin interface; `None` while it does not answer.
async fn ask(admin: SocketAddr, target: &str) -> Option<Response> {
    let mut connection = Connection::open(admin).await.ok()?;
    connection.send(&Request::get(target)).await.ok()
}

/// Writes what the filter has left of each request.
fn access_logger(files: &Path) -> Value {
    json!({
                "name": "envoy.access_loggers.file",
                "typed_config": {
                    "@type": FILE_ACCESS_LOG,
                    "path": access_log(files),
                    "log_format": { "json_format": {
                        "path": "%REQ(:PATH)%",
                        "route": "%ROUTE_NAME%",
                        "status": "%RESPONSE_CODE%",
                        "details": "%RESPONSE_CODE_DETAILS%",
                        "flags": "%RESPONSE_FLAGS%",
                        "authz": format!("%DYNAMIC_METADATA({FILTER})%"),
                        "decision": format!("%DYNAMIC_METADATA({FILTER}:decision)%"),
                        "reason": format!("%DYNAMIC_METADATA({FILTER}:reason)%"),
                        "consumer": format!("%DYNAMIC_METADATA({FILTER}:consumer)%"),
                        "key_version": format!("%DYNAMIC_METADATA({FILTER}:key_version)%"),
                    } },
                },
    })
}

fn access_log(files: &Path) -> PathBuf {
    files.join("access.log")
}

fn listener(name: &str, address: &Value, manager: &Value) -> Value {
    json!({
        "name": name,
        "address": address,
        "filter_chains": [{ "filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": manager,
        }] }],
    })
}

/// Follows redirects of the upstream, without a check.
fn redirecting() -> Value {
    let router =
        json!({ "name": "envoy.filters.http.router", "typed_config": { "@type": ROUTER } });
    json!({
        "@type": HTTP_CONNECTION_MANAGER,
        "stat_prefix": "behind",
        "route_config": { "virtual_hosts": [{
            "name": "behind",
            "domains": ["*"],
            "routes": [{
                "match": { "prefix": "/" },
                "route": { "cluster": "upstream", "internal_redirect_policy": redirect_policy() },
            }],
        }] },
        "http_filters": [router],
    })
}

fn redirect_policy() -> Value {
    json!({ "max_internal_redirects": 2 })
}

fn cluster(name: &str, addresses: &[Value], http2: bool) -> Value {
    let endpoint = |address| json!({ "endpoint": { "address": address } });
    let endpoints: Vec<Value> = addresses.iter().map(endpoint).collect();
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": endpoints }],
        },
    });
    if http2 {
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": HTTP_PROTOCOL_OPTIONS,
                "explicit_http_config": { "http2_protocol_options": {} },
            },
        });
    }
    cluster
}

fn upstream_tls(certs: &Path) -> Value {
    let file = |name: &str| json!({ "filename": certs.join(name) });
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": UPSTREAM_TLS,
            "sni": "localhost",
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
                "tls_certificates": [{
                    "certificate_chain": file("envoy.pem"),
                    "private_key": file("envoy.key"),
                }],
                "validation_context": {
                    "trusted_ca": file("ca.pem"),
                    "match_typed_subject_alt_names": [
                        { "san_type": "DNS", "matcher": { "exact": "localhost" } },
                    ],
                },
            },
        },
    })
}

fn grpc_service(cluster: &str, timeout: Duration) -> Value {
    json!({
        "envoy_grpc": { "cluster_name": cluster },
        "timeout": format!("{}s", timeout.as_secs_f64()),
    })
}

fn tcp(addr: SocketAddr) -> Value {
    json!({ "socket_address": { "address": addr.ip(), "port_value": addr.port() } })
}
