//! Wall clocks that step: a control plane and a sidecar of this process on a clock that the test turns.

use std::time::Duration;

use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use relatch::{
    clock::{Clock, ManualClock},
    config::{self, ControlSettings},
    control::{
        data::{self, Data, NewData},
        plane::ControlPlane,
    },
    key::Timestamp,
    shutdown::Shutdown,
    sidecar::{Sidecar, listener},
};
use serde_json::Value;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use super::deployment::{CONSUMER, IssuedKey, KEYRING, Verdict, check_request};
use crate::support::{
    eventually::{DEADLINE, eventually, within},
    process::relatch,
    relatch::{sidecar_yaml, text},
};

/// One machine: its clocks, and what runs on it.
struct Machine {
    clock: Clock,
    hands: ManualClock,
    plane: ControlPlane,
    checks: AuthorizationClient<Channel>,
    shutdown: Shutdown,
    data: TempDir,
}

const DAY: Duration = Duration::from_hours(24);

impl Machine {
    async fn new() -> Self {
        let start: Timestamp = "2027-01-15T08:00:00Z".parse().expect("RFC 3339");
        let (clock, hands) = Clock::manual(start);
        let data = tempfile::tempdir().expect("a directory can be made");
        let port = "127.0.0.1:0".parse().expect("an address");
        let settings = ControlSettings {
            discovery: port,
            admin: port,
            http: port,
            heartbeat: Duration::from_secs(1),
            ..ControlSettings::new(data.path().to_owned())
        };
        let created = data::initialize(&settings, &clock).await;
        let NewData { token, owner } = created.expect("it can be initialized");
        drop(owner);
        std::fs::write(data.path().join("token"), token.expose()).expect("it is the test's");
        let shutdown = Shutdown::new();
        let stored = Data::open(&settings, &clock, "a test").await;
        let stored = stored.expect("it was created");
        let plane = ControlPlane::start(stored, &settings, clock.clone(), &shutdown).await;
        let plane = plane.expect("it starts");
        let yaml = sidecar_yaml("edge-1", plane.endpoints.discovery, &[KEYRING]);
        let settings = config::sidecar::parse(&yaml, "sidecar.yaml").expect("it is right");
        let sidecar = Sidecar::start(&settings, clock.clone(), &shutdown).await;
        let listener::Endpoint::Tcp(address) = sidecar.expect("it starts").endpoints.ext_authz
        else {
            panic!("it listens on a port");
        };
        let endpoint = Endpoint::from_shared(format!("http://{address}"));
        Self {
            checks: AuthorizationClient::new(endpoint.expect("a URL").connect_lazy()),
            clock,
            hands,
            plane,
            shutdown,
            data,
        }
    }

    async fn json(&self, args: &[&str]) -> Value {
        let admin = format!("http://{}", self.plane.endpoints.admin);
        let token = self.data.path().join("token");
        let connection = [
            "--admin",
            &admin,
            "--token-file",
            text(&token),
            "-o",
            "json",
        ];
        relatch(&[args, &connection].concat(), "").await.json()
    }

    async fn create_key(&self) -> IssuedKey {
        let create = [
            "key",
            "create",
            "--keyring",
            KEYRING,
            "--consumer",
            CONSUMER,
        ];
        let create = [&create[..], &["--create-missing"]].concat();
        IssuedKey::from_json(&self.json(&create).await)
    }

    async fn rotate(&self, key: &IssuedKey, policy: &[&str]) -> IssuedKey {
        let set = ["policy", "set", &key.id];
        self.json(&[&set, policy].concat()).await;
        IssuedKey::from_json(&self.json(&["rotate", "start", &key.id]).await)
    }

    async fn state(&self, key: &IssuedKey) -> String {
        let shown = self.json(&["key", "show", &key.id]).await;
        let state = shown["versions"][0]["state"].as_str();
        state.expect("it has a first version").to_owned()
    }

    async fn check(&self, key: &IssuedKey) -> Verdict {
        let answer = self.checks.clone().check(check_request(&key.secret)).await;
        Verdict::from(answer.expect("a sidecar answers").into_inner())
    }

    /// Waits until a check has this verdict.
    async fn until_checked(&self, key: &IssuedKey, verdict: Verdict) {
        eventually("the verdict", async || {
            (self.check(key).await == verdict).then_some(())
        })
        .await;
    }

    async fn until_retired(&self, key: &IssuedKey) {
        eventually("it has retired", async || {
            (self.state(key).await == "retired").then_some(())
        })
        .await;
    }

    /// Lets the control plane look what is due by the time that it is now, and commit that.
    async fn rounds(&self) {
        let mut rounds = self.plane.rounds.clone();
        rounds.mark_unchanged();
        // The one that is under way may have looked before.
        for _ in 0..2 {
            let over = within(DEADLINE, "a round of the control plane", rounds.changed()).await;
            over.expect("it runs");
        }
    }

    fn step(&self, by: i64) {
        let by = by * i64::try_from(DAY.as_millis()).expect("a day is short");
        let wall = self.clock.wall().as_millis();
        self.hands.set_wall(Timestamp::from_millis(wall + by));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_jumps_ahead_retires_nothing_before_its_time() {
    let machine = Machine::new().await;
    let old = machine.create_key().await;
    machine.until_checked(&old, Verdict::allowed(1)).await;
    let policy = [
        "--overlap",
        "7d",
        "--idle-for",
        "1d",
        "--on-deadline",
        "retire",
    ];
    let new = machine.rotate(&old, &policy).await;

    machine.step(30);
    machine.rounds().await;

    assert_eq!(machine.state(&old).await, "retiring");
    assert_eq!(machine.check(&old).await, Verdict::allowed(1));
    assert_eq!(machine.check(&new).await, Verdict::allowed(2));
    // Somebody sets it right.
    machine.step(-30);
    machine.hands.advance(6 * DAY);
    machine.until_checked(&old, Verdict::allowed(1)).await;
    assert_eq!(machine.state(&old).await, "retiring");
    machine.hands.advance(DAY);
    machine.until_retired(&old).await;
    machine
        .until_checked(&old, Verdict::denied("retired", 1))
        .await;
    machine.until_checked(&new, Verdict::allowed(2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_set_back_revives_nothing() {
    let machine = Machine::new().await;
    let old = machine.create_key().await;
    let marker = machine.create_key().await;
    machine.until_checked(&marker, Verdict::allowed(1)).await;
    let policy = ["--overlap", "2d", "--idle-for", "1d"];
    let new = machine.rotate(&old, &policy).await;
    machine.hands.advance(2 * DAY);
    machine.until_retired(&old).await;
    machine
        .until_checked(&old, Verdict::denied("retired", 1))
        .await;
    machine.rotate(&marker, &policy).await;

    machine.step(-1);

    // It goes on to work by that time.
    let other = machine.create_key().await;
    machine.until_checked(&other, Verdict::allowed(1)).await;
    let denied = async || {
        assert_eq!(machine.state(&old).await, "retired");
        assert_eq!(machine.check(&old).await, Verdict::denied("retired", 1));
        assert_eq!(machine.check(&new).await, Verdict::allowed(2));
    };
    denied().await;
    // What was planned comes later, and never earlier.
    machine.hands.advance(DAY);
    machine.rounds().await;
    assert_eq!(machine.state(&marker).await, "retiring");
    machine.hands.advance(2 * DAY);
    machine.until_retired(&marker).await;
    machine.until_checked(&new, Verdict::allowed(2)).await;
    denied().await;
}
