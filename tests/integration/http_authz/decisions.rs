//! What passes, and what a client learns of a denial.

use super::{Mesh, identities, reason_of, values};
use crate::support::{client::Request, gateway::GatewayKind, reserved::own_address};

#[tokio::test]
async fn a_good_key_passes_with_its_identity_and_without_the_key() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let bearer = format!("bearer {}", key.secret);
    mesh.through_each(async |gateway| {
        for request in [
            key.get("/a/b?c=%20d"),
            Request::get("/a/b?c=%20d").header("authorization", &bearer),
            key.get("/a/b?c=%20d").header("authorization", &bearer),
        ] {
            let seen = gateway.send(request).await.seen();
            key.assert_identified(&seen);
            assert_eq!((&*seen.method, &*seen.target), ("GET", "/a/b?c=%20d"));
            assert!(values(&seen, "authorization").is_empty(), "{seen:?}");
        }
        let post = Request::post("/orders", &vec![b'x'; 100_000]).header("x-api-key", &key.secret);
        let seen = gateway.send(post).await.seen();
        key.assert_identified(&seen);
        assert_eq!((&*seen.method, seen.body), ("POST", 100_000));
    })
    .await;
}

#[tokio::test]
async fn an_authorization_that_is_no_key_stays() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each(async |gateway| {
        for kept in [
            "Basic dTpw",
            "Basic {env.HOME} $relatch_consumer {{ .Name }}",
        ] {
            let seen = gateway
                .send(key.get("/").header("Authorization", kept))
                .await;
            let seen = seen.seen();
            key.assert_identified(&seen);
            assert_eq!(values(&seen, "authorization"), [kept]);
        }
    })
    .await;
}

#[tokio::test]
async fn each_denial_reaches_the_client_with_its_status_and_body() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let revoked = mesh.key(&[]).await;
    mesh.change(&["revoke", &revoked.id, "--all", "--reason", "leaked"])
        .await;
    let bound = mesh.key(&["--allow-source", "192.0.2.1"]).await;
    mesh.through_each(async |gateway| {
        let before = mesh.upstream.requests();
        let two = key.get("/").header("x-api-key", &revoked.secret);
        let large = (0..8).fold(key.get("/"), |request, _| {
            request.header("x-filler", "x".repeat(1_000))
        });
        for (request, status, reason) in [
            (Request::get("/"), 401, "missing_credential"),
            (
                Request::get("/").header("x-api-key", "wrong"),
                401,
                "malformed_credential",
            ),
            (revoked.get("/"), 401, "revoked"),
            (two, 400, "ambiguous_credential"),
            (bound.get("/"), 403, "source_not_allowed"),
        ] {
            let response = gateway.send(request).await;
            assert_eq!(response.status, status, "{reason}");
            assert_eq!(reason_of(&response), reason);
            assert_eq!(
                response.header("content-type"),
                Some("application/problem+json")
            );
            let challenges = response.headers.iter();
            let challenges =
                challenges.filter(|(name, _)| name.eq_ignore_ascii_case("www-authenticate"));
            assert_eq!(challenges.count(), usize::from(status == 401), "{reason}");
            assert_eq!(response.header("x-relatch-consumer"), None);
        }
        assert_eq!(mesh.upstream.requests(), before, "a denied request arrived");
        // Large headers are no reason for a denial.
        gateway.send(large).await.seen();
    })
    .await;
}

#[tokio::test]
async fn scopes_and_keyring_are_those_of_the_profile() {
    let mesh = Mesh::start().await;
    let plain = mesh.key(&[]).await;
    let scoped = mesh.key(&["--scope", "orders.read"]).await;
    let partner = mesh.key_of("partners", &[]).await;
    mesh.through_each_at("-scoped", async |gateway| {
        let response = gateway.send(plain.get("/")).await;
        assert_eq!(response.status, 403);
        assert_eq!(reason_of(&response), "insufficient_scope");
        let challenge = response.header("www-authenticate").expect("a challenge");
        assert!(challenge.contains("scope=\"orders.read\""), "{challenge}");
        let seen = gateway.send(scoped.get("/")).await.seen();
        assert_eq!(values(&seen, "x-relatch-scopes"), ["orders.read"]);
    })
    .await;
    mesh.through_each_at("-partners", async |gateway| {
        assert_eq!(gateway.send(plain.get("/")).await.status, 401);
        let seen = gateway.send(partner.get("/")).await.seen();
        partner.assert_identified(&seen);
    })
    .await;
}

#[tokio::test]
async fn a_keyring_that_is_not_there_is_503_with_a_time_to_retry() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each_at("-missing", async |gateway| {
        let response = gateway.send(key.get("/")).await;
        assert_eq!(response.status, 503);
        assert_eq!(reason_of(&response), "keyring_unavailable");
        assert_eq!(response.header("retry-after"), Some("5"));
    })
    .await;
}

#[tokio::test]
async fn too_many_wrong_keys_are_429_for_their_client_alone() {
    let mesh = Mesh::start_with("failed_credentials: { per_second: 1, burst: 1 }\n").await;
    let key = mesh.key(&[]).await;
    mesh.through_each(async |gateway| {
        let (one, other) = (own_address().into(), own_address().into());
        let wrong = Request::get("/").header("x-api-key", "wrong");
        let mut last = wrong.send_from(one, gateway.addr()).await;
        for _ in 0..50 {
            if last.status == 429 {
                break;
            }
            last = wrong.send_from(one, gateway.addr()).await;
        }
        assert_eq!(
            (last.status, &*reason_of(&last)),
            (429, "too_many_failures")
        );
        assert_eq!(last.header("retry-after"), Some("5"));
        let others = wrong.send_from(other, gateway.addr()).await;
        assert_eq!(reason_of(&others), "malformed_credential");
        key.get("/").send_from(one, gateway.addr()).await.seen();
    })
    .await;
}

#[tokio::test]
async fn a_call_of_grpc_is_denied() {
    let mesh = Mesh::start().await;
    mesh.through_each(async |gateway| {
        let before = mesh.upstream.requests();
        for content_type in ["application/grpc", "application/grpc-web+proto"] {
            let call = Request::post("/shop.Orders/List", b"\0\0\0\0\0");
            let response = gateway
                .send(call.header("content-type", content_type))
                .await;
            assert_eq!(response.status, 401);
        }
        assert_eq!(mesh.upstream.requests(), before, "a denied call arrived");
    })
    .await;
}

/// Caddy's sample replaces `Connection`, and must not lose a WebSocket by that.
#[tokio::test]
async fn a_websocket_is_still_asked_for() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each(async |gateway| {
        let asked = key.get("/live").header("Upgrade", "websocket");
        let asked = asked.header("Connection", "keep-alive, Upgrade");
        let seen = gateway.send(asked).await.seen();
        key.assert_identified(&seen);
        let upgrade = values(&seen, "upgrade");
        match gateway.kind() {
            GatewayKind::Traefik | GatewayKind::Caddy => assert_eq!(upgrade, ["websocket"]),
            // The sample keeps connections to the upstream open, and has no WebSockets.
            GatewayKind::Nginx => assert!(values(&seen, "connection").is_empty()),
        }
    })
    .await;
}

#[tokio::test]
async fn a_consumer_learns_of_a_rotation_where_the_proxy_can_tell() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.change(&["rotate", "start", &key.id, "--overlap", "1h"])
        .await;
    mesh.through_each(async |gateway| {
        let response = gateway.send(key.get("/")).await;
        key.assert_hidden_from(&response.seen());
        let notice = response.header("api-key-rotation");
        match gateway.kind() {
            // Traefik passes no header of an allow on to the client.
            GatewayKind::Traefik => assert_eq!(notice, None),
            GatewayKind::Caddy | GatewayKind::Nginx => {
                let notice = notice.expect("a notice");
                assert!(notice.starts_with("version=1, state=retiring"), "{notice}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn the_client_is_the_one_that_connects_to_the_proxy() {
    let mesh = Mesh::start().await;
    let (client, other) = (own_address(), own_address());
    let key = mesh.key(&["--allow-source", &client.to_string()]).await;
    mesh.through_each(async |gateway| {
        key.get("/")
            .send_from(client.into(), gateway.addr())
            .await
            .seen();
        for forged in [
            "x-forwarded-for",
            "x-real-ip",
            "x-original-address",
            "x-envoy-external-address",
            "x-client-ip",
            "cf-connecting-ip",
        ] {
            let request = key.get("/").header(forged, client.to_string());
            let denied = request.send_from(other.into(), gateway.addr()).await;
            assert_eq!(reason_of(&denied), "source_not_allowed", "{forged}");
        }
        let forwarded = key.get("/").header("forwarded", format!("for={client}"));
        let denied = forwarded.send_from(other.into(), gateway.addr()).await;
        assert_eq!(reason_of(&denied), "source_not_allowed");
    })
    .await;
}

#[tokio::test]
async fn a_trial_lets_every_request_pass_without_identity_and_with_its_key() {
    let mesh = Mesh::start_by("", |file| {
        file.replace("name: partners", "name: partners, enforce: false")
    })
    .await;
    let key = mesh.key_of("partners", &[]).await;
    let bearer = format!("Bearer {}", key.secret);
    mesh.through_each_at("-partners", async |gateway| {
        for (request, name, value) in [
            (key.get("/"), "x-api-key", &*key.secret),
            (Request::get("/"), "authorization", "Bearer wrong"),
            (Request::get("/"), "authorization", &*bearer),
        ] {
            let request = match name {
                "authorization" => request.header(name, value),
                _ => request,
            };
            let forged = request.header("x-relatch-consumer", "root");
            let seen = gateway.send(forged).await.seen();
            assert!(identities(&seen).is_empty(), "{seen:?}");
            assert_eq!(values(&seen, name), [value]);
        }
    })
    .await;
    let page = mesh.sidecar.get("/metrics").await.text();
    let line = r#"relatch_checks_total{keyring="partners",decision="would_deny",reason="malformed_credential",key_state=""} 3"#;
    assert!(page.lines().any(|it| it == line), "no {line} in {page}");
}
