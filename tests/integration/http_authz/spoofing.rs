//! What a client cannot forge: an identity, the original request, another keyring, or a key that stays in the request.

use super::{Key, Mesh, identities, reason_of, values};
use crate::support::{client::Request, gateway::Gateway, upstream::Seen};

/// Names that a framework may take for an identity header: CGI and WSGI fold `-` and `_`, others `.` too.
const IDENTITIES: [&str; 14] = [
    "x-relatch-consumer",
    "X-Relatch-Consumer",
    "X-RELATCH-CONSUMER",
    "X_Relatch_Consumer",
    "x.relatch.consumer",
    "x-relatch_consumer",
    "X.RELATCH-Consumer",
    "x-relatch-key-id",
    "X_RELATCH_KEY_ID",
    "x-relatch-key-version",
    "x.relatch.key.version",
    "X-Relatch-Scopes",
    "x_relatch_scopes",
    "x.relatch-scopes",
];

/// Headers in which some proxy describes the original request, or an intermediary rewrites it.
const DESCRIPTIONS: [(&str, &str); 24] = [
    ("x-forwarded-method", "GET"),
    ("x-forwarded-uri", "/authz/traefik-partners"),
    ("x-forwarded-host", "partners.example.com"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-for", "127.0.0.1"),
    ("x-forwarded-port", "443"),
    ("x-forwarded-prefix", "/partners"),
    ("x-original-method", "OPTIONS"),
    ("x-original-uri", "/authz/nginx-partners"),
    ("x-original-url", "/partners"),
    ("x-original-address", "127.0.0.1"),
    ("x-rewrite-url", "/partners"),
    ("x-real-ip", "127.0.0.1"),
    ("x-envoy-original-path", "/partners"),
    ("x-envoy-external-address", "127.0.0.1"),
    ("x-envoy-internal", "true"),
    ("x-envoy-auth-partial-body", "false"),
    ("x-http-method-override", "GET"),
    ("x-method-override", "GET"),
    (
        "forwarded",
        "for=127.0.0.1;host=partners.example.com;proto=https",
    ),
    ("relatch.keyring", "partners"),
    ("relatch.auth", "optional"),
    ("x-relatch-keyring", "partners"),
    ("content-location", "/authz/caddy-partners"),
];

/// Headers whose removal a client may ask of a proxy.
const REMOVABLE: [&str; 9] = [
    "x-relatch-consumer",
    "x-relatch-key-id",
    "x-relatch-scopes",
    "x-api-key",
    "authorization",
    "x-forwarded-for",
    "x-forwarded-uri",
    "x-original-uri",
    "host",
];

/// Fails unless the request was denied, or arrived with the identity of `key` alone and without it.
fn assert_harmless(mesh: &Mesh, gateway: &Gateway, key: &Key, before: u64, response: &Answer) {
    if let Some(seen) = &response.seen {
        key.assert_identified(seen);
        return;
    }
    assert!(
        (400..600).contains(&response.status),
        "{} is neither the upstream's nor a denial: {}",
        gateway.kind(),
        response.status
    );
    assert_eq!(mesh.upstream.requests(), before, "a denied request arrived");
}

/// An answer, and what the upstream saw if it is the upstream's.
struct Answer {
    status: u16,
    seen: Option<Seen>,
}

/// Sends a request that is denied or arrives.
async fn send(mesh: &Mesh, gateway: &Gateway, request: Request) -> Answer {
    let before = mesh.upstream.requests();
    let response = gateway.send(request).await;
    let arrived = mesh.upstream.requests() > before;
    assert_eq!(arrived, response.status == 200, "{}", response.text());
    Answer {
        status: response.status,
        seen: arrived.then(|| response.seen()),
    }
}

#[tokio::test]
async fn a_forged_identity_never_arrives_in_any_spelling() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each(async |gateway| {
        for name in IDENTITIES {
            let before = mesh.upstream.requests();
            let alone = Request::get("/").header(name, "root");
            assert_eq!(gateway.send(alone).await.status / 100, 4, "{name}");
            assert_eq!(
                mesh.upstream.requests(),
                before,
                "{name} passed without a key"
            );
            let forged = key.get("/").header(name, "root");
            let twice = forged.clone().header(name, "admin");
            let first = Request::get("/").header(name, "root");
            let first = first.header("x-api-key", &key.secret);
            for request in [forged, twice, first] {
                let before = mesh.upstream.requests();
                let answer = send(&mesh, gateway, request).await;
                assert_harmless(&mesh, gateway, &key, before, &answer);
            }
        }
        let all = IDENTITIES.iter().filter(|name| !name.contains(['_', '.']));
        let all = all.fold(key.get("/"), |request, name| request.header(name, "root"));
        key.assert_identified(&gateway.send(all).await.seen());
    })
    .await;
}

#[tokio::test]
async fn no_header_has_an_identity_or_a_key_removed() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let other = mesh.key(&[]).await;
    mesh.through_each(async |gateway| {
        for name in REMOVABLE {
            for value in [
                name.to_owned(),
                format!("close, {name}"),
                format!("keep-alive, {}", name.to_ascii_uppercase()),
                format!("Upgrade, {name}"),
            ] {
                for request in [
                    key.get("/").header("Connection", &value),
                    key.get("/")
                        .header("Connection", "close")
                        .header("Connection", &value),
                    key.get("/")
                        .header("Connection", &value)
                        .header("Upgrade", "websocket"),
                    key.get("/")
                        .header("Connection", &value)
                        .header("Upgrade", "h2c"),
                    key.get("/").header("Proxy-Connection", &value),
                    key.get("/").header("Keep-Alive", &value),
                    key.get("/").header("TE", &value),
                    // The second key may pass for the first one, but never arrives.
                    Request::get("/")
                        .header("authorization", format!("Bearer {}", key.secret))
                        .header("x-api-key", &other.secret)
                        .header("Connection", &value),
                ] {
                    let before = mesh.upstream.requests();
                    let answer = send(&mesh, gateway, request.clone()).await;
                    let Some(seen) = &answer.seen else {
                        assert_harmless(&mesh, gateway, &key, before, &answer);
                        continue;
                    };
                    key.assert_hidden_from(seen);
                    other.assert_hidden_from(seen);
                    let found = identities(seen);
                    let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
                    let expected = [
                        "x-relatch-consumer",
                        "x-relatch-key-id",
                        "x-relatch-key-version",
                    ];
                    assert_eq!(names, expected, "{request:?}");
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_without_a_key_is_denied_whatever_it_says_of_itself() {
    let mesh = Mesh::start().await;
    mesh.through_each(async |gateway| {
        let before = mesh.upstream.requests();
        let all = DESCRIPTIONS.iter();
        let all = all.fold(Request::get("/"), |request, (name, value)| {
            request.header(name, value)
        });
        let twice = DESCRIPTIONS
            .iter()
            .fold(all.clone(), |request, (name, value)| {
                request.header(name, value)
            });
        let each = DESCRIPTIONS.iter().flat_map(|(name, value)| {
            let one = Request::get("/").header(name, value);
            let two = one.clone().header(name, value);
            let loud = Request::get("/").header(name.to_ascii_uppercase(), value);
            let folded = Request::get("/").header(name.replace('-', "_"), value);
            [one, two, loud, folded]
        });
        for request in [all, twice].into_iter().chain(each) {
            let response = gateway.send(request.clone()).await;
            assert!(
                (400..500).contains(&response.status),
                "{request:?}: {}",
                response.status
            );
        }
        assert_eq!(mesh.upstream.requests(), before, "a denied request arrived");
    })
    .await;
}

#[tokio::test]
async fn nothing_that_a_request_says_of_itself_chooses_another_keyring() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let partner = mesh.key_of("partners", &[]).await;
    mesh.through_each(async |gateway| {
        for (name, value) in DESCRIPTIONS {
            let described = |key: &Key| key.get("/?keyring=partners").header(name, value);
            let before = mesh.upstream.requests();
            let response = gateway.send(described(&partner)).await;
            assert_eq!(reason_of(&response), "unknown_key", "{name}");
            assert_eq!(mesh.upstream.requests(), before, "{name}");
            let answer = send(&mesh, gateway, described(&key)).await;
            let seen = answer.seen;
            let seen = seen.unwrap_or_else(|| panic!("{name}: {}", answer.status));
            // Whoever asks for `x-relatch-keyring` gets what the client wrote: relatch does not use the name.
            if name != "x-relatch-keyring" {
                key.assert_identified(&seen);
            }
            key.assert_hidden_from(&seen);
        }
    })
    .await;
}

#[tokio::test]
async fn other_spellings_of_the_key_header_are_no_key_and_do_not_arrive() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let other = mesh.key(&[]).await;
    mesh.through_each(async |gateway| {
        for name in ["x_api_key", "X.Api.Key", "x-api_key", "X_API-KEY"] {
            let before = mesh.upstream.requests();
            let alone = Request::get("/").header(name, &other.secret);
            assert_eq!(gateway.send(alone).await.status / 100, 4, "{name}");
            let beside = key.get("/").header(name, &other.secret);
            let answer = send(&mesh, gateway, beside).await;
            if let Some(seen) = &answer.seen {
                other.assert_hidden_from(seen);
            }
            assert_harmless(&mesh, gateway, &key, before, &answer);
        }
    })
    .await;
}

#[tokio::test]
async fn a_second_key_in_any_place_never_arrives() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let other = mesh.key(&[]).await;
    mesh.through_each(async |gateway| {
        let bearer = |key: &Key| format!("Bearer {}", key.secret);
        for request in [
            key.get("/").header("x-api-key", &other.secret),
            key.get("/").header("authorization", bearer(&other)),
            key.get("/")
                .header("Authorization", "Basic x")
                .header("authorization", bearer(&other)),
            Request::get("/")
                .header("authorization", bearer(&key))
                .header("authorization", bearer(&other)),
            Request::get("/").header(
                "authorization",
                format!("{}, {}", bearer(&key), bearer(&other)),
            ),
        ] {
            let before = mesh.upstream.requests();
            let response = gateway.send(request.clone()).await;
            assert_eq!(response.status, 400, "{request:?}");
            assert_eq!(mesh.upstream.requests(), before, "{request:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn odd_methods_and_targets_are_judged_as_every_other_one() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each(async |gateway| {
        for target in [
            "/authz/traefik",
            "/_relatch",
            "/a/../_relatch",
            "//_relatch",
            "/%5frelatch",
            "/a%00b",
            "/a?relatch.auth=optional",
            "*",
        ] {
            let before = mesh.upstream.requests();
            let response = gateway.send(Request::get(target)).await;
            assert!(
                (400..600).contains(&response.status),
                "{target}: {}",
                response.status
            );
            assert_eq!(mesh.upstream.requests(), before, "{target}");
            let answer = send(&mesh, gateway, key.get(target)).await;
            if let Some(seen) = &answer.seen {
                key.assert_identified(seen);
            }
        }
        let before = mesh.upstream.requests();
        let tunnel = Request::connect("127.0.0.1:1").send(gateway.addr()).await;
        assert!(tunnel.status >= 400, "{}", tunnel.status);
        assert_eq!(mesh.upstream.requests(), before);
        let host = key.get("/").header("host", "partners.example.com");
        let seen = gateway.send(host).await.seen();
        assert_eq!(values(&seen, "host").len(), 1);
    })
    .await;
}
