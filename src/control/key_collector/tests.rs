//! Tests of the scrape of a control plane.

use std::{collections::BTreeSet, time::Duration};

use prometheus_client::encoding::text::encode;
use tempfile::TempDir;

use super::*;
use crate::{
    clock::{Clock, ManualClock},
    control::{
        fleet::{Believed, OpenStream, Parting},
        metrics::ControlMetrics,
    },
    key::{
        AllowedSources, Change, KeyId, MasterPepper, OnDeadline, OperationRefusal, PepperId,
        PolicyOverrides, Prefix, Revision, RotationId, Scopes, VersionNumber, Window,
        operation::{self, KeySpec, OldEnds, StageSpec, Which},
        testing,
    },
    proto::discovery,
    serving::{Farewell, RunKey},
    store::{NewEntry, SqliteOptions, SqliteStore, Store},
};

const START: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const MAX_SERVE_FOR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);
/// The ids of keys, in the order in which they are created.
const KEYS: [&str; 4] = [
    "AAAAAAAAAAAA",
    "BBBBBBBBBBBB",
    "CCCCCCCCCCCC",
    "DDDDDDDDDDDD",
];

/// A control plane with one keyring, and the registry that it is scraped from.
struct World {
    _directory: TempDir,
    hands: ManualClock,
    catalog: Arc<Catalog>,
    fleet: Arc<Fleet>,
    usage: Arc<UsageBook>,
    metrics: ControlMetrics,
    registry: Registry,
}

impl World {
    /// Returns a world with room for `max_versions` versions.
    async fn new(max_versions: usize) -> Self {
        let (clock, hands) = Clock::manual(START);
        let directory = tempfile::tempdir().expect("a temporary directory");
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&directory.path().join("relatch.db"), options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("it opens"));
        let mut registry = Registry::default();
        let metrics = ControlMetrics::register(&mut registry);
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        let opened = Catalog::open(Arc::clone(&store), clock.clone(), pepper, metrics.clone());
        let catalog = Arc::new(opened.await.expect("a sound store"));
        let pace = Arc::new(Pace::new(clock.clone()));
        let usage = UsageBook::open(store, clock.clone(), pace, &[]).await;
        let usage = Arc::new(usage.expect("it reads"));
        let fleet = Fleet::new(clock.clone(), MAX_SERVE_FOR, Vec::new());
        let fleet = Arc::new(fleet.expect("no rows"));
        registry.register_collector(Box::new(KeyCollector {
            catalog: Arc::clone(&catalog),
            usage: Arc::clone(&usage),
            fleet: Arc::clone(&fleet),
            pace: Arc::new(Pace::new(clock)),
            max_versions,
        }));
        let world = Self {
            _directory: directory,
            hands,
            catalog,
            fleet,
            usage,
            metrics,
            registry,
        };
        world.make_keyring().await;
        world
    }

    async fn make_keyring(&self) {
        let name = testing::keyring_name();
        let first = operation::create_keyring(name.clone(), Prefix::default(), false, None);
        let first = first.expect("a valid keyring");
        let made = self.catalog.create_keyring("test", name, &first).await;
        made.expect("a new keyring");
        self.commit(|keyring, _| {
            keyring.create_consumer("checkout".parse().expect("a name"), String::new())
        })
        .await;
    }

    async fn make_key(&self, id: &str) {
        self.make_key_until(id, None).await;
    }

    async fn make_key_until(&self, id: &str, expires_at: Option<Timestamp>) {
        let key_id = id.parse().expect("an id");
        let secret = testing::secret(key_id);
        let pepper = self.served().pepper().clone();
        self.commit(|keyring, now| {
            let spec = KeySpec {
                key_id,
                consumer: "checkout".parse().expect("a name"),
                name: String::new(),
                scopes: Scopes::default(),
                allowed_sources: AllowedSources::default(),
                window: Window::new(None, expires_at),
                imported: false,
            };
            keyring.create_key(spec, &secret.presented(), &pepper, now)
        })
        .await;
    }

    async fn stage(&self, id: &str) -> RotationId {
        let key_id: KeyId = id.parse().expect("an id");
        let rotation = RotationId::generate().expect("the random source works");
        let secret = testing::secret(key_id);
        let pepper = self.served().pepper().clone();
        self.commit(|keyring, now| {
            let stage = StageSpec {
                key_id,
                rotation,
                window: Window::default(),
                withdraw_after: now.saturating_add(DAY),
            };
            keyring.stage(stage, &secret.presented(), &pepper, now)
        })
        .await;
        rotation
    }

    /// Rotates with an overlap of an hour.
    async fn rotate(&self, id: &str) {
        let rotation = self.stage(id).await;
        let ends = OldEnds::AfterOverlap(Some(Duration::from_hours(1)));
        let key_id = id.parse().expect("an id");
        self.commit(|keyring, now| keyring.hand_over(key_id, rotation, &ends, now))
            .await;
    }

    async fn commit(
        &self,
        plan: impl Fn(&Keyring, Timestamp) -> Result<Vec<Change>, OperationRefusal>,
    ) {
        let served = self.served();
        let committed = self.catalog.commit(&served, "test", |keyring, now| {
            Ok((plan(keyring, now)?, ()))
        });
        committed.await.expect("it is permitted");
    }

    fn served(&self) -> Arc<ServedKeyring> {
        let served = self.catalog.get(&testing::keyring_name());
        served.expect("it was made")
    }

    fn connect(&self, node: &str) -> OpenStream {
        self.connect_with(node, None)
    }

    fn connect_with(
        &self,
        node: &str,
        snapshot_file: Option<discovery::SnapshotFile>,
    ) -> OpenStream {
        let hello = discovery::Hello {
            node: Some(discovery::Node {
                id: node.to_owned(),
                ..discovery::Node::default()
            }),
            run_id: node.to_owned(),
            subscriptions: vec![discovery::Subscription {
                keyring: testing::keyring_name().to_string(),
                epoch: self.served().epoch().get(),
                revision: self.served().revision().get(),
                deny_after_ms: u64::MAX,
                ..discovery::Subscription::default()
            }],
            protocol: discovery::PROTOCOL,
            stream: 1,
            snapshot_file,
            ..Default::default()
        };
        let believed = Believed::from([(testing::keyring_name(), true)]);
        let connected = self.fleet.connected(&hello, &believed, None);
        connected.expect("nobody else is this node")
    }

    /// Reports from a sidecar that versions were used this often until now.
    fn report(&self, node: &str, uses: &[(&str, u32, u64)]) {
        let member = RunKey {
            node: node.to_owned(),
            run_id: node.to_owned(),
        };
        let now = self.catalog.clock().wall();
        let subscribed = BTreeSet::from([testing::keyring_name()]);
        let (mut stream, _acks) = self.usage.stream(&member, subscribed);
        let versions = uses
            .iter()
            .map(|(key_id, version, requests)| discovery::VersionUsage {
                key_id: (*key_id).to_owned(),
                version: *version,
                requests: *requests,
                last_used_ms: now.as_millis(),
                ..discovery::VersionUsage::default()
            });
        let usage = discovery::Usage {
            sequence: 1,
            is_final: true,
            keyrings: vec![discovery::KeyringUsage {
                keyring: testing::keyring_name().to_string(),
                versions: versions.collect(),
            }],
            ..Default::default()
        };
        stream.note(&usage, &*self.catalog);
    }

    /// Returns the samples of a metric, in order.
    fn samples(&self, metric: &str) -> Vec<String> {
        let mut page = String::new();
        encode(&mut page, &self.registry).expect("it is text");
        let samples = page.lines().filter_map(|line| line.strip_prefix(metric));
        let mut samples: Vec<String> = samples
            .filter(|sample| sample.starts_with(['{', ' ']))
            .map(str::to_owned)
            .collect();
        samples.sort_unstable();
        samples
    }

    fn requests(&self) -> Vec<String> {
        self.samples("relatch_key_requests_total")
    }
}

/// Returns the labels as on a page, with `last` after those that all series of versions have, and
/// the value.
fn sample(key_id: &str, version: u32, last: &str, value: impl fmt::Display) -> String {
    format!(
        "{{keyring=\"payments\",consumer=\"checkout\",key_id=\"{key_id}\",version=\"{version}\",{last}}} {value}"
    )
}

#[tokio::test]
async fn versions_that_are_used_or_in_a_rotation_have_series() {
    let world = World::new(MAX_VERSIONS).await;
    let [rotated, staged, used, unused] = KEYS;
    for id in KEYS {
        world.make_key(id).await;
    }
    world.report("edge-1", &[(rotated, 1, 5), (used, 1, 7)]);
    world.report("edge-2", &[(rotated, 1, 2)]);
    world.hands.advance(Duration::from_secs(1));
    world.rotate(rotated).await;
    world.stage(staged).await;

    assert_eq!(
        world.requests(),
        [
            sample(rotated, 1, r#"state="retiring""#, 7),
            sample(staged, 2, r#"state="pending""#, 0),
            sample(used, 1, r#"state="active""#, 7),
        ]
    );
    assert_eq!(
        world.samples("relatch_key_last_used_timestamp_seconds"),
        [
            sample(rotated, 1, r#"state="retiring""#, "1800000000.0"),
            sample(used, 1, r#"state="active""#, "1800000000.0"),
        ]
    );
    assert_eq!(
        world.samples("relatch_key_retires_timestamp_seconds"),
        [sample(rotated, 1, r#"state="retiring""#, "1800003601.0")]
    );
    assert_eq!(
        world.samples("relatch_rotation_phase"),
        [
            sample(rotated, 1, r#"phase="overlap""#, 1),
            sample(staged, 2, r#"phase="stage""#, 1),
        ]
    );
    let page = format!("{:?}", world.requests());
    assert!(!page.contains(unused));
}

#[tokio::test]
async fn a_version_is_denied_while_it_is_used_only_where_its_policy_or_its_expiry_ends_it() {
    const OVERLAP_ENDS: &str = "1800003600.0";
    const EXPIRES: &str = "1800007200.0";
    let world = World::new(MAX_VERSIONS).await;
    let [plain, expiring, ..] = KEYS;
    let expiry = START.saturating_add(Duration::from_hours(2));
    world.make_key(plain).await;
    world.make_key_until(expiring, Some(expiry)).await;
    for id in [plain, expiring] {
        world.report(id, &[(id, 1, 1)]);
        world.rotate(id).await;
    }
    let denied = || world.samples("relatch_key_denied_from_timestamp_seconds");
    let at = |id, at| sample(id, 1, r#"state="retiring""#, at);
    for (on_deadline, told) in [
        (OnDeadline::Hold, vec![at(expiring, EXPIRES)]),
        (OnDeadline::Extend, vec![at(expiring, EXPIRES)]),
        (
            OnDeadline::Retire,
            vec![at(plain, OVERLAP_ENDS), at(expiring, OVERLAP_ENDS)],
        ),
    ] {
        let policy = PolicyOverrides {
            on_deadline: Some(on_deadline),
            ..PolicyOverrides::NONE
        };
        world.commit(|keyring, _| keyring.set_policy(&policy)).await;
        assert_eq!(denied(), told, "{on_deadline:?}");
    }
    // Without another version to use, the version is held, whatever the policy.
    let key_id = plain.parse().expect("an id");
    let new = VersionNumber::FIRST.next();
    world
        .commit(|keyring, _| keyring.revoke(key_id, Which::Version(new), "leaked"))
        .await;
    assert_eq!(denied(), [at(expiring, OVERLAP_ENDS)]);
}

#[tokio::test]
async fn the_phase_goes_with_the_rotation() {
    let world = World::new(MAX_VERSIONS).await;
    let id = KEYS[0];
    world.make_key(id).await;
    world.report("edge-1", &[(id, 1, 1)]);
    world.rotate(id).await;
    let phase = || world.samples("relatch_rotation_phase");
    assert_eq!(phase(), [sample(id, 1, r#"phase="overlap""#, 1)]);
    // By default, evidence takes a day, and there is no sidecar that could have seen another use.
    world.hands.advance(Duration::from_mins(59));
    assert_eq!(phase(), [sample(id, 1, r#"phase="overlap""#, 1)]);
    world.hands.advance(Duration::from_mins(1));
    assert_eq!(phase(), [sample(id, 1, r#"phase="held""#, 1)]);
    let key_id = id.parse().expect("an id");
    world
        .commit(|keyring, now| {
            keyring.retire(key_id, None, &Evidence::default(), Some("it is over"), now)
        })
        .await;
    assert_eq!(phase(), [""; 0]);
    assert_eq!(
        world.samples("relatch_key_retires_timestamp_seconds"),
        [""; 0]
    );
}

#[tokio::test]
async fn a_keyring_that_cannot_be_read_is_told() {
    let world = World::new(MAX_VERSIONS).await;
    let unreadable = || world.samples("relatch_keyring_unreadable");
    assert_eq!(unreadable(), [r#"{keyring="payments"} 0"#]);
    let rubbish = NewEntry {
        at: START,
        actor: "somebody".to_owned(),
        kind: "rubbish".to_owned(),
        payload: b"{}".to_vec(),
    };
    let (log, at) = (testing::keyring_name().into(), world.served().revision());
    let appended = world.catalog.store().append(&log, at, vec![rubbish]).await;
    appended.expect("any bytes can be appended");
    world.catalog.refresh().await.expect("the store is there");
    assert_eq!(unreadable(), [r#"{keyring="payments"} 1"#]);
}

#[tokio::test]
async fn series_of_ended_versions_go_when_these_cannot_come_back() {
    let world = World::new(MAX_VERSIONS).await;
    let [retired, revoked, ..] = KEYS;
    for id in [retired, revoked] {
        world.make_key(id).await;
        world.report(id, &[(id, 1, 3)]);
    }
    world.rotate(retired).await;
    let key_id = retired.parse().expect("an id");
    world
        .commit(|keyring, now| {
            keyring.retire(key_id, None, &Evidence::default(), Some("it is over"), now)
        })
        .await;
    let key_id = revoked.parse().expect("an id");
    world
        .commit(|keyring, _| keyring.revoke(key_id, Which::All, "leaked"))
        .await;
    let told = [
        sample(retired, 1, r#"state="retired""#, 3),
        sample(revoked, 1, r#"state="revoked""#, 3),
    ];
    assert_eq!(world.requests(), told);
    let rollback_for = world
        .served()
        .journal()
        .state()
        .keyring
        .policy()
        .rollback_for;
    world
        .hands
        .advance(rollback_for.saturating_sub(Duration::from_millis(1)));
    assert_eq!(world.requests(), told);
    world.hands.advance(Duration::from_millis(1));
    assert_eq!(world.requests(), [""; 0]);
    assert_eq!(
        world.samples("relatch_key_last_used_timestamp_seconds"),
        [""; 0]
    );
}

#[tokio::test]
async fn versions_beyond_the_bound_are_summed_up() {
    let world = World::new(2).await;
    let [first, second, third, rotated] = KEYS;
    for id in KEYS {
        world.make_key(id).await;
    }
    world.report("edge-1", &[(second, 1, 10), (third, 1, 100)]);
    world.hands.advance(Duration::from_secs(1));
    world.report(
        "edge-2",
        &[(first, 1, 1), (third, 1, 200), (rotated, 1, 1_000)],
    );
    // A rotation comes before everything else.
    world.rotate(rotated).await;

    let overflow = |value: &str| {
        let labels = ["keyring", "consumer", "key_id", "version", "state"];
        let labels = labels.map(|label| format!("{label}=\"__overflow__\""));
        format!("{{{}}} {value}", labels.join(","))
    };
    for _ in 0..3 {
        assert_eq!(
            world.requests(),
            [
                overflow("310"),
                sample(first, 1, r#"state="active""#, 1),
                sample(rotated, 1, r#"state="retiring""#, 1_000),
            ]
        );
    }
    let last_used = world.samples("relatch_key_last_used_timestamp_seconds");
    assert_eq!(last_used.first(), Some(&overflow("1800000001.0")));
    assert_eq!(last_used.len(), 3);
}

#[tokio::test]
async fn sidecars_are_counted_by_how_they_are() {
    let world = World::new(MAX_VERSIONS).await;
    let counts = || {
        let samples = world.samples("relatch_sidecars");
        let count = |status: &str| {
            let labels = format!("{{keyring=\"payments\",status=\"{status}\"}} ");
            let sample = samples
                .iter()
                .find_map(|sample| sample.strip_prefix(&labels));
            let sample = sample.unwrap_or_else(|| panic!("no {status} in {samples:?}"));
            sample.parse::<u32>().expect("a number")
        };
        assert_eq!(samples.len(), 5, "{samples:?}");
        ["current", "lagging", "lost", "stopped", "gap"].map(count)
    };
    assert_eq!(counts(), [0, 0, 0, 0, 0]);
    let behind = world.connect("edge-1");
    let lost = world.connect("edge-2");
    world.make_key(KEYS[0]).await;
    world.connect("edge-3");
    world.fleet.disconnected(&lost, Parting::Lost);
    assert_eq!(counts(), [1, 1, 1, 0, 0]);
    let file = discovery::SnapshotFile {
        id: b"file".to_vec().into(),
        begun_from_write: 0,
    };
    let stopped = world.connect_with("edge-4", Some(file));
    let farewell = Farewell {
        has_told_all: true,
        has_erased_file: false,
        last_write: 7,
    };
    world
        .fleet
        .disconnected(&stopped, Parting::Goodbye(farewell));
    assert_eq!(counts(), [1, 1, 1, 1, 0]);
    world.hands.advance(MAX_SERVE_FOR);
    assert_eq!(counts(), [1, 1, 1, 1, 0], "their bounds are 1 % later");
    world.hands.advance(MAX_SERVE_FOR / 50);
    assert_eq!(counts(), [1, 1, 0, 0, 2]);
    let served = world.served();
    let ack = discovery::Ack {
        keyring: served.name().to_string(),
        epoch: served.epoch().get(),
        applied_revision: served.revision().get(),
        ..discovery::Ack::default()
    };
    world.fleet.acked(&behind, &ack);
    assert_eq!(counts(), [2, 0, 0, 0, 2]);
}

#[tokio::test]
async fn commits_are_counted_by_what_became_of_them() {
    let world = World::new(MAX_VERSIONS).await;
    let counts = || world.samples("relatch_commits_total");
    // The keyring and its consumer.
    let told = |committed: u32, refused: u32| {
        [
            format!("{{outcome=\"committed\"}} {committed}"),
            "{outcome=\"failed\"} 0".to_owned(),
            format!("{{outcome=\"refused\"}} {refused}"),
        ]
    };
    assert_eq!(counts(), told(2, 0));
    let served = world.served();
    let nothing = world
        .catalog
        .commit(&served, "test", |_, _| Ok((Vec::new(), ())))
        .await;
    assert_eq!(nothing.expect("it is one").revision, Revision::new(2));
    assert_eq!(counts(), told(2, 0), "nothing was written");
    let refused = world
        .catalog
        .commit(&served, "test", |keyring, _| {
            let consumer = "checkout".parse().expect("a name");
            Ok((keyring.create_consumer(consumer, String::new())?, ()))
        })
        .await;
    assert!(refused.is_err(), "it is there");
    assert_eq!(counts(), told(2, 1));
    world.make_key(KEYS[0]).await;
    assert_eq!(counts(), told(3, 1));
}

#[tokio::test]
async fn what_is_counted_as_it_happens_is_registered() {
    let world = World::new(MAX_VERSIONS).await;
    world.metrics.propagated(Duration::from_millis(3));
    world.metrics.spans_dropped().inc_by(2);
    assert_eq!(world.samples("relatch_spans_dropped_total"), [" 2"]);
    assert_eq!(world.samples("relatch_propagation_seconds_count"), [" 1"]);
    assert_eq!(world.samples("relatch_propagation_seconds_sum"), [" 0.003"]);
    let buckets = world.samples("relatch_propagation_seconds_bucket");
    for bucket in ["{le=\"0.0025\"} 0", "{le=\"0.005\"} 1", "{le=\"+Inf\"} 1"] {
        assert!(buckets.iter().any(|other| other == bucket), "{buckets:?}");
    }
}
