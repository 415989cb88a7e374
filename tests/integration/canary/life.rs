//! What is done with the secrets: all that people and programs do with them, and what they do by mistake.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;

use super::{
    scene::{HANDED, Issued, PAYMENTS, Scene, random_text, token_of_nobody, write_private},
    search::{Canaries, each},
};
use crate::support::{
    client::{Request, Response},
    envoy::{AuthzAddress, Envoy},
    eventually::eventually,
    process,
    relatch::{CONFIG_FILE, Sidecar, TOKEN_FILE, text},
};

/// What makes the sidecar trace a request.
const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
/// Files whose only content is a secret, by the ends of their names.
const SECRET_FILES: [&str; 6] = [
    ".key",
    ".token",
    "pepper.json",
    "/current",
    "/previous",
    HANDED,
];

impl Scene {
    /// A request with secrets that are not relatch's, and the first parameter `query`.
    pub(super) fn request(&self, path: &str, query: &str) -> Request {
        Request::get(&format!("{path}?{query}card={}", self.card)).header("traceparent", SAMPLED)
    }

    /// Sends a request through Envoy, and keeps the answer.
    pub(super) async fn ask(&mut self, envoy: &Envoy, request: Request) -> Response {
        let response = request.send(envoy.addr()).await;
        let mut told = response.body.clone();
        for (name, value) in &response.headers {
            told.extend([b"\n", name.as_bytes(), b": ", value].concat());
        }
        if response.status == 200 {
            self.arrived.add("what the upstream saw", told);
        } else {
            self.left.add("a denial", told);
        }
        response
    }

    /// Presents a key in each place where one can stand.
    pub(super) async fn use_key(&mut self, envoy: &Envoy, key: &str, is_allowed: bool) {
        let session = format!("session={}", self.session);
        let encoded: String = url::form_urlencoded::byte_serialize(key.as_bytes()).collect();
        let percents = each(key.as_bytes(), |byte| format!("%{byte:02x}"), "");
        let basic = format!("Basic {}", self.basic);
        let requests = [
            self.request("/header", "")
                .header("x-api-key", key)
                .header("authorization", basic)
                .header("cookie", &session),
            self.request("/bearer", "")
                .header("authorization", format!("Bearer {key}")),
            self.request("/query", &format!("api_key={encoded}&")),
            self.request("/percents", &format!("api%5Fkey={percents}&")),
            self.request("/cookie", "")
                .header("cookie", format!("a=b; api_key={key}; {session}")),
        ];
        for request in requests {
            let status = self.ask(envoy, request).await.status;
            assert_eq!(status == 200, is_allowed, "{status}");
        }
    }

    /// Asks the sidecar that holds keys on demand, with the key where it belongs and behind another scheme.
    pub(super) async fn check(&mut self, sidecar: &Sidecar, key: &str, is_allowed: bool) {
        let AuthzAddress::Unix(path) = sidecar.ext_authz() else {
            panic!("it is on a Unix socket");
        };
        let endpoint = format!("unix://{}", text(&path));
        let check = ["check", "--endpoint", &endpoint];
        let output = self.command(&check, key).await;
        assert_eq!(output.status.success(), is_allowed, "{}", output.stderr);
        let odd = ["--header", "authorization", "--scheme", "Basic"];
        let output = self.command(&[&check[..], &odd].concat(), key).await;
        assert!(!output.status.success(), "{}", output.stdout);
    }

    pub(super) async fn explain(&mut self, key: &str) {
        let explain = ["explain", "--keyring", PAYMENTS];
        let output = self.control.cli_reading(&explain, key).await;
        self.keep(&explain, &output);
    }

    /// Presents what nobody has issued, and nobody could; the first is in the form of a key.
    pub(super) async fn present_what_is_no_key(
        &mut self,
        envoy: &Envoy,
        on_demand: &Sidecar,
    ) -> String {
        let unknown = token_of_nobody(&mut self.canaries, "an unknown key");
        let mut misspelt = unknown.clone();
        misspelt.replace_range(misspelt.len() - 1.., "-");
        for (name, odd) in [
            ("an unknown key", unknown.clone()),
            ("a misspelt key", misspelt),
            ("a key with spaces", format!("  {} \t", random_text())),
            ("a key that is no ASCII", format!("clé-{}", random_text())),
            ("a key in quotes", format!("\"{}\\\"", random_text())),
            ("a key that is too long", random_text().repeat(20)),
        ] {
            self.canaries.add(name, odd.trim().as_bytes());
            self.use_key(envoy, &odd, false).await;
            self.check(on_demand, &odd, false).await;
            self.explain(&odd).await;
        }
        unknown
    }

    /// Has keys rotated by the clock, into sinks that take them and into two that refuse, and repeat what they got.
    pub(super) async fn rotate_by_schedule(&mut self) {
        let mut keys = Vec::new();
        for sink in ["files", "vault", "program", "echo"] {
            let key = self.key().await;
            let set = ["policy", "set", &key.id, "--sink", sink];
            let often = [
                "--rotate-every",
                "2s",
                "--overlap",
                "0s",
                "--idle-for",
                "0s",
            ];
            self.run(&[&set[..], &often].concat()).await;
            keys.push(key);
        }
        let [files, vault, program, echo] = &keys[..] else {
            panic!("a key for each sink");
        };
        let current = self
            .path("keys")
            .join(PAYMENTS)
            .join(&files.id)
            .join("current");
        eventually("a file was delivered", async || fs::read(&current).ok()).await;
        let place = format!("secret/data/relatch/{}", vault.id);
        eventually("OpenBao has a key", async || {
            let held = self.bao.read(&place).await;
            held["data"]["data"]["key"].as_str().map(str::to_owned)
        })
        .await;
        for key in [program, echo] {
            self.held(key).await;
        }
        for key in &keys {
            let stop = ["policy", "set", &key.id, "--rotate-every", "never"];
            self.run(&stop).await;
            self.run(&["rotate", "status", &key.id]).await;
        }
        let held = self.bao.read(&place).await;
        let mut delivered = vec![held["data"]["data"]["key"].clone()];
        delivered.extend(self.echo.refused().into_iter().map(Value::from));
        for file in [current, self.path(HANDED)] {
            let keys = fs::read_to_string(file).expect("it was delivered");
            delivered.extend(keys.lines().map(Value::from));
        }
        assert!(delivered.len() >= 4, "{}", delivered.len());
        for key in delivered {
            let key = key.as_str().expect("a key");
            self.canaries.add_token("a key that was delivered", key);
        }
    }

    /// Waits until the rotation of a key is held up, and everybody is told why.
    async fn held(&mut self, key: &Issued) {
        let list = ["audit", "list", "--keyring", PAYMENTS, "--limit", "1000"];
        eventually("a rotation is held", async || {
            let log = self.control.cli_json(&list).await;
            let mut entries = log.as_array()?.iter();
            let is_held = |entry: &&Value| {
                let change = &entry["payload"];
                change["note"]["what"] == "held" && change["key_id"] == key.id.as_str()
            };
            entries.find(is_held).map(drop)
        })
        .await;
    }

    /// Secrets stand where they do not belong, and are wrong where they do.
    pub(super) async fn mistake(&mut self, key: &Issued, admin: &Issued, signing: &str) {
        let (secret, token) = (key.secret.as_str(), admin.secret.as_str());
        for args in [
            &["key", "show", secret][..],
            &["usage", secret],
            &["revoke", secret, "--all", "--reason", "leaked"],
            &["rotate", "start", secret],
            &["rotate", "status", secret],
            &["rotate", "retire", secret],
            &["policy", "set", secret, "--overlap", "1d"],
            &["token", "end", token],
            &["webhook", "test", "--keyring", PAYMENTS, signing],
            &["keyring", "show", secret],
            &["keyring", "create", secret],
            &["consumer", "show", secret],
            &["key", "list", "--keyring", secret],
            &["explain", "--keyring", PAYMENTS, secret],
            &["explain", "--keyring", PAYMENTS, "--key", secret],
            &["check", secret],
            &["--token", token, "fleet"],
            &["fleet", token],
            &[secret],
        ] {
            let output = self.control.cli(args).await;
            assert!(!output.status.success(), "{}", output.stdout);
            self.left.add(
                "a command with a secret among its arguments",
                [output.stdout, output.stderr].concat(),
            );
        }

        let unknown = token_of_nobody(&mut self.canaries, "an unknown admin token");
        let parts = [random_text(), random_text()];
        for part in &parts {
            let name = "a token file that holds something else";
            self.canaries.add(name, part.as_bytes());
        }
        let garbage = parts.join(" \u{7}\n");
        for (name, token) in [
            ("unknown", unknown.as_str()),
            ("garbage", &garbage),
            ("key", secret),
            ("truncated", &token[..token.len() - 4]),
        ] {
            let file = self.path(&format!("{name}.token"));
            write_private(&file, token);
            let fleet = ["fleet"];
            let output = self.control.cli_as(&file, &fleet).await;
            assert!(!output.status.success(), "{}", output.stdout);
            self.keep(&fleet, &output);
        }
        let viewer = self.path(&format!("{}.token", admin.id));
        let create = ["keyring", "create", "mine"];
        let output = self.control.cli_as(&viewer, &create).await;
        assert_eq!(output.status.code(), Some(6), "{}", output.stderr);
        self.keep(&create, &output);
    }

    /// Files of secrets that hold something else, and files of settings that hold a secret.
    pub(super) async fn misconfigure(&mut self) {
        let broken = self.path("broken");
        fs::create_dir(&broken).expect("the directory is the test's");
        let text_of = |canaries: &mut Canaries, name: &str| {
            let secret = random_text();
            canaries.add(name, secret.as_bytes());
            secret
        };
        let pepper = text_of(&mut self.canaries, "a pepper that is none");
        let pepper_file = broken.join("pepper.json");
        write_private(
            &pepper_file,
            &format!("{{\"id\":1,\"secret\":\"{pepper}\"}}"),
        );
        let snapshot = text_of(&mut self.canaries, "a snapshot key that is none");
        let snapshot_key = broken.join("snapshot.key");
        write_private(
            &snapshot_key,
            &format!("relatch-snapshot-key-1:{snapshot}\n"),
        );
        let tls = text_of(&mut self.canaries, "a certificate's key that is none");
        let tls_key = broken.join("tls.key");
        let begin = "-----BEGIN PRIVATE KEY-----";
        let end = "-----END PRIVATE KEY-----";
        write_private(&tls_key, &format!("{begin}\n{tls}\n{end}\n"));

        let control = ["control", "--data-dir", text(&broken)];
        self.fails(&control, "pepper file").await;
        let certs = self.certs();
        let base = "control: { endpoints: [\"http://127.0.0.1:1\"] }\nkeyrings: [{ name: payments }]\n\
                    listen: 127.0.0.1:0\nhttp: 127.0.0.1:0\nlog: { level: trace }\n";
        let url = text_of(&mut self.canaries, "a password in a URL");
        let field = text_of(&mut self.canaries, "a secret in a file of settings");
        let file = broken.join("sidecar.yaml");
        for (yaml, words) in [
            (
                format!("{base}snapshot: {{ path: {0}/a.snap, key_file: {0}/snapshot.key }}\n", text(&broken)),
                "snapshot key",
            ),
            (
                base.replace(
                    "listen: 127.0.0.1:0",
                    &format!(
                        "listen: {{ address: \"127.0.0.1:0\", tls: {{ cert: {}/ext-authz.pem, key: {}, client_ca: {0}/ca.pem }} }}",
                        text(&certs),
                        text(&tls_key)
                    ),
                ),
                "tls.key",
            ),
            (format!("{base}snapshot: {{ key: {field} }}\n"), "snapshot"),
            (format!("{base}token: {field}\n"), "token"),
            (format!("{base}credentials: [{{ header: x-api-key, value: {field} }}]\n"), "credentials"),
            (base.replace("http://", &format!("http://user:{url}@")), "endpoints"),
            (
                format!("{base}telemetry: {{ otlp_endpoint: \"http://user:{url}@127.0.0.1:1\" }}\n"),
                "otlp_endpoint",
            ),
        ] {
            fs::write(&file, yaml).expect("the directory is the test's");
            self.fails(&["sidecar", "--config", text(&file)], words).await;
        }
        fs::remove_file(&file).expect("it was written");
        for secret in [
            &pepper_file,
            &snapshot_key,
            &tls_key,
            &self.path(TOKEN_FILE),
        ] {
            let check = ["config", "check", text(secret)];
            self.fails(&check, "").await;
            self.fails(&["sidecar", "--config", text(secret)], "").await;
        }
        let admin = format!("https://user:{url}@localhost:1");
        self.fails(&["fleet", "--admin", &admin], "").await;
        let file = self.path("keyring.snap");
        for key in [&snapshot_key, &self.path("snapshot.key")] {
            let inspect = ["snapshot", "inspect", text(&file), "--key-file", text(key)];
            self.command(&inspect, "").await;
        }
    }

    /// Runs a command that has to fail, with `words`.
    async fn fails(&mut self, args: &[&str], words: &str) {
        let output = process::relatch(args, "").await;
        assert!(!output.status.success(), "{args:?}: {}", output.stdout);
        assert!(output.stderr.contains(words), "{args:?}: {}", output.stderr);
        self.left.add(
            "a command that fails",
            [output.stdout, output.stderr].concat(),
        );
    }

    /// Stops the control plane, has a sidecar start from its file alone, and starts the control plane again: with what it
    /// had saved, and with its log as text.
    pub(super) async fn begin_again(&mut self, mut edge: Sidecar) -> Sidecar {
        self.left.add_shown("control", &self.control.process);
        self.left.add_shown("edge-1", &edge.process);
        self.control.process.signal(Signal::TERM);
        assert!(self.control.process.exit().await.success());
        self.left.add_output("control", &self.control.process);
        assert!(edge.stop().await.success());
        self.left.add_output("edge-1", &edge.process);

        let mut edge = self.sidecar("edge-1", "text").await;
        let taken = "keyring loaded from the snapshot file";
        edge.process.wait_for_line(taken).await;
        let config = self.path(CONFIG_FILE);
        let yaml = fs::read_to_string(&config).expect("the control plane has it");
        let yaml = yaml.replace("format: json", "format: text");
        fs::write(&config, yaml).expect("the directory is the test's");
        self.control.restart().await;
        let key = self.key().await;
        self.rotate(&key.id).await;
        edge
    }

    /// Looks at everything that processes show while they run.
    pub(super) async fn look(&mut self, sidecars: &[&Sidecar]) {
        for page in ["/metrics", "/readyz", "/livez", "/status"] {
            for sidecar in sidecars {
                let shown = sidecar.get(page).await.text();
                self.left.add(format!("a sidecar's {page}"), shown);
            }
            let shown = Request::get(page).send(self.control.http()).await.text();
            self.left.add(format!("the control plane's {page}"), shown);
        }
        for sidecar in sidecars {
            self.left.add_shown("a sidecar", &sidecar.process);
        }
        self.left.add_shown("control, again", &self.control.process);
        let sockets = fs::read("/proc/net/unix").expect("there are Unix sockets");
        self.left.add("Unix sockets", sockets);
        // While all is in use, so that what waits to be merged into the store is there.
        let dir = self.dir.path().to_owned();
        self.left.add_files(&dir, &|path| {
            let path = text(path);
            SECRET_FILES.iter().any(|end| path.ends_with(end))
        });
    }

    /// Ends the control plane.
    pub(super) async fn stop(&mut self) {
        self.control.process.signal(Signal::TERM);
        assert!(self.control.process.exit().await.success());
        self.left
            .add_output("control, again", &self.control.process);
        self.left.add("spans", self.spans.sent());
    }

    /// Searches everything.
    pub(super) fn judge(&self) {
        for (place, text) in [
            ("control: output", "\"level\":\"DEBUG\""),
            ("control, again: output", " INFO "),
            ("edge-1: output", "\"level\":\"DEBUG\""),
            ("edge-2: output", "DEBUG"),
            ("spans", "relatch.rotation"),
            ("spans", "envoy.service.auth.v3.Authorization/Check"),
            ("spans", "relatch-sidecar"),
            ("a sidecar's /metrics", "relatch_checks_total"),
            ("a sidecar's /status", PAYMENTS),
            ("the control plane's /metrics", "relatch_"),
            ("relatch.db", "version_staged"),
            ("keyring.snap", "edge-1"),
            ("webhook", "webhook-signature"),
            ("a denial", "unknown_key"),
            ("Envoy", "insufficient"),
            ("/proc/PID/cmdline", "--config"),
            (
                "/proc/PID/limits",
                "Max core file size        0                    0",
            ),
            ("Unix sockets", "authz.sock"),
        ] {
            assert!(self.left.has(place, text), "no {text:?} in {place}");
        }
        assert!(!self.left.has("output", "panicked at"));
        let mut found = self.left.search(&self.canaries);
        found.extend(self.left.search(&self.passing));
        found.extend(self.arrived.search(&self.canaries));
        eprintln!("{} secrets, {} bytes", self.canaries.len(), self.left.len());
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}
