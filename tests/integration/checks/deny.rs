//! Requests that do not pass: each reason, with all that the consumer and the access log get to see.

use std::{net::SocketAddr, time::Duration};

use relatch::{clock::Clock, key::Timestamp};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Gate, Key, Kind, Mesh, reason_of};
use crate::support::{
    client::{Request, Response},
    envoy::{Envoy, EnvoyOptions, EnvoyVersion},
    eventually::eventually,
    relatch::{Control, Sidecar, sidecar_yaml},
    upstream::Upstream,
};

/// A request and the denial that it gets.
struct Case {
    request: Request,
    status: u16,
    reason: &'static str,
    title: &'static str,
    challenge: Option<&'static str>,
    /// What the consumer should change.
    detail: Option<&'static str>,
    /// Whether the key was verified, so that the access log may name its consumer.
    verified: bool,
}

const CHALLENGE: &str = r#"Bearer realm="payments""#;
const INVALID: &str = r#"Bearer realm="payments", error="invalid_token""#;
const SCOPE: &str =
    r#"Bearer realm="payments", error="insufficient_scope", scope="orders.read orders.write""#;
const NOT_VALID: &str = "The API key is not valid";
const MALFORMED: &str = "The request cannot be understood";

#[tokio::test]
async fn every_denial_is_exact() {
    let mesh = Mesh::start().await;
    let cases = cases(&mesh).await;
    mesh.through_each_envoy(async |gate| {
        for case in &cases {
            case.assert_denied(gate).await;
        }
        assert_eq!(mesh.upstream.requests(), 0);
        let log = gate.envoy.access_log(cases.len()).await;
        for (case, line) in cases.iter().zip(log) {
            assert_eq!(line["status"], case.status, "{line}");
            assert_eq!(line["decision"], "deny", "{line}");
            assert_eq!(line["reason"], case.reason, "{line}");
            assert_eq!(line["details"], "ext_authz_denied", "{line}");
            if case.verified {
                assert_eq!(line["consumer"], "checkout", "{line}");
                assert_eq!(line["authz"]["key_version"].as_f64(), Some(1.0), "{line}");
            } else {
                assert!(line["consumer"].is_null(), "{line}");
                assert!(line["authz"]["key_id"].is_null(), "{line}");
            }
        }
    })
    .await;
}

async fn cases(mesh: &Mesh) -> Vec<Case> {
    let key = mesh.key(&[]).await;
    let other = mesh.key(&[]).await;
    let mut cases = cases_of_credentials(&key, &other);
    cases.extend(cases_of_keys(mesh).await);
    cases.extend(cases_of_routes(&key));
    cases
}

/// None, none that a key could be, or more than one.
fn cases_of_credentials(key: &Key, other: &Key) -> Vec<Case> {
    let get = || Request::get("/");
    let missing = |request| {
        denied(request, 401, "missing_credential", "An API key is required").challenged(CHALLENGE)
    };
    let malformed = |credential: &str| {
        let request = get().header("x-api-key", credential);
        denied(request, 401, "malformed_credential", NOT_VALID).challenged(INVALID)
    };
    let ambiguous = |request| {
        let title = "The request holds more than one API key";
        denied(request, 400, "ambiguous_credential", title)
    };
    let cookies = format!("api_key={}; api_key={}", key.secret, other.secret);
    let bearer = format!("Bearer {}", other.secret);
    vec![
        missing(get()),
        missing(get().header("authorization", "Basic dTpw")),
        malformed("nonsense"),
        malformed(&mistyped(&key.secret)),
        ambiguous(key.get("/").header("x-api-key", &key.secret)),
        ambiguous(key.get("/").header("authorization", bearer)),
        ambiguous(key.get(&format!("/?api_key={}", other.secret))),
        ambiguous(get().header("cookie", cookies)),
        malformed(&format!("Bearer {}", key.secret))
            .with_detail("The key begins with the scheme Bearer: send the key alone"),
        malformed(&format!("\"{}\"", key.secret))
            .with_detail("The key is in quotation marks: send the key alone"),
        denied(
            Request::get(&format!("/?api_key={}%0A", key.secret)),
            401,
            "malformed_credential",
            NOT_VALID,
        )
        .challenged(INVALID)
        .with_detail("The key has a line end: send the key alone"),
    ]
}

/// Another keyring's, ended, not yet begun, or not for this place.
async fn cases_of_keys(mesh: &Mesh) -> Vec<Case> {
    let foreign = [
        "key",
        "create",
        "--keyring",
        "partners",
        "--consumer",
        "acme",
    ];
    let foreign = mesh
        .issue(&[&foreign[..], &["--create-missing"]].concat())
        .await;
    let early = mesh.key(&["--not-before", "2099-01-01T00:00:00Z"]).await;
    let inner = ["--allow-source", "10.0.0.0/8", "--scope", "orders.read"];
    let inner = mesh.key(&inner).await;
    let revoked = mesh.key(&[]).await;
    let revoke = [
        "revoke",
        &revoked.id,
        "--all",
        "--reason",
        "leaked",
        "--wait",
    ];
    mesh.until_applied(&mesh.control.cli_json(&revoke).await)
        .await;
    let retired = mesh.key(&[]).await;
    let policy = ["policy", "set", &retired.id, "--on-deadline", "retire"];
    mesh.control.cli_json(&policy).await;
    mesh.issue(&["rotate", "start", &retired.id, "--overlap", "0s"])
        .await;
    mesh.until_held("payments", "retired", 1).await;
    let ended = |key: &Key, reason, title| {
        denied(key.get("/"), 401, reason, title)
            .challenged(INVALID)
            .verified()
    };
    let (source, title) = (
        "source_not_allowed",
        "The API key may not be used from this address",
    );
    vec![
        denied(foreign.get("/"), 401, "unknown_key", NOT_VALID).challenged(INVALID),
        ended(&early, "not_yet_valid", "The API key is not valid yet"),
        ended(&revoked, "revoked", "The API key was revoked"),
        ended(
            &retired,
            "retired",
            "The API key was replaced by a newer version",
        ),
        denied(inner.get("/orders"), 403, source, title).verified(),
    ]
}

/// What an Envoy route demands.
fn cases_of_routes(key: &Key) -> [Case; 3] {
    let scopes = "The API key does not hold the scopes that this route needs";
    let keyring = "No keyring serves this route";
    [
        denied(key.get("/orders"), 403, "insufficient_scope", scopes)
            .challenged(SCOPE)
            .verified(),
        denied(key.get("/elsewhere"), 503, "unknown_keyring", keyring),
        denied(key.get("/odd"), 400, "malformed_request", MALFORMED),
    ]
}

#[tokio::test]
async fn a_key_is_accepted_exactly_within_its_window() {
    let mesh = Mesh::start().await;
    let gate = mesh.newest().await;
    let clock = Clock::system();
    // Long enough that requests fall into each part, also on a busy machine.
    let begins = Timestamp::from_millis(clock.wall().as_millis() + 6_000);
    let not_before = begins.to_string();
    let window = ["--not-before", &not_before, "--expires-in", "12s"];
    let key = mesh.key(&window).await;
    let expires = key.expires_at.expect("the key expires");
    let mut outcomes = Vec::new();
    eventually("the key expires", async || {
        let before = clock.wall();
        let response = gate.send(key.get("/")).await;
        let after = clock.wall();
        let outcome = match response.status {
            200 => "ok".to_owned(),
            _ => reason_of(&response),
        };
        match outcome.as_str() {
            "not_yet_valid" => assert!(before < begins, "refused after its beginning"),
            "ok" => assert!(
                begins <= after && before < expires,
                "allowed outside its window"
            ),
            "expired" => assert!(expires <= after, "refused before its end"),
            other => panic!("an unexpected {other}"),
        }
        let is_over = outcome == "expired";
        outcomes.push(outcome);
        outcomes.dedup();
        is_over.then_some(())
    })
    .await;
    assert_eq!(outcomes, ["not_yet_valid", "ok", "expired"]);
    denied(key.get("/"), 401, "expired", "The API key has expired")
        .challenged(INVALID)
        .assert_denied(&gate)
        .await;
}

#[tokio::test]
async fn a_source_that_fails_too_often_is_told_so_and_its_good_keys_pass() {
    let mesh = Mesh::start_with("failed_credentials: { per_second: 1, burst: 1 }\n").await;
    let key = mesh.key(&[]).await;
    let gate = mesh.newest().await;
    let wrong = || Request::get("/").header("x-api-key", mistyped(&key.secret));
    let title = "Too many API keys from this address were not valid";
    let too_many = denied(wrong(), 429, "too_many_failures", title);
    // One passes in a second: of many that come at once most are one too many.
    let mut responses = Vec::new();
    for _ in 0..5 {
        responses.push(gate.send(wrong()).await);
    }
    let told = responses
        .iter()
        .filter(|response| response.status == 429)
        .inspect(|response| too_many.assert_is(response))
        .count();
    assert!(told > 0, "none of them was one too many");
    gate.send(key.get("/")).await.seen();
}

#[tokio::test]
async fn without_a_control_plane_there_is_no_keyring_and_no_way_in() {
    // Nobody listens on port 1.
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let sidecar = Sidecar::start(&sidecar_yaml("edge-1", nobody, &["payments"])).await;
    let upstream = Upstream::start().await;
    for version in EnvoyVersion::ALL {
        let options = EnvoyOptions::new(sidecar.ext_authz(), upstream.addr());
        // Told to let requests pass when nobody answers: a denial is an answer.
        let envoy = Envoy::start(options.version(version).failure_mode_allow()).await;
        let kind = Kind {
            version,
            raw_headers: false,
        };
        let title = "The keys of this API are not available yet";
        let request = Request::get("/").header("x-api-key", "rlk_7Qm2Xc91TbKe_0");
        denied(request, 503, "keyring_unavailable", title)
            .assert_denied(&Gate { kind, envoy })
            .await;
    }
    assert_eq!(upstream.requests(), 0);
    let readyz = sidecar.get("/readyz").await;
    assert_eq!(readyz.status, 503);
    assert_eq!(
        readyz.text(),
        "not ready: keyring payments is not loaded, or is stale\n"
    );
    assert_eq!(sidecar.get("/livez").await.status, 200);
}

#[tokio::test]
async fn a_keyring_that_nobody_confirms_is_denied_until_somebody_does() {
    // The control plane confirms every five seconds, and a busy machine makes it late.
    let mesh = Mesh::start_with("staleness: { warn_after: 10s, deny_after: 15s }\n").await;
    let key = mesh.key(&[]).await;
    let gate = mesh.newest().await;
    gate.send(key.get("/")).await.seen();
    mesh.control.process.signal(Signal::STOP);
    let stale = denied(
        key.get("/"),
        503,
        "keyring_stale",
        "The keys of this API are out of date",
    );
    eventually("the keyring is stale", async || {
        let response = gate.send(key.get("/")).await;
        if response.status == 200 {
            return None;
        }
        stale.assert_is(&response);
        Some(())
    })
    .await;
    let age = metric(
        &mesh.sidecar,
        "relatch_keyring_age_seconds{keyring=\"payments\"} ",
    )
    .await;
    assert!(age >= 15.0, "{age}");
    eventually("the sidecar is not ready", async || {
        (mesh.sidecar.get("/readyz").await.status == 503).then_some(())
    })
    .await;
    let status: Value = mesh.sidecar.get("/status").await.json();
    assert_eq!(status["status"], "not ready");
    assert_eq!(status["keyrings"][0]["condition"], "stale");
    mesh.control.process.signal(Signal::CONT);
    eventually("the key is accepted again", async || {
        (gate.send(key.get("/")).await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_is_never_opened_without_a_key() {
    let mesh = Mesh::start_with("routes: [{ host: \"*.example.com\", auth: optional }]\n").await;
    let key = mesh.key(&[]).await;
    mesh.through_each_version(EnvoyOptions::tunnels, async |gate| {
        let connect = || Request::connect("www.example.com:443");
        assert_eq!(reason_of(&gate.send(connect()).await), "missing_credential");
        let public = Request::get("/").header("host", "www.example.com");
        gate.send(public).await.seen();
        let keyed = connect().header("x-api-key", &key.secret);
        assert_eq!(gate.send(keyed).await.status, 200);
    })
    .await;
}

#[tokio::test]
async fn a_check_is_denied_before_envoy_stops_waiting_for_it() {
    let data = tempfile::tempdir().expect("a directory can be made");
    let control = Control::start(data.path()).await;
    control.cli_json(&["keyring", "create", "payments"]).await;
    let create = [
        "key",
        "create",
        "--keyring",
        "payments",
        "--consumer",
        "acme",
    ];
    let yaml = sidecar_yaml("edge-1", control.discovery(), &["payments"]).replace(
        "{ name: payments }",
        "{ name: payments, mode: on_demand, cache: { lookup_timeout: 10s } }",
    );
    let sidecar = Sidecar::start(&yaml).await.until_ready().await;
    let created = control
        .cli_json(&[&create[..], &["--create-missing"]].concat())
        .await;
    let key = created["secret"].as_str().expect("a new key has a secret");
    control.process.signal(Signal::STOP);
    let upstream = Upstream::start().await;
    let timeout = Duration::from_secs(2);
    let options = EnvoyOptions::new(sidecar.ext_authz(), upstream.addr());
    let envoy = Envoy::start(options.timeout(timeout).failure_mode_allow()).await;
    let request = Request::get("/").header("x-api-key", key);
    let response = request.send(envoy.addr()).await;
    assert_eq!(reason_of(&response), "keyring_unavailable");
    assert_eq!(upstream.requests(), 0);
    control.process.signal(Signal::CONT);
}

async fn metric(sidecar: &Sidecar, series: &str) -> f64 {
    let page = sidecar.get("/metrics").await.text();
    let value = page.lines().find_map(|line| line.strip_prefix(series));
    let value = value.unwrap_or_else(|| panic!("no {series} in {page}"));
    value.parse().expect("a value is a number")
}

const fn denied(request: Request, status: u16, reason: &'static str, title: &'static str) -> Case {
    Case {
        request,
        status,
        reason,
        title,
        challenge: None,
        detail: None,
        verified: false,
    }
}

impl Case {
    fn challenged(mut self, challenge: &'static str) -> Self {
        self.challenge = Some(challenge);
        self
    }

    const fn with_detail(mut self, detail: &'static str) -> Self {
        self.detail = Some(detail);
        self
    }

    const fn verified(mut self) -> Self {
        self.verified = true;
        self
    }

    async fn assert_denied(&self, gate: &Gate) {
        self.assert_is(&gate.send(self.request.clone()).await);
    }

    fn assert_is(&self, response: &Response) {
        let Self {
            status,
            reason,
            title,
            ..
        } = self;
        assert_eq!(response.status, *status, "{reason}: {}", response.text());
        let mut problem = json!({
            "type": format!("urn:relatch:problem:{reason}"),
            "title": title,
            "status": status,
            "reason": reason,
        });
        if let Some(detail) = self.detail {
            problem["detail"] = detail.into();
        }
        assert_eq!(response.json::<Value>(), problem);
        let retry_after = matches!(status, 429 | 503).then_some("5");
        for (name, value) in [
            ("content-type", Some("application/problem+json")),
            ("cache-control", Some("no-store")),
            ("www-authenticate", self.challenge),
            ("retry-after", retry_after),
        ] {
            assert_eq!(response.header(name), value, "{name} of {reason}");
        }
    }
}

/// The key with another last character, which only its checksum tells.
fn mistyped(secret: &str) -> String {
    let (rest, last) = secret.split_at(secret.len() - 1);
    let other = if last == "0" { "1" } else { "0" };
    format!("{rest}{other}")
}
