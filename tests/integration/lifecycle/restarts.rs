//! Restarts and stops of sidecars under load: no request fails because of one.

use std::net::TcpListener;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{
    deployment::{Control, IssuedKey, KEYRING, Sidecar, Verdict},
    traffic::{Caller, HeldKey, assert_all_right},
};
use crate::support::{
    envoy::{Envoy, EnvoyOptions},
    eventually::eventually,
    loopback::any_port,
    process::{self, Process},
    relatch::{self, sidecar_yaml, text},
    upstream::Upstream,
};

/// As systemd does for a socket unit: the socket outlives the processes that accept on it. Each process begins from the
/// snapshot file of the one before.
struct SocketUnit {
    socket: TcpListener,
    yaml: String,
    _state: TempDir,
}

impl SocketUnit {
    async fn new(control: &Control) -> Self {
        let state = tempfile::tempdir().expect("a directory can be made");
        let [file, key] = ["keyring.snap", "snapshot.key"].map(|name| state.path().join(name));
        let made = process::relatch(&["config", "snapshot-key", text(&key)], "").await;
        assert!(made.status.success(), "{}", made.stderr);
        let socket = TcpListener::bind(any_port()).expect("a port of loopback is free");
        let address = socket.local_addr().expect("it is bound");
        let yaml = sidecar_yaml("edge-1", control.plane.discovery(), &[KEYRING]);
        let (head, rest) = yaml.split_once("listen: ").expect("it listens");
        let (_, rest) = rest.split_once('\n').expect("more follows");
        Self {
            yaml: format!(
                "{head}listen: {address}\n{rest}snapshot: {{ path: {}, key_file: {} }}\n",
                text(&file),
                text(&key)
            ),
            socket,
            _state: state,
        }
    }

    async fn start(&self) -> Sidecar {
        let daemon = relatch::Sidecar::start_by(&self.yaml, |args| {
            Process::relatch_with_socket(&self.socket, args)
        });
        Sidecar::asking(daemon.await)
    }
}

/// A caller that sends requests with `key` through Envoy.
fn steady(envoy: &Envoy, key: &IssuedKey) -> Caller {
    let key = HeldKey::from(key);
    Caller::start(envoy.addr(), "steady", move || key.clone())
}

#[tokio::test]
async fn a_restart_with_a_passed_socket_fails_no_request() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let unit = SocketUnit::new(&control).await;
    let mut sidecar = unit.start().await;
    sidecar.ready().await;
    let upstream = Upstream::start().await;
    let envoy = EnvoyOptions::new(sidecar.daemon.ext_authz(), upstream.addr());
    let envoy = Envoy::start(envoy).await;
    let callers = [(); 3].map(|()| steady(&envoy, &key));
    for _ in 0..4 {
        for caller in &callers {
            caller.answered(20).await;
        }
        let status = sidecar.daemon.stop().await;
        assert!(status.success(), "{status}");
        sidecar = unit.start().await;
    }
    for caller in callers {
        caller.answered(20).await;
        assert_all_right(&caller.stop().await);
    }
}

#[tokio::test]
async fn a_restart_where_envoy_retries_fails_no_request() {
    let control = Control::start().await;
    let key = control.create_key().await;
    // Nobody holds the socket while the sidecar restarts.
    let SocketUnit {
        yaml,
        socket,
        _state,
    } = SocketUnit::new(&control).await;
    drop(socket);
    let mut sidecar = Sidecar::with_config(&yaml).await;
    sidecar.ready().await;
    let upstream = Upstream::start().await;
    let envoy = EnvoyOptions::new(sidecar.daemon.ext_authz(), upstream.addr());
    let envoy = Envoy::start(envoy.retries()).await;
    let caller = steady(&envoy, &key);
    for _ in 0..4 {
        caller.answered(20).await;
        assert!(sidecar.daemon.stop().await.success());
        sidecar = Sidecar::with_config(&yaml).await;
    }
    caller.answered(20).await;
    assert_all_right(&caller.stop().await);
}

#[tokio::test]
async fn a_passed_socket_that_nobody_uses_is_refused() {
    let control = Control::start().await;
    let yaml = sidecar_yaml("edge-1", control.plane.discovery(), &[KEYRING]);
    let dir = tempfile::tempdir().expect("a directory can be made");
    let file = dir.path().join("sidecar.yaml");
    std::fs::write(&file, yaml).expect("the test's directory can be written to");
    let socket = TcpListener::bind(any_port()).expect("a port of loopback is free");
    let address = socket.local_addr().expect("it is bound");
    let file = file.to_str().expect("a path of text");
    let mut process = Process::relatch_with_socket(&socket, &["sidecar", "--config", file]);
    let status = process.exit().await;
    assert!(!status.success());
    let printed = process.lines().join("\n");
    let expected = format!(
        "systemd passes a socket for {address}, but none of `listen`, `http_authz.listen` and `http`"
    );
    assert!(printed.contains(&expected), "{printed}");
}

/// A drain gives balancers the time to turn to others, before the first check fails.
#[tokio::test]
async fn a_sidecar_that_drains_is_not_ready_and_still_answers() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let yaml = sidecar_yaml("edge-1", control.plane.discovery(), &[KEYRING]);
    let mut sidecar = Sidecar::with_config(&format!("{yaml}drain: 5m\n")).await;
    sidecar.ready().await;
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    sidecar.daemon.process.signal(Signal::TERM);
    eventually("the sidecar is not ready", async || {
        let page = sidecar.daemon.get("/readyz").await;
        (page.status == 503)
            .then(|| assert_eq!(page.text(), "not ready: the sidecar is stopping\n"))
    })
    .await;
    for _ in 0..20 {
        assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    }
    let changed = control.rotate(&key.id).await;
    let allowed = eventually("the sidecar still follows its keyring", async || {
        let verdict = sidecar.check(&changed.secret).await;
        verdict.allowed.then_some(verdict)
    });
    assert_eq!(allowed.await, Verdict::allowed(2));
    // A second signal ends the wait.
    sidecar.daemon.process.signal(Signal::TERM);
    let status = sidecar.daemon.process.exit().await;
    assert!(!status.success(), "it was cut off");
}

#[tokio::test]
async fn one_of_two_sidecars_may_stop_or_die() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let mut first = Sidecar::start(&control, "edge-1").await;
    let mut second = Sidecar::start(&control, "edge-2").await;
    let upstream = Upstream::start().await;
    let options = EnvoyOptions::new(first.daemon.ext_authz(), upstream.addr());
    let options = options.and_authz(second.daemon.ext_authz());
    let envoy = Envoy::start(options.retries()).await;
    let caller = steady(&envoy, &key);
    caller.answered(50).await;
    assert!(first.daemon.stop().await.success());
    caller.answered(100).await;
    assert_all_right(&caller.stop().await);

    // Both run again; now one dies without a word.
    let first = Sidecar::start(&control, "edge-1").await;
    let options = EnvoyOptions::new(first.daemon.ext_authz(), upstream.addr());
    let options = options.and_authz(second.daemon.ext_authz());
    let envoy = Envoy::start(options.retries()).await;
    let caller = steady(&envoy, &key);
    caller.answered(50).await;
    second.daemon.process.kill().await;
    caller.answered(100).await;
    assert_all_right(&caller.stop().await);
}

/// What a sidecar counted up to its stop is in the store before it ends.
#[tokio::test]
async fn the_uses_before_a_restart_are_counted() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let unit = SocketUnit::new(&control).await;
    let mut asked = 0;
    for _ in 0..3 {
        let mut sidecar = unit.start().await;
        sidecar.ready().await;
        for _ in 0..7 {
            assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
            asked += 1;
        }
        assert!(sidecar.daemon.stop().await.success());
        let usage: Value = control.json(&["usage", &key.id]).await;
        let counted = usage["versions"][0]["requests"].as_u64();
        assert_eq!(counted, Some(asked), "{usage}");
    }
}
