//! Tests against a server with scripted answers; the integration tests use a real one.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes as Body,
    extract::State,
    http::{Method as HttpMethod, Uri},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::{
    control::sink::testing::{Owner, Version},
    reserved::Reserved,
};

const TOKEN_TEXT: &str = "hvs.CAESIJ-canary-token-0123456789";

/// A server that gives its answers in order, repeats the last one, and records its requests.
struct Scripted {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    directory: TempDir,
}

#[derive(Clone, Debug)]
struct Asked {
    method: HttpMethod,
    uri: Uri,
    headers: HeaderMap,
    body: Value,
}

#[derive(Clone)]
struct Script {
    answers: Arc<[(u16, String)]>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Scripted {
    async fn start(answers: &[(u16, String)]) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let script = Script {
            answers: answers.to_vec().into(),
            asked: Arc::clone(&asked),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let app = Router::new().fallback(answer).with_state(script);
        tokio::spawn(async move { axum::serve(listener, app).await });
        let directory = tempfile::tempdir().expect("a temporary directory");
        let server = Self {
            address,
            asked,
            directory,
        };
        fs::write(server.token_file(), format!("{TOKEN_TEXT}\n")).expect("it is written");
        server
    }

    fn token_file(&self) -> PathBuf {
        self.directory.path().join("vault.token")
    }

    fn sink(&self) -> VaultSink {
        VaultSink::new(&VaultSettings {
            address: format!("http://{}", self.address).parse().expect("one"),
            mount: "kv/team".parse().expect("a mount"),
            path: "apps/{consumer}/{key_id}".parse().expect("a path"),
            token_file: self.token_file(),
            namespace: Some("team-a/b".parse().expect("a namespace")),
            ca_file: None,
        })
        .expect("it needs no certificates")
    }

    async fn deliver(&self, version: &Version<'_>) -> Result<(), VaultError> {
        let delivered = self.sink().deliver(&version.delivery()).await;
        if let Err(error) = &delivered {
            let text = format!("{error} {error:?} {:?}", version.delivery());
            version.assert_absent(&text);
            assert!(!text.contains("canary-token"), "the token is in: {text}");
        }
        delivered
    }

    async fn refusal(&self, version: &Version<'_>) -> String {
        let error = self.deliver(version).await.expect_err("it is refused");
        error.to_string()
    }

    fn asked(&self) -> Vec<Asked> {
        let asked = self.asked.lock();
        asked.expect("no holder of the list panics").clone()
    }
}

async fn answer(
    State(script): State<Script>,
    method: HttpMethod,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> (StatusCode, [(&'static str, &'static str); 1], String) {
    let mut asked = script.asked.lock().expect("no holder of the list panics");
    let at = asked.len().min(script.answers.len() - 1);
    asked.push(Asked {
        method,
        uri,
        headers,
        body: serde_json::from_slice(&body).unwrap_or_default(),
    });
    let (status, body) = script.answers[at].clone();
    let status = StatusCode::from_u16(status).expect("a status");
    (status, [("location", "http://127.0.0.1:1/elsewhere")], body)
}

fn nothing() -> (u16, String) {
    (404, json!({ "errors": [] }).to_string())
}

fn holds(revision: u64, data: &Value) -> (u16, String) {
    let data = json!({ "data": data, "metadata": { "version": revision } });
    (200, json!({ "data": data }).to_string())
}

fn written(revision: u64) -> (u16, String) {
    (200, json!({ "data": { "version": revision } }).to_string())
}

fn refuses(status: u16, error: &str) -> (u16, String) {
    (status, json!({ "errors": [error] }).to_string())
}

fn of(version: &Version<'_>) -> Value {
    let delivery = version.delivery();
    json!({
        "key": version.secret.expose(),
        "key_id": delivery.version.key_id.as_str(),
        "version": delivery.version.version.get(),
        "consumer": "team/checkout",
    })
}

#[tokio::test]
async fn requests_are_as_documented() {
    let owner = Owner::new();
    let [one, two] = [1, 2].map(|number| owner.version(number));
    let server = Scripted::start(&[holds(7, &of(&one)), written(8)]).await;
    server.deliver(&two).await.expect("it is delivered");
    let asked = server.asked();
    let [read, write] = asked.as_slice() else {
        panic!("two requests, not {asked:?}");
    };
    let path = format!("/v1/kv/team/data/apps/team~checkout/{}", owner.key_id);
    for request in [read, write] {
        assert_eq!(request.uri.path(), path);
        assert_eq!(request.headers["x-vault-token"], TOKEN_TEXT);
        assert_eq!(request.headers["x-vault-namespace"], "team-a/b");
        assert_eq!(request.headers["x-vault-request"], "true");
    }
    assert_eq!(
        (&read.method, &write.method),
        (&HttpMethod::GET, &HttpMethod::POST)
    );
    let mut data = of(&two);
    data["previous"] = one.secret.expose().into();
    assert_eq!(write.body, json!({ "data": data, "options": { "cas": 7 } }));
}

#[tokio::test]
async fn a_version_that_is_there_is_not_written_again() {
    let owner = Owner::new();
    let version = owner.version(2);
    let server = Scripted::start(&[holds(7, &of(&version))]).await;
    server.deliver(&version).await.expect("it is there");
    assert_eq!(server.asked().len(), 1);

    // The same number with another secret, as after a restore, is another version.
    let mut other = of(&owner.version(2));
    other["previous"] = "older".into();
    let key = other["key"].clone();
    let server = Scripted::start(&[holds(7, &other), written(8)]).await;
    server.deliver(&version).await.expect("it is delivered");
    assert_eq!(server.asked()[1].body["data"]["previous"], key);

    // The same secret under another number keeps the previous secret.
    let mut other = of(&version);
    other["version"] = 1.into();
    other["previous"] = "older".into();
    let server = Scripted::start(&[holds(7, &other), written(8)]).await;
    server.deliver(&version).await.expect("it is delivered");
    assert_eq!(server.asked()[1].body["data"]["previous"], "older");
}

#[tokio::test]
async fn who_loses_a_race_looks_again() {
    let owner = Owner::new();
    let version = owner.version(1);
    let conflict = refuses(
        400,
        "check-and-set parameter did not match the current version",
    );
    // The winner delivered the same.
    let script = [nothing(), conflict.clone(), holds(1, &of(&version))];
    let server = Scripted::start(&script).await;
    server.deliver(&version).await.expect("the winner did");
    assert_eq!(server.asked().len(), 3);

    // The winner wrote something else.
    let other = json!({ "key": "by hand" });
    let script = [nothing(), conflict.clone(), holds(1, &other), written(2)];
    let server = Scripted::start(&script).await;
    server.deliver(&version).await.expect("it is delivered");
    let body = &server.asked()[3].body;
    assert_eq!(
        (&body["options"]["cas"], &body["data"]["previous"]),
        (&1.into(), &"by hand".into())
    );

    // Another writer wins each time.
    let script = [
        nothing(),
        conflict.clone(),
        holds(1, &other),
        conflict.clone(),
        holds(2, &other),
        conflict.clone(),
    ];
    let server = Scripted::start(&script).await;
    let refusal = server.refusal(&version).await;
    assert!(refusal.contains("status 400"), "{refusal}");
    assert_eq!(server.asked().len(), 6);

    // No other writer interferes: the refusal has another reason, and a retry changes nothing.
    let script = [nothing(), refuses(400, "no data provided"), nothing()];
    let server = Scripted::start(&script).await;
    let refusal = server.refusal(&version).await;
    assert!(refusal.contains("\"no data provided\""), "{refusal}");
    assert_eq!(server.asked().len(), 3);
}

#[tokio::test]
async fn a_refusal_names_status_errors_and_what_to_do_and_no_secret() {
    let owner = Owner::new();
    let version = owner.version(1);
    let place = format!("kv/team/data/apps/team~checkout/{}", owner.key_id);
    for (answer, expected) in [
        (
            refuses(403, "permission denied"),
            format!(
                "cannot read {place}: status 403, \"permission denied\"; the token must be valid, and its policy must allow \
                 `read`, `create` and `update` on {place}"
            ),
        ),
        (
            refuses(503, "Vault is sealed"),
            format!(
                "cannot read {place}: status 503, \"Vault is sealed\"; unseal the server, or wait for the end of its maintenance"
            ),
        ),
        (
            (502, "<html>bad gateway</html>".to_owned()),
            format!(
                "cannot read {place}: status 502, without a reason; read the log of the server"
            ),
        ),
        (
            (307, String::new()),
            format!(
                "cannot read {place}: status 307, without a reason; set `address` to the server that answers without a redirect: \
                 redirects are not followed"
            ),
        ),
        (
            refuses(404, "no handler for route"),
            format!(
                "cannot read {place}: status 404, \"no handler for route\"; check `mount` and `namespace`"
            ),
        ),
        (
            (200, "{}".to_owned()),
            format!(
                "{place} does not answer as a KV version 2 mount does: check `address`, `mount` and the \
                 version of the mount"
            ),
        ),
    ] {
        let server = Scripted::start(&[answer]).await;
        assert_eq!(server.refusal(&version).await, expected);
    }
    // A server, or a proxy before it, that repeats the request.
    let echo = format!("bad token {TOKEN_TEXT} for {}", version.secret.expose());
    let server = Scripted::start(&[nothing(), refuses(500, &echo)]).await;
    let refusal = server.refusal(&version).await;
    assert!(
        refusal.contains("cannot write") && refusal.contains("bad token [redacted] for [redacted]"),
        "{refusal}"
    );
}

#[tokio::test]
async fn a_refusal_repeats_no_key_that_the_place_holds() {
    let owner = Owner::new();
    let [first, second, third] = [1, 2, 3].map(|number| owner.version(number));
    let mut data = of(&second);
    data["previous"] = first.secret.expose().into();
    let [older, old] = [&first, &second].map(|version| version.secret.expose());
    // The request contains the newer of the two; the server knows the other one.
    let echo = format!("{old} follows {older}");
    let server = Scripted::start(&[holds(7, &data), refuses(500, &echo)]).await;
    let refusal = server.refusal(&third).await;
    assert!(
        refusal.contains("\"[redacted] follows [redacted]\""),
        "{refusal}"
    );
}

#[tokio::test]
async fn a_write_without_a_new_version_is_none() {
    let owner = Owner::new();
    let version = owner.version(1);
    // A version 1 mount answers 204.
    for answer in [(204, String::new()), written(0)] {
        let server = Scripted::start(&[nothing(), answer]).await;
        let error = server.deliver(&version).await;
        assert!(matches!(error, Err(VaultError::NotKv2 { .. })), "{error:?}");
    }
}

#[tokio::test]
async fn the_token_is_read_at_every_delivery() {
    let owner = Owner::new();
    let version = owner.version(1);
    let server = Scripted::start(&[holds(1, &of(&version))]).await;
    let sink = server.sink();
    for token in [TOKEN_TEXT, "hvs.second"] {
        fs::write(server.token_file(), token).expect("it is written");
        sink.deliver(&version.delivery())
            .await
            .expect("it is there");
    }
    let tokens: Vec<_> = server
        .asked()
        .iter()
        .map(|asked| asked.headers["x-vault-token"].clone())
        .collect();
    assert_eq!(tokens, [TOKEN_TEXT, "hvs.second"]);
    for bad in [
        "",
        "\n",
        "hvs.canary-token one two",
        "hvs.canary-token\nmore",
    ] {
        fs::write(server.token_file(), bad).expect("it is written");
        let refusal = server.refusal(&version).await;
        assert!(
            refusal.ends_with("must be one line of printable ASCII"),
            "{refusal}"
        );
    }
    fs::remove_file(server.token_file()).expect("it is ours");
    let refusal = server.refusal(&version).await;
    assert!(refusal.contains("correct `token_file`"), "{refusal}");
}

#[tokio::test]
async fn a_server_that_is_away_is_named() {
    let owner = Owner::new();
    let version = owner.version(1);
    let mut server = Scripted::start(&[nothing()]).await;
    let nobody = Reserved::new();
    server.address = nobody.address();
    let refusal = server.refusal(&version).await;
    let expected = format!("cannot connect to {}", server.address);
    assert!(refusal.starts_with(&expected), "{refusal}");
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_refused_at_the_start() {
    let server = Scripted::start(&[nothing()]).await;
    let mut settings = server.sink().settings;
    settings.ca_file = Some(Path::new("/nonexistent/ca.pem").into());
    let error = VaultSink::new(&settings).expect_err("absent").to_string();
    assert!(
        error.starts_with("cannot read /nonexistent/ca.pem"),
        "{error}"
    );
    settings.ca_file = Some(server.token_file());
    let error = VaultSink::new(&settings).expect_err("no certificate");
    assert!(error.to_string().contains("`ca_file`"), "{error}");
    assert!(!format!("{error} {error:?}").contains("canary-token"));
}
