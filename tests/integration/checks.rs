//! The way of a request through the real Envoys and the real sidecar, with keys from the real control plane.
//!
//! `allow` and `deny`: every outcome; `credentials` and `spoofing`: what must not reach the upstream; `notices`: what a
//! consumer is told during an overlap; `client_address`: clients behind load balancers; `grpc`: denials that clients of gRPC understand; `sizes`: large bodies and headers;
//! `places`: keys in Basic, WebSocket protocols and places of one route; `browsers`: CORS; `redirects`: redirects that Envoy
//! follows, and routes without a check; `trial`: denials that are not enforced;
//! `telemetry`: what metrics, spans, access logs and logs tell; `listen`: sockets, probes and health.

mod allow;
mod browsers;
mod client_address;
mod credentials;
mod deny;
mod grpc;
mod listen;
mod notices;
mod places;
mod redirects;
mod sizes;
mod spoofing;
mod telemetry;
mod trial;

use std::{fmt, thread};

use relatch::key::Timestamp;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    client::{Request, Response},
    envoy::{Envoy, EnvoyOptions, EnvoyVersion},
    eventually::eventually,
    relatch::{Control, Sidecar, sidecar_yaml},
    upstream::{Seen, Upstream},
};

/// A control plane with the keyrings `payments` (the default) and `partners` (takes imported keys), a sidecar that holds
/// both, and an upstream. Envoys are put before them by each test.
struct Mesh {
    control: Control,
    sidecar: Sidecar,
    upstream: Upstream,
    _data: TempDir,
}

/// A key that the sidecar holds.
struct Key {
    id: String,
    secret: String,
    expires_at: Option<Timestamp>,
}

/// An Envoy that asks the sidecar of a [`Mesh`].
struct Gate {
    kind: Kind,
    envoy: Envoy,
}

/// Which Envoy, and how it tells of headers.
#[derive(Clone, Copy)]
struct Kind {
    version: EnvoyVersion,
    raw_headers: bool,
}

/// Says with which Envoy a test was failing.
struct Blame(Kind);

/// Where credentials are looked for, and logs for machines.
const PLACES: &str = "\
credentials:
  - { header: x-api-key }
  - { header: authorization, scheme: Bearer }
  - { query: api_key }
  - { cookie: api_key }
log: { format: json, level: debug }
";

impl Mesh {
    async fn start() -> Self {
        Self::start_with("").await
    }

    /// As [`Self::start`], with more lines in the sidecar's file.
    async fn start_with(more: &str) -> Self {
        Self::start_by(more, |file| file).await
    }

    /// As [`Self::start_with`], with a change to the lines before.
    async fn start_by(more: &str, change: impl FnOnce(String) -> String) -> Self {
        let data = tempfile::tempdir().expect("a directory can be made");
        let control = Control::start(data.path()).await;
        control.cli_json(&["keyring", "create", "payments"]).await;
        control
            .cli_json(&["keyring", "create", "partners", "--allow-imported"])
            .await;
        let base = sidecar_yaml("edge-1", control.discovery(), &["payments", "partners"]);
        let base = change(base);
        let sidecar = Sidecar::start(&[&base, PLACES, more].concat()).await;
        Self {
            sidecar: sidecar.until_ready().await,
            control,
            upstream: Upstream::start().await,
            _data: data,
        }
    }

    /// Makes a key of `checkout` in the keyring `payments`, and waits until the sidecar holds it.
    async fn key(&self, args: &[&str]) -> Key {
        let create = [
            "key",
            "create",
            "--keyring",
            "payments",
            "--consumer",
            "checkout",
        ];
        self.issue(&[&create, args, &["--create-missing"]].concat())
            .await
    }

    /// Runs a command that ends with a new key or version, and waits until the sidecar holds it.
    async fn issue(&self, command: &[&str]) -> Key {
        let issued = self.control.cli_json(command).await;
        self.until_applied(&issued).await;
        let text = |name: &str| issued[name].as_str().map(str::to_owned);
        let time = |text: String| text.parse().expect("times are RFC 3339");
        Key {
            id: text("key_id").expect("a key has an id"),
            secret: text("secret").expect("a new key has a secret"),
            expires_at: text("expires_at").map(time),
        }
    }

    /// Waits until the sidecar's view of a keyring has the revision that `change` has brought.
    async fn until_applied(&self, change: &Value) {
        let (keyring, revision) = (&change["keyring"], change["revision"].as_u64());
        eventually(
            &format!("the sidecar applies {revision:?} of {keyring}"),
            async || {
                let status: Value = self.sidecar.get("/status").await.json();
                let mut keyrings = status["keyrings"].as_array()?.iter();
                let held = keyrings.find(|held| held["name"] == *keyring)?;
                (held["revision"].as_u64() >= revision).then_some(())
            },
        )
        .await;
    }

    /// Waits until the sidecar holds `count` versions of a keyring in `state`.
    async fn until_held(&self, keyring: &str, state: &str, count: u64) {
        eventually("the sidecar holds the versions", async || {
            let status: Value = self.sidecar.get("/status").await.json();
            let mut keyrings = status["keyrings"].as_array()?.iter();
            let held = keyrings.find(|held| held["name"] == keyring)?;
            (held["keys"][state].as_u64() == Some(count)).then_some(())
        })
        .await;
    }

    /// Runs `test` with one Envoy after the other: each version, with headers in a map and apart.
    async fn through_each_envoy(&self, test: impl AsyncFn(&Gate)) {
        for version in EnvoyVersion::ALL {
            for raw_headers in [false, true] {
                let kind = Kind {
                    version,
                    raw_headers,
                };
                let _blame = Blame(kind);
                test(&self.gate(kind, |options| options).await).await;
            }
        }
    }

    /// Runs `test` with one version of Envoy after the other, set up by `setup`.
    async fn through_each_version(
        &self,
        setup: impl Fn(EnvoyOptions) -> EnvoyOptions,
        test: impl AsyncFn(&Gate),
    ) {
        for version in EnvoyVersion::ALL {
            let kind = Kind {
                version,
                raw_headers: false,
            };
            let _blame = Blame(kind);
            test(&self.gate(kind, &setup).await).await;
        }
    }

    /// The newest Envoy.
    async fn newest(&self) -> Gate {
        let kind = Kind {
            version: EnvoyVersion::V1_40,
            raw_headers: false,
        };
        self.gate(kind, |options| options).await
    }

    async fn gate(&self, kind: Kind, setup: impl FnOnce(EnvoyOptions) -> EnvoyOptions) -> Gate {
        let options = EnvoyOptions::new(self.sidecar.ext_authz(), self.upstream.addr())
            .version(kind.version)
            .route("/partners", &[("relatch.keyring", "partners")])
            .route("/elsewhere", &[("relatch.keyring", "elsewhere")])
            .route("/optional", &[("relatch.auth", "optional")])
            .route("/orders", &[("relatch.scopes", "orders.read orders.write")])
            .route("/odd", &[("relatch.auth", "sometimes")]);
        let options = if kind.raw_headers {
            options.raw_headers()
        } else {
            options
        };
        Gate {
            kind,
            envoy: Envoy::start(setup(options)).await,
        }
    }
}

impl Key {
    /// A request with this key in the header of the API.
    fn get(&self, target: &str) -> Request {
        Request::get(target).header("X-API-Key", &self.secret)
    }

    /// Fails when the upstream got anything of the key's secret part.
    fn assert_hidden_from(&self, seen: &Seen) {
        let text = serde_json::to_string(seen).expect("a description is text");
        assert!(
            !text.contains(self.random_part()),
            "the credential arrived: {text}"
        );
    }

    /// What nobody else knows: all behind the second `_`.
    fn random_part(&self) -> &str {
        let part = self.secret.splitn(3, '_').nth(2);
        part.expect("a key has three parts")
    }
}

impl Gate {
    async fn send(&self, request: Request) -> Response {
        request.send(self.envoy.addr()).await
    }

    async fn send_http2(&self, request: Request) -> Response {
        request.send_http2(self.envoy.addr()).await
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headers = if self.raw_headers {
            "raw headers"
        } else {
            "a map of headers"
        };
        write!(f, "Envoy {} with {headers}", self.version)
    }
}

impl Drop for Blame {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("this was with {}", self.0);
        }
    }
}

/// The reason that a denial gives; panics when the answer is the upstream's.
fn reason_of(response: &Response) -> String {
    let problem: Value = response.json();
    let reason = problem["reason"].as_str();
    reason
        .unwrap_or_else(|| panic!("no denial: {problem}"))
        .to_owned()
}
