//! The measured control plane and sidecar: processes of the deployed binary.

use std::{
    env, fmt, fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep},
};

use crate::{
    memory,
    store::{KEYRING, Keys},
};

/// The data of a control plane with a filled store.
#[derive(Debug)]
pub(crate) struct Deployment(TempDir);

/// A running process that has reported its addresses. It is killed on drop.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    told: Value,
}

/// The counters of the cache of a sidecar.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    hits: u64,
    misses: u64,
    found: u64,
    evictions: u64,
    denied: u64,
    entries: u64,
    bytes: u64,
    at: Option<Instant>,
    took: Duration,
}

const RELATCH: &str = env!("CARGO_BIN_EXE_relatch");
/// The longest start: ten million keys are read within minutes.
const TIMEOUT: Duration = Duration::from_mins(30);

impl Deployment {
    /// Creates the data of a control plane, and fills its store in a process of its own.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub(crate) fn prepare(keys: u32) -> Result<Self> {
        let deployment = Self(tempfile::tempdir()?);
        let made = Command::new(RELATCH)
            .args(["control", "init", "--data-dir"])
            .arg(deployment.data_dir())
            .output()?;
        ensure!(made.status.success(), "relatch control init failed");
        let filled = Command::new(env::current_exe()?)
            .args(["--keys", &keys.to_string(), "--fill"])
            .arg(deployment.data_dir())
            .status()?;
        ensure!(filled.success(), "the store is not filled");
        Ok(deployment)
    }

    /// Starts the control plane.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub(crate) fn control(&self) -> Result<Daemon> {
        let yaml = format!(
            "data_dir: \"{}\"\ndiscovery: 127.0.0.1:0\nadmin: 127.0.0.1:0\nhttp: 127.0.0.1:0\nlog: {{ format: json, level: info }}\n",
            self.data_dir().display()
        );
        self.start("control", &yaml)
    }

    /// Starts a sidecar with the keyring on demand, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When it does not become ready.
    pub(crate) async fn sidecar(&self, control: &Daemon, max_size: &str) -> Result<Daemon> {
        let discovery = control.address("discovery")?;
        let yaml = format!(
            "node: {{ id: bench }}\nlisten: 127.0.0.1:0\nhttp: 127.0.0.1:0\ncontrol: {{ endpoints: [\"http://{discovery}\"] }}\n\
             keyrings: [{{ name: {KEYRING}, mode: on_demand, cache: {{ max_size: {max_size} }} }}]\ndefault_keyring: {KEYRING}\n\
             log: {{ format: json, level: info }}\n"
        );
        let sidecar = self.start("sidecar", &yaml)?;
        let began = Instant::now();
        while !sidecar.get("/readyz").await?.starts_with("HTTP/1.1 200") {
            ensure!(
                began.elapsed() < TIMEOUT,
                "the sidecar does not become ready"
            );
            sleep(Duration::from_millis(100)).await;
        }
        Ok(sidecar)
    }

    /// The secrets of the keys.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub(crate) fn keys(&self) -> Result<Keys> {
        Keys::open(&self.data_dir())
    }

    fn data_dir(&self) -> PathBuf {
        self.0.path().join("data")
    }

    fn start(&self, part: &str, yaml: &str) -> Result<Daemon> {
        let config = self.0.path().join(format!("{part}.yaml"));
        fs::write(&config, yaml)?;
        let mut child = Command::new(RELATCH)
            .args([part, "--config"])
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let log = child.stderr.take().context("it is piped")?;
        let mut lines = BufReader::new(log).lines();
        let told = loop {
            let line = lines.next().context("it ended")??;
            let told: Value = serde_json::from_str(&line).unwrap_or_default();
            let text = told.to_string();
            if text.contains("sidecar started") || text.contains("control plane started") {
                break told;
            }
        };
        // Later log lines must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Daemon { child, told })
    }
}

impl Daemon {
    /// The address that it has reported as `name`.
    ///
    /// # Errors
    ///
    /// When it has not reported one.
    pub(crate) fn address(&self, name: &str) -> Result<&str> {
        let found = self
            .told
            .get(name)
            .or_else(|| self.told["fields"].get(name));
        let found = found.and_then(Value::as_str);
        found.with_context(|| format!("no {name} in {}", self.told))
    }

    /// The resident memory, in bytes.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub(crate) fn resident(&self) -> Result<u64> {
        memory::resident(&self.child.id().to_string())
    }

    /// Reads the counters of its cache.
    ///
    /// # Errors
    ///
    /// When its metrics cannot be read.
    pub(crate) async fn counters(&self) -> Result<Counters> {
        let page = self.get("/metrics").await?;
        let read = |name: &str, label: &str| -> u64 {
            let lines = page.lines().filter(|line| line.starts_with(name));
            let lines = lines.filter(|line| line.contains(label));
            let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
            values.sum()
        };
        Ok(Counters {
            hits: read("relatch_on_demand_reads_total", "\"hit\""),
            misses: read("relatch_on_demand_reads_total", "\"miss\""),
            found: read("relatch_on_demand_lookups_total", "\"found\""),
            evictions: read("relatch_on_demand_evictions_total", ""),
            denied: read("relatch_on_demand_denials_total", ""),
            entries: read("relatch_on_demand_entries", "\"key\""),
            bytes: read("relatch_on_demand_bytes", ""),
            at: Some(Instant::now()),
            took: Duration::ZERO,
        })
    }

    async fn get(&self, target: &str) -> Result<String> {
        let mut stream = TcpStream::connect(self.address("http")?).await?;
        let request = format!("GET {target} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }
}

impl Counters {
    /// The counts since `before`.
    pub(crate) fn since(self, before: &Self) -> Self {
        Self {
            hits: self.hits - before.hits,
            misses: self.misses - before.misses,
            found: self.found - before.found,
            evictions: self.evictions - before.evictions,
            denied: self.denied - before.denied,
            took: self
                .at
                .zip(before.at)
                .map_or(Duration::ZERO, |(now, then)| now.duration_since(then)),
            ..self
        }
    }
}

impl fmt::Display for Counters {
    #[expect(clippy::cast_precision_loss, reason = "both are far below 2^52")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = self.hits as f64 / (self.hits + self.misses).max(1) as f64;
        write!(
            f,
            "hit rate {:.2} %, {:.0} lookups/s, {} evicted or not let in, {} denied; {} entries, {} MiB",
            100.0 * share,
            self.found as f64 / self.took.as_secs_f64(),
            self.evictions,
            self.denied,
            self.entries,
            self.bytes >> 20,
        )
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
