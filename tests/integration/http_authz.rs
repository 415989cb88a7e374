//! The way of a request through a real Traefik, Caddy and nginx, each with its sample, and the real sidecar.
//!
//! `decisions`: what passes, and what a client learns of a denial; `spoofing`: what a client cannot forge; `availability`:
//! what happens while the sidecar restarts or is away; `listener`: TLS, Unix sockets, metrics, spans and status.

mod availability;
mod decisions;
mod listener;
mod spoofing;

use std::thread;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    client::{Request, Response},
    eventually::eventually,
    gateway::{Asks, Gateway, GatewayKind},
    relatch::{Control, Sidecar, own_node, sidecar_yaml},
    upstream::{Seen, Upstream},
};

/// A control plane with the keyrings `payments` and `partners`, a sidecar that holds both, and an upstream. Proxies are put
/// before them by each test.
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
}

/// Says with which proxy a test was failing.
struct Blame(GatewayKind);

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
        for keyring in ["payments", "partners"] {
            control.cli_json(&["keyring", "create", keyring]).await;
        }
        let keyrings = ["payments", "partners", "missing"];
        let base = sidecar_yaml(&own_node("edge"), control.discovery(), &keyrings);
        let base = change(base);
        let sidecar = Sidecar::start(&[&base, &*listener(), more].concat()).await;
        let mesh = Self {
            sidecar,
            control,
            upstream: Upstream::start().await,
            _data: data,
        };
        for keyring in ["payments", "partners"] {
            mesh.until_holding(keyring, 1).await;
        }
        mesh
    }

    /// Makes a key of `checkout` in the keyring `payments`, and waits until the sidecar holds it.
    async fn key(&self, args: &[&str]) -> Key {
        self.key_of("payments", args).await
    }

    async fn key_of(&self, keyring: &str, args: &[&str]) -> Key {
        let create = [
            "key",
            "create",
            "--keyring",
            keyring,
            "--consumer",
            "checkout",
            "--create-missing",
        ];
        let issued = self.change(&[&create, args].concat()).await;
        let text = |name: &str| issued[name].as_str().expect("a key has it").to_owned();
        Key {
            id: text("key_id"),
            secret: text("secret"),
        }
    }

    /// Runs a command that changes a keyring, and waits until the sidecar has applied the change.
    async fn change(&self, command: &[&str]) -> Value {
        let changed = self.control.cli_json(command).await;
        let keyring = changed["keyring"].as_str().expect("it is of a keyring");
        let revision = changed["revision"].as_u64().expect("it is a change");
        self.until_holding(keyring, revision).await;
        changed
    }

    async fn until_holding(&self, keyring: &str, revision: u64) {
        eventually("the sidecar applies a change", async || {
            let status: Value = self.sidecar.get("/status").await.json();
            let mut keyrings = status["keyrings"].as_array()?.iter();
            let held = keyrings.find(|held| held["name"] == keyring)?;
            let is_usable = held["condition"] == "fresh";
            (is_usable && held["revision"].as_u64()? >= revision).then_some(())
        })
        .await;
    }

    /// Runs `test` with one proxy after the other, each asking at the profile of its name.
    async fn through_each(&self, test: impl AsyncFn(&Gateway)) {
        self.through_each_at("", test).await;
    }

    /// As [`Self::through_each`], at the profile whose name ends in `suffix`.
    async fn through_each_at(&self, suffix: &str, test: impl AsyncFn(&Gateway)) {
        for kind in GatewayKind::ALL {
            let _blame = Blame(kind);
            test(&self.gateway(kind, suffix).await).await;
        }
    }

    async fn gateway(&self, kind: GatewayKind, suffix: &str) -> Gateway {
        let asks = Asks {
            sidecar: self.sidecar.http_authz(),
            profile: &format!("{kind}{suffix}"),
            upstream: self.upstream.addr(),
        };
        Gateway::start(kind, asks, &[]).await
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
        let random = self.secret.splitn(3, '_').nth(2);
        let random = random.expect("a key has three parts");
        assert!(!text.contains(random), "the credential arrived: {text}");
    }

    /// Fails unless the upstream got the identity of this key, once and nothing else that reads as one, and not the key.
    fn assert_identified(&self, seen: &Seen) {
        self.assert_hidden_from(seen);
        assert_eq!(
            identities(seen),
            [
                ("x-relatch-consumer".to_owned(), "checkout"),
                ("x-relatch-key-id".to_owned(), self.id.as_str()),
                ("x-relatch-key-version".to_owned(), "1"),
            ]
        );
    }
}

impl Drop for Blame {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("this was with {}", self.0);
        }
    }
}

/// The listener with its profiles: for each dialect one of the keyring `payments`, one that requires a scope, one of the
/// keyring `partners`, and one of a keyring that does not exist.
fn listener() -> String {
    let profiles = GatewayKind::ALL.map(|kind| {
        format!(
            "    - {{ name: {kind}, dialect: {kind} }}\n\
             \x20   - {{ name: {kind}-scoped, dialect: {kind}, scopes: [orders.read] }}\n\
             \x20   - {{ name: {kind}-partners, dialect: {kind}, keyring: partners }}\n\
             \x20   - {{ name: {kind}-missing, dialect: {kind}, keyring: missing }}\n"
        )
    });
    format!(
        "http_authz:\n  listen: 127.0.0.1:0\n  profiles:\n{}log: {{ format: json, level: debug }}\n",
        profiles.concat()
    )
}

/// Every header that could be taken for an identity, with its name in lower case, sorted.
fn identities(seen: &Seen) -> Vec<(String, &str)> {
    let folded = |name: &str| name.to_ascii_lowercase().replace(['_', '.'], "-");
    let lines = seen.headers.iter();
    let mut found: Vec<_> = lines
        .filter(|(name, _)| folded(name).starts_with("x-relatch-"))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
        .collect();
    found.sort_unstable();
    found
}

/// The values of a header, whatever the case of its name.
fn values<'s>(seen: &'s Seen, name: &str) -> Vec<&'s str> {
    let lines = seen.headers.iter();
    let named = lines.filter(|(other, _)| other.eq_ignore_ascii_case(name));
    named.map(|(_, value)| value.as_str()).collect()
}

/// The reason that a denial gives; panics when it is not one of relatch.
#[track_caller]
fn reason_of(response: &Response) -> String {
    let body: Value = response.json();
    let reason = body["reason"].as_str();
    let reason = reason.unwrap_or_else(|| panic!("no reason in {}: {body}", response.status));
    assert_eq!(body["status"], response.status, "{body}");
    reason.to_owned()
}
