//! What may still be serving: links that are cut, files that are left, namesakes, and answers that come late.
//!
//! Each test asks a sidecar that the control plane cannot reach, as its Envoy does: what a command has promised has to hold
//! there, too.

use std::{path::PathBuf, process, time::Duration};

use relatch::{
    clock::{BootTime, Clock},
    key::Timestamp,
};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::deployment::{Control, IssuedKey, KEYRING, Sidecar, Verdict, last_line, time};
use crate::support::{
    eventually::{eventually, within},
    process::{Output, relatch},
    proxy::{Fault, FaultProxy},
    relatch::{sidecar_yaml, text},
};

/// A sidecar whose link can be cut.
struct Edge {
    sidecar: Sidecar,
    proxy: FaultProxy,
    node: String,
    yaml: String,
}

/// A check, and when it was asked.
struct Asked {
    sent: BootTime,
    verdict: Verdict,
}

/// A directory for the snapshot file of a sidecar, with a key.
struct Disk(TempDir);

/// How long the control plane lets a sidecar serve: long enough for a few commands on a busy machine.
const BOUND: Duration = Duration::from_secs(15);
const BOUND_SETTINGS: &str = "max_serve_for: 15s\n";
/// The pause between two checks.
const PAUSE: Duration = Duration::from_millis(20);
const STALE: &str = "keyring_stale";

impl Edge {
    /// Starts a sidecar and waits until it has its keyring.
    async fn start(control: &Control, node: &str) -> Self {
        Self::with(control, node, "").await
    }

    /// As [`Self::start`], with the lines `more` in its file.
    async fn with(control: &Control, node: &str, more: &str) -> Self {
        // The lock that proves the end of a process is one of this machine, not of this test.
        let node = format!("{node}-{}", process::id());
        let proxy = FaultProxy::start(control.plane.discovery()).await;
        let yaml = sidecar_yaml(&node, proxy.address(), &[KEYRING]) + more;
        let sidecar = Sidecar::with_config(&yaml).await;
        sidecar.ready().await;
        Self {
            sidecar,
            proxy,
            node,
            yaml,
        }
    }

    /// Cuts the link, and waits until the control plane has noticed.
    async fn cut(&self, control: &Control) {
        self.proxy.cut().await;
        until_presence(control, &self.node, "lost").await;
    }

    /// Makes the link whole, and waits until the sidecar is ready again.
    async fn heal(&self) {
        self.proxy.set(Fault::None);
        self.sidecar.ready().await;
    }

    /// Starts a process in the place of one that has ended.
    async fn start_again(&mut self) {
        self.sidecar.daemon.process.exit().await;
        self.sidecar = Sidecar::with_config(&self.yaml).await;
    }

    /// Asks for `key` without a pause worth the name while `work` is under way.
    async fn asked_while<T>(&self, key: &str, work: impl Future<Output = T>) -> (T, Vec<Asked>) {
        let clock = Clock::system();
        let mut all = Vec::new();
        let asking = async {
            loop {
                let sent = clock.boot();
                let verdict = self.sidecar.check(key).await;
                all.push(Asked { sent, verdict });
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            biased;
            done = work => (done, all),
            () = asking => unreachable!("it asks until the work is done"),
        }
    }

    /// Whatever happens here, `key` is denied, for some checks in a row.
    async fn denies(&self, key: &str) {
        for _ in 0..20 {
            let verdict = self.sidecar.check(key).await;
            assert!(!verdict.allowed, "{}: {verdict:?}", self.node);
            tokio::time::sleep(PAUSE).await;
        }
    }
}

impl Disk {
    async fn new() -> Self {
        let disk = Self(tempfile::tempdir().expect("a directory can be made"));
        let key_file = disk.0.path().join("snapshot.key");
        let made = relatch(&["config", "snapshot-key", text(&key_file)], "").await;
        assert!(made.status.success(), "{}", made.stderr);
        disk
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("keyring.snap")
    }

    /// The lines of a sidecar that keeps its file here.
    fn settings(&self) -> String {
        let key_file = self.0.path().join("snapshot.key");
        format!(
            "snapshot: {{ path: {}, key_file: {} }}\n",
            text(&self.file()),
            text(&key_file)
        )
    }
}

/// What `fleet` says of the processes of a node.
async fn runs(control: &Control, node: &str) -> Vec<Value> {
    let fleet = control.json(&["fleet"]).await;
    let all = fleet.as_array().expect("a list of sidecars").iter();
    all.filter(|run| run["node"] == node).cloned().collect()
}

async fn presences(control: &Control, node: &str) -> Vec<String> {
    let runs = runs(control, node).await;
    let presences = runs.iter().map(|run| run["presence"].as_str());
    let mut presences: Vec<String> = presences.flatten().map(str::to_owned).collect();
    presences.sort();
    presences
}

async fn until_presence(control: &Control, node: &str, presence: &str) {
    eventually(&format!("{node} is {presence}"), async || {
        let presences = presences(control, node).await;
        presences.iter().any(|is| is == presence).then_some(())
    })
    .await;
}

async fn revoke(control: &Control, key: &IssuedKey, more: &[&str]) -> Output {
    let revoke = ["revoke", &key.id, "--all", "--reason", "leaked", "--wait"];
    control.run(&[&revoke, more].concat()).await
}

/// A revocation that was waited for.
async fn revoked(control: &Control, key: &IssuedKey) -> Value {
    let done = revoke(control, key, &[]).await;
    assert_eq!(done.status.code(), Some(0), "{}", done.stderr);
    last_line(&done)
}

/// It was waited for in vain, and the command names for whom, until when, and the way out.
fn assert_waits_for(output: &Output, node: &str) {
    assert_eq!(output.status.code(), Some(5), "{}", output.stderr);
    let waits = format!("{node}, lost since ");
    let forget = format!("relatch fleet forget {node} --reason");
    for part in [&waits, "may serve its last revision until", &forget] {
        assert!(output.stderr.contains(part), "{part}: {}", output.stderr);
    }
    assert!(!output.stdout.contains("\"secret\""), "{}", output.stdout);
}

fn passed_by(event: &Value) -> Vec<&str> {
    let runs = event["passed_by"].as_array().map(Vec::as_slice);
    let nodes = runs.unwrap_or_default().iter();
    nodes.filter_map(|run| run["node"].as_str()).collect()
}

/// The newest entry of a kind in the log of the control plane itself.
async fn own_log(control: &Control, kind: &str) -> Value {
    let log = control.json(&["audit", "list", "--limit", "1000"]).await;
    let entries = log.as_array().expect("a list of changes").iter();
    let found = entries.rev().find(|entry| entry["kind"] == kind);
    found.unwrap_or_else(|| panic!("no {kind}: {log}")).clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_is_handed_out_when_no_sidecar_serves_without_it() {
    let control = Control::start_brisk(BOUND_SETTINGS).await;
    let old = control.create_key().await;
    let whole = Edge::start(&control, "rotation-whole").await;
    let cut = Edge::start(&control, "rotation-cut").await;
    cut.cut(&control).await;

    let start = ["rotate", "start", &old.id];
    let late = control
        .run(&[&start[..], &["--timeout", "2s"]].concat())
        .await;
    assert_waits_for(&late, &cut.node);
    assert_eq!(cut.sidecar.check(&old.secret).await, Verdict::allowed(1));
    let (new, asked) = cut.asked_while(&old.secret, control.rotate(&old.id)).await;

    cut.denies(&old.secret).await;
    assert_eq!(cut.sidecar.check(&new.secret).await.reason, STALE);
    let allowed = asked.iter().filter(|asked| asked.verdict.allowed).count();
    assert!(allowed > 0, "it did not serve while it was waited for");
    let denied = asked.iter().find(|asked| !asked.verdict.allowed);
    assert_eq!(
        denied.map(|asked| asked.verdict.reason.as_str()),
        Some(STALE)
    );
    assert_eq!(
        whole.sidecar.check(&new.secret).await,
        Verdict::allowed(new.version)
    );
    cut.heal().await;
    assert_eq!(
        cut.sidecar.check(&new.secret).await,
        Verdict::allowed(new.version)
    );
    assert_eq!(cut.sidecar.check(&old.secret).await, Verdict::allowed(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_is_done_when_no_sidecar_that_is_cut_off_allows_the_key() {
    let control = Control::start_brisk(BOUND_SETTINGS).await;
    let key = control.create_key().await;
    let whole = Edge::start(&control, "revocation-whole").await;
    let cut = Edge::start(&control, "revocation-cut").await;
    cut.cut(&control).await;

    let late = revoke(&control, &key, &["--timeout", "2s"]).await;
    assert_waits_for(&late, &cut.node);
    assert!(
        late.stderr.contains("the revocation is committed"),
        "{}",
        late.stderr
    );
    assert_eq!(cut.sidecar.check(&key.secret).await, Verdict::allowed(1));
    whole.denies(&key.secret).await;
    let (done, asked) = cut.asked_while(&key.secret, revoked(&control, &key)).await;

    cut.denies(&key.secret).await;
    assert_eq!((&done["applied"], &done["total"]), (&1.into(), &1.into()));
    let allowed = asked.iter().filter(|asked| asked.verdict.allowed).count();
    assert!(allowed > 0, "it did not serve while it was waited for");
    cut.heal().await;
    assert_eq!(
        cut.sidecar.check(&key.secret).await,
        Verdict::denied("revoked", 1)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_is_used_where_nobody_sees_it_does_not_retire() {
    const CUT_FOR: Duration = Duration::from_secs(20);
    // The bound leaves room for the longest wait before an attempt to connect, 30 s, after the cut.
    let control = Control::start_brisk("max_serve_for: 2min\n").await;
    let old = control.create_key().await;
    control
        .set_policy(&["--overlap", "2s", "--idle-for", "2s"])
        .await;
    let whole = Edge::start(&control, "evidence-whole").await;
    let cut = Edge::start(&control, "evidence-cut").await;
    let new = control.rotate(&old.id).await;
    cut.cut(&control).await;

    // Much longer than it would have to be unused.
    let pause = tokio::time::sleep(CUT_FOR);
    let ((), asked) = cut.asked_while(&old.secret, pause).await;
    let (shown, more) = cut
        .asked_while(&old.secret, control.show_key(&old.id))
        .await;
    for asked in asked.iter().chain(&more) {
        assert_eq!(asked.verdict, Verdict::allowed(1), "at {:?}", asked.sent);
    }
    assert_eq!(shown["versions"][0]["state"], "retiring", "{shown}");

    // It reports all that it saw, and nobody is denied.
    let ((), asked) = cut.asked_while(&old.secret, Box::pin(cut.heal())).await;
    let usage = control.usage_until(&old.id, Clock::system().wall());
    let (_, more) = cut.asked_while(&old.secret, usage).await;
    for asked in asked.iter().chain(&more) {
        assert_eq!(asked.verdict, Verdict::allowed(1), "at {:?}", asked.sent);
    }
    // Only where nobody uses it any more.
    let last_use = Clock::system().wall();
    let retired = control.retired(&old.id, 1).await;
    let idle = time(&retired["at"]).saturating_since(last_use);
    assert!(idle >= Duration::from_secs(1), "after {idle:?}: {retired}");
    for edge in [&whole, &cut] {
        assert_eq!(
            edge.sidecar.check(&new.secret).await,
            Verdict::allowed(new.version)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_left_counts_until_it_cannot_be_served() {
    let control = Control::start_brisk(BOUND_SETTINGS).await;
    control.create_key().await;
    let disk = Disk::new().await;
    let mut edge = Edge::with(&control, "stopped", &disk.settings()).await;
    // It is on the disk, too.
    let key = control.create_key().await;

    assert!(edge.sidecar.daemon.stop().await.success());
    edge.proxy.set(Fault::Cut);
    assert_eq!(presences(&control, &edge.node).await, ["stopped"]);
    let late = revoke(&control, &key, &["--timeout", "1s"]).await;
    assert_eq!(late.status.code(), Some(5), "{}", late.stderr);
    let may_start = "may start from its snapshot file until";
    assert!(late.stderr.contains(may_start), "{}", late.stderr);
    edge.start_again().await;
    assert_eq!(edge.sidecar.check(&key.secret).await, Verdict::allowed(1));
    let (_, asked) = edge.asked_while(&key.secret, revoked(&control, &key)).await;

    edge.denies(&key.secret).await;
    let allowed = asked.iter().filter(|asked| asked.verdict.allowed).count();
    assert!(allowed > 0, "it did not serve while it was waited for");
    edge.heal().await;
    assert_eq!(
        edge.sidecar.check(&key.secret).await,
        Verdict::denied("revoked", 1)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_of_the_node_ends_none_that_it_has_not_witnessed() {
    let control = Control::start_brisk(BOUND_SETTINGS).await;
    let key = control.create_key().await;
    let first = Edge::start(&control, "namesake").await;
    first.cut(&control).await;
    // With a file it holds another lock, as on another machine.
    let disk = Disk::new().await;
    let second = Edge::with(&control, "namesake", &disk.settings()).await;
    assert_eq!(first.node, second.node);
    assert_eq!(
        presences(&control, &first.node).await,
        ["connected", "lost"]
    );

    let late = revoke(&control, &key, &["--timeout", "1s"]).await;
    assert_waits_for(&late, &first.node);
    assert_eq!(first.sidecar.check(&key.secret).await, Verdict::allowed(1));
    second.denies(&key.secret).await;
    let (_, asked) = first
        .asked_while(&key.secret, revoked(&control, &key))
        .await;

    first.denies(&key.secret).await;
    let allowed = asked.iter().filter(|asked| asked.verdict.allowed).count();
    assert!(allowed > 0, "it did not serve while it was waited for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_comes_late_makes_nothing_fresh() {
    let control = Control::start_brisk("max_serve_for: 6s\n").await;
    let key = control.create_key().await;
    let edge = Edge::start(&control, "late").await;

    // Some answers are on their way when the process is stopped, and wait for it there.
    edge.proxy.set(Fault::HeldBack);
    let process = &edge.sidecar.daemon.process;
    eventually("answers to beats are on their way", async || {
        (edge.proxy.held_back() > 300).then_some(())
    })
    .await;
    process.signal(Signal::STOP);
    edge.proxy.set(Fault::Late);
    until_presence(&control, &edge.node, "lost").await;
    let done = revoked(&control, &key).await;
    assert_eq!((&done["applied"], &done["total"]), (&0.into(), &0.into()));
    process.signal(Signal::CONT);

    edge.denies(&key.secret).await;
    // For as long as an answer would have made it fresh.
    let pause = tokio::time::sleep(Duration::from_secs(7));
    let ((), asked) = edge.asked_while(&key.secret, pause).await;
    for asked in asked {
        assert_eq!(asked.verdict.reason, STALE, "at {:?}", asked.sent);
    }
    edge.proxy.cut().await;
    edge.heal().await;
    assert_eq!(
        edge.sidecar.check(&key.secret).await,
        Verdict::denied("revoked", 1)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_sidecar_is_not_waited_for_and_begins_anew() {
    let control = Control::start_brisk("").await;
    let key = control.create_key().await;
    let _whole = Edge::start(&control, "forget-whole").await;
    let cut = Edge::start(&control, "forget-cut").await;
    let forget = ["fleet", "forget", &cut.node];
    let why = ["--reason", "its machine is gone"];
    let code = async |args: &[&str]| control.run(args).await.status.code();

    assert_eq!(code(&[&forget[..], &why].concat()).await, Some(4));
    cut.cut(&control).await;
    assert_eq!(code(&forget).await, Some(2));
    assert_eq!(
        code(&[&forget[..], &["--reason", " "]].concat()).await,
        Some(2)
    );
    let unknown = ["fleet", "forget", "nobody"];
    assert_eq!(code(&[&unknown[..], &why].concat()).await, Some(3));
    let late = revoke(&control, &key, &["--timeout", "1s"]).await;
    assert_waits_for(&late, &cut.node);

    let forgotten = control.json(&[&forget[..], &why].concat()).await;
    assert_eq!(forgotten["forgotten"][0]["node"], cut.node.as_str());
    let entry = own_log(&control, "sidecars_forgotten").await;
    let text = entry.to_string();
    assert!(text.contains(&cut.node), "{text}");
    assert!(text.contains("its machine is gone"), "{text}");
    let done = within(BOUND, "nobody waits for it", revoked(&control, &key)).await;
    assert_eq!((&done["applied"], &done["total"]), (&1.into(), &1.into()));
    assert_eq!(presences(&control, &cut.node).await, ["gone"]);

    // It may have served all the while, which somebody has to know.
    assert_eq!(cut.sidecar.check(&key.secret).await, Verdict::allowed(1));
    let before = cut.sidecar.logged("snapshot applied");
    cut.heal().await;
    cut.sidecar
        .until_logged("snapshot applied", before + 1)
        .await;
    assert_eq!(
        cut.sidecar.check(&key.secret).await,
        Verdict::denied("revoked", 1)
    );
    let log = control.stopped().await;
    assert!(
        log.has("a sidecar that was forgotten has connected again"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_passes_by_those_that_it_is_told_to_and_says_so() {
    let control = Control::start_brisk("").await;
    let [first, second] = [control.create_key().await, control.create_key().await];
    let whole = Edge::start(&control, "pass-whole").await;
    let cut = Edge::start(&control, "pass-cut").await;
    cut.cut(&control).await;

    let without = ["--without", &cut.node];
    let done = revoke(&control, &first, &without).await;
    assert_eq!(done.status.code(), Some(0), "{}", done.stderr);
    assert_eq!(passed_by(&last_line(&done)), [cut.node.as_str()]);
    let entry = own_log(&control, "sidecars_passed_by").await.to_string();
    for part in [&cut.node, &first.id, "revocation"] {
        assert!(entry.contains(part), "{part}: {entry}");
    }

    let start = ["rotate", "start", &second.id, "--without-lost"];
    let done = control.json(&start).await;
    assert_eq!(passed_by(&done), [cut.node.as_str()]);
    let entry = own_log(&control, "sidecars_passed_by").await.to_string();
    for part in [&cut.node, &second.id, "rotation"] {
        assert!(entry.contains(part), "{part}: {entry}");
    }
    let new = IssuedKey::from_json(&done);
    assert_eq!(
        whole.sidecar.check(&new.secret).await,
        Verdict::allowed(new.version)
    );
    // Whoever is passed by is still there, and still waited for by others.
    assert_eq!(presences(&control, &cut.node).await, ["lost"]);
    let late = revoke(&control, &second, &["--timeout", "1s"]).await;
    assert_waits_for(&late, &cut.node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_waits_names_whom_for_and_ends_alike_by_time_and_by_ctrl_c() {
    let control = Control::start_brisk("").await;
    let key = control.create_key().await;
    let cut = Edge::start(&control, "named").await;
    cut.cut(&control).await;

    let create = ["key", "create", "--keyring", KEYRING, "--consumer", "acme"];
    let admin = format!("http://{}", control.plane.admin());
    let token = text(control.plane.token_file());
    let connection = ["-o", "table", "--admin", &admin, "--token-file", token];
    let late = [&create[..], &["--timeout", "4s"], &connection].concat();
    let late = relatch(&late, "").await;
    assert_waits_for(&late, &cut.node);
    let progress = format!(
        "0 of 1 sidecars confirmed; {} has been lost since ",
        cut.node
    );
    assert!(late.stderr.contains(&progress), "{}", late.stderr);

    let rotate = ["rotate", "start", &key.id];
    let revoke = ["revoke", &key.id, "--all", "--reason", "leaked", "--wait"];
    let barrier = r#""event":"barrier""#;
    for (waits, line) in [
        (&create[..], "waiting until every sidecar"),
        (&rotate, barrier),
        (&revoke, barrier),
    ] {
        let mut command = control.plane.cli_started(waits);
        command.wait_for_line(line).await;
        command.signal(Signal::INT);
        assert_eq!(command.exit().await.code(), Some(5), "{waits:?}");
        let said = command.lines().join("\n");
        assert!(said.contains("interrupted"), "{said}");
        assert!(!said.contains("\"secret\""), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_restarts_waits_for_the_rest_of_the_bound() {
    const LONG: Duration = Duration::from_secs(30);
    /// The rest of each bound is written down every ten seconds.
    const WRITTEN_DOWN: Duration = Duration::from_secs(15);
    let mut control = Control::start_brisk("max_serve_for: 30s\n").await;
    let key = control.create_key().await;
    let cut = Edge::start(&control, "restart-cut").await;
    cut.cut(&control).await;
    tokio::time::sleep(WRITTEN_DOWN).await;

    control.plane.kill().await;
    control.plane.restart().await;
    let began = Clock::system().boot();
    let lost = runs(&control, &cut.node).await;
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!(lost[0]["presence"], "lost");
    let until: Timestamp = time(&lost[0]["serves_until"]);
    let rest = until.saturating_since(Clock::system().wall());
    let most = LONG.mul_f64(1.01).saturating_sub(Duration::from_secs(4));
    assert!(rest <= most, "{rest:?} are left");
    let late = revoke(&control, &key, &["--timeout", "1s"]).await;
    assert_waits_for(&late, &cut.node);
    assert_eq!(cut.sidecar.check(&key.secret).await, Verdict::allowed(1));
    let (_, asked) = cut.asked_while(&key.secret, revoked(&control, &key)).await;

    cut.denies(&key.secret).await;
    let served = asked.iter().rfind(|asked| asked.verdict.allowed);
    let served = served.expect("it served while it was waited for").sent;
    assert!(served > began, "it did not serve any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_is_seen_as_the_next_process_starts_in_its_place() {
    // Nobody waits for bounds here: they are an hour away.
    let control = Control::start_brisk("").await;
    control.create_key().await;
    let disk = Disk::new().await;
    for (node, more) in [("crash", String::new()), ("crash-file", disk.settings())] {
        let mut edge = Edge::with(&control, node, &more).await;
        // It is on the disk, too, where there is one.
        let key = control.create_key().await;
        edge.sidecar.daemon.process.kill().await;
        until_presence(&control, &edge.node, "lost").await;
        let late = revoke(&control, &key, &["--timeout", "1s"]).await;
        assert_waits_for(&late, &edge.node);

        edge.start_again().await;
        edge.sidecar.ready().await;
        let done = within(BOUND, "nobody waits for it", revoked(&control, &key)).await;
        assert_eq!(done["applied"], done["total"]);
        assert_eq!(
            edge.sidecar.check(&key.secret).await,
            Verdict::denied("revoked", 1)
        );
        let live = presences(&control, &edge.node).await;
        let live = live.iter().filter(|presence| *presence != "gone");
        assert_eq!(live.collect::<Vec<_>>(), ["connected"]);
        assert!(edge.sidecar.daemon.stop().await.success());
    }
}
