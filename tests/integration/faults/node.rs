//! A sidecar as a process that comes and goes, behind a proxy in its link.

use std::{path::Path, sync::Arc, time::Duration};

use rustix::process::Signal;
use serde_json::Value;
use tokio::{sync::watch, task::JoinHandle};

use super::{
    fleet::{KEYRING, NODE},
    proxy::FaultProxy,
    record::Record,
};
use crate::support::{
    envoy::AuthzAddress,
    eventually::eventually,
    process::relatch,
    relatch::{Control, Sidecar, sidecar_yaml, text},
};

/// A sidecar, its link, and where it is asked.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) proxy: FaultProxy,
    pub(super) sidecar: Sidecar,
    number: usize,
    yaml: String,
    address: watch::Sender<AuthzAddress>,
    record: Arc<Record>,
}

impl Node {
    /// Starts node `number` of a run, with `settings` in its file, and waits until it is ready.
    pub(super) async fn start(
        number: usize,
        control: &Control,
        settings: &str,
        record: &Arc<Record>,
    ) -> Self {
        let proxy = FaultProxy::start(control.discovery()).await;
        let name = format!("{NODE}{number}");
        let yaml = sidecar_yaml(&name, proxy.address(), &[KEYRING]) + settings;
        record.lives(number);
        let sidecar = Sidecar::start(&yaml).await.until_ready().await;
        let (address, _) = watch::channel(sidecar.ext_authz());
        record.serves(number);
        Self {
            proxy,
            sidecar,
            number,
            yaml,
            address,
            record: Arc::clone(record),
        }
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
        self.sidecar.process.exit().await;
        self.record.lives(self.number);
        self.sidecar = Sidecar::start(&self.yaml).await;
        self.address.send_replace(self.sidecar.ext_authz());
        self.record.serves(self.number);
    }

    /// Lets its process stand still for a while.
    pub(super) async fn freeze(&mut self, duration: Duration) {
        self.record.freezes(self.number);
        self.sidecar.process.signal(Signal::STOP);
        tokio::time::sleep(duration).await;
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
}

/// The lines for a snapshot file in `directory`, where a key is made for it.
pub(super) async fn snapshot_settings(directory: &Path) -> String {
    let key_file = directory.join("snapshot.key");
    let made = relatch(&["config", "snapshot-key", text(&key_file)], "").await;
    assert!(made.status.success(), "{}", made.stderr);
    format!(
        "snapshot: {{ path: {}, key_file: {} }}\n",
        text(&directory.join("keyring.snap")),
        text(&key_file),
    )
}
