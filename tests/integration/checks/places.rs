//! Further places of a key: Basic, the protocols of a WebSocket, and places that only one route has.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{Mesh, reason_of};
use crate::support::{client::Request, envoy::EnvoyOptions};

const ROUTES: &str = "\
routes:
  - { path_prefix: /user, keyring: payments, credentials: [{ basic: username }] }
  - { path_prefix: /password, keyring: payments, credentials: [{ basic: password }] }
  - { path_prefix: /socket, keyring: payments, credentials: [{ websocket_protocol: key. }] }
  - { path_prefix: /legacy, keyring: payments, credentials: [{ header: x-legacy-key }, { query: token }] }
";

fn basic(user_name: &str, password: &str) -> String {
    format!(
        "Basic {}",
        STANDARD.encode(format!("{user_name}:{password}"))
    )
}

#[tokio::test]
async fn a_key_is_the_user_name_or_the_password_of_basic() {
    let mesh = Mesh::start_with(ROUTES).await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        for (target, value) in [
            ("/user", basic(&key.secret, "")),
            ("/user", basic(&key.secret, "x-oauth-basic")),
            ("/password", basic("anyone", &key.secret)),
        ] {
            let sent = Request::get(target).header("Authorization", &value);
            let seen = gate.send(sent).await.seen();
            assert_eq!(seen.values("x-relatch-key-id"), [&key.id], "{target}");
            assert!(seen.values("authorization").is_empty(), "{target}");
        }
        for (target, value, reason) in [
            ("/user", basic("", &key.secret), "missing_credential"),
            (
                "/user",
                format!("Bearer {}", key.secret),
                "missing_credential",
            ),
            ("/user", "Basic !".to_owned(), "malformed_credential"),
            (
                "/password",
                basic(&key.secret, "other"),
                "malformed_credential",
            ),
        ] {
            let sent = Request::get(target).header("authorization", &value);
            let response = gate.send(sent).await;
            assert_eq!(reason_of(&response), reason, "{target} {value}");
            let challenge = response.header("www-authenticate");
            assert!(challenge.is_some_and(|it| it.starts_with("Basic realm=\"payments\"")));
        }
    })
    .await;
}

#[tokio::test]
async fn a_key_is_one_of_the_protocols_of_a_websocket_and_the_others_stay() {
    let mesh = Mesh::start_with(ROUTES).await;
    let key = mesh.key(&[]).await;
    let setup = |options: EnvoyOptions| options.websockets();
    let upgrade = |protocols: &str| {
        Request::get("/socket")
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
            .header("sec-websocket-protocol", protocols)
    };
    mesh.through_each_version(setup, async |gate| {
        for (before, after, left) in [
            ("", "", None),
            ("chat, ", "", Some("chat")),
            ("", ", v2.chat", Some("v2.chat")),
            ("a,b , ", ",c", Some("a, b, c")),
        ] {
            let protocols = format!("{before}key.{}{after}", key.secret);
            let seen = gate.send(upgrade(&protocols)).await.seen();
            assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
            let kept = seen.values("sec-websocket-protocol");
            assert_eq!(kept, Vec::from_iter(left), "{before}..{after}");
            assert_eq!(seen.values("upgrade"), ["websocket"]);
            key.assert_hidden_from(&seen);
        }
        for (protocols, reason) in [
            ("chat".to_owned(), "missing_credential"),
            (key.secret.clone(), "missing_credential"),
            (
                format!("key.{0}, key.{0}", key.secret),
                "ambiguous_credential",
            ),
        ] {
            assert_eq!(reason_of(&gate.send(upgrade(&protocols)).await), reason);
        }
    })
    .await;
}

#[tokio::test]
async fn a_route_has_places_of_its_own() {
    let mesh = Mesh::start_with(ROUTES).await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        let legacy = Request::get("/legacy/a").header("x-legacy-key", &key.secret);
        let seen = gate.send(legacy).await.seen();
        assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
        key.assert_hidden_from(&seen);
        // What is a place elsewhere belongs to the upstream here.
        let query = format!("/legacy?token={}&a=1", key.secret);
        let sent = Request::get(&query).header("authorization", "Bearer jwt");
        let seen = gate.send(sent.header("x-api-key", "upstream's own")).await;
        let seen = seen.seen();
        assert_eq!(seen.target, "/legacy?a=1");
        assert_eq!(seen.values("authorization"), ["Bearer jwt"]);
        assert_eq!(seen.values("x-api-key"), ["upstream's own"]);
        assert!(seen.values("x-legacy-key").is_empty());
        key.assert_hidden_from(&seen);
        // Another spelling of the place never reaches the upstream.
        let spelled = gate.send(Request::get(&query).header("x.legacy.key", "root"));
        assert!(spelled.await.seen().values("x.legacy.key").is_empty());
        for missing in [
            key.get("/legacy"),
            Request::get("/").header("x-legacy-key", &key.secret),
        ] {
            assert_eq!(reason_of(&gate.send(missing).await), "missing_credential");
        }
    })
    .await;
}
