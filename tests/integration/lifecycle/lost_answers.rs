//! Answers that get lost on their way: the connection breaks after the commit, as the new secret passes.

use std::{
    io,
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::process::Signal;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::deployment::{CONSUMER, Control, IssuedKey, KEYRING, Sidecar, Verdict, last_line};
use crate::support::{
    eventually::eventually,
    process::{self, Output, Process},
    relatch::text,
};

/// Stands between commands and the admin API, and cuts a connection as a secret is about to pass to the command.
struct Cutter {
    address: SocketAddr,
    /// How many more connections it cuts.
    cuts: Arc<AtomicUsize>,
    _server: JoinSet<()>,
}

/// What a secret begins with on its way, and nothing else that is asked for here does: a key, an admin token, and the secret
/// of a webhook.
const SECRETS: [&[u8]; 3] = [b"rlk_", b"rlat_", b"whsec_"];

impl Cutter {
    async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("a loopback port is free");
        let address = listener.local_addr().expect("it is bound");
        let cuts = Arc::new(AtomicUsize::new(0));
        let mut task = JoinSet::new();
        let left = Arc::clone(&cuts);
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, server, Arc::clone(&left)));
            }
        });
        Self {
            address,
            cuts,
            _server: task,
        }
    }

    /// Cuts the next connections.
    fn cut(&self, connections: usize) {
        self.cuts.store(connections, Ordering::SeqCst);
    }

    fn left(&self) -> usize {
        self.cuts.load(Ordering::SeqCst)
    }

    /// Runs a command through it.
    async fn run(&self, control: &Control, args: &[&str]) -> Output {
        let admin = format!("http://{}", self.address);
        let token = text(control.plane.token_file());
        let connection = ["--admin", &admin, "--token-file", token, "-o", "json"];
        process::relatch(&[args, &connection].concat(), "").await
    }
}

async fn carry(
    mut client: TcpStream,
    server: SocketAddr,
    left: Arc<AtomicUsize>,
) -> io::Result<()> {
    let mut server = TcpStream::connect(server).await?;
    client.set_zero_linger()?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let down = async {
        let mut passed = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let len = from_server.read(&mut piece).await?;
            if len == 0 {
                return Ok(());
            }
            passed.extend_from_slice(&piece[..len]);
            let is_secret = SECRETS
                .iter()
                .any(|secret| passed.windows(secret.len()).any(|window| window == *secret));
            let one_less = |left: usize| left.checked_sub(1);
            if is_secret
                && left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less)
                    .is_ok()
            {
                return Ok::<(), io::Error>(());
            }
            to_client.write_all(&piece[..len]).await?;
        }
    };
    tokio::select! {
        end = copy(&mut from_client, &mut to_server) => end.map(drop),
        end = down => end,
    }
}

const CREATE: [&str; 7] = [
    "key",
    "create",
    "--keyring",
    KEYRING,
    "--consumer",
    CONSUMER,
    "--create-missing",
];

fn versions(key: &Value) -> usize {
    key["versions"].as_array().expect("versions").len()
}

async fn keys(control: &Control) -> usize {
    let keys = control.json(&["key", "list"]).await;
    keys.as_array().expect("a list").len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_asks_again_for_a_lost_answer_and_nothing_is_done_twice() {
    let control = Control::start().await;
    let cutter = Cutter::before(control.plane.admin()).await;

    cutter.cut(1);
    let created = cutter.run(&control, &CREATE).await;
    let key = IssuedKey::from_json(&created.json());
    assert_eq!(cutter.left(), 0, "the answer was lost once");
    assert_eq!(keys(&control).await, 1);
    let sidecar = Sidecar::start(&control, "edge-1").await;
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));

    cutter.cut(2);
    let rotated = cutter.run(&control, &["rotate", "start", &key.id]).await;
    let new = IssuedKey::from_json(&rotated.json());
    assert_eq!((cutter.left(), new.version), (0, 2));
    assert_eq!(versions(&control.show_key(&key.id).await), 2);
    assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));

    cutter.cut(1);
    let emergency = ["rotate", "start", &key.id, "--emergency", "--reason", "x"];
    let rotated = cutter.run(&control, &emergency).await;
    assert_eq!(rotated.status.code(), Some(0), "{}", rotated.stderr);
    assert_eq!(cutter.left(), 0);
    assert_eq!(last_line(&rotated)["event"], "old_revoked");
    let mut events = rotated
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"));
    let handed_over = events.find(|event| event["event"] == "handed_over");
    let newest = IssuedKey::from_json(&handed_over.expect("it was handed over"));
    assert_eq!(versions(&control.show_key(&key.id).await), 3);
    assert_eq!(sidecar.check(&newest.secret).await, Verdict::allowed(3));
    assert_eq!(
        sidecar.check(&new.secret).await,
        Verdict::denied("revoked", 2)
    );

    cutter.cut(1);
    let token = ["token", "create", "--name", "ci", "--role", "issuer"];
    let token = cutter.run(&control, &token).await.json();
    assert_eq!(cutter.left(), 0);
    let file = control.data_dir().join("ci.token");
    let secret = token["secret"].as_str().expect("a token");
    std::fs::write(&file, secret).expect("the test's directory can be written to");
    let listed = control.plane.cli_as(&file, &["key", "list"]).await;
    assert_eq!(listed.status.code(), Some(0), "{}", listed.stderr);
    let tokens = control.json(&["token", "list"]).await;
    assert_eq!(tokens.as_array().map(Vec::len), Some(2), "{tokens}");

    cutter.cut(1);
    let url = "https://hooks.example/";
    let add = ["webhook", "add", "--keyring", KEYRING, "--url", url];
    let added = cutter.run(&control, &add).await.json();
    assert_eq!(cutter.left(), 0);
    assert!(added["signing_secret"].is_string());
    let webhooks = control.json(&["webhook", "list"]).await;
    assert_eq!(webhooks.as_array().map(Vec::len), Some(1), "{webhooks}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_gets_no_answer_does_not_say_that_nothing_was_handed_out() {
    let control = Control::start().await;
    let [rotated, leaked] = [(); 2].map(|()| control.create_key());
    let (rotated, leaked) = (rotated.await, leaked.await);
    let cutter = Cutter::before(control.plane.admin()).await;
    cutter.cut(usize::MAX);
    let rotate = ["rotate", "start", &rotated.id];
    let why = ["--emergency", "--reason", "leaked"];
    let emergency = [&["rotate", "start", &leaked.id][..], &why].concat();

    let (created, rotated_output, emergency_output) = tokio::join!(
        cutter.run(&control, &CREATE),
        cutter.run(&control, &rotate),
        cutter.run(&control, &emergency),
    );

    for output in [&created, &rotated_output, &emergency_output] {
        assert_eq!(output.status.code(), Some(7), "{}", output.stderr);
        assert!(!output.stdout.contains("secret"), "{}", output.stdout);
        let said = &output.stderr;
        assert!(!said.contains("was not handed out"), "{said}");
        assert!(said.contains("not known"), "{said}");
    }
    let neither = "the consumer has no accepted key until you get the secret";
    assert!(
        emergency_output.stderr.contains(neither),
        "{}",
        emergency_output.stderr
    );
    // What the message says helps: the same command with the key that it names.
    let again = async |args: &[&str], output: &Output| {
        let (_, key) = output
            .stderr
            .split_once("--idempotency-key ")
            .expect("it is named");
        let key = key.split_whitespace().next().expect("a key");
        let output = control
            .run(&[args, &["--idempotency-key", key]].concat())
            .await;
        assert_eq!(output.status.code(), Some(0), "{}", output.stderr);
        let lines = output.stdout.lines();
        let mut with_secret = lines.filter(|line| line.contains("\"secret\":\"rlk_"));
        let line = with_secret.next().expect("the secret is there").to_owned();
        IssuedKey::from_json(&serde_json::from_str(&line).expect("JSON"))
    };
    let key = again(&CREATE, &created).await;
    let second = again(&rotate, &rotated_output).await;
    let replaced = again(&emergency, &emergency_output).await;
    assert_eq!(keys(&control).await, 3);
    for id in [&second.id, &replaced.id] {
        assert_eq!(versions(&control.show_key(id).await), 2);
    }
    let sidecar = Sidecar::start(&control, "edge-1").await;
    for (key, version) in [(&key, 1), (&second, 2), (&replaced, 2)] {
        assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(version));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_has_forgotten_an_answer_says_what_stands() {
    let mut control = Control::start().await;
    let with =
        |args: &[&'static str], key: &'static str| [args, &["--idempotency-key", key]].concat();
    let create = with(&CREATE, "make");
    let key = IssuedKey::from_json(&control.json(&create).await);
    let rotate = ["rotate", "start", &key.id, "--idempotency-key", "turn"];
    control.json(&rotate).await;
    let token = ["token", "create", "--name", "ci", "--role", "viewer"];
    let token = with(&token, "token");
    control.json(&token).await;

    control.plane.kill().await;
    control.plane.restart().await;

    for (args, stands) in [
        (
            &create[..],
            "was created (version 1 is retiring) by an earlier call with this idempotency key",
        ),
        (&rotate[..], "version 2 of key"),
        (
            &token[..],
            "(ci) was created by an earlier call with this idempotency key",
        ),
    ] {
        let output = control.run(args).await;
        assert_eq!(output.status.code(), Some(8), "{}", output.stderr);
        assert!(output.stderr.contains(stands), "{}", output.stderr);
        assert!(
            output.stderr.contains("secret is forgotten"),
            "{}",
            output.stderr
        );
        assert!(output.stderr.contains("hint: "), "{}", output.stderr);
        assert!(!output.stdout.contains("\"secret\""), "{}", output.stdout);
    }
    // A later rotation does not hide what the earlier call has done.
    control.rotate(&key.id).await;
    let output = control.run(&rotate).await;
    assert_eq!(output.status.code(), Some(8), "{}", output.stderr);
    assert_eq!(keys(&control).await, 1);
    assert_eq!(versions(&control.show_key(&key.id).await), 3);
    let tokens = control.json(&["token", "list"]).await;
    assert_eq!(tokens.as_array().map(Vec::len), Some(2), "{tokens}");

    let revoke = ["revoke", &key.id, "--all", "--reason", "over"];
    control.json(&revoke).await;
    let refused = control.run(&create).await;
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("is revoked (over)"),
        "{}",
        refused.stderr
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_goes_through_although_the_control_plane_is_killed_while_it_waits() {
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    sidecar.daemon.process.signal(Signal::STOP);
    let mut rotate = control.plane.cli_started(&["rotate", "start", &key.id]);
    rotate.wait_for_line(r#""event":"barrier""#).await;
    control.plane.kill().await;
    control.plane.restart().await;
    sidecar.daemon.process.signal(Signal::CONT);

    let status = rotate.exit().await;

    assert_eq!(status.code(), Some(0), "{:?}", rotate.lines());
    let lines = rotate.lines();
    let handed_over = lines
        .iter()
        .filter(|line| line.contains(r#""event":"handed_over""#));
    let [handed_over] = handed_over.collect::<Vec<_>>()[..] else {
        panic!("it is handed over once: {lines:?}");
    };
    let new = IssuedKey::from_json(&serde_json::from_str(handed_over).expect("JSON"));
    assert_eq!(
        sidecar.check(&new.secret).await,
        Verdict::allowed(new.version)
    );
    let shown = control.show_key(&key.id).await;
    let versions = shown["versions"].as_array().expect("versions").iter();
    let accepted = versions.filter(|version| version["state"] != "revoked");
    assert_eq!(
        accepted.count(),
        2,
        "the first one and the new one: {shown}"
    );
}

#[tokio::test]
async fn an_idempotency_key_belongs_to_one_call_of_one_token() {
    let control = Control::start().await;
    let once = ["--idempotency-key", "once"];
    let create = [&CREATE[..], &once].concat();
    let key = control.json(&create).await;
    assert_eq!(control.json(&create).await, key);

    let other = [&create[..], &["--name", "another"]].concat();
    let (_, admin) = control.create_token("admin", &[]).await;
    let id = key["key_id"].as_str().expect("an id");
    let rotate = [&["rotate", "start", id][..], &once].concat();
    for refused in [
        control.run(&other).await,
        control.run(&rotate).await,
        control.plane.cli_as(&admin, &create).await,
    ] {
        assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
        let why = "idempotency_key: another call has used it";
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
        assert_eq!(refused.stdout, "");
    }
    assert_eq!(keys(&control).await, 1);
    let bad = [&CREATE[..], &["--idempotency-key", "two words"]].concat();
    let refused = control.run(&bad).await;
    assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_key_is_handed_out_when_every_sidecar_accepts_it() {
    let control = Control::start().await;
    let nobody = control.run(&CREATE).await;
    assert_eq!(nobody.status.code(), Some(0), "{}", nobody.stderr);
    let warning = "no sidecar serves keyring payments";
    assert!(nobody.stderr.contains(warning), "{}", nobody.stderr);

    let mut sidecar = Sidecar::start(&control, "edge-1").await;
    for _ in 0..20 {
        let created = control.run(&CREATE).await;
        assert!(!created.stderr.contains(warning), "{}", created.stderr);
        let key = IssuedKey::from_json(&created.json());
        // Without waiting for anything.
        assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    }
    let before = keys(&control).await;

    sidecar.daemon.process.signal(Signal::STOP);
    let late = [&CREATE[..], &["--timeout", "1s"]].concat();
    let late = control.run(&late).await;
    assert_eq!(late.status.code(), Some(5), "{}", late.stderr);
    assert_eq!(late.stdout, "");
    let said = "was not handed out, and is revoked; confirmed by 0 of 1 sidecars after 1s: edge-1, connected, 1 revision behind";
    assert!(late.stderr.contains(said), "{}", late.stderr);
    let listed = control.json(&["key", "list"]).await;
    let listed = listed.as_array().expect("a list");
    assert_eq!(listed.len(), before + 1);
    let revoked: Vec<&Value> = listed
        .iter()
        .filter(|key| key["state"] == "revoked")
        .collect();
    assert_eq!(revoked.len(), 1, "{revoked:?}");
    let reason = &revoked[0]["versions"][0]["reason"];
    assert_eq!(
        reason,
        "its secret was not handed out: not every sidecar accepted it in time"
    );
    let at_once = [&CREATE[..], &["--no-wait"]].concat();
    IssuedKey::from_json(&control.json(&at_once).await);

    // Whoever gives up waiting gets nothing, and neither does anybody else.
    let made = keys(&control).await;
    let process = control.plane.cli_started(&CREATE);
    eventually("the key is committed", async || {
        (keys(&control).await > made).then_some(())
    })
    .await;
    drop(process);
    control
        .change("the key is revoked", |change| {
            let reason = "its secret was not handed out: the caller disconnected";
            change["kind"] == "versions_revoked" && change["reason"] == reason
        })
        .await;
    sidecar.daemon.process.signal(Signal::CONT);
    sidecar.daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_that_cannot_be_written_can_be_had_again() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let into_nowhere = async |args: &[&str]| {
        let admin = format!("http://{}", control.plane.admin());
        let token = text(control.plane.token_file());
        let script = "exec \"$0\" \"$@\" > /dev/full";
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_relatch")]);
        command.args(args);
        let connection = ["--admin", &admin, "--token-file", token];
        process::run(command.args(connection), "").await
    };
    for args in [
        &CREATE[..],
        &["rotate", "start", &key.id],
        &["token", "create", "--name", "ci", "--role", "viewer"],
    ] {
        let output = into_nowhere(args).await;
        assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
        let said = &output.stderr;
        assert!(said.contains("cannot write to standard output"), "{said}");
        assert!(!said.contains("revocation"), "{said}");
        let (_, again) = said.split_once("--idempotency-key ").expect("it is named");
        let again = again.split_whitespace().next().expect("a key");
        let again = control
            .run(&[args, &["--idempotency-key", again]].concat())
            .await;
        assert_eq!(again.status.code(), Some(0), "{}", again.stderr);
        assert!(again.stdout.contains("\"secret\":\"rl"), "{}", again.stdout);
    }
    assert_eq!(keys(&control).await, 2);
    assert_eq!(versions(&control.show_key(&key.id).await), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_after_a_lost_answer_does_not_hide_the_attempt_before() {
    let control = Control::start().await;
    control.create_key().await;
    let (id, file) = control.create_token("issuer", &[]).await;
    let cutter = Cutter::before(control.plane.admin()).await;
    cutter.cut(usize::MAX);
    let admin = format!("http://{}", cutter.address);
    let connection = ["--admin", &admin, "--token-file", text(&file), "-o", "json"];
    let mut command = Process::relatch(&[&CREATE[..], &connection].concat());
    eventually("an answer is lost", async || {
        (cutter.left() < usize::MAX).then_some(())
    })
    .await;
    control.json(&["token", "end", &id]).await;
    cutter.cut(0);

    let status = command.exit().await;

    assert_eq!(status.code(), Some(6), "{:?}", command.lines());
    let said = command.lines().join("\n");
    let unknown = "it is not known whether the control plane executed the call";
    assert!(said.contains(unknown), "{said}");
    assert!(said.contains("--idempotency-key"), "{said}");
    assert_eq!(keys(&control).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_forgotten_call_has_created_is_no_answer_to_another_call() {
    let mut control = Control::start().await;
    let (_, other) = control.create_token("admin", &[]).await;
    let imported = ["keyring", "create", "partners", "--allow-imported"];
    control.json(&imported).await;
    control
        .json(&["consumer", "create", "acme", "--keyring", "partners"])
        .await;
    let once = ["--idempotency-key", "once"];
    let import = [
        "key",
        "import",
        "--keyring",
        "partners",
        "--consumer",
        "acme",
    ];
    let import = [&import[..], &once].concat();
    let taken = control.plane.cli_reading(&import, "first-secret").await;
    let taken = taken.json();
    let url = "https://hooks.example/";
    let add = ["webhook", "add", "--keyring", "partners", "--url", url];
    let add = [&add[..], &["--idempotency-key", "hook"]].concat();
    let added = control.json(&add).await;
    assert_eq!(control.json(&add).await, added);

    control.plane.kill().await;
    control.plane.restart().await;

    // The same calls, and then others with the same keys.
    assert_eq!(control.json(&add).await, added);
    let again = control.plane.cli_reading(&import, "first-secret").await;
    assert_eq!(again.json()["key_id"], taken["key_id"]);
    let another = control.plane.cli_reading(&import, "other-secret").await;
    assert_eq!(another.status.code(), Some(2), "{}", another.stderr);
    let narrower = control
        .run(&[&add[..], &["--event", "key.revoked"]].concat())
        .await;
    assert_eq!(narrower.status.code(), Some(2), "{}", narrower.stderr);
    control.plane.kill().await;
    control.plane.restart().await;
    let others = control.plane.cli_as(&other, &add).await.json();
    assert_ne!(others["id"], added["id"]);
    assert_ne!(others["signing_secret"], added["signing_secret"]);
    assert_eq!(keys(&control).await, 1);
}

#[tokio::test]
async fn a_webhook_that_was_removed_does_not_come_back_by_a_late_repetition() {
    let control = Control::start().await;
    control.json(&["keyring", "create", KEYRING]).await;
    let url = "https://hooks.example/";
    let add = ["webhook", "add", "--keyring", KEYRING, "--url", url];
    let add = [&add[..], &["--idempotency-key", "hook"]].concat();
    let added = control.json(&add).await;
    let id = added["id"].as_str().expect("an id");
    control
        .json(&["webhook", "remove", "--keyring", KEYRING, id])
        .await;
    let late = control.run(&add).await;
    assert_eq!(late.status.code(), Some(4), "{}", late.stderr);
    assert!(late.stderr.contains("which was removed"), "{}", late.stderr);
}
