//! A real OpenBao in its development mode: unsealed, in memory, with a KV version 2 mount at `secret`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    client::{Connection, Request, Response},
    eventually::eventually,
    process::Process,
    reserved::Reserved,
};

/// A running OpenBao. Dropping it kills the process and removes its files.
#[derive(Debug)]
pub(crate) struct OpenBao {
    reserved: Reserved,
    files: TempDir,
    _process: Process,
}

/// What OpenBao is told to use as the token that may do everything.
const ROOT: &str = "root-of-the-tests";

impl OpenBao {
    /// Starts OpenBao and waits until it serves.
    ///
    /// # Panics
    ///
    /// When `scripts/test.sh` has not fetched OpenBao, or it does not come up.
    pub(crate) async fn start() -> Self {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/openbao/bin/bao");
        assert!(
            program.exists(),
            "{} is missing: run scripts/test.sh once, it fetches the OpenBao that the tests run",
            program.display()
        );
        let files = tempfile::tempdir().expect("a directory can be made");
        // OpenBao does not tell which port the system chose, so that one is chosen for it.
        let reserved = Reserved::new();
        let addr = reserved.address();
        let mut process = Process::start(
            Command::new(&program)
                .args(["server", "-dev", "-dev-no-store-token"])
                .arg(format!("-dev-root-token-id={ROOT}"))
                .arg(format!("-dev-listen-address={addr}"))
                .env("HOME", files.path()),
        );
        eventually("OpenBao serves", async || {
            let ended = process.ended();
            assert!(ended.is_none(), "OpenBao does not start: {ended:?}");
            let ready = ask(addr, Request::get("/v1/secret/config")).await?;
            (ready.status == 200).then_some(())
        })
        .await;
        Self {
            reserved,
            files,
            _process: process,
        }
    }

    pub(crate) fn address(&self) -> String {
        format!("http://{}", self.reserved.address())
    }

    /// A file that holds `token`.
    pub(crate) fn token_file(&self, token: &str) -> PathBuf {
        let file = tempfile::NamedTempFile::new_in(self.files.path());
        let (_, path) = file
            .and_then(|file| Ok(file.keep()?))
            .expect("the test's directory can be written to");
        std::fs::write(&path, token).expect("the file is the test's");
        path
    }

    /// A file that holds the token that may do everything.
    pub(crate) fn root_token_file(&self) -> PathBuf {
        self.token_file(ROOT)
    }

    /// Reads `path` of the HTTP API; null where there is nothing.
    pub(crate) async fn read(&self, path: &str) -> Value {
        let answer = ask(
            self.reserved.address(),
            Request::get(&format!("/v1/{path}")),
        )
        .await;
        match answer.expect("OpenBao answers") {
            answer if answer.status == 404 => Value::Null,
            answer => answer.json(),
        }
    }

    /// Writes `body` to `path` of the HTTP API.
    pub(crate) async fn write(&self, path: &str, body: &Value) -> Value {
        let request = Request::post(&format!("/v1/{path}"), body.to_string().as_bytes());
        let answer = ask(self.reserved.address(), request)
            .await
            .expect("OpenBao answers");
        assert!(
            matches!(answer.status, 200 | 204),
            "{path}: {}",
            answer.text()
        );
        serde_json::from_slice(&answer.body).unwrap_or_default()
    }

    /// A file with a new token that may do on `path` what `capabilities` say, and nothing else.
    pub(crate) async fn limited_token_file(&self, path: &str, capabilities: &[&str]) -> PathBuf {
        let rules = json!({ "path": { path: { "capabilities": capabilities } } });
        let policy = json!({ "policy": rules.to_string() });
        self.write("sys/policies/acl/limited", &policy).await;
        let token = json!({ "policies": ["limited"], "no_default_policy": true });
        let made = self.write("auth/token/create", &token).await;
        let token = made["auth"]["client_token"].as_str().expect("a token");
        self.token_file(token)
    }
}

/// Asks as root; none when there is no answer.
async fn ask(addr: SocketAddr, request: Request) -> Option<Response> {
    let request = request.header("x-vault-token", ROOT);
    let mut connection = Connection::open(addr).await.ok()?;
    connection.send(&request).await.ok()
}
