//! What happens while the sidecar restarts or is away.

use std::net::TcpListener;

use super::{Blame, Mesh};
use crate::support::{
    client::Request,
    gateway::{Asks, Gateway, GatewayKind},
    load::Load,
    loopback::any_port,
    process::{self, Process},
    relatch::{Sidecar, own_node, sidecar_yaml, text},
};

#[tokio::test]
async fn every_request_is_denied_while_the_sidecar_is_away() {
    let mut mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let mut gateways = Vec::new();
    for kind in GatewayKind::ALL {
        let gateway = mesh.gateway(kind, "").await;
        gateway.send(key.get("/")).await.seen();
        gateways.push(gateway);
    }
    assert!(mesh.sidecar.stop().await.success());
    let before = mesh.upstream.requests();
    for gateway in &gateways {
        let _blame = Blame(gateway.kind());
        for request in [
            key.get("/"),
            key.get("/").header("x-relatch-consumer", "root"),
            Request::get("/"),
        ] {
            let response = gateway.send(request).await;
            assert!((500..600).contains(&response.status), "{}", response.status);
        }
    }
    assert_eq!(mesh.upstream.requests(), before, "a request arrived");
}

/// The socket outlives the processes that accept on it, as with a socket unit of systemd. Each process begins from the
/// snapshot file of the one before.
#[tokio::test]
async fn a_restart_with_a_passed_socket_fails_no_request() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let state = tempfile::tempdir().expect("a directory can be made");
    let [file, snapshot_key] = ["keyring.snap", "snapshot.key"].map(|name| state.path().join(name));
    let made = process::relatch(&["config", "snapshot-key", text(&snapshot_key)], "").await;
    assert!(made.status.success(), "{}", made.stderr);
    let socket = TcpListener::bind(any_port()).expect("a port of loopback is free");
    let address = socket.local_addr().expect("it is bound");
    let base = sidecar_yaml(&own_node("edge"), mesh.control.discovery(), &["payments"]);
    let profiles = GatewayKind::ALL.map(|kind| format!("{{ name: {kind}, dialect: {kind} }}"));
    let yaml = format!(
        "{base}http_authz: {{ listen: \"{address}\", profiles: [{}] }}\n\
         snapshot: {{ path: {}, key_file: {} }}\n",
        profiles.join(", "),
        text(&file),
        text(&snapshot_key)
    );
    let start =
        async || Sidecar::start_by(&yaml, |args| Process::relatch_with_socket(&socket, args)).await;
    let mut sidecar = start().await.until_ready().await;
    let mut loads = Vec::new();
    for kind in GatewayKind::ALL {
        let asks = Asks {
            sidecar: address,
            profile: kind.as_str(),
            upstream: mesh.upstream.addr(),
        };
        let gateway = Gateway::start(kind, asks, &[]).await;
        let secret = key.secret.clone();
        let request = move || Request::get("/").header("x-api-key", &secret);
        let load = Load::start(gateway.addr(), request, 2);
        loads.push((gateway, load));
    }
    for _ in 0..4 {
        for (_, load) in &loads {
            load.answered(40).await;
        }
        assert!(sidecar.stop().await.success());
        sidecar = start().await;
    }
    for (gateway, load) in loads {
        load.answered(40).await;
        let totals = load.stop().await;
        assert_eq!(totals.failed, 0, "{}: {:?}", gateway.kind(), totals.samples);
    }
}
