//! A sidecar as a process that comes and goes, behind a proxy in its link.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::Value;
use tokio::{sync::watch, task::JoinHandle};

use super::{
    disk::{FailingSyncs, LimitedFiles},
    fleet::{KEYRING, NUMBER},
    record::Record,
};
use crate::support::{
    envoy::AuthzAddress,
    eventually::eventually,
    process::relatch,
    proxy::FaultProxy,
    relatch::{Control, Sidecar, sidecar_yaml, text},
};

/// A sidecar, its link, and where it is asked.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) proxy: FaultProxy,
    pub(super) sidecar: Sidecar,
    name: String,
    number: usize,
    yaml: String,
    directory: PathBuf,
    is_on_demand: bool,
    address: watch::Sender<AuthzAddress>,
    record: Arc<Record>,
}

/// How a node is made.
#[derive(Debug)]
pub(super) struct Setup {
    /// Its node id, which others may have, too.
    pub(super) name: String,
    /// Of this node alone.
    pub(super) directory: PathBuf,
    /// More lines of its file.
    pub(super) settings: String,
    /// Whether it keeps a snapshot file.
    pub(super) has_file: bool,
    /// Whether it listens on a socket of the file system, which all its processes share.
    pub(super) has_socket: bool,
    /// Whether it holds the keyring on demand.
    pub(super) is_on_demand: bool,
}

impl Node {
    /// Starts node `number` of a run and waits until it is ready.
    pub(super) async fn start(
        number: usize,
        control: &Control,
        setup: Setup,
        record: &Arc<Record>,
    ) -> Self {
        let proxy = FaultProxy::start(control.discovery()).await;
        let yaml = setup
            .yaml(
                number,
                sidecar_yaml(&setup.name, proxy.address(), &[KEYRING]),
            )
            .await;
        record.lives(number);
        let sidecar = Sidecar::start(&yaml).await.until_ready().await;
        let (address, _) = watch::channel(sidecar.ext_authz());
        record.serves(number);
        Self {
            proxy,
            sidecar,
            name: setup.name,
            number,
            yaml,
            directory: setup.directory,
            is_on_demand: setup.is_on_demand,
            address,
            record: Arc::clone(record),
        }
    }

    pub(super) const fn is_on_demand(&self) -> bool {
        self.is_on_demand
    }

    /// Its node id.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where it is asked.
    pub(super) fn address(&self) -> watch::Receiver<AuthzAddress> {
        self.address.subscribe()
    }

    /// Ends its process at once.
    pub(super) async fn kill(&mut self) {
        self.record.dies(self.number);
        self.sidecar.process.signal(Signal::KILL);
        self.sidecar.process.exit().await;
    }

    /// Ends its process at once, some time from now, whatever goes on then.
    pub(super) fn kill_in(&self, moment: Duration) -> JoinHandle<()> {
        let record = Arc::clone(&self.record);
        let killer = self.sidecar.process.killer();
        let number = self.number;
        tokio::spawn(async move {
            tokio::time::sleep(moment).await;
            record.dies(number);
            killer.kill();
        })
    }

    /// Tells it to stop and waits until it has.
    pub(super) async fn stop(&mut self) {
        self.record.dies(self.number);
        assert!(self.sidecar.stop().await.success());
    }

    /// Starts it again after its end.
    pub(super) async fn restart(&mut self) {
        self.begin(None).await;
    }

    /// Starts it again after its end, on a disk of which some syncs fail.
    pub(super) async fn restart_on(&mut self, disk: &FailingSyncs) {
        self.begin(Some(&disk.before())).await;
    }

    /// Starts it again after its end, on a disk that can be full.
    pub(super) async fn restart_limited(&mut self) -> LimitedFiles {
        self.begin(Some(LimitedFiles::BEFORE)).await;
        LimitedFiles::of(&self.sidecar.process)
    }

    async fn begin(&mut self, before: Option<&str>) {
        self.sidecar.process.exit().await;
        self.record.lives(self.number);
        self.sidecar = match before {
            Some(before) => Sidecar::start_after(before, &self.yaml).await,
            None => Sidecar::start(&self.yaml).await,
        };
        self.address.send_replace(self.sidecar.ext_authz());
        self.record.serves(self.number);
    }

    /// A disk for this node: the syncs that fail of files written whole, and of what is appended.
    pub(super) fn failing_syncs(&self, whole: &str, append: &str) -> FailingSyncs {
        FailingSyncs {
            whole: whole.to_owned(),
            append: append.to_owned(),
            log: self.directory.join("strace.log"),
        }
    }

    /// Lets its process stand still for a while.
    pub(super) async fn freeze(&self, duration: Duration) {
        self.stand_still();
        tokio::time::sleep(duration).await;
        self.go_on();
    }

    /// Lets its process stand still until it is told to go on.
    pub(super) fn stand_still(&self) {
        self.record.freezes(self.number);
        self.sidecar.process.signal(Signal::STOP);
    }

    /// Lets its process run again.
    pub(super) fn go_on(&self) {
        self.sidecar.process.signal(Signal::CONT);
        self.record.thaws(self.number);
    }

    /// Waits until it says that it is ready.
    pub(super) async fn until_ready(&self) {
        eventually("the sidecar is ready", async || {
            (self.health().await == (200, 200)).then_some(())
        })
        .await;
    }

    /// The status of its pages `/readyz` and `/livez`.
    pub(super) async fn health(&self) -> (u16, u16) {
        let ready = self.sidecar.get("/readyz").await;
        let live = self.sidecar.get("/livez").await;
        (ready.status, live.status)
    }

    /// What its page `/status` says.
    pub(super) async fn status(&self) -> Value {
        self.sidecar.get("/status").await.json()
    }

    /// The value of a series of its metrics, as it is written.
    pub(super) async fn metric(&self, series: &str) -> Option<String> {
        let page = self.sidecar.get("/metrics").await.text();
        let mut lines = page.lines();
        let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
        Some(value.to_owned())
    }

    /// The value of a series that counts, zero when it is not there.
    pub(super) async fn count(&self, series: &str) -> u64 {
        let value = self.metric(series).await;
        value.map_or(0, |value| value.parse().expect("a whole number"))
    }

    /// The value of a series in seconds, zero when it is not there.
    pub(super) async fn seconds(&self, series: &str) -> f64 {
        let value = self.metric(series).await;
        value.map_or(0.0, |value| value.parse().expect("a number"))
    }

    /// How many of its lines so far contain `part`. More may be on their way.
    pub(super) fn logged(&self, part: &str) -> usize {
        let lines = self.sidecar.process.lines();
        lines.iter().filter(|line| line.contains(part)).count()
    }
}

impl Setup {
    /// The file of a sidecar, made of what every one has.
    async fn yaml(&self, number: usize, plain: String) -> String {
        let mut yaml = plain + &self.settings;
        if self.has_file {
            yaml += &snapshot_settings(&self.directory).await;
        }
        let replace = |yaml: &mut String, from: &str, to: &str| {
            assert!(yaml.contains(from), "{from} is not in {yaml}");
            *yaml = yaml.replace(from, to);
        };
        let id = format!("{{ id: {} }}", self.name);
        let labelled = format!(
            "{{ id: {}, labels: {{ {NUMBER}: '{number}' }} }}",
            self.name
        );
        replace(&mut yaml, &id, &labelled);
        if self.has_socket {
            let socket = self.directory.join("authz.sock");
            let listen = format!("\nlisten: unix://{}\n", text(&socket));
            replace(&mut yaml, "\nlisten: 127.0.0.1:0\n", &listen);
        }
        if self.is_on_demand {
            let full = format!("{{ name: {KEYRING} }}");
            // Lookups wait behind those of others, on a busy machine.
            let on_demand =
                format!("{{ name: {KEYRING}, mode: on_demand, cache: {{ lookup_timeout: 10s }} }}");
            replace(&mut yaml, &full, &on_demand);
        }
        yaml
    }
}

/// The lines for a snapshot file in `directory`, where a key is made for it.
async fn snapshot_settings(directory: &Path) -> String {
    let key_file = directory.join("snapshot.key");
    let made = relatch(&["config", "snapshot-key", text(&key_file)], "").await;
    assert!(made.status.success(), "{}", made.stderr);
    format!(
        "snapshot: {{ path: {}, key_file: {} }}\n",
        text(&directory.join("keyring.snap")),
        text(&key_file),
    )
}
