//! A trial on live traffic: every decision is made and reported, and every request passes.

use serde_json::Value;

use super::{Mesh, reason_of};
use crate::support::{
    client::Request,
    envoy::{AuthzAddress, EnvoyOptions},
};

/// `payments` is in a trial, with one path that is enforced and one on which keys are removed.
const TRIAL: &str = "\
routes:
  - { path_prefix: /enforced, keyring: payments, enforce: true }
  - { path_prefix: /removed, keyring: payments, enforce: false, remove: true }
";

async fn start() -> Mesh {
    Mesh::start_by(TRIAL, |file| {
        file.replace("name: payments", "name: payments, enforce: false")
    })
    .await
}

#[tokio::test]
async fn a_trial_lets_every_request_pass_as_it_is() {
    let mesh = start().await;
    let key = mesh.key(&[]).await;
    let revoked = mesh.key(&[]).await;
    let revoke = ["revoke", &revoked.id, "--all", "--reason", "lost"];
    mesh.control.cli_json(&revoke).await;
    mesh.until_held("payments", "revoked", 1).await;
    let api_key = |value: &str| ("x-api-key", value.to_owned());
    let bearer = ("authorization", "Bearer other".to_owned());
    let cases = [
        (vec![api_key(&key.secret)], "allow", "ok"),
        (vec![], "would_deny", "missing_credential"),
        (vec![api_key(&revoked.secret)], "would_deny", "revoked"),
        (vec![api_key("wrong")], "would_deny", "malformed_credential"),
        (
            vec![api_key(&key.secret), bearer],
            "would_deny",
            "ambiguous_credential",
        ),
        (
            vec![("cookie", format!("a=\u{80}; api_key={}", key.secret))],
            "would_deny",
            "malformed_request",
        ),
    ];
    mesh.through_each_envoy(async |gate| {
        for (headers, _, reason) in &cases {
            let request = headers
                .iter()
                .fold(Request::get("/a?b=1&b=2"), |request, (name, value)| {
                    request.header(name, latin_1(value))
                });
            let forged = request
                .header("X-Relatch-Consumer", "root")
                .header("x.relatch.key.id", "root");
            let seen = gate.send(forged).await.seen();
            assert_eq!(seen.target, "/a?b=1&b=2");
            let names = seen.headers.iter().map(|(name, _)| name.as_str());
            let forged: Vec<_> = names.filter(|name| name.contains("relatch")).collect();
            assert!(forged.is_empty(), "{forged:?}");
            for (name, value) in headers {
                assert_eq!(seen.values(name), [value], "{reason}");
            }
        }
        let log = gate.envoy.access_log(cases.len()).await;
        for (line, (_, decision, reason)) in log.iter().zip(&cases) {
            assert_eq!(line["status"], 200);
            assert_eq!(line["decision"], *decision, "{reason}");
            assert_eq!(line["reason"], *reason);
        }
    })
    .await;
    let page = mesh.sidecar.get("/metrics").await.text();
    for line in [
        r#"relatch_checks_total{keyring="payments",decision="allow",reason="ok",key_state="active"} 4"#,
        r#"relatch_checks_total{keyring="payments",decision="would_deny",reason="missing_credential",key_state=""} 4"#,
        r#"relatch_checks_total{keyring="payments",decision="would_deny",reason="revoked",key_state="revoked"} 4"#,
        r#"relatch_keyring_enforced{keyring="payments"} 0"#,
        r#"relatch_keyring_enforced{keyring="partners"} 1"#,
    ] {
        assert!(page.lines().any(|it| it == line), "no {line} in {page}");
    }
}

#[tokio::test]
async fn a_trial_ends_at_what_is_enforced() {
    let mesh = start().await;
    let key = mesh.key(&[]).await;
    let setup = |options: EnvoyOptions| {
        options
            .route(
                "/route",
                &[
                    ("relatch.enforce", "false"),
                    ("relatch.keyring", "partners"),
                ],
            )
            .route("/forced", &[("relatch.enforce", "true")])
            .route(
                "/unnamed",
                &[
                    ("relatch.enforce", "false"),
                    ("relatch.keyring", "elsewhere"),
                ],
            )
    };
    mesh.through_each_version(setup, async |gate| {
        // The key is removed where the trial says so, and an odd header name is never passed on.
        let removed = gate.send(key.get("/removed")).await.seen();
        key.assert_hidden_from(&removed);
        assert!(removed.values("x-relatch-key-id").is_empty());
        gate.send(Request::get("/removed")).await.seen();
        let seen = gate.send(key.get("/route")).await.seen();
        assert_eq!(seen.values("x-api-key"), [&key.secret]);
        for (target, reason) in [
            ("/enforced", "missing_credential"),
            ("/forced", "missing_credential"),
            ("/partners", "missing_credential"),
            ("/elsewhere", "unknown_keyring"),
            ("/unnamed", "malformed_request"),
        ] {
            let response = gate.send(Request::get(target)).await;
            assert_eq!(reason_of(&response), reason, "{target}");
        }
        let kept = gate.send(key.get("/enforced")).await.seen();
        assert_eq!(kept.values("x-relatch-key-id"), [&key.id]);
        key.assert_hidden_from(&kept);
    })
    .await;
}

#[tokio::test]
async fn a_trial_is_announced_and_shown() {
    let mut mesh = start().await;
    let status: Value = mesh.sidecar.get("/status").await.json();
    let keyrings = status["keyrings"].as_array().expect("keyrings");
    let enforced = keyrings
        .iter()
        .map(|keyring| (keyring["name"].as_str(), keyring["enforced"].as_bool()));
    let expected = [
        (Some("partners"), Some(true)),
        (Some("payments"), Some(false)),
    ];
    let mut enforced: Vec<_> = enforced.collect();
    enforced.sort_unstable();
    assert_eq!(enforced, expected);
    let check = ["check", "--no-key", "--endpoint"];
    let AuthzAddress::Tcp(endpoint) = mesh.sidecar.ext_authz() else {
        panic!("not on TCP");
    };
    let endpoint = endpoint.to_string();
    let decision = mesh
        .control
        .cli_json(&[&check[..], &[&endpoint]].concat())
        .await;
    assert_eq!(decision["decision"], "would_deny");
    assert_eq!(decision["reason"], "missing_credential");
    mesh.sidecar.stop().await;
    let log = mesh.sidecar.process.lines();
    let warned = log.iter().filter(|line| line.contains("is not enforced"));
    let warned: Vec<_> = warned.collect();
    assert_eq!(warned.len(), 1, "{log:?}");
    assert!(
        warned[0].contains(r#""auth.keyring":"payments""#),
        "{log:?}"
    );
}

/// The bytes of a text in Latin-1.
fn latin_1(text: &str) -> Vec<u8> {
    let bytes = text.chars().map(|c| u8::try_from(c).expect("Latin-1"));
    bytes.collect()
}
