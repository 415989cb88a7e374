//! The listener: sockets, TLS, keys on demand, and what metrics, spans, logs and status show.

use serde_json::{Value, json};

use super::{Mesh, reason_of};
use crate::support::{
    client::{Connection, Request},
    gateway::{Asks, Gateway, GatewayKind},
    otlp::OtlpReceiver,
    process::relatch,
    relatch::{Sidecar, own_node, sidecar_yaml, text},
};

/// The headers with which a proxy describes a request.
fn described(path: &str) -> Request {
    Request::get(path)
        .header("x-forwarded-method", "GET")
        .header("x-forwarded-uri", "/")
        .header("x-forwarded-host", "api.example.com")
        .header("x-forwarded-proto", "https")
        .header("x-forwarded-for", "192.0.2.1")
}

#[tokio::test]
async fn status_names_the_profiles_and_the_headers_to_list() {
    let mesh = Mesh::start().await;
    let status: Value = mesh.sidecar.get("/status").await.json();
    let listener = &status["http_authz"];
    assert_eq!(listener["address"], mesh.sidecar.http_authz().to_string());
    assert_eq!(
        listener["profiles"][1],
        json!({
            "path": "/authz/traefik-scoped",
            "dialect": "traefik",
            "keyring": "payments",
            "scopes": "orders.read",
            "headers": [
                "x-relatch-consumer",
                "x-relatch-key-id",
                "x-relatch-key-version",
                "x-relatch-scopes",
                "x-api-key",
                "authorization",
            ],
        })
    );
}

/// The samples list every header of a profile with the default places.
#[test]
fn the_samples_list_every_header() {
    let headers = [
        "X-Relatch-Consumer",
        "X-Relatch-Key-Id",
        "X-Relatch-Key-Version",
        "X-Relatch-Scopes",
        "X-Api-Key",
        "Authorization",
    ];
    for (sample, line) in [
        (include_str!("../../../deploy/traefik/dynamic.yaml"), "- "),
        (include_str!("../../../deploy/caddy/Caddyfile"), " "),
        (
            include_str!("../../../deploy/nginx/nginx.conf"),
            "proxy_set_header ",
        ),
    ] {
        for header in headers {
            assert!(
                sample.contains(&format!("{line}{header}")),
                "{line}{header}"
            );
        }
    }
}

#[tokio::test]
async fn checks_are_counted_traced_and_logged_with_their_dialect() {
    let collector = OtlpReceiver::start().await;
    let telemetry = format!(
        "telemetry: {{ otlp_endpoint: \"http://{}\" }}\n",
        collector.addr()
    );
    let mesh = Mesh::start_with(&telemetry).await;
    let key = mesh.key(&[]).await;
    let sampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let asked = described("/authz/caddy").header("traceparent", sampled);
    let allowed = asked.header("x-api-key", &key.secret);
    let allowed = allowed.send(mesh.sidecar.http_authz()).await;
    assert_eq!(allowed.status, 200);
    assert_eq!(allowed.header("x-relatch-consumer"), Some("checkout"));
    let denied = described("/authz/traefik")
        .send(mesh.sidecar.http_authz())
        .await;
    assert_eq!(reason_of(&denied), "missing_credential");

    let page = mesh.sidecar.get("/metrics").await.text();
    for line in [
        r#"relatch_http_authz_checks_total{dialect="caddy",decision="allow"} 1"#,
        r#"relatch_http_authz_checks_total{dialect="traefik",decision="deny"} 1"#,
        r#"relatch_checks_total{keyring="payments",decision="allow",reason="ok",key_state="active"} 1"#,
        r#"relatch_checks_total{keyring="payments",decision="deny",reason="missing_credential",key_state=""} 1"#,
    ] {
        assert!(page.contains(line), "{line} is not in\n{page}");
    }
    let span = collector
        .span(|span| span.text("auth.dialect") == Some("caddy"))
        .await;
    assert_eq!(span.span.name, "check for caddy");
    assert_eq!(span.text("auth.decision"), Some("allow"));
    assert_eq!(span.text("client.address"), Some("192.0.2.1"));
    assert_eq!(span.text("rpc.system.name"), None);
    let lines = mesh.sidecar.process.lines();
    let logged = lines.iter().any(|line| {
        line.contains(r#""auth.dialect":"traefik""#) && line.contains("a check was denied")
    });
    assert!(logged, "{lines:?}");
}

#[tokio::test]
async fn a_key_on_demand_is_looked_up_for_a_check_over_http() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let base = sidecar_yaml(&own_node("edge"), mesh.control.discovery(), &["payments"]);
    let base = base.replace("{ name: payments }", "{ name: payments, mode: on_demand }");
    let profile =
        "http_authz: { listen: \"127.0.0.1:0\", profiles: [{ name: shop, dialect: caddy }] }\n";
    let sidecar = Sidecar::start(&[&base, profile].concat())
        .await
        .until_ready()
        .await;
    for _ in 0..2 {
        let asked = described("/authz/shop").header("x-api-key", &key.secret);
        let answer = asked.send(sidecar.http_authz()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let unknown = described("/authz/shop").header("x-api-key", key.secret.replace("rlk_", "rlk_x"));
    assert_eq!(unknown.send(sidecar.http_authz()).await.status, 401);
}

#[tokio::test]
async fn a_connection_is_kept_and_other_paths_are_not_found() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let mut connection = Connection::open(mesh.sidecar.http_authz())
        .await
        .expect("it listens");
    for (path, status) in [
        ("/authz/caddy", 200),
        ("/authz/shop", 404),
        ("/status", 404),
        ("/authz/caddy", 200),
    ] {
        let asked = described(path).header("x-api-key", &key.secret);
        let answer = connection.send(&asked).await.expect("it is kept");
        assert_eq!(answer.status, status, "{path}");
    }
}

#[tokio::test]
async fn caddy_and_nginx_ask_over_a_unix_socket() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let dir = tempfile::tempdir().expect("a directory can be made");
    let path = dir.path().join("http.sock");
    let base = sidecar_yaml(&own_node("edge"), mesh.control.discovery(), &["payments"]);
    let yaml = format!(
        "{base}http_authz:\n  listen: unix://{}\n  profiles: [{{ name: caddy, dialect: caddy }}, {{ name: nginx, dialect: nginx }}]\n",
        text(&path)
    );
    let mut sidecar = Sidecar::start(&yaml).await.until_ready().await;
    let asks = |profile| Asks {
        // The changes replace it.
        sidecar: mesh.sidecar.http_authz(),
        profile,
        upstream: mesh.upstream.addr(),
    };
    let tcp = mesh.sidecar.http_authz().to_string();
    let of_caddy = format!("unix/{}", text(&path));
    let changes = [(&*tcp, &*of_caddy)];
    let caddy = Gateway::start(GatewayKind::Caddy, asks("caddy"), &changes).await;
    key.assert_identified(&caddy.send(key.get("/")).await.seen());
    let of_nginx = format!("unix:{}", text(&path));
    let changes = [(&*tcp, &*of_nginx)];
    let nginx = Gateway::start(GatewayKind::Nginx, asks("nginx"), &changes).await;
    key.assert_identified(&nginx.send(key.get("/")).await.seen());
    assert!(sidecar.stop().await.success());
    assert!(!path.exists());
}

#[tokio::test]
async fn nginx_asks_over_tls() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let dir = tempfile::tempdir().expect("a directory can be made");
    let made = relatch(&["certs", "dev", "--out", text(dir.path())], "").await;
    assert!(made.status.success(), "{}", made.stderr);
    let file = |name: &str| text(&dir.path().join(name)).to_owned();
    let base = sidecar_yaml(&own_node("edge"), mesh.control.discovery(), &["payments"]);
    let yaml = format!(
        "{base}http_authz:\n  listen:\n    address: 127.0.0.1:0\n    tls: {{ cert: {}, key: {}, client_ca: {} }}\n  profiles: [{{ name: nginx, dialect: nginx }}]\n",
        file("ext-authz.pem"),
        file("ext-authz.key"),
        file("ca.pem")
    );
    let sidecar = Sidecar::start(&yaml).await.until_ready().await;
    let asks = Asks {
        sidecar: sidecar.http_authz(),
        profile: "nginx",
        upstream: mesh.upstream.addr(),
    };
    let over_tls = format!(
        "proxy_ssl_protocols TLSv1.3; proxy_ssl_verify on; proxy_ssl_name localhost; \
         proxy_ssl_trusted_certificate {}; proxy_ssl_certificate {}; proxy_ssl_certificate_key {}; \
         proxy_pass https://relatch/",
        file("ca.pem"),
        file("envoy.pem"),
        file("envoy.key")
    );
    let changes = [("proxy_pass http://relatch/", &*over_tls)];
    let gateway = Gateway::start(GatewayKind::Nginx, asks, &changes).await;
    key.assert_identified(&gateway.send(key.get("/")).await.seen());
    let page = sidecar.get("/metrics").await.text();
    assert!(page.contains("use=\"http_authz_server\""), "{page}");
    // Without a certificate of its own, nobody is answered.
    let without = [(
        "proxy_pass http://relatch/",
        "proxy_ssl_protocols TLSv1.3; proxy_pass https://relatch/",
    )];
    let stranger = Gateway::start(GatewayKind::Nginx, asks, &without).await;
    let before = mesh.upstream.requests();
    assert_eq!(stranger.send(key.get("/")).await.status, 503);
    assert_eq!(mesh.upstream.requests(), before);
}
