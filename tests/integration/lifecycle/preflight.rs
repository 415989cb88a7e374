//! `relatch config check`: what would stop a start is found before it.

use std::{
    fs,
    net::TcpListener,
    os::unix::{fs::PermissionsExt, net::UnixListener, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    process::{Output, RELATCH, relatch, run},
    relatch::{sidecar_yaml, text},
};

/// A directory with files that a daemon's file names.
struct Machine(TempDir);

/// A user without rights of its own.
const NOBODY: u32 = 65_534;
const TOKEN: &str = "0123456789abcdef0123456789abcdef";

impl Machine {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory can be made"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: &str, mode: u32) -> String {
        let path = self.path(name);
        fs::write(&path, content).expect("the test's directory can be written to");
        set_mode(&path, mode);
        text(&path).to_owned()
    }

    /// Certificates of one authority in the directory `name`; returns its path.
    async fn certificates(&self, name: &str) -> String {
        let dir = text(&self.path(name)).to_owned();
        let made = relatch(&["certs", "dev", "--out", &dir], "").await;
        assert!(made.status.success(), "{}", made.stderr);
        dir
    }

    async fn key(&self, name: &str) -> String {
        let path = text(&self.path(name)).to_owned();
        let made = relatch(&["config", "snapshot-key", &path], "").await;
        assert!(made.status.success(), "{}", made.stderr);
        path
    }

    /// Every file with its content's length, below all directories.
    fn files(&self) -> Vec<(PathBuf, u64)> {
        let mut found = Vec::new();
        let mut places = vec![self.0.path().to_owned()];
        while let Some(place) = places.pop() {
            for entry in fs::read_dir(place).expect("readable") {
                let entry = entry.expect("readable");
                let metadata = entry.metadata().expect("readable");
                if metadata.is_dir() {
                    places.push(entry.path());
                }
                found.push((entry.path(), metadata.len()));
            }
        }
        found.sort_unstable();
        found
    }
}

#[tokio::test]
async fn everything_that_would_stop_a_sidecar_is_found_at_once() {
    let machine = Machine::new();
    let [one, other] = [
        machine.certificates("one").await,
        machine.certificates("other").await,
    ];
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let taken = taken.local_addr().map(|address| (taken, address));
    let (_taken, address) = taken.expect("it is bound");
    let garbage = machine.write("garbage.pem", "no certificate", 0o644);
    let key = machine.key("snapshot.key").await;
    set_mode(Path::new(&key), 0o644);
    let snapshot = text(&machine.path("missing/keyring.snap")).to_owned();
    let yaml = format!(
        "node: {{ id: edge-1 }}\n\
         listen: {address}\n\
         http: 192.0.2.1:1\n\
         control:\n\
         \x20 endpoints: [\"https://localhost:9010\"]\n\
         \x20 tls:\n\
         \x20   ca: {garbage}\n\
         \x20   cert: {one}/node-edge-1.pem\n\
         \x20   key: {other}/node-edge-1.key\n\
         keyrings: [{{ name: payments }}]\n\
         snapshot: {{ path: {snapshot}, key_file: {key} }}\n"
    );
    let file = machine.write("sidecar.yaml", &yaml, 0o644);
    let before = machine.files();

    let checked = check(&file, &[]).await;

    assert_eq!(checked.status.code(), Some(1), "{}", checked.stdout);
    assert_eq!(
        findings(&checked),
        [
            (2, "listen", "choose another port"),
            (3, "http", "an address of this machine"),
            (9, "control.tls.key", "is not the key of the certificate"),
            (7, "control.tls.ca", "holds no certificate"),
            (11, "snapshot.key_file", "chmod 600"),
            (11, "snapshot.path", "create it"),
        ]
        .map(said(&checked))
    );
    let table = relatch(&["config", "check", &file, "-o", "table"], "").await;
    let line = format!("{file}:2:9: listen: cannot listen on {address}: ");
    assert!(table.stdout.starts_with(&line), "{}", table.stdout);
    assert!(table.stdout.contains("6 problems"), "{}", table.stdout);
    let daemon = relatch(&["sidecar", "--config", &file], "").await;
    assert_eq!(daemon.status.code(), Some(1));

    let offline = check(&file, &["--offline"]).await;
    assert_eq!(offline.status.code(), Some(0), "{}", offline.stdout);
    assert_eq!(findings(&offline), []);
    assert_eq!(machine.files(), before);
}

#[tokio::test]
async fn the_listener_over_http_is_checked_too() {
    let machine = Machine::new();
    let certs = machine.certificates("certs").await;
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = taken.local_addr().expect("it is bound");
    let yaml = format!(
        "node: {{ id: edge-1 }}\n\
         listen: 127.0.0.1:0\n\
         http: 127.0.0.1:0\n\
         http_authz:\n\
         \x20 listen:\n\
         \x20   address: {address}\n\
         \x20   tls: {{ cert: {certs}/ext-authz.pem, key: {certs}/control.key }}\n\
         \x20 profiles: [{{ name: shop, dialect: caddy, keyring: payments }}]\n\
         control: {{ endpoints: [\"http://127.0.0.1:9010\"] }}\n\
         keyrings: [{{ name: payments }}]\n"
    );
    let file = machine.write("sidecar.yaml", &yaml, 0o644);
    let checked = check(&file, &[]).await;
    assert_eq!(
        findings(&checked),
        [
            (6, "http_authz.listen", "choose another port"),
            (
                7,
                "http_authz.listen.tls.key",
                "is not the key of the certificate"
            ),
        ]
        .map(said(&checked))
    );
    let summary = document(&checked)["summary"].to_string();
    let end = format!("; over HTTP on {address}: shop for caddy\"");
    assert!(summary.ends_with(&end), "{summary}");
}

#[tokio::test]
async fn a_key_that_is_wrong_does_not_hide_what_is_wrong_with_its_certificate() {
    const CERT: &str = "listen.tls.cert";
    const KEY: &str = "listen.tls.key";
    let machine = Machine::new();
    let dir = machine.certificates("tls").await;
    let yaml = |cert: &str, key: &str| {
        format!(
            "node: {{ id: edge-1 }}\n\
             listen: {{ address: \"127.0.0.1:0\", tls: {{ cert: {cert}, key: {key} }} }}\n\
             http: 127.0.0.1:0\n\
             control: {{ endpoints: [\"http://127.0.0.1:9010\"] }}\n\
             keyrings: [{{ name: payments }}]\n"
        )
    };
    let cert = format!("{dir}/ext-authz.pem");
    let key = format!("{dir}/ext-authz.key");
    let garbage = machine.write("garbage.key", "no key", 0o600);
    let exposed = fs::read_to_string(&key).expect("readable");
    let exposed = machine.write("exposed.key", &exposed, 0o604);
    let damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let damaged = machine.write("damaged.pem", damaged, 0o644);
    for (cert, key, expected) in [
        (&*cert, &*key, &[][..]),
        (&cert, &exposed, &[(2, KEY, "chmod o=")]),
        (&cert, "/nonexistent.key", &[(2, KEY, "check the path")]),
        (
            "/nonexistent.pem",
            &garbage,
            &[
                (2, KEY, "holds no private key"),
                (2, CERT, "check the path"),
            ],
        ),
        (&damaged, &key, &[(2, CERT, "damaged")]),
        (&key, &key, &[(2, CERT, "holds no certificate")]),
    ] {
        let file = machine.write("sidecar.yaml", &yaml(cert, key), 0o644);
        let checked = check(&file, &[]).await;
        let expected: Vec<_> = expected.iter().copied().map(said(&checked)).collect();
        assert_eq!(findings(&checked), expected, "{cert} {key}");
        let code = i32::from(!expected.is_empty());
        assert_eq!(checked.status.code(), Some(code));
    }
}

#[tokio::test]
async fn what_lies_where_a_socket_and_a_snapshot_are_to_be_is_found() {
    let machine = Machine::new();
    let key = machine.key("snapshot.key").await;
    let socket = machine.path("authz.sock");
    let snapshot = machine.write("keyring.snap", "whatever", 0o644);
    let yaml = format!(
        "node: {{ id: edge-1 }}\n\
         listen: unix://{}\n\
         http: 127.0.0.1:0\n\
         control: {{ endpoints: [\"http://127.0.0.1:9010\"] }}\n\
         keyrings: [{{ name: payments }}]\n\
         snapshot: {{ path: {snapshot}, key_file: {key} }}\n",
        socket.display()
    );
    let file = machine.write("sidecar.yaml", &yaml, 0o644);
    let aside = (6, "snapshot.path", "puts it aside");
    let in_use = (2, "listen", "stop the process that listens there");

    let nothing = check(&file, &[]).await;
    let listener = UnixListener::bind(&socket).expect("nothing is there");
    let live = check(&file, &[]).await;
    drop(listener);
    let stale = check(&file, &[]).await;
    assert!(socket.exists(), "it is left alone");
    fs::remove_file(&socket).expect("it is there");
    fs::write(&socket, "precious").expect("writable");
    let other = check(&file, &[]).await;

    for (checked, code, expected) in [
        (nothing, 0, vec![aside]),
        (live, 1, vec![in_use, aside]),
        (stale, 0, vec![aside]),
        (other, 1, vec![in_use, aside]),
    ] {
        assert_eq!(checked.status.code(), Some(code), "{}", checked.stdout);
        let expected: Vec<_> = expected.into_iter().map(said(&checked)).collect();
        assert_eq!(findings(&checked), expected);
    }
}

#[tokio::test]
async fn what_a_control_plane_needs_is_looked_at() {
    let machine = Machine::new();
    let data = machine.path("data");
    let (pepper, store) = (data.join("pepper.json"), data.join("relatch.db"));
    let dir = text(&data);
    let yaml = format!(
        "data_dir: {dir}\n\
         discovery: 127.0.0.1:0\n\
         admin: 127.0.0.1:0\n\
         http: 127.0.0.1:0\n"
    );
    let file = machine.write("control.yaml", &yaml, 0o644);
    let expect = async |code: i32, expected: &[(u64, &str, &str)]| {
        let before = machine.files();
        let checked = check(&file, &[]).await;
        let expected: Vec<_> = expected.iter().copied().map(said(&checked)).collect();
        assert_eq!(findings(&checked), expected);
        assert_eq!(checked.status.code(), Some(code), "{}", checked.stdout);
        assert_eq!(machine.files(), before);
    };
    expect(1, &[(1, "data_dir", "relatch control init")]).await;
    let init = relatch(&["control", "init", "--config", &file], "").await;
    assert!(init.status.success(), "{}", init.stderr);
    expect(0, &[]).await;

    set_mode(&pepper, 0o644);
    expect(0, &[(1, "pepper_file", "chmod 600")]).await;
    let (elsewhere, other) = (data.join("elsewhere"), data.join("other"));
    fs::rename(&pepper, &elsewhere).expect("it is there");
    expect(1, &[(1, "pepper_file", "restore the file from its copy")]).await;
    fs::rename(&store, &other).expect("it is there");
    expect(1, &[(1, "data_dir", "relatch control init")]).await;
    fs::rename(&elsewhere, &pepper).expect("it is there");
    set_mode(&pepper, 0o600);
    expect(1, &[(1, "store.sqlite", "restore the store from a backup")]).await;
    fs::write(&pepper, "{}").expect("writable");
    fs::write(&store, "no database").expect("writable");
    expect(
        1,
        &[
            (1, "pepper_file", "is not a pepper file"),
            (1, "store.sqlite", "is not a database of relatch"),
        ],
    )
    .await;
    fs::remove_dir_all(&data).expect("it is ours");
    fs::write(&data, "").expect("writable");
    expect(1, &[(1, "data_dir", "is not a directory")]).await;
}

#[tokio::test]
async fn a_store_that_cannot_be_owned_is_found() {
    let machine = Machine::new();
    let data = machine.path("data");
    let yaml = format!(
        "data_dir: {}\ndiscovery: 127.0.0.1:0\nadmin: 127.0.0.1:0\nhttp: 127.0.0.1:0\n",
        data.display()
    );
    let file = machine.write("control.yaml", &yaml, 0o644);
    let init = relatch(&["control", "init", "--config", &file], "").await;
    assert!(init.status.success(), "{}", init.stderr);
    let [store, lock, copy] =
        ["relatch.db", "relatch.db.lock", "copy.db"].map(|name| data.join(name));
    let held = fs::File::open(&lock).expect("it is there");

    held.try_lock().expect("nobody runs");
    let in_use = check(&file, &[]).await;
    fs::rename(&store, &copy).expect("writable");
    let creating = check(&file, &[]).await;
    held.unlock().expect("it is held");
    fs::rename(&copy, &store).expect("it is there");
    fs::hard_link(&store, &copy).expect("writable");
    let before = machine.files();
    let linked = check(&file, &[]).await;
    assert_eq!(machine.files(), before);
    let start = relatch(&["control", "--config", &file], "").await;

    assert_eq!(in_use.status.code(), Some(0), "{}", in_use.stdout);
    let expected = [(1, "store.sqlite", "a second control plane would not start")];
    assert_eq!(findings(&in_use), expected.map(said(&in_use)));
    assert_eq!(document(&in_use)["findings"][0]["weight"], "warning");
    assert_eq!(creating.status.code(), Some(1), "{}", creating.stdout);
    let expected = [(1, "store.sqlite", "may be creating what is missing")];
    assert_eq!(findings(&creating), expected.map(said(&creating)));
    assert_eq!(linked.status.code(), Some(1), "{}", linked.stdout);
    let expected = [(1, "store.sqlite", "has 2 names")];
    assert_eq!(findings(&linked), expected.map(said(&linked)));
    assert_eq!(start.status.code(), Some(4), "{}", start.stderr);
    assert!(start.stderr.contains("has 2 names"), "{}", start.stderr);
}

#[tokio::test]
async fn the_pepper_of_another_store_is_found_while_nobody_uses_the_store() {
    let machine = Machine::new();
    let [data, other] = ["data", "other"].map(|name| machine.path(name));
    for dir in [&data, &other] {
        let init = ["control", "init", "--data-dir", text(dir)];
        assert!(relatch(&init, "").await.status.success());
    }
    let yaml = format!(
        "data_dir: {}\npepper_file: {}\n\
         discovery: 127.0.0.1:0\nadmin: 127.0.0.1:0\nhttp: 127.0.0.1:0\n",
        data.display(),
        other.join("pepper.json").display()
    );
    let file = machine.write("control.yaml", &yaml, 0o644);
    let before = machine.files();

    let checked = check(&file, &[]).await;

    assert_eq!(checked.status.code(), Some(1), "{}", checked.stdout);
    let expected = [(2, "pepper_file", "is not the pepper of")];
    assert_eq!(findings(&checked), expected.map(said(&checked)));
    assert_eq!(machine.files(), before);
    let start = relatch(&["control", "--config", &file], "").await;
    assert_eq!(start.status.code(), Some(4), "{}", start.stderr);
}

#[tokio::test]
async fn tokens_and_sinks_are_looked_at() {
    let machine = Machine::new();
    let data = machine.path("data");
    let init = ["control", "init", "--data-dir", text(&data)];
    assert!(relatch(&init, "").await.status.success());
    let tls = machine.certificates("tls").await;
    let open = machine.write("open.token", TOKEN, 0o640);
    let short = machine.write("short.token", "short", 0o600);
    let vault = machine.write("vault.token", "hvs.token", 0o640);
    let script = machine.write("deliver", "#!/bin/sh\n", 0o644);
    let keys = machine.path("keys");
    fs::create_dir(&keys).expect("writable");
    set_mode(&keys, 0o777);
    let identity = |node: u8| format!("identity: \"spiffe://mesh.example/edge-{node}\"");
    let yaml = format!(
        "data_dir: {data}\n\
         discovery:\n\
         \x20 address: 127.0.0.1:0\n\
         \x20 tls: {{ cert: {tls}/control.pem, key: {tls}/control.key }}\n\
         \x20 tokens:\n\
         \x20   - {{ file: {open}, {identity_1} }}\n\
         \x20   - {{ file: {short}, {identity_2} }}\n\
         \x20   - {{ file: /nonexistent.token, {identity_3} }}\n\
         \x20 allow:\n\
         \x20   - {{ identity: \"spiffe://mesh.example/edge-1\", keyrings: [\"*\"] }}\n\
         admin: 127.0.0.1:0\n\
         http: 127.0.0.1:0\n\
         sinks:\n\
         \x20 - {{ name: files, file: {{ directory: {keys} }} }}\n\
         \x20 - {{ name: hook, exec: {{ command: [{script}] }} }}\n\
         \x20 - {{ name: vault, vault: {{ address: \"http://127.0.0.1:8200\", token_file: {vault} }} }}\n\
         \x20 - name: bao\n\
         \x20   vault: {{ address: \"https://bao:8200\", token_file: /nonexistent, ca_file: /nonexistent.pem }}\n",
        data = data.display(),
        keys = keys.display(),
        identity_1 = identity(1),
        identity_2 = identity(2),
        identity_3 = identity(3),
    );
    let file = machine.write("control.yaml", &yaml, 0o644);

    let checked = check(&file, &[]).await;

    assert_eq!(checked.status.code(), Some(1), "{}", checked.stdout);
    assert_eq!(
        findings(&checked),
        [
            (6, "discovery.tokens[0].file", "chmod 600"),
            (7, "discovery.tokens[1].file", "32 to 512"),
            (8, "discovery.tokens[2].file", "check the path"),
            (14, "sinks[0].file.directory", "chmod go-w"),
            (15, "sinks[1].exec.command[0]", "chmod +x"),
            (16, "sinks[2].vault.token_file", "chmod 600"),
            (18, "sinks[3].vault.ca_file", "/nonexistent.pem"),
            (18, "sinks[3].vault.token_file", "cannot read the token"),
        ]
        .map(said(&checked))
    );
}

#[tokio::test]
async fn a_daemon_that_runs_is_found_by_its_addresses_and_its_store() {
    let control = super::deployment::Control::start().await;
    let yaml = format!(
        "data_dir: {}\ndiscovery: {}\nadmin: {}\nhttp: 127.0.0.1:0\n",
        control.data_dir().display(),
        control.plane.discovery(),
        control.plane.admin()
    );
    let machine = Machine::new();
    let file = machine.write("control.yaml", &yaml, 0o644);

    let checked = check(&file, &[]).await;

    let in_use = "if it is this daemon, --offline";
    let process = format!(
        "`relatch control`, process {} on ",
        control.plane.process.id()
    );
    let expected = [
        (1, "store.sqlite", process.as_str()),
        (2, "discovery", in_use),
        (3, "admin", in_use),
    ];
    assert_eq!(findings(&checked), expected.map(said(&checked)));
    assert_eq!(document(&checked)["findings"][0]["weight"], "warning");
    control.create_key().await;
}

#[tokio::test]
async fn what_the_user_of_the_daemon_may_not_do_is_found() {
    let machine = Machine::new();
    let key = machine.key("snapshot.key").await;
    let locked = machine.path("locked");
    fs::create_dir(&locked).expect("writable");
    set_mode(&locked, 0o555);
    let discovery = "127.0.0.1:9010".parse().expect("an address");
    let yaml = format!(
        "{}snapshot: {{ path: {}/keyring.snap, key_file: {key} }}\n",
        sidecar_yaml("edge-1", discovery, &["payments"]),
        locked.display()
    );
    let file = machine.write("sidecar.yaml", &yaml, 0o644);
    set_mode(machine.0.path(), 0o755);
    let mut command = Command::new(RELATCH);
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        // Root may do everything. The program is put where the other user can reach it.
        let program = machine.path("relatch");
        if fs::hard_link(RELATCH, &program).is_err() {
            fs::copy(RELATCH, &program).expect("there is room");
        }
        command = Command::new(&program);
        command.uid(NOBODY).gid(NOBODY);
    } else {
        set_mode(Path::new(&key), 0o000);
    }

    let checked = run(command.args(["config", "check", &file, "-o", "json"]), "").await;

    assert_eq!(checked.status.code(), Some(1), "{}", checked.stdout);
    let expected = [
        (7, "snapshot.key_file", "check the path and its permissions"),
        (7, "snapshot.path", "cannot create files"),
    ];
    assert_eq!(findings(&checked), expected.map(said(&checked)));
    let user = if is_root {
        NOBODY
    } else {
        rustix::process::geteuid().as_raw()
    };
    assert_eq!(checked.status.code(), Some(1));
    assert_eq!(document(&checked)["checked_as"], user);
}

async fn check(file: &str, flags: &[&str]) -> Output {
    let check = ["config", "check", file, "-o", "json"];
    relatch(&[&check, flags].concat(), "").await
}

fn document(checked: &Output) -> Value {
    let problem = |error| panic!("{error}: {} {}", checked.stdout, checked.stderr);
    serde_json::from_str(&checked.stdout).unwrap_or_else(problem)
}

/// Line, field and message of each finding.
fn findings(checked: &Output) -> Vec<(u64, String, String)> {
    let document = document(checked);
    let findings = document["findings"].as_array().expect("a list");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    findings
        .iter()
        .map(|finding| {
            let line = finding["line"].as_u64().expect("a line");
            (line, text(&finding["field"]), text(&finding["message"]))
        })
        .collect()
}

/// Puts in the place of a part of a message the whole one that was said of that field, where it has the part.
fn said<'a>(
    checked: &Output,
) -> impl FnMut((u64, &'a str, &'a str)) -> (u64, String, String) + use<'a> {
    let found = findings(checked);
    move |(line, field, part)| {
        let whole = found
            .iter()
            .find(|(_, name, message)| name == field && message.contains(part));
        let message = whole.map_or_else(|| part.to_owned(), |(_, _, message)| message.clone());
        (line, field.to_owned(), message)
    }
}

fn set_mode(path: &Path, mode: u32) {
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(path, permissions).expect("it is ours");
}
