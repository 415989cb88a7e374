//! relatch as it is deployed: a control plane with keyrings full of keys, and sidecars, each a process of its own.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use ::relatch::cli::connection::AdminAddress;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    cores::{Core, Cores},
    daemon::Daemon,
    keys::Keys,
    page,
    patience::until,
    population::Population,
    server::Server,
};

/// A control plane that runs, and what is in its keyrings.
#[derive(Debug)]
pub(crate) struct Deployment {
    directory: PathBuf,
    cores: Cores,
    populations: Vec<Population>,
    control: Daemon,
    /// How many sidecars were started.
    sidecars: AtomicU32,
}

/// How a sidecar is set up.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SidecarOptions {
    /// Where spans go.
    pub(crate) collector: Option<SocketAddr>,
    /// Whether it listens on a Unix socket.
    pub(crate) unix: bool,
}

const RELATCH: &str = env!("CARGO_BIN_EXE_relatch");
/// A thousand keys arrive at once, a million within seconds; ten million on a busy machine take minutes.
const READY_TIMEOUT: Duration = Duration::from_mins(10);

impl Deployment {
    /// Makes a store with a keyring for each of `sizes` in `directory`, and starts a control plane on it.
    ///
    /// # Errors
    ///
    /// When something of it fails.
    pub(crate) fn start(directory: &Path, cores: &Cores, sizes: &[u32]) -> Result<Self> {
        let data_dir = directory.join("data");
        initialize(&data_dir, &token_file(directory))?;
        let populations = Population::make(&data_dir, sizes)?;
        let config = directory.join("control.yaml");
        fs::write(&config, control_config(&data_dir))?;
        let control = cores.on(Core::Load, || {
            let mut command = Command::new(RELATCH);
            Daemon::start_within(
                command.arg("control").arg("--config").arg(config),
                READY_TIMEOUT,
            )
        })?;
        Ok(Self {
            directory: directory.to_owned(),
            cores: cores.clone(),
            populations,
            control,
            sidecars: AtomicU32::new(0),
        })
    }

    /// Where its admin API is.
    ///
    /// # Errors
    ///
    /// When it did not tell.
    pub(crate) fn admin(&self) -> Result<AdminAddress> {
        Ok(AdminAddress::at(self.control.address("admin")?))
    }

    /// The file that holds its admin token.
    pub(crate) fn token_file(&self) -> PathBuf {
        token_file(&self.directory)
    }

    /// The name of the keyring of `size` keys.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub(crate) fn keyring(&self, size: u32) -> Result<&str> {
        Ok(self.population(size)?.keyring.as_str())
    }

    /// The keys of the keyring of `size` keys.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub(crate) fn keys(&self, size: u32) -> Result<&Arc<Keys>> {
        Ok(&self.population(size)?.keys)
    }

    /// Starts a sidecar with the keyring of `size` keys, and waits until it holds them all.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub(crate) fn sidecar(&self, size: u32, options: SidecarOptions) -> Result<Server> {
        let number = self.sidecars.fetch_add(1, Ordering::Relaxed);
        let config = self.directory.join(format!("sidecar-{number}.yaml"));
        fs::write(&config, self.sidecar_config(number, size, options)?)?;
        let daemon = self.cores.on(Core::Measured, || {
            Daemon::start(
                Command::new(RELATCH)
                    .arg("sidecar")
                    .arg("--config")
                    .arg(config),
            )
        })?;
        let server = Server {
            name: "relatch",
            place: daemon.place("ext_authz")?,
            metrics: Some(daemon.address("http")?),
            daemon,
        };
        until_loaded(&server, u64::from(size))?;
        Ok(server)
    }

    fn population(&self, size: u32) -> Result<&Population> {
        let name = format!("keys-{size}");
        self.populations
            .iter()
            .find(|population| population.keyring.as_str() == name)
            .with_context(|| format!("no keyring has {size} keys"))
    }

    fn sidecar_config(&self, number: u32, size: u32, options: SidecarOptions) -> Result<String> {
        let keyring = self.keyring(size)?;
        let discovery = self.control.address("discovery")?;
        let listen = if options.unix {
            let socket = self.directory.join(format!("sidecar-{number}.sock"));
            format!("unix://{}", socket.display())
        } else {
            "127.0.0.1:0".to_owned()
        };
        let telemetry = options.collector.map_or(String::new(), |collector| {
            format!("telemetry: {{ otlp_endpoint: \"http://{collector}\" }}\n")
        });
        Ok(format!(
            "\
node: {{ id: bench-{number}, cluster: bench }}
listen: {listen}
http: 127.0.0.1:0
workers: 1
control: {{ endpoints: [\"http://{discovery}\"] }}
keyrings: [{{ name: {keyring}, mode: full }}]
default_keyring: {keyring}
{telemetry}log: {{ format: json, level: info }}
"
        ))
    }
}

fn token_file(directory: &Path) -> PathBuf {
    directory.join("admin.token")
}

fn initialize(data_dir: &Path, token_file: &Path) -> Result<()> {
    let output = Command::new(RELATCH)
        .args(["--output", "json", "control", "init", "--data-dir"])
        .arg(data_dir)
        .output()
        .with_context(|| format!("cannot run {RELATCH}"))?;
    ensure!(
        output.status.success(),
        "relatch control init: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let made: Value = serde_json::from_slice(&output.stdout)?;
    let token = made["admin_token"].as_str().context("no admin token")?;
    fs::write(token_file, token).context("cannot keep the admin token")
}

/// Waits until the sidecar says that it is ready, and that it holds `keys` active versions.
fn until_loaded(server: &Server, keys: u64) -> Result<()> {
    let http = server.metrics.context("a sidecar has metrics")?;
    until("the sidecar is ready", READY_TIMEOUT, || {
        Ok(page::get(http, "/readyz").ok())
    })?;
    let held = page::sum(
        &page::get(http, "/metrics")?,
        "relatch_keyring_keys",
        "state=\"active\"",
    )?;
    ensure!(held >= keys, "the sidecar holds {held} keys of {keys}");
    Ok(())
}

fn control_config(data_dir: &Path) -> String {
    format!(
        "\
data_dir: \"{}\"
discovery: 127.0.0.1:0
admin: 127.0.0.1:0
http: 127.0.0.1:0
log: {{ format: json, level: info }}
",
        data_dir.display()
    )
}
