//! relatch as its users run it: `dev` in one process, or control plane and sidecars apart.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use rustix::process::Signal;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use super::{
    client::{Request, Response},
    envoy::AuthzAddress,
    eventually::eventually,
    loopback::any_port,
    process::{self, Output, Process},
    reserved::Reserved,
};

/// `relatch dev` on ports of its own. Dropping it kills the process and removes its data.
#[derive(Debug)]
pub(crate) struct Relatch {
    operator: Operator,
    endpoints: Endpoints,
    key: String,
    key_id: String,
    _process: Process,
    _data: TempDir,
}

/// `relatch control` on ports of its own, two of which it keeps over a restart. Dropping it kills the process and leaves the
/// data.
#[derive(Debug)]
pub(crate) struct Control {
    /// The running program, for signals and for what it printed.
    pub(crate) process: Process,
    operator: Operator,
    ports: Arc<Ports>,
    http: SocketAddr,
    data: PathBuf,
}

/// Where a control plane listens in each of its lives.
#[derive(Debug)]
struct Ports {
    discovery: Reserved,
    admin: Reserved,
}

/// `relatch sidecar` with a file that a test gives. Dropping it kills the process and removes the file.
///
/// Where the file says [`ANY_PORT`] for `listen` or `http`, the sidecar gets a port of an address of its own: whoever asks a
/// sidecar that has ended does not reach somebody else's.
#[derive(Debug)]
pub(crate) struct Sidecar {
    /// The running program, for signals and for what it printed.
    pub(crate) process: Process,
    ext_authz: AuthzAddress,
    http_authz: Option<SocketAddr>,
    http: SocketAddr,
    config: TempDir,
}

/// Who calls the command line: the address of the admin API and the file with the first admin token.
#[derive(Clone, Debug)]
struct Operator {
    admin: SocketAddr,
    token_file: PathBuf,
    /// Where the certificates are with which the admin API is called over TLS.
    certs: Option<PathBuf>,
}

/// `endpoints.json`
#[derive(Debug, Deserialize)]
struct Endpoints {
    ext_authz: SocketAddr,
    sidecar_http: SocketAddr,
    admin: SocketAddr,
    control_http: SocketAddr,
    admin_token_file: PathBuf,
}

/// In the file of a sidecar: any port of this machine.
const ANY_PORT: &str = "127.0.0.1:0";

/// The name of a sidecar's file.
const SIDECAR_FILE: &str = "sidecar.yaml";

/// The file in a control plane's directory where [`Control`] keeps the admin token that `control init` printed.
pub(crate) const TOKEN_FILE: &str = "test-admin.token";

/// Where in a control plane's directory a test puts certificates, if its admin API is to be called over TLS.
pub(crate) const CERTS: &str = "certs";

/// The file in a control plane's directory with what a test changes of its settings, if it does.
pub(crate) const CONFIG_FILE: &str = "test-control.yaml";

impl Relatch {
    /// Starts it and waits until its sidecar answers checks.
    pub(crate) async fn dev() -> Self {
        let data = tempfile::tempdir().expect("a directory can be made");
        let args = ["dev", "--ephemeral-ports", "--data-dir", text(data.path())];
        let mut process = Process::relatch(&args);
        process.wait_for_line("Press Ctrl-C to stop").await;
        let json = fs::read(data.path().join("endpoints.json")).expect("endpoints.json is there");
        let endpoints: Endpoints = serde_json::from_slice(&json).expect("endpoints.json is right");
        Self {
            operator: Operator {
                admin: endpoints.admin,
                token_file: endpoints.admin_token_file.clone(),
                certs: None,
            },
            endpoints,
            key: told(&process, "key"),
            key_id: told(&process, "key id"),
            _process: process,
            _data: data,
        }
    }

    /// The demo key; its keyring is `demo`, its consumer `demo-app`.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// The id of the demo key.
    pub(crate) fn key_id(&self) -> &str {
        &self.key_id
    }

    /// Where Envoy asks.
    pub(crate) const fn ext_authz(&self) -> SocketAddr {
        self.endpoints.ext_authz
    }

    /// The sidecar's metrics, probes and status.
    pub(crate) const fn sidecar_http(&self) -> SocketAddr {
        self.endpoints.sidecar_http
    }

    /// The control plane's metrics and probes.
    pub(crate) const fn control_http(&self) -> SocketAddr {
        self.endpoints.control_http
    }

    /// Runs a command of the operator.
    pub(crate) async fn cli(&self, args: &[&str]) -> Output {
        self.operator.run(args, "").await
    }

    /// Runs a command that reads `stdin`.
    pub(crate) async fn cli_reading(&self, args: &[&str], stdin: &str) -> Output {
        self.operator.run(args, stdin).await
    }

    /// Runs a command that must succeed; the last document that it prints.
    pub(crate) async fn cli_json(&self, args: &[&str]) -> Value {
        self.cli(args).await.json()
    }
}

impl Control {
    /// Starts it on the data of `dir`, which it makes the first time, and waits until it serves.
    pub(crate) async fn start(dir: &Path) -> Self {
        Self::initialize(dir).await;
        Self::serve(dir, Ports::reserve(dir), &[]).await
    }

    /// As [`Self::start`], with the lines `settings` in its file, in this life and in later ones.
    pub(crate) async fn start_with(dir: &Path, settings: &str) -> Self {
        Self::initialize(dir).await;
        let yaml = format!("data_dir: {}\n{settings}", text(dir));
        fs::write(dir.join(CONFIG_FILE), yaml).expect("the test's directory can be written to");
        Self::serve(dir, Ports::reserve(dir), &[]).await
    }

    async fn initialize(dir: &Path) {
        if !dir.join(TOKEN_FILE).exists() {
            let init = ["control", "init", "--data-dir", text(dir), "-o", "json"];
            let made = process::relatch(&init, "").await.json();
            let token = made["admin_token"].as_str().expect("init prints a token");
            fs::write(dir.join(TOKEN_FILE), token).expect("the test's directory can be written to");
        }
    }

    /// Starts it again after its process has ended, on the same data and with the same addresses for sidecars and for
    /// commands.
    pub(crate) async fn restart(&mut self) {
        self.restart_with(&[]).await;
    }

    /// As [`Self::restart`], with more arguments.
    pub(crate) async fn restart_with(&mut self, args: &[&str]) {
        self.process.exit().await;
        *self = Self::serve(&self.data, Arc::clone(&self.ports), args).await;
    }

    async fn serve(dir: &Path, ports: Arc<Ports>, args: &[&str]) -> Self {
        let config = dir.join(CONFIG_FILE);
        let discovery = ports.discovery.address();
        let admin = ports.admin.address();
        let [discovery_port, admin_port, any_port] =
            [discovery, admin, any_port()].map(|address| address.to_string());
        let mut all = vec!["control", "--data-dir", text(dir)];
        if config.exists() {
            all.extend(["--config", text(&config)]);
        }
        all.extend(["--discovery", &discovery_port]);
        all.extend(["--admin-listen", &admin_port, "--http", &any_port]);
        all.extend(args);
        let mut process = Process::relatch(&all);
        let line = process.wait_for_line("control plane started").await;
        let address = |name| field(&line, name).parse().expect("an address is logged");
        for (name, reserved) in [("discovery", discovery), ("admin", admin)] {
            assert_eq!(address(name), reserved, "{name}: {line}");
        }
        Self {
            operator: Operator {
                admin,
                token_file: dir.join(TOKEN_FILE),
                certs: certs(dir),
            },
            ports,
            http: address("http"),
            data: dir.to_owned(),
            process,
        }
    }

    /// Where sidecars connect.
    pub(crate) fn discovery(&self) -> SocketAddr {
        self.ports.discovery.address()
    }

    /// Metrics and probes.
    pub(crate) const fn http(&self) -> SocketAddr {
        self.http
    }

    /// Runs a command of the operator.
    pub(crate) async fn cli(&self, args: &[&str]) -> Output {
        self.operator.run(args, "").await
    }

    /// Runs a command that must succeed; the last document that it prints.
    pub(crate) async fn cli_json(&self, args: &[&str]) -> Value {
        self.cli(args).await.json()
    }

    /// Runs a command that reads `stdin`.
    pub(crate) async fn cli_reading(&self, args: &[&str], stdin: &str) -> Output {
        self.operator.run(args, stdin).await
    }

    /// Runs a command of whoever holds the token in `token_file`.
    pub(crate) async fn cli_as(&self, token_file: &Path, args: &[&str]) -> Output {
        let operator = Operator {
            token_file: token_file.to_owned(),
            ..self.operator.clone()
        };
        operator.run(args, "").await
    }

    /// Starts a command of the operator without waiting for its end.
    pub(crate) fn cli_started(&self, args: &[&str]) -> Process {
        self.operator.start(args)
    }

    /// The admin API.
    pub(crate) const fn admin(&self) -> SocketAddr {
        self.operator.admin
    }

    /// The file with the first admin token.
    pub(crate) fn token_file(&self) -> &Path {
        &self.operator.token_file
    }

    /// Ends it at once, without a word to anyone.
    pub(crate) async fn kill(&mut self) {
        self.process.kill().await;
    }
}

impl Ports {
    /// Of an address that only this control plane uses, but for one with certificates: they name 127.0.0.1.
    fn reserve(dir: &Path) -> Arc<Self> {
        let file = fs::read_to_string(dir.join(CONFIG_FILE)).unwrap_or_default();
        let has_certificates = certs(dir).is_some() || file.contains("tls: {");
        let reserve = || {
            if has_certificates {
                Reserved::at(Ipv4Addr::LOCALHOST)
            } else {
                Reserved::new()
            }
        };
        Arc::new(Self {
            discovery: reserve(),
            admin: reserve(),
        })
    }
}

impl Sidecar {
    /// Starts it with the file `yaml`, whose log level is `info` or more, and waits until it listens. It may have no
    /// keyring yet: see [`Self::until_ready`].
    pub(crate) async fn start(yaml: &str) -> Self {
        Self::launch(yaml, Process::relatch).await
    }

    /// As [`Self::start`], in a shell that runs `before` first.
    pub(crate) async fn start_after(before: &str, yaml: &str) -> Self {
        Self::launch(yaml, |args| Process::relatch_after(before, args)).await
    }

    /// As [`Self::start`], by what `start` makes of the arguments.
    pub(crate) async fn start_by(yaml: &str, start: impl FnOnce(&[&str]) -> Process) -> Self {
        Self::launch(yaml, start).await
    }

    async fn launch(yaml: &str, start: impl FnOnce(&[&str]) -> Process) -> Self {
        let config = tempfile::tempdir().expect("a directory can be made");
        let file = config.path().join(SIDECAR_FILE);
        let yaml = on_own_address(yaml);
        fs::write(&file, yaml).expect("the test's directory can be written to");
        let mut process = start(&["sidecar", "--config", text(&file)]);
        let line = process.wait_for_line("sidecar started").await;
        let ext_authz = field(&line, "ext_authz");
        let ext_authz = match ext_authz.strip_prefix("unix://") {
            Some(path) => AuthzAddress::Unix(path.into()),
            None => AuthzAddress::Tcp(ext_authz.parse().expect("an address is logged")),
        };
        let http = field(&line, "http").parse().expect("an address is logged");
        let http_authz = line
            .contains("http_authz")
            .then(|| field(&line, "http_authz"));
        let http_authz = http_authz.and_then(|address| address.parse().ok());
        Self {
            process,
            ext_authz,
            http_authz,
            http,
            config,
        }
    }

    /// Waits until it says that it is ready.
    pub(crate) async fn until_ready(self) -> Self {
        eventually("the sidecar is ready", async || {
            (self.get("/readyz").await.status == 200).then_some(())
        })
        .await;
        self
    }

    /// Where Envoy asks.
    pub(crate) fn ext_authz(&self) -> AuthzAddress {
        self.ext_authz.clone()
    }

    /// Where proxies ask over HTTP; panics when its file has no listener for them on TCP.
    pub(crate) fn http_authz(&self) -> SocketAddr {
        self.http_authz.expect("it is configured")
    }

    /// Metrics, probes and status.
    pub(crate) const fn http(&self) -> SocketAddr {
        self.http
    }

    /// An answer of its HTTP interface.
    pub(crate) async fn get(&self, target: &str) -> Response {
        Request::get(target).send(self.http()).await
    }

    /// The path of its file.
    pub(crate) fn config(&self) -> PathBuf {
        self.config.path().join(SIDECAR_FILE)
    }

    /// Tells it to stop and waits for its end.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        self.process.signal(Signal::TERM);
        self.process.exit().await
    }
}

impl Operator {
    async fn run(&self, args: &[&str], stdin: &str) -> Output {
        let all = self.command(args);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        process::relatch(&all, stdin).await
    }

    fn start(&self, args: &[&str]) -> Process {
        let all = self.command(args);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        Process::relatch(&all)
    }

    fn command(&self, args: &[&str]) -> Vec<String> {
        let scheme = self.certs.as_ref().map_or("http", |_| "https");
        let admin = format!("{scheme}://{}", self.admin);
        let connection = ["--admin", &admin, "--token-file", text(&self.token_file)];
        // It asks a sidecar, and has no options for the control plane.
        let is_check = args.first() == Some(&"check");
        let connection = if is_check { &[] } else { &connection[..] };
        let certs = self.certs.iter().flat_map(|certs| {
            [
                ("--ca", "ca.pem"),
                ("--tls-cert", "operator.pem"),
                ("--tls-key", "operator.key"),
            ]
            .map(|(flag, file)| [flag.to_owned(), text(&certs.join(file)).to_owned()])
        });
        let all = [args, connection, &["-o", "json"]].concat();
        let all = all.into_iter().map(str::to_owned);
        all.chain(certs.flatten()).collect()
    }
}

impl Output {
    /// The last document that a command which must have succeeded has printed.
    pub(crate) fn json(&self) -> Value {
        assert!(self.status.success(), "{}: {}", self.status, self.stderr);
        let last = self.stdout.lines().next_back().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error} in {last}"))
    }
}

/// A name for a sidecar that no other one of this machine has at the same time: of a name that two share, only one gets the
/// socket that proves its end.
pub(crate) fn own_node(name: &str) -> String {
    static USED: AtomicU32 = AtomicU32::new(0);
    let used = USED.fetch_add(1, Ordering::Relaxed);
    format!("{name}-{}-{used}", std::process::id())
}

/// The part of a sidecar's file that every test needs: who it is, ports of its own, and the keyrings that it takes from
/// the control plane at `discovery`. The first one is the default.
pub(crate) fn sidecar_yaml(node: &str, discovery: SocketAddr, keyrings: &[&str]) -> String {
    let default = keyrings.first().expect("a sidecar holds a keyring");
    let names: Vec<String> = keyrings
        .iter()
        .map(|k| format!("{{ name: {k} }}"))
        .collect();
    format!(
        "node: {{ id: {node} }}\n\
         listen: {ANY_PORT}\n\
         http: {ANY_PORT}\n\
         control: {{ endpoints: [\"http://{discovery}\"] }}\n\
         keyrings: [{}]\n\
         default_keyring: {default}\n",
        names.join(", ")
    )
}

/// The file of a sidecar in which any port is one of an address of its own. A listener over TLS, whose address stands on a
/// line of its own, stays where its certificate says.
fn on_own_address(yaml: &str) -> String {
    let own = any_port().to_string();
    ["listen", "http"]
        .iter()
        .fold(yaml.to_owned(), |yaml, key| {
            yaml.replace(&format!("{key}: {ANY_PORT}\n"), &format!("{key}: {own}\n"))
        })
}

/// Where the certificates of a control plane are, if its admin API is called over TLS.
fn certs(dir: &Path) -> Option<PathBuf> {
    Some(dir.join(CERTS)).filter(|certs| certs.exists())
}

/// What `relatch dev` printed behind `title`.
fn told(process: &Process, title: &str) -> String {
    let lines = process.lines();
    let value = lines.iter().find_map(|line| {
        let rest = line.strip_prefix("  ")?.strip_prefix(title)?;
        let value = rest.strip_prefix("  ")?.split_whitespace().next()?;
        Some(value.to_owned())
    });
    value.unwrap_or_else(|| panic!("{title:?} is not in {lines:?}"))
}

/// The value of a field of a log line, which is text or JSON.
fn field(line: &str, name: &str) -> String {
    let value = match serde_json::from_str::<Value>(line) {
        Ok(json) => json[name].as_str().map(str::to_owned),
        Err(_) => line
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .map(str::to_owned),
    };
    value.unwrap_or_else(|| panic!("no {name} in {line}"))
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("the path of a test is text")
}

#[tokio::test]
async fn its_parts_run_together_and_apart() {
    let relatch = Relatch::dev().await;
    let key = relatch.cli_json(&["key", "show", relatch.key_id()]).await;
    assert_eq!(
        (&key["keyring"], &key["consumer"]),
        (&"demo".into(), &"demo-app".into())
    );
    assert!(relatch.key().contains(relatch.key_id()));

    let dir = tempfile::tempdir().expect("a directory can be made");
    let mut control = Control::start(dir.path()).await;
    let yaml = sidecar_yaml("edge-1", control.discovery(), &["payments"]);
    let mut sidecar = Sidecar::start(&yaml).await;
    let create = [
        "key",
        "create",
        "--keyring",
        "payments",
        "--consumer",
        "acme",
        "--create-missing",
    ];
    control.cli_json(&create).await;
    sidecar = sidecar.until_ready().await;
    control.kill().await;
    control.restart().await;
    let keys = control.cli_json(&["key", "list"]).await;
    assert_eq!(keys[0]["consumer"], "acme");
    assert!(sidecar.stop().await.success());
}

#[tokio::test]
async fn a_control_plane_comes_back_where_it_was_whoever_has_its_ports_elsewhere() {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let mut control = Control::start(dir.path()).await;
    let addresses = [control.discovery(), control.admin()];

    control.kill().await;
    // Where the port is taken at that address already, somebody else was given it, too.
    let others = addresses.map(|address| {
        let elsewhere = (Ipv4Addr::LOCALHOST, address.port());
        std::net::TcpListener::bind(elsewhere)
    });
    control.restart().await;

    assert_eq!([control.discovery(), control.admin()], addresses);
    assert_eq!(control.cli(&["key", "list"]).await.status.code(), Some(0));
    drop(others);
}
