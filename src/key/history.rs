//! Properties that hold for arbitrary histories of a keyring.

use std::time::Duration;

use proptest::prelude::*;

use super::{
    Change, Coverage, Evidence, Key, KeyId, KeyRecord, KeyState, Keyring, OnDeadline,
    PolicyOverrides, Revision, RotationId, Timestamp, VersionNumber, VersionRef, VersionState,
    Window,
    evidence::Idleness,
    operation::{self, KeySpec, OldEnds, StageSpec, Which},
    rotation, testing,
    version::NewVersion,
};

/// A step of a random operator, of time or of the sidecars. A step may be refused.
#[derive(Clone, Debug)]
enum Step {
    CreateKey {
        lives_for: Option<u64>,
    },
    Stage {
        key: usize,
        lives_for: Option<u64>,
    },
    HandOver {
        key: usize,
        overlap: u64,
    },
    Deliver {
        key: usize,
    },
    HandOverAtOnce {
        key: usize,
    },
    Withdraw {
        key: usize,
    },
    Abort {
        key: usize,
    },
    Retire {
        key: usize,
        force: bool,
    },
    Extend {
        key: usize,
        by: u64,
    },
    RollBack {
        key: usize,
    },
    SetPolicy {
        key: Option<usize>,
        parts: PolicyOverrides,
    },
    Revoke {
        key: usize,
        version: u32,
    },
    RevokeAll {
        key: usize,
    },
    Use {
        key: usize,
        version: u32,
    },
    Vanish,
    Report,
    Restart,
    Wait {
        millis: u64,
    },
    Reconcile,
}

fn on_deadline() -> impl Strategy<Value = OnDeadline> {
    prop_oneof![
        Just(OnDeadline::Retire),
        Just(OnDeadline::Extend),
        Just(OnDeadline::Hold)
    ]
}

fn parts() -> impl Strategy<Value = PolicyOverrides> {
    let millis = |below: u64| proptest::option::of((0..below).prop_map(Duration::from_millis));
    (
        proptest::option::of((0_u64..20).prop_map(Duration::from_secs)),
        millis(5_000),
        millis(2_000),
        proptest::option::of(on_deadline()),
        millis(4_000),
        millis(3_000),
        proptest::option::of(2_u32..5),
        proptest::option::of(prop_oneof![Just("files".into()), Just("".into())]),
    )
        .prop_map(
            |(
                rotate_every,
                overlap,
                idle_for,
                on_deadline,
                rollback_for,
                remind_before,
                max_versions,
                sink,
            )| PolicyOverrides {
                rotate_every,
                overlap,
                idle_for,
                on_deadline,
                rollback_for,
                remind_before,
                max_versions,
                sink,
            },
        )
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0_usize..4;
    let lives_for = proptest::option::of(1_u64..5_000);
    prop_oneof![
        1 => lives_for.clone().prop_map(|lives_for| Step::CreateKey { lives_for }),
        4 => (key.clone(), lives_for).prop_map(|(key, lives_for)| Step::Stage { key, lives_for }),
        4 => (key.clone(), 0_u64..5_000).prop_map(|(key, overlap)| Step::HandOver { key, overlap }),
        1 => key.clone().prop_map(|key| Step::Withdraw { key }),
        1 => (key.clone(), 1_u32..5).prop_map(|(key, version)| Step::Revoke { key, version }),
        1 => key.clone().prop_map(|key| Step::RevokeAll { key }),
        1 => key.clone().prop_map(|key| Step::Deliver { key }),
        1 => key.clone().prop_map(|key| Step::HandOverAtOnce { key }),
        1 => key.clone().prop_map(|key| Step::Abort { key }),
        2 => (key.clone(), any::<bool>()).prop_map(|(key, force)| Step::Retire { key, force }),
        1 => (key.clone(), 0_u64..5_000).prop_map(|(key, by)| Step::Extend { key, by }),
        2 => key.clone().prop_map(|key| Step::RollBack { key }),
        2 => (proptest::option::of(key.clone()), parts())
            .prop_map(|(key, parts)| Step::SetPolicy { key, parts }),
        3 => (key, 1_u32..5).prop_map(|(key, version)| Step::Use { key, version }),
        1 => Just(Step::Vanish),
        3 => Just(Step::Report),
        1 => Just(Step::Restart),
        3 => (0_u64..3_000).prop_map(|millis| Step::Wait { millis }),
        2 => Just(Step::Reconcile),
    ]
}

struct History {
    keyring: Keyring,
    log: Vec<(Timestamp, Change)>,
    now: Timestamp,
    evidence: Evidence,
}

/// Generates a keyring with a random history.
pub(crate) fn keyring() -> impl Strategy<Value = Keyring> {
    proptest::collection::vec(step(), 1..60).prop_map(|steps| {
        let mut history = History::begin();
        for step in steps {
            history.witness(&step);
            let changes = history.plan(&step);
            history.commit(changes);
        }
        history.keyring
    })
}

/// Returns the change that creates the key of `record`, in state active.
pub(crate) fn creation(record: &KeyRecord) -> Change {
    Change::KeyCreated {
        key_id: record.key_id,
        consumer: record.consumer.clone(),
        name: String::new(),
        imported: false,
        scopes: record.scopes.clone(),
        allowed_sources: record.allowed_sources.clone(),
        version: NewVersion {
            number: record.version,
            digest: record.digest,
            pepper: record.pepper,
            window: record.window,
        },
    }
}

impl History {
    fn begin() -> Self {
        let now = Timestamp::from_millis(1_000_000);
        let first = operation::create_keyring(
            testing::keyring_name(),
            super::Prefix::default(),
            false,
            None,
        )
        .expect("a valid keyring");
        let mut history = Self {
            keyring: Keyring::begin(now, &first).expect("a first change"),
            log: vec![(now, first)],
            now,
            evidence: Evidence::default(),
        };
        let short = PolicyOverrides {
            overlap: Some(Duration::from_secs(2)),
            idle_for: Some(Duration::from_secs(1)),
            rollback_for: Some(Duration::from_secs(3)),
            remind_before: Some(Duration::from_secs(1)),
            ..PolicyOverrides::default()
        };
        let policy = history.keyring.set_policy(&short);
        history.commit(policy.expect("a valid policy"));
        let consumer = history
            .keyring
            .create_consumer("checkout".parse().expect("valid"), String::new())
            .expect("a new consumer");
        history.commit(consumer);
        history
    }

    fn commit(&mut self, changes: Vec<Change>) {
        for change in changes {
            let revision = self.keyring.revision().next();
            self.keyring
                .apply(revision, self.now, &change)
                .expect("an operation plans only possible changes");
            self.log.push((self.now, change));
        }
    }

    fn key(&self, index: usize) -> Option<&Key> {
        self.keyring.keys().values().nth(index).map(|key| &**key)
    }

    fn window(&self, lives_for: Option<u64>) -> Window {
        let end = lives_for.map(|millis| self.now.saturating_add(Duration::from_millis(millis)));
        Window::new(None, end)
    }

    #[expect(clippy::too_many_lines, reason = "one arm a step, each short")]
    fn plan(&self, step: &Step) -> Vec<Change> {
        let planned = match *step {
            Step::CreateKey { lives_for } => {
                let key_id = KeyId::generate().expect("the random source works");
                let spec = KeySpec {
                    key_id,
                    consumer: "checkout".parse().expect("valid"),
                    name: String::new(),
                    scopes: super::Scopes::default(),
                    allowed_sources: super::AllowedSources::default(),
                    window: self.window(lives_for),
                    imported: false,
                };
                let secret = testing::secret(key_id);
                self.keyring
                    .create_key(spec, &secret.presented(), &testing::pepper(), self.now)
            }
            Step::Stage { key, lives_for } => {
                let Some(key) = self.key(key) else {
                    return Vec::new();
                };
                let spec = StageSpec {
                    key_id: key.id,
                    rotation: RotationId::generate().expect("the random source works"),
                    window: self.window(lives_for),
                    withdraw_after: self.now.saturating_add(Duration::from_secs(2)),
                };
                let secret = testing::secret(key.id);
                self.keyring
                    .stage(spec, &secret.presented(), &testing::pepper(), self.now)
            }
            Step::HandOver { key, overlap } => {
                let Some((key_id, rotation)) = self.staged(key) else {
                    return Vec::new();
                };
                let overlap = OldEnds::AfterOverlap(Some(Duration::from_millis(overlap)));
                self.keyring.hand_over(key_id, rotation, &overlap, self.now)
            }
            Step::Deliver { key } => {
                let Some((key_id, rotation)) = self.staged(key) else {
                    return Vec::new();
                };
                let sink = "files".parse().expect("a name");
                let after = self.now.saturating_add(Duration::from_secs(1));
                self.keyring.begin_delivery(key_id, rotation, sink, after)
            }
            Step::HandOverAtOnce { key } => {
                let Some((key_id, rotation)) = self.staged(key) else {
                    return Vec::new();
                };
                let at_once = OldEnds::AtOnce("test".into());
                self.keyring.hand_over(key_id, rotation, &at_once, self.now)
            }
            Step::Abort { key } => {
                let Some(key) = self.key(key) else {
                    return Vec::new();
                };
                self.keyring.abort(key.id, "test")
            }
            Step::Retire { key, force } => {
                let Some(key) = self.key(key) else {
                    return Vec::new();
                };
                let force = force.then_some("test");
                self.keyring
                    .retire(key.id, None, &self.evidence, force, self.now)
            }
            Step::Extend { key, by } => {
                let Some(key) = self.key(key) else {
                    return Vec::new();
                };
                let until = self.now.saturating_add(Duration::from_millis(by));
                self.keyring.extend(key.id, None, until, "test")
            }
            Step::RollBack { key } => {
                let Some(key) = self.key(key) else {
                    return Vec::new();
                };
                self.keyring.roll_back(key.id, "test", self.now)
            }
            Step::SetPolicy {
                key: None,
                ref parts,
            } => self.keyring.set_policy(parts),
            Step::SetPolicy {
                key: Some(key),
                ref parts,
            } => {
                let Some(key) = self.key(key) else {
                    return Vec::new();
                };
                self.keyring.set_key_policy(key.id, parts, false)
            }
            Step::Withdraw { key } => {
                let Some((key_id, rotation)) = self.staged(key) else {
                    return Vec::new();
                };
                self.keyring.withdraw(key_id, rotation, "test".into())
            }
            Step::Revoke { key, version } => {
                let (Some(key), Some(number)) = (self.key(key), VersionNumber::new(version)) else {
                    return Vec::new();
                };
                self.keyring.revoke(key.id, Which::Version(number), "test")
            }
            Step::RevokeAll { key } => {
                let Some(key) = self.key(key) else {
                    return Vec::new();
                };
                self.keyring.revoke(key.id, Which::All, "test")
            }
            Step::Reconcile => Ok(self.due()),
            Step::Restart => {
                let staged: Vec<VersionRef> = rotation::staged(&self.keyring).collect();
                Ok(rotation::settle_left_behind(&self.keyring, &staged, 100))
            }
            Step::Use { .. } | Step::Vanish | Step::Report | Step::Wait { .. } => Ok(Vec::new()),
        };
        planned.unwrap_or_default()
    }

    fn due(&self) -> Vec<Change> {
        rotation::plan(&self.keyring, &self.evidence, self.now, usize::MAX)
    }

    /// Applies the part of a step that is not a commit: time, uses and reports.
    fn witness(&mut self, step: &Step) {
        match *step {
            Step::Wait { millis } => {
                self.now = self.now.saturating_add(Duration::from_millis(millis));
            }
            Step::Use { key, version } => {
                let used = self.key(key).map(|key| key.id);
                if let (Some(key_id), Some(version)) = (used, VersionNumber::new(version)) {
                    let which = VersionRef { key_id, version };
                    let used = self.evidence.uses.entry(which).or_default();
                    used.requests += 1;
                    used.last_used = Some(self.now);
                }
            }
            Step::Vanish => {
                let until = self.now.saturating_add(Duration::from_millis(100));
                self.evidence.coverage.gap_until = Some(until);
            }
            Step::Report => {
                self.evidence.coverage = Coverage {
                    complete_until: Some(self.now),
                    ..self.evidence.coverage
                };
            }
            Step::CreateKey { .. }
            | Step::Stage { .. }
            | Step::HandOver { .. }
            | Step::Deliver { .. }
            | Step::HandOverAtOnce { .. }
            | Step::Withdraw { .. }
            | Step::Abort { .. }
            | Step::Retire { .. }
            | Step::Extend { .. }
            | Step::RollBack { .. }
            | Step::SetPolicy { .. }
            | Step::Revoke { .. }
            | Step::RevokeAll { .. }
            | Step::Restart
            | Step::Reconcile => {}
        }
    }

    fn staged(&self, key: usize) -> Option<(KeyId, RotationId)> {
        let key = self.key(key)?;
        Some((key.id, key.pending()?.rotation?))
    }

    fn replay(&self) -> Keyring {
        let (at, first) = &self.log[0];
        let mut keyring = Keyring::begin(*at, first).expect("a first change");
        for (index, (at, change)) in self.log.iter().enumerate().skip(1) {
            keyring
                .apply(Revision::new(index as u64 + 1), *at, change)
                .expect("a log replays");
        }
        keyring
    }
}

/// Returns whether only revocation or expiry explains that a key has no accepted version any more.
fn lost_by_revoke_or_expiry(before: &Key, after: &Key, now: Timestamp) -> bool {
    before.accepted(now).all(|version| {
        let after = &after.versions[&version.number];
        after.state.kind() == KeyState::Revoked
            || after.window.expires_at.is_some_and(|end| now >= end)
    })
}

#[test]
fn a_rotation_is_told_of_only_while_it_runs() {
    let mut history = History::begin();
    let mut step = |step: Step| {
        history.witness(&step);
        let changes = history.plan(&step);
        history.commit(changes);
        let records = history.keyring.records();
        records
            .map(|record| (record.state, record.rotation.is_some()))
            .collect::<Vec<_>>()
    };
    step(Step::CreateKey { lives_for: None });
    let staged = step(Step::Stage {
        key: 0,
        lives_for: None,
    });
    assert_eq!(
        staged,
        [(KeyState::Active, false), (KeyState::Pending, true)]
    );
    let overlap = step(Step::HandOver {
        key: 0,
        overlap: 100,
    });
    assert_eq!(
        overlap,
        [(KeyState::Retiring, true), (KeyState::Active, true)]
    );
    step(Step::Wait { millis: 1_000 });
    step(Step::Report);
    let over = step(Step::Reconcile);
    assert_eq!(
        over,
        [(KeyState::Retired, false), (KeyState::Active, false)]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_history_keeps_its_promises(steps in proptest::collection::vec(step(), 1..60)) {
        let mut history = History::begin();
        for step in steps {
            let before = history.keyring.clone();
            history.witness(&step);
            let changes = history.plan(&step);
            history.commit(changes);
            let now = history.now;
            for key in history.keyring.keys().values() {
                let max = history.keyring.policy_of(key).max_versions;
                let was = before.keys().get(&key.id).map_or(0, |key| key.accepted(now).count());
                let accepted = key.accepted(now).count();
                // A lower bound does not end versions that were accepted before.
                prop_assert!(
                    accepted <= was.max(max as usize),
                    "too many accepted versions"
                );
                let active = key.versions.values().filter(|v| v.state.kind() == KeyState::Active);
                prop_assert!(active.count() <= 1, "two active versions");
                for version in key.versions.values() {
                    if let (Some(end), Some(expiry)) = (version.ends_at(), version.window.expires_at) {
                        prop_assert!(end <= expiry, "a rotation lengthened a life");
                    }
                }
            }
            for (id, key) in before.keys() {
                let after = &history.keyring.keys()[id];
                for version in key.versions.values() {
                    if version.state.kind() == KeyState::Revoked {
                        prop_assert_eq!(version, &after.versions[&version.number], "a revoked version changed");
                    }
                }
                if key.active().is_some_and(|active| active.is_accepted(now))
                    && after.accepted(now).next().is_none()
                {
                    prop_assert!(lost_by_revoke_or_expiry(key, after, now), "an active key was lost");
                }
            }
        }
        prop_assert_eq!(&history.replay(), &history.keyring, "replaying the log gives another state");
    }

    #[test]
    fn planning_twice_is_planning_once(steps in proptest::collection::vec(step(), 1..60)) {
        let mut history = History::begin();
        for step in steps {
            history.witness(&step);
            let changes = history.plan(&step);
            history.commit(changes);
        }
        let plan = history.due();
        history.commit(plan);
        prop_assert_eq!(history.due(), Vec::new());
    }

    #[test]
    fn changes_survive_their_json(steps in proptest::collection::vec(step(), 1..40)) {
        let mut history = History::begin();
        for step in steps {
            let changes = history.plan(&step);
            history.commit(changes);
        }
        for (_, change) in &history.log {
            let json = serde_json::to_string(change).expect("a change is JSON");
            prop_assert_eq!(&serde_json::from_str::<Change>(&json).expect("it reads back"), change);
        }
    }

    #[test]
    fn nothing_retires_by_itself_without_evidence_unless_the_policy_says_so(
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        let mut history = History::begin();
        for step in steps {
            history.witness(&step);
            for change in history.plan(&step) {
                if let Change::VersionRetired { key_id, version, forced: false, .. } = &change {
                    let which = VersionRef { key_id: *key_id, version: *version };
                    let (key, retired) = history.keyring.version(which).expect("it is there");
                    let VersionState::Retiring { since, until, .. } = retired.state else {
                        panic!("{change:?} of a version that is not retiring");
                    };
                    let policy = history.keyring.policy_of(key);
                    let idle = history.evidence.idleness(which, since, policy.idle_for);
                    let is_idle = matches!(idle, Idleness::Complete { .. });
                    let expired = retired.window.expires_at.is_some_and(|end| end <= history.now);
                    let has_successor = key.active().is_some_and(|v| v.is_accepted(history.now));
                    let by_policy = policy.on_deadline == OnDeadline::Retire;
                    let by_engine = matches!(step, Step::Reconcile);
                    prop_assert!(expired || has_successor, "{change:?} leaves nothing");
                    prop_assert!(expired || is_idle || by_policy, "{change:?} without evidence");
                    prop_assert!(!by_engine || until <= history.now, "{change:?} broke the promise");
                }
                history.commit(vec![change]);
            }
        }
    }

    #[test]
    fn a_roll_back_takes_nothing_away(steps in proptest::collection::vec(step(), 1..60)) {
        let mut history = History::begin();
        for step in steps {
            let before = history.keyring.clone();
            history.witness(&step);
            let changes = history.plan(&step);
            history.commit(changes);
            if let Step::RollBack { .. } = step {
                let now = history.now;
                for (id, key) in before.keys() {
                    for version in key.accepted(now) {
                        let after = &history.keyring.keys()[id].versions[&version.number];
                        prop_assert!(after.is_accepted(now), "who used {} is denied", after.number);
                    }
                }
            }
        }
    }
}
