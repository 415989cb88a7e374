//! The measured control plane: a process of the deployed binary.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use ::relatch::{
    cli::connection::{self, Admin, AdminAddress, Bearer, TlsArgs},
    control::secrets,
    key::MasterPepper,
};
use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;

use crate::daemon::Daemon;

/// The data directory of a control plane, and the admin token for it.
#[derive(Debug)]
pub(crate) struct Home {
    data_dir: PathBuf,
    config: PathBuf,
    token_file: PathBuf,
}

/// A running control plane. It is killed on drop.
#[derive(Debug)]
pub(crate) struct Control {
    daemon: Daemon,
    bearer: PathBuf,
}

/// The resident memory of the process, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// The current memory.
    pub(crate) resident: u64,
    /// The peak since the start, or since [`Control::forget_peak`].
    pub(crate) peak: u64,
}

const RELATCH: &str = env!("CARGO_BIN_EXE_relatch");
/// The longest start: ten million keys are read from their log in minutes.
const START_TIMEOUT: Duration = Duration::from_mins(30);

impl Home {
    /// Creates the data of a control plane in `directory`.
    ///
    /// # Errors
    ///
    /// When `relatch control init` fails.
    pub(crate) fn make(directory: &Path) -> Result<Self> {
        let home = Self {
            data_dir: directory.join("data"),
            config: directory.join("control.yaml"),
            token_file: directory.join("admin.token"),
        };
        let output = Command::new(RELATCH)
            .args(["--output", "json", "control", "init", "--data-dir"])
            .arg(&home.data_dir)
            .output()
            .with_context(|| format!("cannot run {RELATCH}"))?;
        ensure!(
            output.status.success(),
            "relatch control init: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let made: Value = serde_json::from_slice(&output.stdout)?;
        let token = made["admin_token"].as_str().context("no admin token")?;
        fs::write(&home.token_file, token).context("cannot keep the admin token")?;
        let config = format!(
            "\
data_dir: \"{}\"
discovery: 127.0.0.1:0
admin: 127.0.0.1:0
http: 127.0.0.1:0
log: {{ format: json, level: info }}
",
            home.data_dir.display()
        );
        fs::write(&home.config, config)?;
        Ok(home)
    }

    /// The path of the store.
    pub(crate) fn store(&self) -> PathBuf {
        self.data_dir.join("relatch.db")
    }

    /// Reads the master pepper.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub(crate) fn pepper(&self) -> Result<MasterPepper> {
        Ok(secrets::read_pepper(&self.data_dir.join("pepper.json"))?)
    }

    /// Starts the control plane, and waits until it listens.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub(crate) fn start(&self) -> Result<Control> {
        let mut command = Command::new(RELATCH);
        command.args(["control", "--config"]).arg(&self.config);
        let daemon = Daemon::start_within(&mut command, START_TIMEOUT)?;
        Ok(Control {
            daemon,
            bearer: self.token_file.clone(),
        })
    }
}

impl Control {
    /// The address for sidecars.
    ///
    /// # Errors
    ///
    /// When it has not reported the address.
    pub(crate) fn discovery(&self) -> Result<SocketAddr> {
        self.daemon.address("discovery")
    }

    /// A connection to the admin API.
    ///
    /// # Errors
    ///
    /// When it cannot be reached.
    pub(crate) async fn admin(&self) -> Result<Admin> {
        let address = AdminAddress::at(self.daemon.address("admin")?);
        let bearer = Bearer::from_file(&self.bearer).map_err(|error| anyhow!("{error:?}"))?;
        connection::connect(&address, bearer, &TlsArgs::default())
            .await
            .map_err(|error| anyhow!("{error:?}"))
    }

    /// Reads the memory of the process.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub(crate) fn memory(&self) -> Result<Memory> {
        let path = format!("/proc/{}/status", self.daemon.id());
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let bytes = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            let kib: u64 = line
                .and_then(|line| line.trim().strip_suffix(" kB"))
                .with_context(|| format!("{path} has no {field}"))?
                .parse()?;
            anyhow::Ok(kib << 10)
        };
        Ok(Memory {
            resident: bytes("VmRSS:")?,
            peak: bytes("VmHWM:")?,
        })
    }

    /// Resets the peak (`clear_refs` of proc(5)).
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn forget_peak(&self) -> Result<()> {
        let path = format!("/proc/{}/clear_refs", self.daemon.id());
        fs::write(&path, "5").with_context(|| format!("cannot write {path}"))
    }
}
