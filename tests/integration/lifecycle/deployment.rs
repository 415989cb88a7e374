//! A control plane and its sidecars as processes of their own, and the command line that works with them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use ::relatch::key::Timestamp;
use envoy_types::pb::{
    envoy::service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse,
        attribute_context::{HttpRequest, Request as AttributesRequest},
        authorization_client::AuthorizationClient,
    },
    google::protobuf::value::Kind,
};
use serde_json::Value;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use crate::support::{
    client::Request,
    envoy::AuthzAddress,
    eventually::{eventually, eventually_within},
    process::{Output, Printed},
    relatch::{self, sidecar_yaml},
};

/// The keyring of every test here.
pub(super) const KEYRING: &str = "payments";
pub(super) const CONSUMER: &str = "acme";

/// The least that the control plane's file may hold: sidecars report with every heartbeat.
const BRISK: &str = "heartbeat: 1s\n";
/// Twice the longest time that a sidecar waits before it connects again.
const RECONNECTED: Duration = Duration::from_mins(1);

/// A control plane with a data directory of its own.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) plane: relatch::Control,
    data: TempDir,
}

/// A sidecar of [`KEYRING`], and a client that asks it as Envoy does.
#[derive(Debug)]
pub(super) struct Sidecar {
    pub(super) daemon: relatch::Sidecar,
    checks: AuthorizationClient<Channel>,
}

/// A key as its maker was told of it.
#[derive(Clone, Debug)]
pub(super) struct IssuedKey {
    pub(super) id: String,
    pub(super) secret: String,
    pub(super) version: u64,
    pub(super) revision: u64,
}

/// What a sidecar decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) allowed: bool,
    pub(super) reason: String,
    /// Of the key that was recognised.
    pub(super) version: Option<u64>,
}

impl Control {
    pub(super) async fn start() -> Self {
        let data = tempfile::tempdir().expect("a directory can be made");
        let plane = relatch::Control::start(data.path()).await;
        Self { plane, data }
    }

    /// As [`Self::start`], with times for tests that wait for evidence, and the lines `settings` in its file.
    pub(super) async fn start_brisk(settings: &str) -> Self {
        let data = tempfile::tempdir().expect("a directory can be made");
        let plane = relatch::Control::start_with(data.path(), &[BRISK, settings].concat()).await;
        Self { plane, data }
    }

    /// Starts one whose file has `yaml` beside what every file has.
    pub(super) async fn with_file(yaml: &str) -> Self {
        let data = tempfile::tempdir().expect("a directory can be made");
        let plane = relatch::Control::start_with(data.path(), yaml).await;
        Self { plane, data }
    }

    /// Tells it to stop; everything that it logged.
    pub(super) async fn stopped(mut self) -> Printed {
        self.plane.process.stop().await
    }

    pub(super) fn data_dir(&self) -> &Path {
        self.data.path()
    }

    /// Runs a command of its first administrator.
    pub(super) async fn run(&self, args: &[&str]) -> Output {
        self.plane.cli(args).await
    }

    /// The last line of JSON of a command that has to succeed.
    pub(super) async fn json(&self, args: &[&str]) -> Value {
        self.plane.cli_json(args).await
    }

    /// Makes a key of [`KEYRING`], and what it needs.
    pub(super) async fn create_key(&self) -> IssuedKey {
        self.create_key_with(&[]).await
    }

    /// As [`Self::create_key`], without waiting for sidecars that cannot answer.
    pub(super) async fn create_key_at_once(&self) -> IssuedKey {
        self.create_key_with(&["--no-wait"]).await
    }

    async fn create_key_with(&self, flags: &[&str]) -> IssuedKey {
        let args = [
            "key",
            "create",
            "--keyring",
            KEYRING,
            "--consumer",
            CONSUMER,
        ];
        let json = self
            .json(&[&args[..], &["--create-missing"], flags].concat())
            .await;
        IssuedKey::from_json(&json)
    }

    /// Replaces a key in an emergency; returns the event of the hand-over and the last one.
    pub(super) async fn emergency(&self, key_id: &str) -> (Value, Value) {
        let start = ["rotate", "start", key_id];
        let why = ["--emergency", "--reason", "leaked"];
        let output = self.run(&[&start[..], &why].concat()).await;
        assert_eq!(output.status.code(), Some(0), "{}", output.stderr);
        let lines = output.stdout.lines();
        let mut events: Vec<Value> = lines
            .map(|line| serde_json::from_str(line).expect("a line of JSON"))
            .collect();
        let last = events.pop().expect("events");
        events.retain(|event| event["event"] == "handed_over");
        (events.pop().expect("it was handed over"), last)
    }

    /// Starts the rotation of a key and waits for the hand-over.
    pub(super) async fn rotate(&self, key_id: &str) -> IssuedKey {
        IssuedKey::from_json(&self.json(&["rotate", "start", key_id]).await)
    }

    /// Changes the policy of [`KEYRING`].
    pub(super) async fn set_policy(&self, settings: &[&str]) {
        let set = ["policy", "set", "--keyring", KEYRING];
        self.json(&[&set, settings].concat()).await;
    }

    /// Waits until the log of [`KEYRING`] has a change, and returns the first that `is_it`.
    pub(super) async fn change(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let list = ["audit", "list", "--keyring", KEYRING, "--limit", "1000"];
        eventually(what, async || {
            let log = self.json(&list).await;
            let mut entries = log.as_array().expect("a list of changes").iter();
            entries.find(|entry| is_it(&entry["payload"])).cloned()
        })
        .await
    }

    /// Waits until a version has retired, and returns the change.
    pub(super) async fn retired(&self, key_id: &str, version: u64) -> Value {
        self.change("the version has retired", |change| {
            change["kind"] == "version_retired" && is_of(change, key_id, version)
        })
        .await
    }

    /// Waits until people were told something of a version, and returns the change.
    pub(super) async fn noted(&self, key_id: &str, version: u64, what: &str) -> Value {
        self.change(what, |change| {
            change["note"]["what"] == what && is_of(change, key_id, version)
        })
        .await
    }

    /// Waits until sidecars have told of every request before `moment`, and returns the usage of a key.
    pub(super) async fn usage_until(&self, key_id: &str, moment: Timestamp) -> Value {
        eventually_within(
            RECONNECTED,
            "sidecars have told of everything",
            async || {
                let usage = self.json(&["usage", key_id]).await;
                let complete: Timestamp = usage["complete_until"].as_str()?.parse().ok()?;
                (complete > moment).then_some(usage)
            },
        )
        .await
    }

    /// The value of the series of its metrics that `labels` all stand in.
    pub(super) async fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let page = Request::get("/metrics").send(self.plane.http()).await;
        let page = page.text();
        let series = page.lines().find(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with('{'))
                && labels.iter().all(|label| line.contains(label))
        });
        series?.rsplit(' ').next()?.parse().ok()
    }

    pub(super) async fn show_key(&self, id: &str) -> Value {
        self.json(&["key", "show", id]).await
    }

    /// The nodes of the sidecars that are live.
    pub(super) async fn fleet(&self) -> Vec<String> {
        let fleet = self.json(&["fleet"]).await;
        let sidecars = fleet.as_array().expect("a list of sidecars");
        let is_live = |sidecar: &&Value| sidecar["gap_until"].is_null();
        let node = |sidecar: &Value| sidecar["node"].as_str().map(str::to_owned);
        sidecars.iter().filter(is_live).filter_map(node).collect()
    }

    /// Makes an admin token and the file that holds it.
    pub(super) async fn create_token(&self, role: &str, args: &[&str]) -> (String, PathBuf) {
        let create = ["token", "create", "--role", role, "--name", role];
        let made = self.json(&[&create[..], args].concat()).await;
        let text = |name: &str| made[name].as_str().expect("a token is shown").to_owned();
        let id = text("id");
        let path = self.data_dir().join(format!("{id}.token"));
        std::fs::write(&path, text("secret")).expect("the test's directory can be written to");
        (id, path)
    }
}

impl Sidecar {
    /// Starts a sidecar and waits until it has its keyring.
    pub(super) async fn start(control: &Control, node: &str) -> Self {
        let sidecar = Self::start_unready(control, node).await;
        sidecar.ready().await;
        sidecar
    }

    /// Starts a sidecar that may not have its keyring yet.
    pub(super) async fn start_unready(control: &Control, node: &str) -> Self {
        Self::with_config(&sidecar_yaml(node, control.plane.discovery(), &[KEYRING])).await
    }

    /// Starts a sidecar with the file `yaml`.
    pub(super) async fn with_config(yaml: &str) -> Self {
        Self::asking(relatch::Sidecar::start(yaml).await)
    }

    /// Starts a sidecar with the file `yaml`, in a shell that runs `before` first.
    pub(super) async fn with_config_after(before: &str, yaml: &str) -> Self {
        Self::asking(relatch::Sidecar::start_after(before, yaml).await)
    }

    pub(super) fn asking(daemon: relatch::Sidecar) -> Self {
        let uri = match daemon.ext_authz() {
            AuthzAddress::Tcp(address) => format!("http://{address}"),
            AuthzAddress::Unix(path) => format!("unix://{}", path.display()),
        };
        let endpoint = Endpoint::from_shared(uri).expect("it listens on an address");
        Self {
            daemon,
            checks: AuthorizationClient::new(endpoint.connect_lazy()),
        }
    }

    pub(super) async fn ready(&self) {
        eventually("the sidecar is ready", async || {
            self.is_ready().await.then_some(())
        })
        .await;
    }

    pub(super) async fn is_ready(&self) -> bool {
        self.daemon.get("/readyz").await.status == 200
    }

    /// What `/status` tells of [`KEYRING`].
    pub(super) async fn keyring(&self) -> Value {
        let status: Value = self.daemon.get("/status").await.json();
        let keyrings = status["keyrings"].as_array().expect("a list of keyrings");
        let found = keyrings.iter().find(|keyring| keyring["name"] == KEYRING);
        found.expect("it holds the keyring").clone()
    }

    /// Waits until it has applied `revision` or a later one.
    pub(super) async fn reaches(&self, revision: u64) {
        eventually("the sidecar reaches the revision", async || {
            (self.keyring().await["revision"].as_u64()? >= revision).then_some(())
        })
        .await;
    }

    /// What it decides on a request with `key`.
    pub(super) async fn check(&self, key: &str) -> Verdict {
        Box::pin(self.judge(check_request(key))).await
    }

    /// What it decides on `request`.
    pub(super) async fn judge(&self, request: CheckRequest) -> Verdict {
        let response = self.checks.clone().check(request).await;
        Verdict::from(response.expect("a sidecar answers").into_inner())
    }

    /// How many lines it has logged so far that hold `part`. More may be on their way: see [`Self::until_logged`] and
    /// [`Self::stopped`].
    pub(super) fn logged(&self, part: &str) -> usize {
        let lines = self.daemon.process.lines();
        lines.iter().filter(|line| line.contains(part)).count()
    }

    /// Waits until it has logged `count` lines that hold `part`, or more.
    pub(super) async fn until_logged(&self, part: &str, count: usize) {
        eventually(&format!("the sidecar logs {part:?}"), async || {
            (self.logged(part) >= count).then_some(())
        })
        .await;
    }

    /// Tells it to stop; everything that it logged.
    pub(super) async fn stopped(mut self) -> Printed {
        self.daemon.process.stop().await
    }
}

impl IssuedKey {
    /// From the JSON of `key create` or of a finished `rotate start`.
    pub(super) fn from_json(json: &Value) -> Self {
        let text = |name: &str| json[name].as_str().map(str::to_owned);
        let parse = || {
            Some(Self {
                id: text("key_id")?,
                secret: text("secret")?,
                version: json["version"].as_u64()?,
                revision: json["revision"].as_u64()?,
            })
        };
        parse().unwrap_or_else(|| panic!("no issued key: {json}"))
    }
}

impl Verdict {
    pub(super) fn allowed(version: u64) -> Self {
        Self {
            allowed: true,
            reason: "ok".to_owned(),
            version: Some(version),
        }
    }

    /// Denied, and the key was recognised.
    pub(super) fn denied(reason: &str, version: u64) -> Self {
        Self {
            allowed: false,
            reason: reason.to_owned(),
            version: Some(version),
        }
    }
}

impl From<CheckResponse> for Verdict {
    fn from(response: CheckResponse) -> Self {
        let metadata = response.dynamic_metadata.unwrap_or_default().fields;
        let field = |name: &str| metadata.get(name).and_then(|value| value.kind.clone());
        Self {
            allowed: response.status.is_some_and(|status| status.code == 0),
            reason: match field("reason") {
                Some(Kind::StringValue(reason)) => reason,
                other => panic!("no reason: {other:?}"),
            },
            version: match field("key_version") {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "versions are small whole numbers"
                )]
                Some(Kind::NumberValue(version)) => Some(version as u64),
                _ => None,
            },
        }
    }
}

/// Whether a change of the log is about a version.
fn is_of(change: &Value, key_id: &str, version: u64) -> bool {
    change["key_id"] == key_id && change["version"] == version
}

/// A time as commands print it.
pub(super) fn time(value: &Value) -> Timestamp {
    let text = value.as_str().unwrap_or_else(|| panic!("no time: {value}"));
    text.parse().expect("RFC 3339")
}

/// The last line of a command that may have failed.
pub(super) fn last_line(output: &Output) -> Value {
    let line = output.stdout.lines().next_back().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {}", output.stdout))
}

/// A request with `key` in `x-api-key`, as Envoy asks.
pub(super) fn check_request(key: &str) -> CheckRequest {
    let headers = [
        (":authority", "api.example"),
        (":method", "GET"),
        (":path", "/"),
        ("x-api-key", key),
    ];
    let http = HttpRequest {
        method: "GET".to_owned(),
        path: "/".to_owned(),
        host: "api.example".to_owned(),
        headers: headers
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..HttpRequest::default()
    };
    CheckRequest {
        attributes: Some(AttributeContext {
            request: Some(AttributesRequest {
                http: Some(http),
                ..AttributesRequest::default()
            }),
            ..AttributeContext::default()
        }),
    }
}
