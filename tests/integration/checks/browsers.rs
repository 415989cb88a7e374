//! Scripts in browsers: preflights of CORS, and what a script can read of a denial. The assertions are those of the Fetch
//! Standard ("CORS check" and "CORS-safelisted response-header name"); no browser runs.

use super::{Mesh, reason_of};
use crate::support::{
    client::{Request, Response},
    envoy::EnvoyOptions,
};

const ORIGIN: &str = "https://app.example";
const PREFLIGHTS: &str = "\
routes:
  - { path_prefix: /, keyring: payments }
  - { path_prefix: /app, keyring: payments, preflight: allow }
";

/// Whether a script of [`ORIGIN`] can read the answer at all, and this header of it.
fn can_read(response: &Response, header: &str) -> bool {
    let allowed = response.header("access-control-allow-origin");
    let exposed = response.header("access-control-expose-headers");
    allowed == Some(ORIGIN)
        && exposed.is_some_and(|names| {
            let mut names = names.split(',').map(str::trim);
            names.any(|name| name.eq_ignore_ascii_case(header))
        })
}

#[tokio::test]
async fn a_preflight_passes_without_a_key_where_a_route_lets_it() {
    let mesh = Mesh::start_with(PREFLIGHTS).await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        let preflight = || Request::preflight("/app/orders", ORIGIN, "PUT");
        for response in [
            gate.send(preflight()).await,
            gate.send_http2(preflight()).await,
        ] {
            let seen = response.seen();
            assert_eq!(seen.method, "OPTIONS");
            assert_eq!(seen.values("origin"), [ORIGIN]);
            assert!(seen.values("x-relatch-consumer").is_empty());
        }
        // No identity and no credential goes with it.
        let forged = preflight()
            .header("X-Relatch-Consumer", "root")
            .header("x.relatch.consumer", "root")
            .header("x-api-key", &key.secret)
            .header("authorization", "Bearer wrong");
        let seen = gate.send(forged).await.seen();
        let is_left = |(name, _): &&(String, String)| {
            name.contains("relatch") || name == "x-api-key" || name == "authorization"
        };
        assert_eq!(seen.headers.iter().find(is_left), None);
        for other in [
            Request::preflight("/orders", ORIGIN, "PUT"),
            preflight().header("x-http-method-override", "DELETE"),
            Request::get("/app/orders").header("origin", ORIGIN),
        ] {
            assert_eq!(reason_of(&gate.send(other).await), "missing_credential");
        }
        let log = gate.envoy.access_log(6).await;
        assert_eq!(log[0]["authz"]["decision"], "allow");
        assert_eq!(log[0]["authz"]["reason"], "preflight");
        assert_eq!(log[2]["authz"]["reason"], "preflight");
    })
    .await;
    let page = mesh.sidecar.get("/metrics").await.text();
    let line = r#"relatch_checks_total{keyring="payments",decision="allow",reason="preflight",key_state=""} 12"#;
    assert!(
        page.lines().any(|other| other == line),
        "no {line} in {page}"
    );
}

#[tokio::test]
async fn a_script_can_read_a_denial_and_the_rotation_notice() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let rotate = ["rotate", "start", &key.id, "--overlap", "1h"];
    let next = mesh.issue(&rotate).await;
    mesh.until_held("payments", "retiring", 1).await;
    let setup = |options: EnvoyOptions| options.cors(ORIGIN);
    mesh.through_each_version(setup, async |gate| {
        // The filter answers the preflight: neither relatch nor the upstream sees it.
        let before = mesh.upstream.requests();
        let preflight = gate
            .send(Request::preflight("/orders", ORIGIN, "POST"))
            .await;
        assert_eq!(preflight.status, 200);
        let allowed = preflight.header("access-control-allow-headers");
        assert_eq!(allowed, Some("x-api-key"));
        assert_eq!(mesh.upstream.requests(), before);
        let from_script = |request: Request| request.header("origin", ORIGIN);
        let denied = gate.send(from_script(Request::get("/"))).await;
        assert_eq!(denied.status, 401);
        assert!(
            can_read(&denied, "www-authenticate"),
            "{:?}",
            denied.headers
        );
        let retiring = gate.send(from_script(key.get("/"))).await;
        assert_eq!(retiring.status, 200);
        assert!(retiring.header("api-key-rotation").is_some());
        assert!(can_read(&retiring, "api-key-rotation"));
        let fresh = gate.send(from_script(next.get("/"))).await;
        assert_eq!(fresh.header("api-key-rotation"), None);
        // Another origin reads nothing.
        let elsewhere = Request::get("/").header("origin", "https://evil.example");
        let denied = gate.send(elsewhere).await;
        assert_eq!(denied.header("access-control-allow-origin"), None);
    })
    .await;
}
