//! Everything over TLS, with the certificates of `relatch certs dev`: who gets in, who does not and is told why, and
//! what goes on while certificates change.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use crate::support::{
    client::Request,
    envoy::{AuthzAddress, Envoy, EnvoyOptions},
    eventually::{DEADLINE, eventually, within},
    load::Load,
    process::{Process, relatch},
    relatch::{CERTS, Control, Sidecar, text},
    upstream::Upstream,
};

/// A control plane over TLS.
struct Mesh {
    control: Control,
    dir: TempDir,
}

/// Certificates for three nodes.
const NODES: [&str; 6] = ["--node", "edge-1", "--node", "edge-2", "--node", "edge-3"];
const EDGE_1: &str = "{ identity: \"spiffe://relatch.example/node/edge-1\", keyrings: [\"*\"] }";

/// What a sidecar logs once for each stream.
const OPENED: &str = "stream to the control plane is open";

/// Sidecars whose tokens the control plane has.
const TOKENS: [&str; 2] = ["edge-1", "edge-2"];

impl Mesh {
    async fn start(allow: &str) -> Self {
        Self::start_with(", client_ca: {certs}/ca.pem", &format!("allow: [{allow}]")).await
    }

    /// As [`Self::start`], where sidecars show the tokens of files in the mesh's directory, with `more` about discovery.
    async fn start_with_tokens(more: &str) -> Self {
        Self::start_with("", more).await
    }

    /// `authorities` are those of sidecars, in the directory `{certs}`; `more` is said about discovery.
    async fn start_with(authorities: &str, more: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let certs = dir.path().join(CERTS);
        make(&certs, &[]).await;
        for node in TOKENS {
            write_token(dir.path(), node, &token(node));
        }
        let certs = text(&certs);
        let own = format!("cert: {certs}/control.pem, key: {certs}/control.key");
        let yaml = format!(
            "discovery: {{ tls: {{ {own}{authorities} }}, {more} }}\n\
             admin: {{ tls: {{ {own}, client_ca: {certs}/ca.pem }} }}\nheartbeat: 1s\n"
        );
        let yaml = yaml
            .replace("{certs}", certs)
            .replace("{dir}", text(dir.path()));
        Self {
            control: Control::start_with(dir.path(), &yaml).await,
            dir,
        }
    }

    fn certs(&self) -> PathBuf {
        self.dir.path().join(CERTS)
    }

    async fn create_key(&self) -> Value {
        let create = [
            "key",
            "create",
            "--keyring",
            "payments",
            "--consumer",
            "acme",
        ];
        let create = [&create[..], &["--create-missing"]].concat();
        self.control.cli_json(&create).await
    }

    /// The file of a sidecar that has the certificate of `certificate` and calls itself `node`.
    fn sidecar_yaml(&self, certificate: &str, node: &str) -> String {
        let certs = self.certs();
        let certs = text(&certs);
        format!(
            "node: {{ id: {node} }}\n\
             listen:\n  address: 127.0.0.1:0\n  \
             tls: {{ cert: {certs}/ext-authz.pem, key: {certs}/ext-authz.key, client_ca: {certs}/ca.pem }}\n\
             http: 127.0.0.1:0\n\
             control:\n  endpoints: [\"https://localhost:{port}\"]\n  \
             tls: {{ ca: {certs}/ca.pem, cert: {certs}/node-{certificate}.pem, key: {certs}/node-{certificate}.key, \
             server_identity: \"spiffe://relatch.example/control\" }}\n\
             keyrings: [{{ name: payments }}]\ndefault_keyring: payments\n",
            port = self.control.discovery().port(),
        )
    }

    /// The file of a sidecar that shows the token in `{node}.shown` and calls itself `node`.
    fn yaml_with_token(&self, node: &str) -> String {
        let dir = text(self.dir.path());
        let port = self.control.discovery().port();
        format!(
            "node: {{ id: {node} }}\nlisten: 127.0.0.1:0\nhttp: 127.0.0.1:0\n\
             control:\n  endpoints: [\"https://localhost:{port}\"]\n  \
             tls: {{ ca: {dir}/{CERTS}/ca.pem, token_file: {dir}/{node}.shown }}\n\
             keyrings: [{{ name: payments }}]\ndefault_keyring: payments\n"
        )
    }

    async fn sidecar(&self) -> Sidecar {
        let yaml = self.sidecar_yaml("edge-1", "edge-1");
        Sidecar::start(&yaml).await.until_ready().await
    }

    /// What `relatch check` says, with the certificate that Envoy has.
    async fn check(&self, sidecar: &Sidecar, key: &Value) -> (Option<i32>, String) {
        let certs = self.certs();
        let [ca, cert, key_file] =
            ["ca.pem", "envoy.pem", "envoy.key"].map(|name| certs.join(name));
        let endpoint = format!("https://localhost:{}", tcp(sidecar).port());
        let check = [
            "check",
            "--endpoint",
            &endpoint,
            "--ca",
            text(&ca),
            "--tls-cert",
            text(&cert),
            "--tls-key",
            text(&key_file),
        ];
        let output = relatch(&check, secret(key)).await;
        (
            output.status.code(),
            [output.stdout, output.stderr].concat(),
        )
    }
}

#[tokio::test]
async fn keys_are_made_brought_and_checked_over_tls() {
    let mesh = Mesh::start(EDGE_1).await;
    let key = mesh.create_key().await;
    let sidecar = mesh.sidecar().await;

    let (code, said) = mesh.check(&sidecar, &key).await;
    assert_eq!(code, Some(0), "{said}");
    let fleet = mesh.control.cli_json(&["fleet"]).await;
    assert_eq!(fleet[0]["node"], "edge-1");
    let metrics = sidecar.get("/metrics").await;
    for used in ["discovery_client", "ext_authz_server"] {
        for end in ["not_before", "not_after"] {
            let series = format!("relatch_tls_certificate_{end}_seconds{{use=\"{used}\"}} ");
            assert!(metrics.text().contains(&series), "{series}");
        }
    }
}

#[tokio::test]
async fn who_calls_otherwise_is_told_what_is_wrong() {
    let mut mesh = Mesh::start(EDGE_1).await;
    let certs = mesh.certs();
    let ca = certs.join("ca.pem");
    let [clear, tls] =
        ["http", "https"].map(|scheme| format!("{scheme}://{}", mesh.control.admin()));
    let base = [
        "keyring",
        "list",
        "--token-file",
        text(mesh.control.token_file()),
    ];
    let node = [certs.join("control.pem"), certs.join("control.key")];
    let [cert, key] = node.each_ref().map(|path| text(path));
    for (args, code, words) in [
        // A plaintext call on a port for TLS.
        (vec!["--admin", &clear], 7, "the connection failed"),
        (
            vec!["--admin", &tls],
            7,
            "its issuer is not among the authorities that are trusted here",
        ),
        (
            vec!["--admin", &tls, "--ca", text(&ca)],
            7,
            "it requires a certificate, but none is configured here",
        ),
        (
            vec![
                "--admin",
                &tls,
                "--ca",
                text(&ca),
                "--tls-cert",
                cert,
                "--tls-key",
                key,
            ],
            7,
            "it does not accept our certificate",
        ),
        (
            vec!["--admin", &tls, "--ca", "/nonexistent.pem"],
            2,
            "/nonexistent.pem: cannot be read",
        ),
        (vec!["--admin", &tls, "--tls-cert", cert], 2, "--tls-key"),
        (
            vec!["--admin", "http://10.0.0.1:9011"],
            2,
            "would cross the network unencrypted",
        ),
    ] {
        let output = relatch(&[&base[..], &args].concat(), "").await;
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}: {}",
            output.stderr
        );
        assert!(output.stderr.contains(words), "{args:?}: {}", output.stderr);
    }
    for words in [
        "it may use http://, but this port needs https://",
        "it does not trust the issuer of our certificate",
        "the client presented no certificate, but this port requires one",
        "it is for another use",
    ] {
        mesh.control.process.wait_for_line(words).await;
    }
}

#[tokio::test]
async fn a_sidecar_may_show_a_token_in_the_place_of_a_certificate() {
    let mut mesh = Mesh::start_with_tokens(
        "tokens: [{ file: \"{dir}/edge-1.token\", identity: \"spiffe://relatch.example/node/edge-1\" }, \
         { file: \"{dir}/edge-2.token\", identity: \"spiffe://relatch.example/node/edge-2\" }], \
         allow: [{ identity: \"spiffe://relatch.example/node/*\", keyrings: [\"*\"] }]",
    )
    .await;
    let dir = mesh.dir.path();
    mesh.create_key().await;
    write_shown(dir, "edge-1", &token("edge-1"));
    let good = Sidecar::start(&mesh.yaml_with_token("edge-1")).await;
    let good = good.until_ready().await;
    let fleet = mesh.control.cli_json(&["fleet"]).await;
    assert_eq!(fleet[0]["node"], "edge-1");

    // Another's token, one of nobody, and none.
    let problem = async |words: &str| {
        let other = Sidecar::start(&mesh.yaml_with_token("edge-2")).await;
        eventually(words, async || {
            let status: Value = other.get("/status").await.json();
            let problem = status["control"][0]["problem"].as_str().unwrap_or_default();
            problem.contains(words).then_some(())
        })
        .await;
        assert_eq!(other.get("/readyz").await.status, 503);
    };
    write_shown(dir, "edge-2", &token("edge-1"));
    problem("may not appear as node edge-2").await;
    write_shown(dir, "edge-2", &token("nobody"));
    problem("no file of `discovery.tokens` holds the token of this sidecar").await;
    write_shown(dir, "edge-2", "");
    problem("edge-2.shown holds no token").await;

    // Replaced on both sides: whoever connects anew shows the new one.
    write_shown(dir, "edge-2", &token("new"));
    let late = Sidecar::start(&mesh.yaml_with_token("edge-2")).await;
    write_token(dir, "edge-2", &token("new"));
    late.until_ready().await;
    assert_eq!(good.get("/readyz").await.status, 200);
    let log = mesh.control.process.stop().await;
    for shown in ["edge-1", "nobody", "new"] {
        assert!(!log.has(&token(shown)), "{log}");
    }
}

#[tokio::test]
async fn a_sidecar_gets_what_a_rule_gives_its_identity_and_is_told_why_not_more() {
    let rules = [
        EDGE_1,
        "{ identity: \"spiffe://relatch.example/node/edge-2\", keyrings: [partners] }",
    ];
    let mut mesh = Mesh::start(&rules.join(", ")).await;
    let key = mesh.create_key().await;
    let good = mesh.sidecar().await;
    for (certificate, node, words, place) in [
        (
            "edge-2",
            "edge-2",
            "no rule of `discovery.allow` lets the identity spiffe://relatch.example/node/edge-2 subscribe to payments",
            "/keyrings/0/not_served",
        ),
        (
            "edge-3",
            "edge-3",
            "no rule of `discovery.allow` names the identity spiffe://relatch.example/node/edge-3",
            "/control/0/problem",
        ),
        (
            "edge-2",
            "edge-1",
            "the identity spiffe://relatch.example/node/edge-2 may not appear as node edge-1",
            "/control/0/problem",
        ),
    ] {
        let yaml = mesh.sidecar_yaml(certificate, node);
        let mut refused = Sidecar::start(&yaml).await;
        eventually(words, async || {
            let status: Value = refused.get("/status").await.json();
            let told = status.pointer(place)?.as_str()?;
            told.contains(words).then_some(())
        })
        .await;
        assert_eq!(refused.get("/readyz").await.status, 503);
        for process in [&mut refused.process, &mut mesh.control.process] {
            process.wait_for_line(words).await;
        }
        let (code, said) = mesh.check(&refused, &key).await;
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("keyring_unavailable"), "{said}");
    }
    let (code, said) = mesh.check(&good, &key).await;
    assert_eq!(code, Some(0), "{said}");
    // Nobody waits for those that do not get the keyring.
    let rotate = ["rotate", "start", key["key_id"].as_str().expect("an id")];
    assert_eq!(mesh.control.cli_json(&rotate).await["total"], 1);
}

#[tokio::test]
async fn certificates_are_replaced_under_load_through_envoy_with_no_failed_check() {
    let mut mesh = Mesh::start(EDGE_1).await;
    let key = mesh.create_key().await;
    let mut sidecar = mesh.sidecar().await;
    let upstream = Upstream::start().await;
    let options = EnvoyOptions::new(tcp(&sidecar), upstream.addr()).authz_over_tls(&mesh.certs());
    let envoy = Envoy::start(options).await;
    let secret = secret(&key).to_owned();
    let request = move || Request::get("/").header("x-api-key", &secret);
    let denied = Request::get("/").send(envoy.addr()).await;
    assert_eq!(denied.status, 401, "{}", denied.text());
    let load = Load::start(envoy.addr(), request, 4);
    load.answered(100).await;

    make(&mesh.certs(), &["--force"]).await;
    for (who, address, uses) in [
        (
            "sidecar",
            sidecar.http(),
            ["discovery_client", "ext_authz_server"],
        ),
        (
            "control plane",
            mesh.control.http(),
            ["discovery_server", "admin_server"],
        ),
    ] {
        eventually(
            &format!("the {who} has taken its certificates"),
            async || {
                let page = Request::get("/metrics").send(address).await;
                let taken = uses.map(|used| {
                    format!("relatch_tls_reloads_total{{use=\"{used}\",result=\"taken\"}} 1")
                });
                taken
                    .iter()
                    .all(|line| page.text().contains(line))
                    .then_some(())
            },
        )
        .await;
    }
    load.answered(100).await;

    // The stream that is open goes on, and the next one is made with the new certificates, by both.
    mesh.control.kill().await;
    mesh.control.restart().await;
    sidecar.process.wait_for_lines(OPENED, 2).await;
    let next = mesh.create_key().await;
    eventually("a new key is checked", async || {
        let (code, _) = mesh.check(&sidecar, &next).await;
        (code == Some(0)).then_some(())
    })
    .await;
    load.answered(100).await;
    let totals = load.stop().await;
    assert_eq!(totals.failed, 0, "{:?}", totals.samples);
    assert!(totals.ok >= 300);
    let log = sidecar.process.stop().await;
    assert_eq!(log.count(OPENED), 2, "{log}");
}

#[tokio::test]
async fn who_says_nothing_and_who_says_it_slowly_keep_nobody_out() {
    let mesh = Mesh::start(EDGE_1).await;
    let key = mesh.create_key().await;
    let sidecar = mesh.sidecar().await;
    let ports = [
        tcp(&sidecar),
        mesh.control.discovery(),
        mesh.control.admin(),
    ];
    let mut silent = Vec::new();
    for port in ports {
        for _ in 0..100 {
            silent.push(TcpStream::connect(port).await.expect("it listens"));
        }
    }
    let mut slow = JoinSet::new();
    for port in ports {
        for _ in 0..20 {
            slow.spawn(drip(port));
        }
    }
    let (code, said) = mesh.check(&sidecar, &key).await;
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(mesh.control.cli_json(&["fleet"]).await[0]["node"], "edge-1");
    drop(mesh.sidecar().await);
    // Each is closed at its deadline.
    for mut socket in silent {
        let read = within(
            DEADLINE,
            "a silent connection is closed",
            socket.read(&mut [0]),
        )
        .await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    within(DEADLINE, "a slow connection is closed", slow.join_all()).await;
    let (code, said) = mesh.check(&sidecar, &key).await;
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test]
async fn nothing_listens_in_clear_beyond_this_machine() {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let data = dir.path().join("data");
    for flag in ["--discovery", "--admin-listen"] {
        let start = ["control", "--data-dir", text(&data), flag, "0.0.0.0:0"];
        let mut refused = Process::relatch(&start);
        assert_eq!(refused.exit().await.code(), Some(2));
        let lines = refused.lines().join("\n");
        assert!(
            lines.contains("without `tls` only this machine may connect"),
            "{lines}"
        );
    }
    let file = dir.path().join("sidecar.yaml");
    let yaml = "control: { endpoints: [\"http://127.0.0.1:1\"] }\nkeyrings: [{ name: payments }]\n";
    fs::write(&file, yaml).expect("the test's directory can be written to");
    for (flag, value, words) in [
        (
            "--listen",
            "0.0.0.0:0",
            "without `tls` only this machine may connect",
        ),
        (
            "--control",
            "https://localhost:1",
            "https:// needs `control.tls`",
        ),
    ] {
        let start = ["sidecar", "--config", text(&file), flag, value];
        let mut refused = Process::relatch(&start);
        assert_eq!(refused.exit().await.code(), Some(2));
        let lines = refused.lines().join("\n");
        assert!(lines.contains(words), "{lines}");
    }
}

/// Makes certificates, or replaces them.
async fn make(dir: &Path, more: &[&str]) {
    let args = ["certs", "dev", "--out", text(dir), "--days", "2"];
    let made = relatch(&[&args[..], &NODES, more].concat(), "").await;
    assert!(made.status.success(), "{}", made.stderr);
}

/// Begins a handshake, a byte at a time, until the connection is closed.
async fn drip(port: SocketAddr) {
    // A record of 512 bytes with a ClientHello (RFC 8446, sections 4 and 5.1): it would take a minute.
    let begin = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
    let mut socket = TcpStream::connect(port).await.expect("it listens");
    for byte in begin.into_iter().chain(std::iter::repeat(0)) {
        if socket.write_all(&[byte]).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(120)).await;
    }
}

fn secret(key: &Value) -> &str {
    key["secret"].as_str().expect("a key was made")
}

fn tcp(sidecar: &Sidecar) -> SocketAddr {
    match sidecar.ext_authz() {
        AuthzAddress::Tcp(address) => address,
        AuthzAddress::Unix(path) => panic!("no port: {}", path.display()),
    }
}

/// A token that only this name has.
fn token(name: &str) -> String {
    format!("{name:-<40}")
}

/// Writes what the control plane takes for the token of a node.
fn write_token(dir: &Path, node: &str, token: &str) {
    write_secret(&dir.join(format!("{node}.token")), token);
}

/// Writes what a sidecar shows.
fn write_shown(dir: &Path, node: &str, token: &str) {
    write_secret(&dir.join(format!("{node}.shown")), token);
}

fn write_secret(path: &Path, token: &str) {
    fs::write(path, format!("{token}\n")).expect("writable");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("it is ours");
}

#[tokio::test]
async fn a_pattern_finds_what_a_rule_gives_and_nothing_else() {
    let rules = [
        EDGE_1,
        "{ identity: \"spiffe://relatch.example/node/edge-2\", keyrings: [partners, payments-eu] }",
    ];
    let mesh = Mesh::start(&rules.join(", ")).await;
    let create = ["key", "create", "--consumer", "acme", "--create-missing"];
    for keyring in ["partners", "payments", "payments-us"] {
        let create = [&create[..], &["--keyring", keyring]].concat();
        mesh.control.cli_json(&create).await;
    }
    let entry = "keyrings: [{ name: payments }]\ndefault_keyring: payments\n";
    let held = async |sidecar: &Sidecar| {
        let status: Value = sidecar.get("/status").await.json();
        let keyrings = status["keyrings"].as_array().expect("a list").iter();
        let names = keyrings.map(|keyring| keyring["name"].as_str());
        let names = names.map(|name| name.expect("a name").to_owned());
        names.collect::<Vec<_>>()
    };
    let mut sidecars = Vec::new();
    for (node, pattern) in [("edge-1", "*"), ("edge-2", "p*")] {
        let yaml = mesh.sidecar_yaml(node, node);
        assert!(yaml.contains(entry), "{yaml}");
        let yaml = yaml.replace(entry, &format!("keyrings: [{{ match: \"{pattern}\" }}]\n"));
        sidecars.push(Sidecar::start(&yaml).await.until_ready().await);
    }
    let all = ["partners", "payments", "payments-us"];
    assert_eq!(held(&sidecars[0]).await, all);
    assert_eq!(held(&sidecars[1]).await, ["partners"]);
    for keyring in ["payments-asia", "payments-eu"] {
        let create = [&create[..], &["--keyring", keyring]].concat();
        mesh.control.cli_json(&create).await;
    }
    eventually("the permitted keyring is found", async || {
        (held(&sidecars[1]).await == ["partners", "payments-eu"]).then_some(())
    })
    .await;
    eventually("every new keyring is found", async || {
        (held(&sidecars[0]).await.len() == 5).then_some(())
    })
    .await;
}
