//! relatch as it is deployed: a control plane with filled keyrings, and sidecars, each as a process.

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

/// A running control plane, and the keys in its keyrings.
#[derive(Debug)]
pub(crate) struct Deployment {
    directory: PathBuf,
    cores: Cores,
    populations: Vec<Population>,
    control: Daemon,
    /// The number of started sidecars.
    sidecars: AtomicU32,
}

/// The configuration of a sidecar.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SidecarOptions {
    /// The collector of spans.
    pub(crate) collector: Option<SocketAddr>,
    /// Whether it listens on a Unix socket.
    pub(crate) unix: bool,
    /// Whether it has a snapshot file.
    pub(crate) snapshot: bool,
    /// Whether it also answers checks over HTTP, at [`PROFILE_PATH`].
    pub(crate) http_authz: bool,
}

/// The configuration file and the snapshot file of a sidecar that has ended.
#[derive(Debug)]
pub(crate) struct Kept<'a> {
    deployment: &'a Deployment,
    config: PathBuf,
    keys: u64,
}

/// The path of the profile for Traefik.
pub(crate) const PROFILE_PATH: &str = "/authz/bench";

const RELATCH: &str = env!("CARGO_BIN_EXE_relatch");
/// The longest wait for a ready sidecar: a million keys arrive within seconds, but ten million on a busy machine need minutes.
const READY_TIMEOUT: Duration = Duration::from_mins(10);

impl Deployment {
    /// Creates a store with a keyring for each of `sizes` in `directory`, and starts a control plane with it.
    ///
    /// # Errors
    ///
    /// When one of these fails.
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

    /// The address of the admin API.
    ///
    /// # Errors
    ///
    /// When the control plane has not reported it.
    pub(crate) fn admin(&self) -> Result<AdminAddress> {
        Ok(AdminAddress::at(self.control.address("admin")?))
    }

    /// The path of its admin token.
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

    /// Starts a sidecar with the keyring of `size` keys, and waits until it has all of them.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub(crate) fn sidecar(&self, size: u32, options: SidecarOptions) -> Result<Server> {
        let number = self.sidecars.fetch_add(1, Ordering::Relaxed);
        let control = self.control.address("discovery")?;
        let config = self.write_config(number, size, options, control)?;
        let server = self.run_sidecar(&config)?;
        until_loaded(&server, u64::from(size))?;
        Ok(server)
    }

    /// Creates the snapshot file of a sidecar with the keyring of `size` keys. The sidecar has ended. With the returned
    /// configuration file, it starts again without a control plane.
    ///
    /// # Errors
    ///
    /// When the sidecar does not start, or writes no file.
    pub(crate) fn kept(&self, size: u32) -> Result<Kept<'_>> {
        let options = SidecarOptions {
            snapshot: true,
            ..SidecarOptions::default()
        };
        make_snapshot_key(&self.snapshot_key())?;
        let number = self.sidecars.fetch_add(1, Ordering::Relaxed);
        let control = self.control.address("discovery")?;
        let server = self.run_sidecar(&self.write_config(number, size, options, control)?)?;
        until_loaded(&server, u64::from(size))?;
        // At its stop, the sidecar writes everything that is not on the disk yet.
        server.daemon.stop()?;
        // Nothing listens on the port of the discard protocol (RFC 863).
        let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
        Ok(Kept {
            deployment: self,
            config: self.write_config(number, size, options, nobody)?,
            keys: u64::from(size),
        })
    }

    fn run_sidecar(&self, config: &Path) -> Result<Server> {
        let daemon = self.cores.on(Core::Measured, || {
            Daemon::start(
                Command::new(RELATCH)
                    .arg("sidecar")
                    .arg("--config")
                    .arg(config),
            )
        })?;
        Ok(Server {
            name: "relatch",
            place: daemon.place("ext_authz")?,
            metrics: Some(daemon.address("http")?),
            daemon,
        })
    }

    fn snapshot_key(&self) -> PathBuf {
        self.directory.join("snapshot.key")
    }

    fn population(&self, size: u32) -> Result<&Population> {
        let name = format!("keys-{size}");
        self.populations
            .iter()
            .find(|population| population.keyring.as_str() == name)
            .with_context(|| format!("no keyring has {size} keys"))
    }

    fn write_config(
        &self,
        number: u32,
        size: u32,
        options: SidecarOptions,
        discovery: SocketAddr,
    ) -> Result<PathBuf> {
        let keyring = self.keyring(size)?;
        let listen = if options.unix {
            let socket = self.directory.join(format!("sidecar-{number}.sock"));
            format!("unix://{}", socket.display())
        } else {
            "127.0.0.1:0".to_owned()
        };
        let telemetry = options.collector.map_or(String::new(), |collector| {
            format!("telemetry: {{ otlp_endpoint: \"http://{collector}\" }}\n")
        });
        let snapshot = if options.snapshot {
            let file = self.directory.join(format!("sidecar-{number}.snap"));
            let (file, key) = (file.display(), self.snapshot_key());
            let key = key.display();
            format!("snapshot: {{ path: \"{file}\", key_file: \"{key}\" }}\n")
        } else {
            String::new()
        };
        let http_authz = if options.http_authz {
            "http_authz: { listen: \"127.0.0.1:0\", profiles: [{ name: bench, dialect: traefik }] }\n"
        } else {
            ""
        };
        let config = self.directory.join(format!("sidecar-{number}.yaml"));
        let yaml = format!(
            "\
node: {{ id: bench-{number}, cluster: bench }}
listen: {listen}
http: 127.0.0.1:0
workers: 1
control: {{ endpoints: [\"http://{discovery}\"] }}
keyrings: [{{ name: {keyring}, mode: full }}]
default_keyring: {keyring}
{telemetry}{snapshot}{http_authz}log: {{ format: json, level: info }}
"
        );
        fs::write(&config, yaml)?;
        Ok(config)
    }
}

impl Kept<'_> {
    /// Starts the sidecar again, and waits until it is ready and has every key.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub(crate) fn start(&self) -> Result<Server> {
        let server = self.deployment.run_sidecar(&self.config)?;
        until_loaded(&server, self.keys)?;
        Ok(server)
    }
}

fn make_snapshot_key(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let output = Command::new(RELATCH)
        .args(["config", "snapshot-key"])
        .arg(path)
        .output()
        .with_context(|| format!("cannot run {RELATCH}"))?;
    ensure!(
        output.status.success(),
        "relatch config snapshot-key: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
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

/// Waits until the sidecar reports that it is ready, and that it has `keys` active versions.
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
