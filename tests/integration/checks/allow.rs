//! Requests that pass.

use super::{Mesh, reason_of};
use crate::support::{
    client::Request,
    envoy::{Envoy, EnvoyOptions},
    relatch::Relatch,
    upstream::Upstream,
};

const IDENTITY: [&str; 4] = [
    "x-relatch-consumer",
    "x-relatch-key-id",
    "x-relatch-key-version",
    "x-relatch-scopes",
];

#[tokio::test]
async fn the_upstream_learns_who_called_and_not_by_which_key() {
    let mesh = Mesh::start().await;
    let key = mesh
        .key(&["--scope", "orders.write", "--scope", "orders.read"])
        .await;
    let plain = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        let response = gate
            .send(key.get("/orders/7?a=1").header("x-kept", "as it was"))
            .await;
        assert_eq!(response.header("api-key-rotation"), None);
        let seen = response.seen();
        let identity = ["checkout", &key.id, "1", "orders.read orders.write"];
        for (name, value) in IDENTITY.into_iter().zip(identity) {
            assert_eq!(seen.values(name), [value], "{name}");
        }
        assert_eq!(seen.target, "/orders/7?a=1");
        assert_eq!(seen.values("x-kept"), ["as it was"]);
        assert_eq!(seen.values("x-api-key").len(), 0);
        key.assert_hidden_from(&seen);

        let seen = gate.send_http2(plain.get("/")).await.seen();
        assert_eq!(seen.values("x-relatch-key-id"), [&plain.id]);
        assert_eq!(seen.values("x-relatch-scopes").len(), 0);
        plain.assert_hidden_from(&seen);

        let log = gate.envoy.access_log(2).await;
        assert_eq!(log[0]["status"], 200);
        let authz = &log[0]["authz"];
        assert_eq!(authz["decision"], "allow");
        assert_eq!(authz["reason"], "ok");
        assert_eq!(authz["keyring"], "payments");
        assert_eq!(authz["consumer"], "checkout");
        assert_eq!(authz["key_id"], key.id);
        assert_eq!(authz["key_state"], "active");
        assert!(authz["key_version"].is_number(), "{authz}");
        assert_eq!(authz["key_version"].as_f64(), Some(1.0));
        assert!(authz["revision"].is_number(), "{authz}");
    })
    .await;
}

#[tokio::test]
async fn an_optional_route_passes_the_anonymous_and_still_judges_a_key() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        let seen = gate.send(Request::get("/optional")).await.seen();
        for name in IDENTITY {
            assert_eq!(seen.values(name).len(), 0, "{name}");
        }
        let seen = gate.send(key.get("/optional")).await.seen();
        assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
        key.assert_hidden_from(&seen);
        let wrong = Request::get("/optional").header("x-api-key", "nonsense");
        assert_eq!(reason_of(&gate.send(wrong).await), "malformed_credential");
        let log = gate.envoy.access_log(3).await;
        let reasons = [&log[0]["reason"], &log[1]["reason"], &log[2]["reason"]];
        assert_eq!(reasons, ["anonymous", "ok", "malformed_credential"]);
        assert!(log[0]["consumer"].is_null());
    })
    .await;
}

#[tokio::test]
async fn a_key_of_another_system_is_taken_over_as_it_is() {
    const FOREIGN: &str = "ak-live/0123456789+abcdefghijklmnop==";
    let mesh = Mesh::start().await;
    let import = [
        "key",
        "import",
        "--keyring",
        "partners",
        "--consumer",
        "acme",
        "--create-missing",
    ];
    let imported = mesh.control.cli_reading(&import, FOREIGN).await.json();
    assert!(imported["secret"].is_null(), "{imported}");
    mesh.until_applied(&imported).await;
    mesh.through_each_envoy(async |gate| {
        let request = |key: &str| Request::get("/partners").header("x-api-key", key);
        let seen = gate.send(request(FOREIGN)).await.seen();
        assert_eq!(seen.values("x-relatch-consumer"), ["acme"]);
        let id = imported["key_id"].as_str().expect("a key has an id");
        assert_eq!(seen.values("x-relatch-key-id"), [id]);
        let text = serde_json::to_string(&seen).expect("a description is text");
        assert!(!text.contains("0123456789"), "{text}");
        let unknown = gate
            .send(request("ak-live/0123456789+abcdefghijklmnoq=="))
            .await;
        assert_eq!(reason_of(&unknown), "unknown_key");
    })
    .await;
}

#[tokio::test]
async fn host_and_path_choose_keyring_and_scopes_where_the_route_says_nothing() {
    let mesh = Mesh::start_with(
        "routes:\n\
         - { host: partners.example.com, keyring: partners, scopes: [orders.read] }\n\
         - { host: \"*.example.com\", path_prefix: /public, auth: optional }\n\
         - { path_prefix: /admin, scopes: [admin] }\n",
    )
    .await;
    let ours = mesh.key(&[]).await;
    let create = [
        "key",
        "create",
        "--keyring",
        "partners",
        "--consumer",
        "acme",
        "--create-missing",
    ];
    let partner = mesh
        .issue(&[&create[..], &["--scope", "orders.read"]].concat())
        .await;
    let bare = mesh.issue(&create).await;
    mesh.through_each_version(
        |options| options,
        async |gate| {
            let partners = |request: Request| request.header("host", "Partners.Example.com:8443");
            let seen = gate.send(partners(partner.get("/"))).await.seen();
            assert_eq!(seen.values("x-relatch-consumer"), ["acme"]);
            for (request, reason) in [
                (partners(bare.get("/")), "insufficient_scope"),
                (partners(ours.get("/")), "unknown_key"),
                (partner.get("/"), "unknown_key"),
                (ours.get("/admin/users"), "insufficient_scope"),
                (ours.get("/ADMIN/users"), "malformed_request"),
                (ours.get("/x/../admin/users"), "malformed_request"),
                (ours.get("/%61dmin/users"), "malformed_request"),
                (ours.get("/admin%00"), "malformed_request"),
                (Request::get("/public"), "missing_credential"),
            ] {
                assert_eq!(reason_of(&gate.send(request).await), reason);
            }
            let public = Request::get("/public/docs").header("host", "www.example.com");
            gate.send(public).await.seen();
            gate.send(ours.get("/administration")).await.seen();
        },
    )
    .await;
}

#[tokio::test]
async fn another_spelling_of_a_host_evades_no_rule() {
    let mesh = Mesh::start_with(
        "routes:\n\
         - { host: \"2001:db8::1\", scopes: [admin] }\n\
         - { host: 192.0.2.1, scopes: [admin] }\n\
         - { host: admin.example.com, scopes: [admin] }\n",
    )
    .await;
    let key = mesh.key(&[]).await;
    mesh.through_each_version(
        |options| options,
        async |gate| {
            for (host, reason) in [
                ("[2001:db8::1]", "insufficient_scope"),
                ("[2001:DB8:0:0::1]:8443", "insufficient_scope"),
                ("192.0.2.1:80", "insufficient_scope"),
                ("[::ffff:192.0.2.1]", "insufficient_scope"),
                ("Admin.example.com.", "insufficient_scope"),
                ("admin.example.com..", "malformed_request"),
                ("3221225985", "malformed_request"),
            ] {
                let response = gate.send(key.get("/").header("host", host)).await;
                assert_eq!(reason_of(&response), reason, "{host}");
            }
            let other = key.get("/").header("host", "[2001:db8::2]");
            gate.send(other).await.seen();
        },
    )
    .await;
}

#[tokio::test]
async fn the_demo_key_opens_a_fresh_relatch_dev() {
    let relatch = Relatch::dev().await;
    let upstream = Upstream::start().await;
    let envoy = Envoy::start(EnvoyOptions::new(relatch.ext_authz(), upstream.addr())).await;
    let request = Request::get("/").header("x-api-key", relatch.key());
    let seen = request.send(envoy.addr()).await.seen();
    assert_eq!(seen.values("x-relatch-consumer"), ["demo-app"]);
    assert_eq!(seen.values("x-relatch-key-id"), [relatch.key_id()]);
    assert_eq!(Request::get("/").send(envoy.addr()).await.status, 401);

    let endpoint = relatch.ext_authz().to_string();
    let check = ["check", "--endpoint", &endpoint];
    let allowed = relatch.cli_reading(&check, relatch.key()).await;
    assert_eq!(allowed.json()["decision"], "allow");
    let denied = relatch.cli(&[&check[..], &["--no-key"]].concat()).await;
    assert_eq!(denied.status.code(), Some(1), "{}", denied.stderr);
    for http in [relatch.sidecar_http(), relatch.control_http()] {
        assert_eq!(Request::get("/readyz").send(http).await.status, 200);
    }
}
