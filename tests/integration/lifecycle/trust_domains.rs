//! Two trust domains between a control plane and its sidecars: whose root may sign for whom.

use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;
use time::Duration;

use crate::support::{
    authority::Authority,
    eventually::eventually,
    process::relatch,
    relatch::{Control, Sidecar, text},
};

/// Two trust domains, and the files of a control plane that serves both.
struct World {
    dir: TempDir,
    mesh: Authority,
    other: Authority,
}

const BUNDLES: &str = "bundles: { mesh.example: {dir}/mesh.pem, other.example: {dir}/other.pem }";
const CONTROL: &str = "spiffe://mesh.example/control";
const EDGE_1: &str = "spiffe://mesh.example/relatch/edge-1";
const EDGE_2: &str = "spiffe://other.example/relatch/edge-2";
const UNTRUSTED: &str = "its issuer is not among the authorities that are trusted here";

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let (mesh, other) = (Authority::new("mesh root"), Authority::new("other root"));
        mesh.write(&dir.path().join("mesh.pem"));
        other.write(&dir.path().join("other.pem"));
        Self { dir, mesh, other }
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A control plane whose certificate `authority` has signed for [`CONTROL`].
    async fn control(&self, authority: &Authority) -> Control {
        authority.issue(self.dir(), "control", CONTROL, Duration::HOUR);
        let yaml = format!(
            "discovery:\n  tls: {{ cert: {{dir}}/control.pem, key: {{dir}}/control.key, {BUNDLES} }}\n  allow:\n  \
             - {{ identity: \"{EDGE_1}\", keyrings: [\"*\"] }}\n  \
             - {{ identity: \"{EDGE_2}\", keyrings: [\"*\"] }}\n"
        );
        let dir = text(self.dir());
        let control = Control::start_with(self.dir(), &yaml.replace("{dir}", dir)).await;
        control.cli_json(&["keyring", "create", "payments"]).await;
        control
    }

    /// A sidecar whose certificate `authority` has signed for `identity`.
    async fn sidecar(
        &self,
        control: &Control,
        node: &str,
        identity: &str,
        authority: &Authority,
    ) -> Sidecar {
        let dir = text(self.dir());
        authority.issue(self.dir(), node, identity, Duration::HOUR);
        let yaml = format!(
            "node: {{ id: {node} }}\nlisten: 127.0.0.1:0\nhttp: 127.0.0.1:0\n\
             control:\n  endpoints: [\"https://localhost:{port}\"]\n  \
             tls: {{ cert: {dir}/{node}.pem, key: {dir}/{node}.key, {BUNDLES}, server_identity: \"{CONTROL}\" }}\n\
             keyrings: [{{ name: payments }}]\n",
            port = control.discovery().port(),
        );
        Sidecar::start(&yaml.replace("{dir}", dir)).await
    }
}

/// Waits until the sidecar says in `/status` why it has no stream.
async fn problem(sidecar: &Sidecar, words: &str) {
    eventually(words, async || {
        let status: Value = sidecar.get("/status").await.json();
        let problem = status["control"][0]["problem"].as_str()?;
        problem.contains(words).then_some(())
    })
    .await;
    assert_eq!(sidecar.get("/readyz").await.status, 503);
}

#[tokio::test]
async fn the_root_of_another_trust_domain_signs_no_sidecar_of_this_one() {
    let world = World::new();
    let mut control = world.control(&world.mesh).await;
    let forged = world
        .sidecar(&control, "edge-1", EDGE_1, &world.other)
        .await;
    let refused = control.process.wait_for_line(UNTRUSTED).await;
    assert!(
        refused.contains(EDGE_1) && refused.contains("issued by CN=other root"),
        "{refused}"
    );
    problem(&forged, "the server refuses the connection").await;

    // Each for itself is served, on one port.
    let ours = world.sidecar(&control, "edge-1", EDGE_1, &world.mesh).await;
    let ours = ours.until_ready().await;
    let theirs = world
        .sidecar(&control, "edge-2", EDGE_2, &world.other)
        .await;
    let theirs = theirs.until_ready().await;
    for served in [ours, theirs] {
        assert_eq!(served.get("/readyz").await.status, 200);
    }
}

#[tokio::test]
async fn the_root_of_another_trust_domain_signs_no_control_plane_of_this_one() {
    let world = World::new();
    let forged = world.control(&world.other).await;
    let sidecar = world.sidecar(&forged, "edge-1", EDGE_1, &world.mesh).await;
    problem(&sidecar, UNTRUSTED).await;
}

#[tokio::test]
async fn rules_for_two_trust_domains_need_a_bundle_for_each() {
    let world = World::new();
    let file = world.dir().join("control.yaml");
    let yaml = format!(
        "data_dir: d\ndiscovery:\n  tls: {{ cert: c.pem, key: c.key, client_ca: both.pem }}\n  allow:\n  \
         - {{ identity: \"{EDGE_1}\", keyrings: [\"*\"] }}\n  \
         - {{ identity: \"{EDGE_2}\", keyrings: [\"*\"] }}\n"
    );
    std::fs::write(&file, yaml).expect("the test's directory can be written to");
    for command in [
        &["config", "check", text(&file)][..],
        &["control", "--config", text(&file)],
    ] {
        let refused = relatch(command, "").await;
        assert!(!refused.status.success(), "{command:?}");
        let words = "discovery.allow[1].identity: is of trust domain other.example, but discovery.allow[0] is of \
                     mesh.example: `client_ca` is for one trust domain, because its authorities may sign for any; use \
                     `discovery.tls.bundles`";
        assert!(
            refused.stderr.contains(words),
            "{command:?}: {}",
            refused.stderr
        );
    }
}
