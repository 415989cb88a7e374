use std::sync::{Arc, Mutex};

use http::{HeaderName, HeaderValue, StatusCode, header};
use proptest::{collection::vec, prelude::*, sample::select};
use prost::Message as _;

use super::*;
use crate::{
    authz::{
        CheckEvent, CredentialSource, DenyReason, Dialect, Enforcement, Observer, Outcome,
        Settings, SettingsParts,
        testing::{behind_proxies, keyrings, parts},
    },
    clock::Clock,
    key::{KeyId, KeyRecord, KeyState, Secret, Timestamp, testing},
    proto::auth::{
        CheckResponse, DeniedHttpResponse, OkHttpResponse, Status, check_response::HttpResponse,
    },
};

const OVER_HTTP: [Dialect; 3] = [Dialect::Traefik, Dialect::Caddy, Dialect::Nginx];

/// An observer that stores the outcome and the dialect of each check.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<(Outcome, Dialect, Option<String>)>>);

impl Observer for Recorder {
    fn observe(&self, event: &CheckEvent<'_>) {
        let client = event.client.and_then(|client| client.address());
        let client = client.map(|address| address.to_string());
        let told = (event.decision.outcome(), event.dialect, client);
        self.0.lock().expect("no test panics here").push(told);
    }
}

/// A profile of the keyring `payments`, and a key of it.
struct World {
    checks: ForwardAuth,
    recorder: Arc<Recorder>,
    secret: Secret,
}

impl World {
    fn new(dialect: Dialect) -> Self {
        Self::with(dialect, parts(), "", |_| {})
    }

    fn with(
        dialect: Dialect,
        parts: SettingsParts,
        scopes: &str,
        change: impl FnOnce(&mut KeyRecord),
    ) -> Self {
        let secret = testing::secret(KeyId::generate().expect("the random source works"));
        let mut record = testing::record_of(&secret);
        change(&mut record);
        let keyrings = keyrings(vec![record], true);
        let recorder = Arc::new(Recorder::default());
        let (clock, _) = Clock::manual(Timestamp::from_millis(5_000));
        let settings = Settings::new(SettingsParts {
            dialect,
            credentials: CredentialSource::defaults(),
            ..parts
        });
        let settings = Arc::new(settings.expect("valid settings"));
        let authorizer = Authorizer::new(settings, &keyrings, clock, recorder.clone());
        let scopes = scopes.split(' ').filter(|scope| !scope.is_empty());
        let scopes: Scopes = scopes
            .map(|scope| scope.parse().expect("a scope"))
            .collect();
        Self {
            checks: ForwardAuth::new(authorizer, testing::keyring_name(), &scopes),
            recorder,
            secret,
        }
    }

    fn check(&self, headers: &HeaderMap) -> Response<String> {
        let asked = self.checks.ask(headers);
        assert!(asked.later.is_none(), "the keyring is held in full");
        self.checks.respond(&asked.settings, headers, &asked.answer)
    }

    fn settings(&self) -> AllSettings {
        self.checks.authorizer.settings()
    }

    fn key(&self) -> &str {
        self.secret.expose()
    }

    /// Returns the outcome of the last check.
    fn outcome(&self) -> Outcome {
        let told = self.recorder.0.lock().expect("no test panics here");
        told.last().expect("a check was reported").0
    }

    fn assert_malformed(&self, headers: &HeaderMap) {
        let response = self.check(headers);
        let malformed = Outcome::Denied(DenyReason::MalformedRequest);
        assert_eq!(self.outcome(), malformed, "{headers:?}");
        assert!(!response.status().is_success(), "{response:?}");
    }
}

/// The headers in which a proxy describes a request of 192.0.2.1.
fn original(dialect: Dialect) -> HeaderMap {
    let family = match dialect {
        Dialect::Traefik | Dialect::Caddy => [
            ("x-forwarded-method", "POST"),
            ("x-forwarded-uri", "/orders?b=1"),
            ("x-forwarded-host", "api.example.com"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-for", "192.0.2.1"),
        ],
        Dialect::Nginx | Dialect::Envoy => [
            ("x-original-method", "POST"),
            ("x-original-uri", "/orders?b=1"),
            ("host", "api.example.com"),
            ("accept", "*/*"),
            ("x-original-address", "192.0.2.1"),
        ],
    };
    let mut headers = HeaderMap::new();
    for (name, value) in family {
        add(&mut headers, name, value);
    }
    headers
}

fn add(headers: &mut HeaderMap, name: &str, value: &str) {
    let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
    headers.append(name, HeaderValue::from_str(value).expect("a value"));
}

fn with(dialect: Dialect, more: &[(&str, &str)]) -> HeaderMap {
    let mut headers = original(dialect);
    for (name, value) in more {
        add(&mut headers, name, value);
    }
    headers
}

fn text<'r>(response: &'r Response<String>, name: &str) -> Option<&'r str> {
    let value = response.headers().get(name)?;
    Some(value.to_str().expect("a text"))
}

#[test]
fn a_good_key_passes_in_every_dialect_with_its_identity() {
    for dialect in OVER_HTTP {
        let world = World::new(dialect);
        let response = world.check(&with(dialect, &[("x-api-key", world.key())]));
        assert_eq!(response.status(), StatusCode::OK, "{dialect}");
        assert_eq!(text(&response, "x-relatch-consumer"), Some("checkout"));
        assert_eq!(text(&response, "x-relatch-key-version"), Some("1"));
        assert_eq!(text(&response, "x-api-key"), None);
        assert_eq!(response.body(), "");
        let told = world
            .recorder
            .0
            .lock()
            .expect("no test panics here")
            .clone();
        let client = Some("192.0.2.1".to_owned());
        assert_eq!(told, [(Outcome::Allowed, dialect, client)]);
    }
}

#[test]
fn each_header_of_the_original_request_occurs_exactly_once() {
    for dialect in OVER_HTTP {
        let world = World::new(dialect);
        let good = with(dialect, &[("x-api-key", world.key())]);
        let names: Vec<_> = original(dialect)
            .keys()
            .filter(|name| **name != header::ACCEPT)
            .cloned()
            .collect();
        assert!(names.len() >= 4);
        for name in names {
            let mut missing = good.clone();
            missing.remove(&name);
            world.assert_malformed(&missing);
            let mut twice = good.clone();
            let value = twice[&name].clone();
            twice.append(&name, value);
            world.assert_malformed(&twice);
            let mut empty = good.clone();
            empty.insert(&name, HeaderValue::from_static(""));
            world.assert_malformed(&empty);
        }
    }
}

#[test]
fn impossible_methods_and_paths_are_malformed() {
    for (name, value) in [
        ("x-forwarded-method", "GET, POST"),
        ("x-forwarded-method", "G ET"),
        ("x-forwarded-uri", "/a, /b"),
        ("x-forwarded-uri", "/a#b"),
    ] {
        let world = World::new(Dialect::Traefik);
        let mut headers = with(Dialect::Traefik, &[("x-api-key", world.key())]);
        let value = HeaderValue::from_static(value);
        headers.insert(HeaderName::from_static(name), value);
        world.assert_malformed(&headers);
    }
}

#[test]
fn the_headers_of_another_dialect_have_no_effect() {
    for (dialect, other) in [
        (Dialect::Traefik, Dialect::Nginx),
        (Dialect::Caddy, Dialect::Nginx),
        (Dialect::Nginx, Dialect::Traefik),
    ] {
        let world = World::new(dialect);
        let mut only_others = original(other);
        add(&mut only_others, "x-api-key", world.key());
        world.assert_malformed(&only_others);

        let mut both = with(dialect, &[("x-api-key", world.key())]);
        for (name, _) in &original(other) {
            if !both.contains_key(name) {
                both.append(name, HeaderValue::from_static("10.9.9.9"));
                both.append(name, HeaderValue::from_static("/a #"));
            }
        }
        assert_eq!(world.check(&both).status(), StatusCode::OK, "{dialect}");
        let told = world.recorder.0.lock().expect("no test panics here");
        let client = told.last().and_then(|(_, _, client)| client.clone());
        assert_eq!(client.as_deref(), Some("192.0.2.1"), "{dialect}");
    }
}

#[test]
fn nothing_in_the_request_chooses_the_keyring_or_makes_the_key_optional() {
    for dialect in OVER_HTTP {
        let world = World::with(dialect, parts(), "orders.read", |_| {});
        let tricks = [
            ("relatch.keyring", "empty"),
            ("relatch.scopes", ""),
            ("relatch.auth", "optional"),
            ("x-relatch-keyring", "empty"),
        ];
        world.check(&with(dialect, &tricks));
        let missing = Outcome::Denied(DenyReason::MissingCredential);
        assert_eq!(world.outcome(), missing, "{dialect}");
        let mut with_key = with(dialect, &tricks);
        add(&mut with_key, "x-api-key", world.key());
        let response = world.check(&with_key);
        let insufficient = Outcome::Denied(DenyReason::InsufficientScope);
        assert_eq!(world.outcome(), insufficient, "{dialect}");
        assert_eq!(response.status(), StatusCode::FORBIDDEN, "{dialect}");
    }
}

#[test]
fn a_denial_is_whole_for_traefik_and_caddy() {
    for dialect in [Dialect::Traefik, Dialect::Caddy] {
        let world = World::new(dialect);
        let response = world.check(&original(dialect));
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(
            text(&response, "content-type"),
            Some("application/problem+json")
        );
        let challenge = text(&response, "www-authenticate").expect("a challenge");
        assert!(challenge.contains("realm=\"payments\""), "{challenge}");
        assert!(
            response
                .body()
                .contains("\"reason\":\"missing_credential\"")
        );
    }
}

#[test]
fn a_denial_for_nginx_is_401_or_403_and_tells_the_rest_in_headers() {
    let world = World::new(Dialect::Nginx);
    let two = [("x-api-key", world.key()), ("x-api-key", "other")];
    for (more, passed, status, reason) in [
        (&[][..], 401, "401", "missing_credential"),
        (&two[..], 403, "400", "ambiguous_credential"),
    ] {
        let response = world.check(&with(Dialect::Nginx, more));
        assert_eq!(response.status(), passed, "{reason}");
        assert_eq!(text(&response, "x-relatch-status"), Some(status));
        assert_eq!(text(&response, "x-relatch-reason"), Some(reason));
        let problem = text(&response, "x-relatch-problem").expect("a body");
        let problem: serde_json::Value = serde_json::from_str(problem).expect("JSON");
        assert_eq!(problem["reason"], reason);
        assert_eq!(response.body(), "");
    }
}

#[test]
fn a_call_of_grpc_is_denied_with_a_status_that_is_no_allow() {
    for dialect in OVER_HTTP {
        for content_type in [
            "application/grpc",
            "application/grpc+proto",
            "application/grpc-web",
        ] {
            let world = World::new(dialect);
            let response = world.check(&with(dialect, &[("content-type", content_type)]));
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{dialect}");
            assert_eq!(text(&response, "grpc-status"), Some("16"));
            // What cannot be read is denied in the same form.
            let mut unread = with(dialect, &[("content-type", content_type)]);
            unread.remove("x-forwarded-method");
            unread.remove("x-original-method");
            let status = world.check(&unread).status();
            assert!(status.is_client_error(), "{dialect}: {status}");
        }
    }
}

#[test]
fn other_spellings_of_headers_that_must_not_pass_are_malformed() {
    for dialect in OVER_HTTP {
        let world = World::new(dialect);
        for name in [
            "x_relatch_consumer",
            "x.relatch.consumer",
            "x-relatch_key-id",
            "x_relatch_scopes",
            "x_api_key",
            "x.api-key",
        ] {
            let key = [("x-api-key", world.key()), (name, "root")];
            world.assert_malformed(&with(dialect, &key));
        }
        // The proxy replaces or removes the canonical spelling.
        let forged = [("x-api-key", world.key()), ("x-relatch-scopes", "admin")];
        let response = world.check(&with(dialect, &forged));
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(text(&response, "x-relatch-scopes"), None);
        let consumer: Vec<_> = response
            .headers()
            .get_all("x-relatch-consumer")
            .iter()
            .collect();
        assert_eq!(consumer, ["checkout"]);
    }
}

#[test]
fn a_shared_header_stays_unless_it_held_the_key() {
    for dialect in OVER_HTTP {
        let world = World::new(dialect);
        let basic = [("authorization", "Basic dTpw"), ("x-api-key", world.key())];
        let response = world.check(&with(dialect, &basic));
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(text(&response, "authorization"), Some("Basic dTpw"));

        let bearer = format!("Bearer {}", world.key());
        let response = world.check(&with(dialect, &[("authorization", &bearer)]));
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(text(&response, "authorization"), None);

        let twice = [
            ("authorization", "Basic dTpw"),
            ("authorization", "Basic x"),
        ];
        let mut twice = with(dialect, &twice);
        add(&mut twice, "x-api-key", world.key());
        world.assert_malformed(&twice);
    }
}

#[test]
fn a_denial_never_returns_a_credential() {
    for dialect in OVER_HTTP {
        let world = World::with(dialect, parts(), "orders.read", |_| {});
        let bearer = format!("Bearer {}", world.key());
        let response = world.check(&with(dialect, &[("authorization", &bearer)]));
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        assert!(!format!("{response:?}").contains(world.key()));
    }
}

#[test]
fn the_source_is_the_peer_of_the_proxy_and_proxies_before_it_are_walked() {
    for dialect in OVER_HTTP {
        let world = World::with(dialect, behind_proxies(), "", |_| {});
        let told = |forwarded_for: &str, peer: &str| {
            let mut headers = with(dialect, &[("x-api-key", world.key())]);
            let forwarded = match dialect {
                Dialect::Nginx | Dialect::Envoy => {
                    let value = HeaderValue::from_str(peer).expect("a value");
                    headers.insert("x-original-address", value);
                    forwarded_for.to_owned()
                }
                Dialect::Traefik | Dialect::Caddy => format!("{forwarded_for}, {peer}"),
            };
            let value = HeaderValue::from_str(&forwarded).expect("a value");
            headers.insert("x-forwarded-for", value);
            world.check(&headers);
            let told = world.recorder.0.lock().expect("no test panics here");
            told.last().and_then(|(_, _, client)| client.clone())
        };
        let client = told("203.0.113.9, 192.0.2.7", "10.0.0.1");
        assert_eq!(client.as_deref(), Some("192.0.2.7"), "{dialect}");
        // Nobody trusts what an untrusted peer forwards.
        let client = told("203.0.113.9", "192.0.2.7");
        assert_eq!(client.as_deref(), Some("192.0.2.7"), "{dialect}");
        let client = told("203.0.113.9", "_hidden");
        assert_eq!(client, None, "{dialect}");
    }
}

#[test]
fn the_notice_of_a_rotation_is_in_the_answer() {
    for dialect in OVER_HTTP {
        let world = World::with(dialect, parts(), "", |record| {
            record.state = KeyState::Retiring;
            record.retires_at = Some(Timestamp::from_millis(9_000));
        });
        let response = world.check(&with(dialect, &[("x-api-key", world.key())]));
        let notice = "version=1, state=retiring, sunset=@9";
        assert_eq!(text(&response, "api-key-rotation"), Some(notice));
    }
}

#[test]
fn what_is_not_clearly_an_allow_is_a_denial() {
    let status = |code| {
        Some(Status {
            code,
            ..Status::default()
        })
    };
    let ok = || Some(HttpResponse::OkResponse(OkHttpResponse::default()));
    let denied = |code| {
        let status = Some(crate::proto::auth::HttpStatus { code });
        Some(HttpResponse::DeniedResponse(DeniedHttpResponse {
            status,
            ..DeniedHttpResponse::default()
        }))
    };
    let answers = [
        (None, None),
        (status(0), None),
        (None, ok()),
        (status(16), ok()),
        (status(0), denied(401)),
        (status(16), denied(200)),
        (status(16), denied(302)),
        (status(16), denied(0)),
    ];
    let mut answers: Vec<Vec<u8>> = answers
        .into_iter()
        .map(|(status, http_response)| {
            encoded(&CheckResponse {
                status,
                http_response,
                dynamic_metadata: None,
            })
        })
        .collect();
    answers.extend([vec![0xff], vec![0x0a, 9], vec![0x0a, 0, 0x1a, 0, 0x12, 0]]);
    let allow = encoded(&CheckResponse {
        status: status(0),
        http_response: ok(),
        dynamic_metadata: None,
    });
    for dialect in OVER_HTTP {
        let world = World::new(dialect);
        let passes = world
            .checks
            .respond(&world.settings(), &HeaderMap::new(), &allow);
        assert_eq!(passes.status(), StatusCode::OK);
        for answer in &answers {
            let response = world
                .checks
                .respond(&world.settings(), &HeaderMap::new(), answer);
            let expected = match dialect {
                Dialect::Nginx | Dialect::Envoy => StatusCode::FORBIDDEN,
                Dialect::Traefik | Dialect::Caddy => StatusCode::SERVICE_UNAVAILABLE,
            };
            assert_eq!(response.status(), expected, "{dialect}: {answer:?}");
        }
    }
}

#[test]
fn a_request_that_is_too_large_is_counted() {
    let world = World::new(Dialect::Traefik);
    world.checks.refuse_too_large();
    assert_eq!(
        world.outcome(),
        Outcome::Denied(DenyReason::RequestTooLarge)
    );
    let mut large = with(Dialect::Traefik, &[("x-api-key", world.key())]);
    add(&mut large, "x-filler", &"x".repeat(200 << 10));
    let response = world.check(&large);
    assert_eq!(
        response.status(),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    );
}

/// Headers between those of a good request and noise.
fn any_headers() -> impl Strategy<Value = Vec<(&'static str, String)>> {
    let names = [
        "x-forwarded-method",
        "x-forwarded-uri",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-forwarded-for",
        "x-original-method",
        "x-original-uri",
        "x-original-address",
        "host",
        "x-api-key",
        "x_api_key",
        "authorization",
        "x-relatch-consumer",
        "x.relatch.consumer",
        "x-relatch-scopes",
        "content-type",
        "connection",
        "cookie",
    ];
    let values = prop_oneof![
        Just("KEY".to_owned()),
        Just("Bearer KEY".to_owned()),
        Just("application/grpc".to_owned()),
        "[ -~]{0,12}",
    ];
    vec((select(names.to_vec()), values), 0..6)
}

proptest! {
    #[test]
    fn a_status_of_2xx_is_an_allow_with_the_key_and_the_identity(
        dialect in select(OVER_HTTP.to_vec()),
        is_described in proptest::bool::weighted(0.8),
        more in any_headers(),
    ) {
        let world = World::new(dialect);
        let mut headers = if is_described {
            original(dialect)
        } else {
            HeaderMap::new()
        };
        for (name, value) in more {
            add(&mut headers, name, &value.replace("KEY", world.key()));
        }
        let response = world.check(&headers);
        let is_allowed = world.outcome() == Outcome::Allowed;
        prop_assert_eq!(response.status().is_success(), is_allowed);
        prop_assert_eq!(response.status() == StatusCode::OK, is_allowed);
        let places = [headers.get("x-api-key"), headers.get("authorization")];
        let mut places = places.into_iter().flatten();
        let key = world.key().as_bytes();
        if is_allowed {
            prop_assert!(places.any(|value| value.as_bytes().ends_with(key)));
            prop_assert_eq!(text(&response, "x-relatch-consumer"), Some("checkout"));
        } else {
            let shown = format!("{response:?}");
            prop_assert!(!shown.contains(world.key()));
        }
    }
}

fn encoded(response: &CheckResponse) -> Vec<u8> {
    response.encode_to_vec()
}

/// A proxy over HTTP removes the headers that it lists, unless the answer has them.
#[test]
fn a_trial_leaves_the_key_where_it_was() {
    for dialect in OVER_HTTP {
        let mut parts = parts();
        let observed = Enforcement::Observed {
            removes_credential: false,
        };
        parts.enforcements.named = vec![(testing::keyring_name(), observed)];
        let world = World::with(dialect, parts, "", |record| {
            record.state = KeyState::Revoked;
        });
        let mut headers = original(dialect);
        let key = HeaderValue::from_str(world.key()).expect("a value");
        headers.insert("x-api-key", key.clone());
        headers.insert("x-relatch-consumer", HeaderValue::from_static("root"));
        let response = world.check(&headers);
        assert_eq!(world.outcome(), Outcome::WouldDeny(DenyReason::Revoked));
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers().get("x-api-key"), Some(&key));
        assert_eq!(response.headers().get("x-relatch-consumer"), None);
    }
}
