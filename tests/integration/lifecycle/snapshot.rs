//! The snapshot file: sidecars that are killed and start again while no control plane is there.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use relatch::{
    clock::Clock,
    config::{self, SidecarSettings},
    proto::admin::{
        CreateKeyRequest, IssuedKey as WireKey, RevokeRequest, admin_client::AdminClient,
        revoke_request::Which,
    },
    shutdown::Shutdown,
    sidecar::{Sidecar as InProcess, listener},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::mpsc, task::JoinHandle};
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use super::deployment::{CONSUMER, Control, IssuedKey, KEYRING, Sidecar, Verdict, check_request};
use crate::support::{
    eventually::{DEADLINE, eventually, eventually_within, within},
    process::{Output, relatch},
    relatch::{sidecar_yaml, text},
};

/// What a sidecar logs that starts with what its file holds.
const TAKEN: &str = "keyring loaded from the snapshot file";
/// Far less than the half minute after which a file says anew how fresh it is.
const SOON: Duration = Duration::from_secs(15);

/// A directory for the file of a sidecar, with a key.
pub(super) struct Disk(TempDir);

impl Disk {
    pub(super) async fn new() -> Self {
        let disk = Self(tempfile::tempdir().expect("a directory can be made"));
        disk.make_key().await;
        disk
    }

    async fn make_key(&self) {
        let key_file = self.key_file();
        let made = relatch(&["config", "snapshot-key", text(&key_file)], "").await;
        assert!(made.status.success(), "{}", made.stderr);
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("keyring.snap")
    }

    fn key_file(&self) -> PathBuf {
        self.0.path().join("snapshot.key")
    }

    /// The file of sidecar `node`, with the lines `more`.
    fn yaml(&self, control: &Control, node: &str, more: &str) -> String {
        let yaml = sidecar_yaml(node, control.plane.discovery(), &[KEYRING]);
        format!("{yaml}{}{more}", self.lines())
    }

    /// The lines of a sidecar's file that keep its snapshot file here.
    pub(super) fn lines(&self) -> String {
        format!(
            "snapshot: {{ path: {}, key_file: {} }}\n",
            text(&self.file()),
            text(&self.key_file()),
        )
    }

    /// Starts a sidecar that keeps its file here.
    pub(super) async fn start(&self, control: &Control) -> Sidecar {
        Sidecar::with_config(&self.yaml(control, "edge-1", "")).await
    }

    async fn inspect(&self, args: &[&str]) -> Output {
        let file = self.file();
        let inspect = ["snapshot", "inspect", text(&file), "-o", "json"];
        relatch(&[&inspect[..], args].concat(), "").await
    }

    /// What the file holds of [`KEYRING`].
    pub(super) async fn keyring(&self) -> Value {
        self.keyrings().await[0].clone()
    }

    /// What the file holds.
    pub(super) async fn keyrings(&self) -> Value {
        let key_file = self.key_file();
        let shown = self.inspect(&["--key-file", text(&key_file)]).await.json();
        shown["keyrings"].clone()
    }
}

#[tokio::test]
async fn a_sidecar_that_is_killed_seconds_after_its_first_keyring_starts_with_it() {
    let disk = Disk::new().await;
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = disk.start(&control).await;
    // Ready once the control plane has confirmed the keyring: a second later that is on disk. Nothing else is written.
    sidecar.ready().await;
    eventually_within(SOON, "the confirmation is on disk", async || {
        let as_of = disk.keyring().await["as_of"].clone();
        (!as_of.is_null()).then_some(())
    })
    .await;

    control.plane.kill().await;
    drop(sidecar);
    let sidecar = disk.start(&control).await;

    sidecar.ready().await;
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
}

#[tokio::test]
async fn a_sidecar_that_is_killed_starts_without_a_control_plane_where_it_was() {
    let disk = Disk::new().await;
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let revoked = control.create_key().await;
    let sidecar = disk.start(&control).await;
    sidecar.ready().await;
    let later = control.create_key().await;
    let revoke = revoke(&control, &revoked.id).await;
    is_durable(&sidecar, revoke).await;
    let before = sidecar.keyring().await;
    eventually("the control plane knows what is on disk", async || {
        let fleet = control.json(&["fleet"]).await;
        let durable = &fleet[0]["keyrings"][0]["durable_revision"];
        (durable.as_u64() == Some(revoke)).then_some(())
    })
    .await;

    control.plane.kill().await;
    drop(sidecar);
    let sidecar = disk.start(&control).await;

    sidecar.ready().await;
    let allowed = Verdict::allowed(1);
    let denied = Verdict::denied("revoked", 1);
    assert_eq!(sidecar.check(&key.secret).await, allowed);
    assert_eq!(sidecar.check(&later.secret).await, allowed);
    assert_eq!(sidecar.check(&revoked.secret).await, denied);
    let after = sidecar.keyring().await;
    for same in ["epoch", "revision", "keys"] {
        assert_eq!(after[same], before[same]);
    }

    // It goes on from there, and needs no snapshot.
    control.plane.restart().await;
    let new = control.create_key().await;
    sidecar.reaches(new.revision).await;
    assert_eq!(sidecar.check(&new.secret).await, allowed);
    assert_eq!(sidecar.check(&revoked.secret).await, denied);
    is_durable(&sidecar, new.revision).await;
    let log = sidecar.stopped().await;
    assert_eq!(log.count(TAKEN), 1, "{log}");
    assert_eq!(log.count("snapshot applied"), 0, "{log}");
}

#[tokio::test]
async fn what_a_sidecar_has_applied_is_on_disk_when_it_has_stopped() {
    let disk = Disk::new().await;
    let control = Control::start().await;
    control.create_key().await;
    let mut sidecar = disk.start(&control).await;
    sidecar.ready().await;
    let last = control.create_key().await;
    sidecar.reaches(last.revision).await;
    assert!(sidecar.daemon.stop().await.success());
    assert_eq!(disk.keyring().await["revision"], last.revision);
}

#[tokio::test]
async fn a_file_under_another_key_is_refused_and_the_sidecar_starts_with_nothing() {
    let disk = Disk::new().await;
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = disk.start(&control).await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;
    drop(sidecar);
    control.plane.kill().await;
    fs::remove_file(disk.key_file()).expect("it is there");
    disk.make_key().await;

    let sidecar = disk.start(&control).await;

    let verdict = sidecar.check(&key.secret).await;
    assert_eq!(
        (verdict.allowed, verdict.reason.as_str()),
        (false, "keyring_unavailable")
    );
    assert!(!sidecar.is_ready().await);
    let status: Value = sidecar.daemon.get("/status").await.json();
    let refused = status["snapshot"]["refused"].as_str().expect("a reason");
    assert!(refused.contains("another key"), "{refused}");
    assert!(disk.0.path().join("keyring.snap.refused").exists());

    control.plane.restart().await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;
    assert_eq!(disk.keyring().await["revision"], key.revision);
    let log = sidecar.stopped().await;
    assert_eq!(log.count("is refused and put aside"), 1, "{log}");
}

#[tokio::test]
async fn a_file_has_one_process_and_one_node() {
    let disk = Disk::new().await;
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = disk.start(&control).await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;

    // A second process serves, without the file.
    for node in ["edge-1", "edge-2"] {
        let written = fs::metadata(disk.file()).expect("it is there").ino();
        let second = Sidecar::with_config(&disk.yaml(&control, node, "")).await;
        second.ready().await;
        assert_eq!(second.check(&key.secret).await, Verdict::allowed(1));
        let status: Value = second.daemon.get("/status").await.json();
        let problem = status["snapshot"]["problem"].as_str().expect("a reason");
        assert!(problem.contains("another process uses"), "{problem}");
        assert_eq!(second.keyring().await["durable_revision"], 0);
        let log = second.stopped().await;
        assert_eq!(
            log.count("neither reads nor writes the snapshot file"),
            1,
            "{log}"
        );
        let after = fs::metadata(disk.file()).expect("it is there").ino();
        assert_eq!(after, written, "it was not written");
    }
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    drop(sidecar);
    let other = Sidecar::with_config(&disk.yaml(&control, "edge-2", "")).await;
    let status: Value = other.daemon.get("/status").await.json();
    let refused = status["snapshot"]["refused"].as_str().expect("a reason");
    assert!(refused.contains("node edge-1"), "{refused}");
}

#[tokio::test]
async fn a_limit_that_is_raised_during_an_outage_revives_no_file() {
    let disk = Disk::new().await;
    let mut control = Control::start_brisk("").await;
    let key = control.create_key().await;
    let limits =
        |deny_after: &str| format!("staleness: {{ warn_after: 2s, deny_after: {deny_after} }}\n");
    let sidecar = Sidecar::with_config(&disk.yaml(&control, "edge-1", &limits("10s"))).await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;
    control.plane.kill().await;
    eventually("it is stale", async || {
        (sidecar.check(&key.secret).await.reason == "keyring_stale").then_some(())
    })
    .await;
    drop(sidecar);

    let sidecar = Sidecar::with_config(&disk.yaml(&control, "edge-1", &limits("24h"))).await;

    assert_eq!(sidecar.check(&key.secret).await.reason, "keyring_stale");
    control.plane.restart().await;
    sidecar.ready().await;
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
}

#[tokio::test]
async fn a_copy_of_a_file_serves_once_the_control_plane_has_answered() {
    let disk = Disk::new().await;
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let mut sidecar = disk.start(&control).await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;
    sidecar.daemon.stop().await;
    control.plane.kill().await;
    let copy = disk.0.path().join("copy");
    fs::copy(disk.file(), &copy).expect("it is ours");
    fs::rename(&copy, disk.file()).expect("it is ours");

    let sidecar = disk.start(&control).await;

    let verdict = sidecar.check(&key.secret).await;
    assert_eq!(
        (verdict.allowed, verdict.reason.as_str()),
        (false, "keyring_unavailable")
    );
    control.plane.restart().await;
    sidecar.ready().await;
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    let log = sidecar.stopped().await;
    assert_eq!(log.count("its age is unknown"), 1, "{log}");
    assert_eq!(log.count(TAKEN), 1, "{log}");
    // What it holds was enough.
    assert_eq!(log.count("snapshot applied"), 0, "{log}");
}

#[tokio::test]
async fn a_sidecar_that_is_to_leave_nothing_erases_its_file_at_an_orderly_stop() {
    let disk = Disk::new().await;
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let yaml = disk.yaml(&control, "edge-1", "");
    let yaml = yaml.replace("snapshot: {", "snapshot: { erase_on_stop: true,");
    let sidecar = Sidecar::with_config(&yaml).await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;

    // A kill is no orderly stop.
    drop(sidecar);
    assert!(disk.file().exists());
    let mut sidecar = Sidecar::with_config(&yaml).await;
    sidecar.ready().await;
    assert!(sidecar.daemon.stop().await.success());
    assert!(!disk.file().exists());

    // Nor does it need a control plane that is told.
    let sidecar = Sidecar::with_config(&yaml).await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;
    control.plane.kill().await;
    let log = sidecar.stopped().await;
    assert_eq!(log.count("the snapshot file is erased"), 1, "{log}");
    assert!(!disk.file().exists());
}

#[tokio::test]
async fn a_keyring_that_is_too_old_is_denied_after_a_restart_too() {
    let disk = Disk::new().await;
    let mut control = Control::start_brisk("").await;
    let key = control.create_key().await;
    // The control plane confirms every second, and a busy machine makes it late.
    let limits = "staleness: { warn_after: 2s, deny_after: 10s }\n";
    let yaml = disk.yaml(&control, "edge-1", limits);
    let sidecar = Sidecar::with_config(&yaml).await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;
    control.plane.kill().await;
    eventually("it is stale", async || {
        (sidecar.check(&key.secret).await.reason == "keyring_stale").then_some(())
    })
    .await;
    drop(sidecar);

    let sidecar = Sidecar::with_config(&yaml).await;

    assert_eq!(sidecar.check(&key.secret).await.reason, "keyring_stale");
    assert!(!sidecar.is_ready().await);
    let age = sidecar.keyring().await["age_ms"].as_u64();
    assert!(age.is_some_and(|age| age >= 10_000), "{age:?}");
    control.plane.restart().await;
    sidecar.ready().await;
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
}

#[tokio::test]
async fn a_disk_that_takes_no_more_stops_no_check_and_is_told_of() {
    /// Each has a digest of 32 bytes and an id of 12: no file that the disk takes holds all of them.
    const KEYS: usize = 100;
    let disk = Disk::new().await;
    let control = Control::start().await;
    let first = control.create_key().await;
    // 4 KiB: enough for the first state. Beyond it a write fails, as on a disk that is full.
    let yaml = disk.yaml(&control, "edge-1", "");
    let mut sidecar = Sidecar::with_config_after("trap '' XFSZ; ulimit -f 8", &yaml).await;
    sidecar.ready().await;
    is_durable(&sidecar, first.revision).await;

    let (mut admin, token) = (admin(&control).await, bearer(&control));
    let mut last = create(&mut admin, &token).await;
    for _ in 1..KEYS {
        last = create(&mut admin, &token).await;
    }
    sidecar.reaches(last.revision).await;
    // Whatever is written from now on has all keys, and fails.
    let problem = eventually("the disk is full", async || {
        let status: Value = sidecar.daemon.get("/status").await.json();
        status["snapshot"]["problem"].as_str().map(str::to_owned)
    })
    .await;
    assert!(problem.contains("too large"), "{problem}");
    for secret in [&first.secret, &last.secret] {
        assert_eq!(sidecar.check(secret).await, Verdict::allowed(1));
    }
    assert!(sidecar.is_ready().await);
    eventually("the metrics say so", async || {
        let metrics = sidecar.daemon.get("/metrics").await.text();
        metrics.contains("relatch_snapshot_failing 1").then_some(())
    })
    .await;
    let logged = "the snapshot file cannot be written";
    sidecar.until_logged(logged, 1).await;
    eventually("no draft is left behind", async || {
        (!disk.0.path().join("keyring.snap.new").exists()).then_some(())
    })
    .await;

    // What is there is an older state, and whole.
    let durable = sidecar.keyring().await["durable_revision"].as_u64();
    let durable = durable.expect("it keeps a file");
    assert!((first.revision..last.revision).contains(&durable));
    let log = sidecar.daemon.process.kill().await;
    // Before there were too many keys, the file may have been written anew in the place of an append that failed.
    let failures = 1 + log.count("is written again");
    assert_eq!(log.count(logged), failures, "each is logged once: {log}");
    let sidecar = disk.start(&control).await;
    sidecar.reaches(last.revision).await;
    is_durable(&sidecar, last.revision).await;
    let log = sidecar.stopped().await;
    assert_eq!(log.count(TAKEN), 1, "{log}");
}

/// However often it is killed: what it begins with was at some time applied, and nothing is missing that the control plane
/// was told is on the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_in_the_middle_of_a_storm_of_changes_lose_nothing_that_was_told() {
    const KILLS: usize = 8;
    /// Enough that several writes are behind.
    const CHANGES: usize = 15;
    let disk = Disk::new().await;
    let control = Control::start().await;
    control.create_key().await;
    let (storm, mut changes) = Storm::start(&control);
    let mut most_told = 0;
    for _ in 0..KILLS {
        let sidecar = disk.start(&control).await;
        for _ in 0..CHANGES {
            within(DEADLINE, "a change", changes.recv())
                .await
                .expect("the storm goes on");
        }
        let told = durable_as_told(&control).await;
        drop(sidecar);
        most_told = most_told.max(told);

        let kept = disk.keyring().await;
        let revision = kept["revision"].as_u64().expect("a number");
        assert!(revision >= told, "{kept}: revision {told} was on the disk");
        let kinds = changes_until(&control, revision).await;
        let count = |kind: &str| kinds.iter().filter(|is| **is == kind).count();
        let (versions, revoked) = (count("key_created"), count("versions_revoked"));
        assert!(versions > 0 && revoked > 0, "{kinds:?}");
        let states = kept["versions"].as_object().expect("counts by state");
        let all: u64 = states.values().filter_map(Value::as_u64).sum();
        // Revocations may have come ahead of their revision, and of the versions that they end.
        let kept_revoked = kept["versions"]["revoked"].as_u64().unwrap_or_default();
        let ahead = kept_revoked.checked_sub(revoked as u64);
        let ahead = ahead.unwrap_or_else(|| panic!("{kept}: {revoked} were revoked"));
        let possible = versions as u64..=versions as u64 + ahead;
        assert!(possible.contains(&all), "{kept}: there were {versions}");
    }
    storm.abort();
    assert!(
        most_told > 0,
        "the control plane was never told of the disk"
    );
    let sidecar = disk.start(&control).await;
    let last = control.create_key().await;
    sidecar.reaches(last.revision).await;
    sidecar.ready().await;
    assert_eq!(sidecar.check(&last.secret).await, Verdict::allowed(1));
}

#[tokio::test]
async fn a_file_is_inspected_without_telling_a_secret() {
    let disk = Disk::new().await;
    let control = Control::start().await;
    let key = control.create_key().await;
    let mut sidecar = disk.start(&control).await;
    sidecar.ready().await;
    is_durable(&sidecar, key.revision).await;
    sidecar.daemon.stop().await;
    let key_file = disk.key_file();
    let with_key = ["--key-file", text(&key_file)];

    let closed = disk.inspect(&[]).await;
    let shown = closed.json();
    assert_eq!(
        (&shown["node"], &shown["opened"], &shown["keyrings"]),
        (&json!("edge-1"), &json!(false), &Value::Null)
    );
    assert!(closed.stderr.contains("--key-file"), "{}", closed.stderr);
    let opened = disk.inspect(&with_key).await;
    let shown = opened.json();
    assert_eq!(
        (&shown["opened"], &shown["torn"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(shown["age_known"], true);
    assert!(shown["write"].as_u64() > Some(0), "{shown}");
    assert_eq!(shown["id"], closed.json()["id"]);
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("it is there");
    assert_eq!(shown["boot_id"], boot_id.trim());
    let keyring = &shown["keyrings"][0];
    assert_eq!(keyring["serve_for_ms"], 3_600_000);
    assert_eq!(keyring["keyring"], KEYRING);
    assert_eq!(keyring["revision"], key.revision);
    assert_eq!(keyring["versions"]["active"], 1);
    assert!(keyring["as_of"].is_string(), "{keyring}");
    let pepper = fs::read_to_string(control.data_dir().join("pepper.json")).expect("it is there");
    let pepper: Value = serde_json::from_str(&pepper).expect("JSON");
    let secret = fs::read_to_string(&key_file).expect("it is there");
    let secrets = [
        pepper["secret"].as_str().expect("it is there"),
        secret.trim().rsplit(':').next().expect("digits"),
        &key.secret,
    ];
    let file = String::from_utf8_lossy(&fs::read(disk.file()).expect("it is there")).into_owned();
    for secret in secrets {
        for told in [&closed.stdout, &opened.stdout, &opened.stderr, &file] {
            assert!(!told.contains(secret));
        }
    }

    let again = relatch(&["config", "snapshot-key", text(&key_file)], "").await;
    assert_eq!(again.status.code(), Some(4), "{}", again.stderr);
    assert!(
        again.stderr.contains("never overwritten"),
        "{}",
        again.stderr
    );
    cut(&disk.file(), 1);
    assert_eq!(disk.inspect(&with_key).await.json()["torn"], true);
    let other = Disk::new().await;
    let wrong = disk.inspect(&["--key-file", text(&other.key_file())]).await;
    assert_eq!(wrong.status.code(), Some(4), "{}", wrong.stderr);
    assert!(wrong.stderr.contains("another key"), "{}", wrong.stderr);
    fs::remove_file(disk.file()).expect("it is there");
    let missing = disk.inspect(&with_key).await;
    assert_eq!(missing.status.code(), Some(3), "{}", missing.stderr);
}

/// The clock of a sidecar that the test turns, beside a control plane that goes by the machine's.
#[test]
fn a_clock_that_is_set_back_revives_no_expired_key_over_a_restart() {
    let main = Runtime::new().expect("a runtime");
    let disk = main.block_on(Disk::new());
    let mut control = main.block_on(Control::start());
    let start = Clock::system().wall();
    let (clock, hands) = Clock::manual(start);
    let create = [
        "key",
        "create",
        "--keyring",
        KEYRING,
        "--consumer",
        CONSUMER,
    ];
    let more = ["--create-missing", "--expires-in", "30s"];
    let key = main.block_on(control.json(&[&create[..], &more].concat()));
    let key = IssuedKey::from_json(&key);
    let yaml = disk.yaml(&control, "edge-1", "");
    let settings = config::sidecar::parse(&yaml, "sidecar.yaml").expect("it is right");

    // A runtime of its own, which ends as a process does.
    let first = Runtime::new().expect("a runtime");
    let shutdown = Shutdown::new();
    let sidecar = Started::start(&main, &first, &settings, &clock, &shutdown);
    main.block_on(sidecar.until_checked(&key, Verdict::allowed(1)));
    hands.advance(Duration::from_mins(10));
    let expired = Verdict::denied("expired", 1);
    main.block_on(sidecar.until_checked(&key, expired.clone()));
    main.block_on(control.plane.kill());
    shutdown.trigger();
    first.shutdown_background();

    hands.set_wall(start);
    let second = Runtime::new().expect("a runtime");
    let shutdown = Shutdown::new();
    let sidecar = Started::start(&main, &second, &settings, &clock, &shutdown);
    assert_eq!(main.block_on(sidecar.check(&key)), expired);
    shutdown.trigger();
    second.shutdown_background();
}

/// A sidecar in this process.
struct Started(AuthorizationClient<Channel>);

impl Started {
    /// Starts it as soon as its file is free, which the former one may still write to.
    fn start(
        main: &Runtime,
        runtime: &Runtime,
        settings: &SidecarSettings,
        clock: &Clock,
        shutdown: &Shutdown,
    ) -> Self {
        let _entered = runtime.enter();
        main.block_on(eventually("the file is free", async || is_free(settings)));
        let (settings, clock, shutdown) = (settings.clone(), clock.clone(), shutdown.clone());
        let start =
            runtime.spawn(async move { InProcess::start(&settings, clock, &shutdown).await });
        let sidecar = main.block_on(start).expect("it does not panic");
        let sidecar = sidecar.expect("it starts");
        let listener::Endpoint::Tcp(address) = sidecar.endpoints.ext_authz else {
            panic!("it listens on a port");
        };
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a URL");
        let _entered = main.enter();
        Self(AuthorizationClient::new(endpoint.connect_lazy()))
    }

    async fn check(&self, key: &IssuedKey) -> Verdict {
        let answer = self.0.clone().check(check_request(&key.secret)).await;
        Verdict::from(answer.expect("a sidecar answers").into_inner())
    }

    async fn until_checked(&self, key: &IssuedKey, verdict: Verdict) {
        eventually("the verdict", async || {
            (self.check(key).await == verdict).then_some(())
        })
        .await;
    }
}

/// Whether nobody holds the lock of the file.
fn is_free(settings: &SidecarSettings) -> Option<()> {
    let file = &settings.snapshot.as_ref().expect("it keeps a file").path;
    let lock = fs::File::open(file.with_extension("snap.lock"));
    match lock {
        Ok(lock) => lock.try_lock().ok(),
        // Nobody was here yet.
        Err(_) => Some(()),
    }
}

/// Makes and revokes keys for as long as it is let.
struct Storm;

impl Storm {
    fn start(control: &Control) -> (JoinHandle<()>, mpsc::UnboundedReceiver<()>) {
        let (channel, token) = (channel(control), bearer(control));
        let (tell, told) = mpsc::unbounded_channel();
        let storm = tokio::spawn(async move {
            let mut admin = AdminClient::new(channel.connect().await.expect("it listens"));
            while tell.send(()).is_ok() {
                let key = create(&mut admin, &token).await;
                let revoke = RevokeRequest {
                    key_id: key.key_id,
                    which: Some(Which::All(true)),
                    reason: "leaked".to_owned(),
                    ..RevokeRequest::default()
                };
                let revoked = admin.revoke(with(&token, revoke)).await;
                let mut revoked = revoked.expect("it is revoked").into_inner();
                while revoked.message().await.expect("an answer").is_some() {}
                create(&mut admin, &token).await;
            }
        });
        (storm, told)
    }
}

fn channel(control: &Control) -> Endpoint {
    let uri = format!("http://{}", control.plane.admin());
    Channel::from_shared(uri).expect("an address")
}

async fn admin(control: &Control) -> AdminClient<Channel> {
    let channel = channel(control).connect().await;
    AdminClient::new(channel.expect("it listens"))
}

/// What the first administrator shows.
fn bearer(control: &Control) -> MetadataValue<Ascii> {
    let token = fs::read_to_string(control.plane.token_file()).expect("it is there");
    format!("Bearer {token}").parse().expect("ASCII")
}

async fn create(admin: &mut AdminClient<Channel>, token: &MetadataValue<Ascii>) -> WireKey {
    let create = CreateKeyRequest {
        keyring: KEYRING.to_owned(),
        consumer: CONSUMER.to_owned(),
        ..CreateKeyRequest::default()
    };
    let created = admin.create_key(with(token, create)).await;
    created.expect("a key").into_inner()
}

fn with<T>(token: &MetadataValue<Ascii>, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("authorization", token.clone());
    request
}

/// Ends a key everywhere; the revision at which it ended.
async fn revoke(control: &Control, key_id: &str) -> u64 {
    let revoke = ["revoke", key_id, "--all", "--reason", "leaked", "--wait"];
    let revoked = control.json(&revoke).await;
    revoked["revision"].as_u64().expect("a revision")
}

/// Waits until the sidecar says that a revision is on its disk.
async fn is_durable(sidecar: &Sidecar, revision: u64) {
    eventually("it is on the disk", async || {
        let durable = sidecar.keyring().await["durable_revision"].as_u64()?;
        (durable >= revision).then_some(())
    })
    .await;
}

/// The newest revision of which the control plane was told that it is on the sidecar's disk.
async fn durable_as_told(control: &Control) -> u64 {
    let fleet = control.json(&["fleet"]).await;
    let fleet = fleet.as_array().expect("a list of sidecars").iter();
    let connected = fleet.filter(|sidecar| sidecar["connected"] == true);
    connected
        .filter_map(|sidecar| sidecar["keyrings"][0]["durable_revision"].as_u64())
        .max()
        .unwrap_or_default()
}

/// The kinds of the first changes of the log.
async fn changes_until(control: &Control, revision: u64) -> Vec<Value> {
    let mut kinds: Vec<Value> = Vec::new();
    while (kinds.len() as u64) < revision {
        let after = kinds.len().to_string();
        let list = ["audit", "list", "--keyring", KEYRING, "--limit", "1000"];
        let page = control
            .json(&[&list[..], &["--after", &after]].concat())
            .await;
        let page = page.as_array().expect("a list of changes").iter();
        kinds.extend(page.map(|change| change["payload"]["kind"].clone()));
    }
    kinds.truncate(usize::try_from(revision).expect("it is small"));
    kinds
}

/// Takes the last bytes of a file away.
fn cut(path: &Path, bytes: u64) {
    let file = fs::OpenOptions::new().write(true).open(path);
    let file = file.expect("it is ours");
    let len = file.metadata().expect("it is there").len();
    file.set_len(len - bytes).expect("it is cut");
}
