//! A deployment over TLS, the secrets that go into it, and what it leaves.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use relatch::key::{KeyId, KeyringName, MasterPepper, PepperId, Prefix, Secret};
use serde_json::Value;
use tempfile::TempDir;

use super::{echo::EchoVault, leavings::Leavings, search::Canaries, tee::Tee};
use crate::support::{
    openbao::OpenBao,
    otlp::OtlpReceiver,
    process::{self, Output},
    relatch::{CERTS, Control, Sidecar, TOKEN_FILE, text},
};

/// A deployment over TLS, the secrets that went into it, and what it left.
pub(super) struct Scene {
    pub(super) dir: TempDir,
    pub(super) control: Control,
    /// Found nowhere.
    pub(super) canaries: Canaries,
    /// What a request carries and relatch must not keep, but which goes on to the upstream.
    pub(super) passing: Canaries,
    pub(super) left: Leavings,
    /// What the upstream saw.
    pub(super) arrived: Leavings,
    pub(super) card: String,
    pub(super) session: String,
    pub(super) basic: String,
    pub(super) spans: Tee,
    pub(super) bao: OpenBao,
    pub(super) echo: EchoVault,
    _collector: OtlpReceiver,
}

/// A key as its maker was told of it.
#[derive(Clone)]
pub(super) struct Issued {
    pub(super) id: String,
    pub(super) secret: String,
}

pub(super) const PAYMENTS: &str = "payments";
/// Takes keys of another system.
pub(super) const PARTNERS: &str = "partners";
/// Made by a program that a sink runs: what it was handed.
pub(super) const HANDED: &str = "handed";

impl Scene {
    pub(super) async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let (mut canaries, mut left) = (Canaries::default(), Leavings::default());
        let certs = dir.path().join(CERTS);
        let nodes = ["--node", "edge-1", "--node", "edge-2"];
        let dev = ["certs", "dev", "--out", text(&certs)];
        let made = process::relatch(&[&dev[..], &nodes].concat(), "").await;
        assert!(made.status.success(), "{}", made.stderr);
        left.add("certs dev", [made.stdout, made.stderr].concat());
        for key in fs::read_dir(&certs).expect("they were made") {
            let path = key.expect("the directory can be read").path();
            if path.extension().is_some_and(|extension| extension == "key") {
                let name = format!("the key of {}", path.display());
                canaries.add(&name, &private_part(&path));
            }
        }

        let init = ["control", "init", "--data-dir", text(dir.path())];
        let init = process::relatch(&[&init[..], &["-o", "json"]].concat(), "").await;
        let token = once(&init, "admin_token", &mut left);
        canaries.add_token("the first admin token", &token);
        fs::write(dir.path().join(TOKEN_FILE), &token).expect("the directory is the test's");
        let pepper = dir.path().join("pepper.json");
        for (name, secret) in peppers(&pepper) {
            canaries.add(&name, &secret);
        }

        let bao = OpenBao::start().await;
        let allowed = ["read", "create", "update"];
        let vault_token = bao.limited_token_file("secret/data/relatch/*", &allowed);
        let vault_token = vault_token.await;
        let secret = fs::read(&vault_token).expect("it was made");
        canaries.add("the token of OpenBao", &secret);
        let held = token_of_nobody(&mut canaries, "a former key that a Vault holds");
        let echo = EchoVault::start(&held).await;
        let echo_token = dir.path().join("echo.token");
        let secret = format!("hvs.{}", random_text());
        canaries.add("the token of a Vault that repeats it", secret.as_bytes());
        write_private(&echo_token, &secret);

        let [first, second] = ["edge-1", "edge-2"].map(|node| {
            let file = dir.path().join(format!("{node}.token"));
            let secret = random_text();
            canaries.add(&format!("the token of {node}"), secret.as_bytes());
            write_private(&file, &secret);
            file
        });

        let collector = OtlpReceiver::start().await;
        let spans = Tee::before(collector.addr()).await;
        let keys = dir.path().join("keys");
        fs::create_dir(&keys).expect("the directory is the test's");
        let handed = dir.path().join(HANDED);
        let certs = text(&certs);
        let yaml = format!(
            "discovery:\n  address: 127.0.0.1:0\n  tls: {{ cert: {certs}/control.pem, key: {certs}/control.key }}\n  \
             tokens:\n    \
             - {{ file: {first}, identity: \"spiffe://relatch.example/node/edge-1\" }}\n    \
             - {{ file: {second}, identity: \"spiffe://relatch.example/node/edge-2\" }}\n  allow:\n    \
             - {{ identity: \"spiffe://relatch.example/node/*\", keyrings: [\"*\"] }}\n\
             admin:\n  tls: {{ cert: {certs}/control.pem, key: {certs}/control.key, client_ca: {certs}/ca.pem }}\n\
             heartbeat: 1s\nmax_serve_for: 10s\n\
             telemetry: {{ otlp_endpoint: \"http://{spans}\" }}\n\
             log: {{ format: json, level: trace }}\n\
             sinks:\n  \
             - {{ name: files, file: {{ directory: {keys} }} }}\n  \
             - {{ name: program, exec: {{ command: [/bin/sh, -c, \"tee -a {handed} >&2; exit 1\"] }} }}\n  \
             - {{ name: vault, vault: {{ address: \"{bao}\", path: \"relatch/{{key_id}}\", token_file: {vault_token} }} }}\n  \
             - {{ name: echo, vault: {{ address: \"{echo}\", path: \"relatch/{{key_id}}\", token_file: {echo_token} }} }}\n",
            first = text(&first),
            second = text(&second),
            spans = spans.addr(),
            keys = text(&keys),
            handed = text(&handed),
            bao = bao.address(),
            vault_token = text(&vault_token),
            echo = echo.address(),
            echo_token = text(&echo_token),
        );
        let control = Control::start_with(dir.path(), &yaml).await;
        let mut scene = Self {
            dir,
            control,
            canaries,
            passing: Canaries::default(),
            left,
            arrived: Leavings::default(),
            card: random_text(),
            session: random_text(),
            basic: random_text(),
            spans,
            bao,
            echo,
            _collector: collector,
        };
        for (name, secret) in [
            ("a parameter of the query", &scene.card),
            ("another cookie", &scene.session),
            ("another authorization", &scene.basic),
        ] {
            scene.passing.add(name, secret.as_bytes());
        }
        scene.run(&["keyring", "create", PAYMENTS]).await;
        let partners = ["keyring", "create", PARTNERS, "--allow-imported"];
        scene.run(&partners).await;
        scene
    }

    pub(super) fn certs(&self) -> PathBuf {
        self.dir.path().join(CERTS)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a sidecar: edge-1 in full, over TLS, with a snapshot file; edge-2 on demand, on a Unix socket.
    pub(super) async fn sidecar(&mut self, node: &str, log: &str) -> Sidecar {
        let yaml = self.sidecar_yaml(node, log).await;
        Sidecar::start(&yaml).await.until_ready().await
    }

    pub(super) async fn sidecar_yaml(&mut self, node: &str, log: &str) -> String {
        let certs = self.certs();
        let certs = text(&certs);
        let own = if node == "edge-1" {
            let key = self.path("snapshot.key");
            if !key.exists() {
                let new = ["config", "snapshot-key", text(&key)];
                self.command(&new, "").await;
                let made = fs::read_to_string(&key).expect("it was made");
                let (_, digits) = made.trim().rsplit_once(':').expect("a key of a snapshot");
                self.canaries
                    .add("the key of the snapshot file", &from_hex(digits));
            }
            format!(
                "listen:\n  address: 127.0.0.1:0\n  tls: {{ cert: {certs}/ext-authz.pem, key: {certs}/ext-authz.key, \
                 client_ca: {certs}/ca.pem }}\n\
                 keyrings: [{{ name: {PAYMENTS} }}, {{ name: {PARTNERS} }}]\n\
                 snapshot: {{ path: {file}, key_file: {key} }}\n",
                file = text(&self.path("keyring.snap")),
                key = text(&key),
            )
        } else {
            format!(
                "listen: unix://{socket}\nkeyrings: [{{ name: {PAYMENTS}, mode: on_demand, cache: {{ lookup_timeout: 10s }} }}]\n",
                socket = text(&self.path("authz.sock")),
            )
        };
        format!(
            "node: {{ id: {node} }}\nhttp: 127.0.0.1:0\n\
             control:\n  endpoints: [\"https://localhost:{port}\"]\n  \
             tls: {{ ca: {certs}/ca.pem, token_file: {token}, server_identity: \"spiffe://relatch.example/control\" }}\n\
             default_keyring: {PAYMENTS}\n\
             credentials: [{{ header: x-api-key }}, {{ header: authorization, scheme: Bearer }}, {{ query: api_key }}, \
             {{ cookie: api_key }}]\n\
             telemetry: {{ otlp_endpoint: \"http://{spans}\" }}\n\
             log: {{ format: {log}, level: trace }}\n{own}",
            port = self.control.discovery().port(),
            token = text(&self.path(&format!("{node}.token"))),
            spans = self.spans.addr(),
        )
    }

    /// Runs a command of the operator, and keeps what it says.
    pub(super) async fn run(&mut self, args: &[&str]) -> Output {
        let output = self.control.cli(args).await;
        assert!(output.status.success(), "{args:?}: {}", output.stderr);
        self.keep(args, &output);
        output
    }

    /// Runs a command that needs no control plane, and keeps what it says.
    pub(super) async fn command(&mut self, args: &[&str], stdin: &str) -> Output {
        let output = process::relatch(args, stdin).await;
        self.keep(args, &output);
        output
    }

    pub(super) fn keep(&mut self, args: &[&str], output: &Output) {
        let said = [&output.stdout, "\n", &output.stderr].concat();
        self.left.add(format!("relatch {}", args.join(" ")), said);
    }

    /// Runs a command that shows a new secret in `field`, once.
    pub(super) async fn reveal(&mut self, args: &[&str], field: &str) -> Value {
        let output = self.control.cli(args).await;
        let secret = once(&output, field, &mut self.left);
        let name = args.join(" ");
        match secret.strip_prefix("whsec_") {
            Some(secret) => self.canaries.add(&name, secret.as_bytes()),
            None => self.canaries.add_token(&name, &secret),
        }
        output.json()
    }

    pub(super) async fn token(&mut self, role: &str) -> Issued {
        let create = ["token", "create", "--role", role, "--name", role];
        let made = self.reveal(&create, "secret").await;
        let issued = Issued {
            id: made["id"].as_str().expect("an id").to_owned(),
            secret: made["secret"].as_str().expect("a token").to_owned(),
        };
        let file = self.path(&format!("{}.token", issued.id));
        write_private(&file, &issued.secret);
        issued
    }

    pub(super) async fn key(&mut self) -> Issued {
        let create = ["key", "create", "--keyring", PAYMENTS, "--consumer", "acme"];
        let create = [&create[..], &["--create-missing"]].concat();
        issued(&self.reveal(&create, "secret").await)
    }

    pub(super) async fn rotate(&mut self, key_id: &str) -> Issued {
        issued(&self.reveal(&["rotate", "start", key_id], "secret").await)
    }

    /// Takes a key of another system over.
    pub(super) async fn import(&mut self) -> String {
        let secret = format!("imp/'quoted'\\back%41+=&<{}>", random_text());
        self.canaries.add("an imported key", secret.as_bytes());
        let import = ["key", "import", "--keyring", PARTNERS, "--consumer", "acme"];
        let import = [&import[..], &["--create-missing"]].concat();
        let output = self.control.cli_reading(&import, &secret).await;
        assert!(output.status.success(), "{}", output.stderr);
        self.keep(&import, &output);
        secret
    }
}

/// The secret that a command which had to succeed shows in `field`: once, and nowhere else. What it says beside that is
/// kept.
#[track_caller]
pub(super) fn once(output: &Output, field: &str, left: &mut Leavings) -> String {
    let json = output.json();
    let secret = json[field].as_str().expect("a secret is shown").to_owned();
    assert_eq!(output.stdout.matches(&secret).count(), 1, "{field}");
    let rest = output.stdout.replacen(&secret, "", 1);
    let said = [&rest, "\n", &output.stderr].concat();
    left.add(format!("a command that shows its {field}"), said);
    secret
}

/// The key that a command of `key` or `rotate` has shown.
pub(super) fn issued(json: &Value) -> Issued {
    let text = |name: &str| json[name].as_str().expect("a key is shown").to_owned();
    Issued {
        id: text("key_id"),
        secret: text("secret"),
    }
}

/// A well-formed key or token that nobody has issued.
pub(super) fn token_of_nobody(canaries: &mut Canaries, name: &str) -> String {
    let token = token(random_id());
    canaries.add_token(name, &token);
    token
}

/// A well-formed key with this id, which nobody has issued.
pub(super) fn token(id: KeyId) -> String {
    let secret = Secret::generate(&Prefix::default(), id);
    let secret = secret.expect("the random source works");
    secret.expose().to_owned()
}

pub(super) fn random_id() -> KeyId {
    KeyId::generate().expect("the random source works")
}

/// 38 letters and digits that stand nowhere else.
pub(super) fn random_text() -> String {
    let token = token(random_id());
    let (_, text) = token.rsplit_once('_').expect("a token has three parts");
    text.to_owned()
}

/// Makes a file that its owner alone can read.
pub(super) fn write_private(path: &Path, text: &str) {
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.expect("the directory is the test's");
    file.write_all(text.as_bytes()).expect("there is room");
}

/// The number that makes a key of a certificate secret. The rest of the file is known, or public.
fn private_part(pem: &Path) -> Vec<u8> {
    // ECPrivateKey: version 1, and 32 bytes (RFC 5915, section 3).
    const BEFORE: [u8; 5] = [2, 1, 1, 4, 32];
    let pem = fs::read_to_string(pem).expect("it was made");
    let lines = pem.lines().filter(|line| !line.starts_with("-----"));
    let der = BASE64_STANDARD.decode(lines.collect::<String>());
    let der = der.expect("PEM is base64");
    let mut places = der.windows(BEFORE.len());
    let at = places.position(|place| place == BEFORE);
    let from = at.expect("a key on a curve") + BEFORE.len();
    der[from..from + 32].to_vec()
}

/// The pepper of a control plane, and those that it derives.
fn peppers(file: &Path) -> Vec<(String, Vec<u8>)> {
    let file = fs::read(file).expect("it was made");
    let file: Value = serde_json::from_slice(&file).expect("JSON");
    let master = from_hex(file["secret"].as_str().expect("digits"));
    let derived = MasterPepper::new(PepperId::new(1), &master).expect("32 bytes");
    let tokens = derived.for_admin_tokens().expose().to_vec();
    let mut all = vec![
        ("the pepper".to_owned(), master),
        ("the pepper of admin tokens".to_owned(), tokens),
    ];
    for keyring in [PAYMENTS, PARTNERS] {
        let name: KeyringName = keyring.parse().expect("a name");
        let pepper = derived.for_keyring(&name).expose().to_vec();
        all.push((format!("the pepper of {keyring}"), pepper));
    }
    all
}

fn from_hex(digits: &str) -> Vec<u8> {
    let pairs = digits.as_bytes().chunks_exact(2);
    let byte = |pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = pairs.map(byte).collect();
    bytes.expect("hexadecimal digits")
}
