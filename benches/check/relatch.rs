//! relatch as it is deployed: a control plane and a sidecar, each a process of its own, and a keyring full of keys.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use ::relatch::{
    cli::{
        Failure,
        connection::{self, AdminAddress, Bearer},
    },
    clock::Clock,
    proto::admin::CreateKeyRequest,
};
use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;
use tokio::runtime::Builder;

use crate::{daemon::Daemon, page, server::Server};

/// A sidecar that holds every key, and one of the keys.
pub(crate) struct Deployment {
    server: Server,
    key: String,
    /// Runs as long as this lives.
    _control: Daemon,
}

const RELATCH: &str = env!("CARGO_BIN_EXE_relatch");
const KEYRING: &str = "bench";
/// A snapshot of a thousand keys arrives at once; of a million, within seconds.
const READY_TIMEOUT: Duration = Duration::from_mins(1);
const READY_POLL: Duration = Duration::from_millis(20);

impl Deployment {
    /// Starts both with their data in `directory`, and issues `keys` keys.
    ///
    /// # Errors
    ///
    /// When something of it fails.
    pub(crate) fn start(directory: &Path, keys: u32) -> Result<Self> {
        let data_dir = directory.join("data");
        let token_file = directory.join("admin.token");
        initialize(&data_dir, &token_file)?;

        let config = directory.join("control.yaml");
        fs::write(&config, control_config(&data_dir))?;
        let control = Daemon::start(
            Command::new(RELATCH)
                .arg("control")
                .arg("--config")
                .arg(config),
        )?;
        let admin = AdminAddress::at(control.address("admin")?);
        let key = issue(&admin, &token_file, keys)?;

        let config = directory.join("sidecar.yaml");
        let discovery = control.address("discovery")?;
        fs::write(&config, sidecar_config(&discovery.to_string()))?;
        let sidecar = Daemon::start(
            Command::new(RELATCH)
                .arg("sidecar")
                .arg("--config")
                .arg(config),
        )?;
        let server = Server {
            name: "relatch",
            address: sidecar.address("ext_authz")?,
            metrics: Some(sidecar.address("http")?),
            daemon: sidecar,
        };
        until_loaded(&server, u64::from(keys))?;
        Ok(Self {
            server,
            key,
            _control: control,
        })
    }

    /// A key that is accepted.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// The sidecar.
    pub(crate) const fn server(&self) -> &Server {
        &self.server
    }
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

/// Issues `count` keys, each to a consumer of its own, and returns the last.
fn issue(address: &AdminAddress, token_file: &Path, count: u32) -> Result<String> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let issued = runtime.block_on(async {
        let bearer = Bearer::from_file(token_file)?;
        let mut admin = connection::connect(address, bearer).await?;
        let mut last = String::new();
        for number in 0..count {
            let request = CreateKeyRequest {
                keyring: KEYRING.to_owned(),
                consumer: format!("consumer-{number}"),
                scopes: vec!["orders.read".to_owned(), "orders.write".to_owned()],
                create_missing: true,
                ..CreateKeyRequest::default()
            };
            last = connection::answer(admin.create_key(request)).await?.secret;
        }
        Ok::<_, Failure>(last)
    });
    issued.map_err(|failure| anyhow!("keys are not issued: {}", failure.report(false)))
}

/// Waits until the sidecar says that it is ready, and that it holds `keys` active versions.
fn until_loaded(server: &Server, keys: u64) -> Result<()> {
    let clock = Clock::system();
    let began = clock.boot();
    let http = server.metrics.context("a sidecar has metrics")?;
    while let Err(error) = page::get(http, "/readyz") {
        let waited = clock.boot().saturating_since(began);
        ensure!(waited < READY_TIMEOUT, "the sidecar is not ready: {error}");
        thread::sleep(READY_POLL);
    }
    let held = page::sum(
        &page::get(http, "/metrics")?,
        "relatch_keyring_keys",
        "state=\"active\"",
    )?;
    ensure!(held == keys, "the sidecar holds {held} keys, not {keys}");
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

fn sidecar_config(discovery: &str) -> String {
    format!(
        "\
node: {{ id: bench, cluster: bench }}
listen: 127.0.0.1:0
http: 127.0.0.1:0
workers: 1
control: {{ endpoints: [\"http://{discovery}\"] }}
keyrings: [{{ name: {KEYRING}, mode: full }}]
default_keyring: {KEYRING}
log: {{ format: json, level: info }}
"
    )
}
