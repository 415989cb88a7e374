//! Where the sidecar listens, and how it says whether it is ready.

use serde_json::Value;
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::Mesh;
use crate::support::{
    client::Request,
    envoy::{AuthzAddress, Envoy, EnvoyOptions, EnvoyVersion},
    eventually::eventually,
    relatch::{Control, Sidecar, sidecar_yaml},
    upstream::Upstream,
};

#[tokio::test]
async fn envoy_asks_over_a_unix_socket() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let directory = tempfile::tempdir().expect("a directory can be made");
    let socket = directory.path().join("authz.sock");
    let listen = format!("listen: unix://{}", socket.display());
    let yaml = sidecar_yaml("edge-2", mesh.control.discovery(), &["payments"]);
    let yaml = yaml.replace("listen: 127.0.0.1:0", &listen);
    let mut sidecar = Sidecar::start(&yaml).await.until_ready().await;
    for version in EnvoyVersion::ALL {
        let options = EnvoyOptions::new(socket.clone(), mesh.upstream.addr());
        let envoy = Envoy::start(options.version(version)).await;
        let seen = key.get("/").send(envoy.addr()).await.seen();
        assert_eq!(seen.values("x-relatch-consumer"), ["checkout"], "{version}");
        assert_eq!(
            Request::get("/").send(envoy.addr()).await.status,
            401,
            "{version}"
        );
    }
    assert!(sidecar.stop().await.success());
    assert!(!socket.exists(), "an orderly end leaves no socket behind");
}

/// A sidecar tells of fewer calls than Envoy has at hand when it has just connected. No check fails for it.
#[tokio::test]
async fn checks_that_wait_for_the_first_connection_are_all_answered() {
    let mesh = Mesh::start().await;
    for version in EnvoyVersion::ALL {
        let options = EnvoyOptions::new(mesh.sidecar.ext_authz(), mesh.upstream.addr());
        let envoy = Envoy::start(options.version(version)).await;
        let answers = Request::get("/")
            .send_http2_at_once(envoy.addr(), 900)
            .await;
        let errors = answers.iter().filter(|answer| answer.status != 401).count();
        assert_eq!(errors, 0, "{version}");
    }
}

#[tokio::test]
async fn a_sidecar_is_ready_once_it_holds_every_keyring() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let control = Control::start(data.path()).await;
    for probe in ["/livez", "/readyz"] {
        let answer = Request::get(probe).send(control.http()).await;
        assert_eq!(answer.status, 200, "{probe} of the control plane");
    }
    control.cli_json(&["keyring", "create", "payments"]).await;
    let yaml = sidecar_yaml("edge-1", control.discovery(), &["payments", "late"]);
    let sidecar = Sidecar::start(&yaml).await;

    // The one that exists comes, the other does not.
    eventually("payments is here, late is not", async || {
        let readyz = sidecar.get("/readyz").await;
        assert_eq!(readyz.status, 503);
        (readyz.text() == "not ready: keyring late is not loaded, or is stale\n").then_some(())
    })
    .await;
    let status: Value = sidecar.get("/status").await.json();
    assert_eq!(status["node"], "edge-1");
    assert_eq!(status["status"], "not ready");
    assert_eq!(condition(&status, "payments"), "fresh");
    assert_eq!(condition(&status, "late"), "unavailable");
    assert_eq!(status["control"][0]["connected"], true);
    for service in SERVICES {
        assert_eq!(
            health(&sidecar, service).await,
            ServingStatus::NotServing,
            "{service}"
        );
    }
    let upstream = Upstream::start().await;
    let envoy = Envoy::start(EnvoyOptions::new(sidecar.ext_authz(), upstream.addr())).await;
    assert_eq!(Request::get("/").send(envoy.addr()).await.status, 401);

    control.cli_json(&["keyring", "create", "late"]).await;
    let sidecar = sidecar.until_ready().await;
    eventually("the gRPC health is serving", async || {
        (health(&sidecar, SERVICES[0]).await == ServingStatus::Serving).then_some(())
    })
    .await;
    for service in SERVICES {
        assert_eq!(
            health(&sidecar, service).await,
            ServingStatus::Serving,
            "{service}"
        );
    }
    assert_eq!(sidecar.get("/livez").await.text(), "ok\n");
    let status: Value = sidecar.get("/status").await.json();
    assert_eq!(status["status"], "ready");
    assert_eq!(condition(&status, "late"), "fresh");
}

/// The process as a whole, and the service that Envoy's health checker names.
const SERVICES: [&str; 2] = ["", "envoy.service.auth.v3.Authorization"];

async fn health(sidecar: &Sidecar, service: &str) -> ServingStatus {
    let AuthzAddress::Tcp(addr) = sidecar.ext_authz() else {
        panic!("the sidecar listens on a port");
    };
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).expect("an address is a URL");
    let channel = endpoint.connect().await.expect("the sidecar listens");
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    let answer = HealthClient::new(channel).check(request).await;
    answer.expect("the service is known").into_inner().status()
}

fn condition<'s>(status: &'s Value, keyring: &str) -> &'s str {
    let mut keyrings = status["keyrings"].as_array().into_iter().flatten();
    let held = keyrings.find(|held| held["name"] == keyring);
    held.and_then(|held| held["condition"].as_str())
        .expect("the keyring is told of")
}
