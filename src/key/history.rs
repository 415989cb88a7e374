//! Properties that hold for arbitrary histories of a keyring.

use std::time::Duration;

use proptest::prelude::*;

use super::{
    Change, Key, KeyId, KeyState, Keyring, Revision, RotationId, Timestamp, VersionNumber, Window,
    operation::{self, KeySpec, StageSpec, Which},
    rotation, testing,
};

/// What a random operator does; it may be refused.
#[derive(Clone, Debug)]
enum Step {
    CreateKey { lives_for: Option<u64> },
    Stage { key: usize, lives_for: Option<u64> },
    HandOver { key: usize, overlap: u64 },
    Withdraw { key: usize },
    Revoke { key: usize, version: u32 },
    RevokeAll { key: usize },
    Wait { millis: u64 },
    Reconcile,
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
        1 => key.prop_map(|key| Step::RevokeAll { key }),
        3 => (0_u64..3_000).prop_map(|millis| Step::Wait { millis }),
        2 => Just(Step::Reconcile),
    ]
}

struct History {
    keyring: Keyring,
    log: Vec<(Timestamp, Change)>,
    now: Timestamp,
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
        };
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
        self.keyring.keys().values().nth(index)
    }

    fn window(&self, lives_for: Option<u64>) -> Window {
        let end = lives_for.map(|millis| self.now.saturating_add(Duration::from_millis(millis)));
        Window::new(None, end)
    }

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
                let overlap = Duration::from_millis(overlap);
                self.keyring.hand_over(key_id, rotation, overlap, self.now)
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
            Step::Reconcile => Ok(rotation::plan(&self.keyring, self.now, usize::MAX)),
            Step::Wait { .. } => Ok(Vec::new()),
        };
        planned.unwrap_or_default()
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

/// Whether revoking or expiry, and nothing else, explains that a key has no accepted version any more.
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
        if let Step::Wait { millis } = step {
            history.now = history.now.saturating_add(Duration::from_millis(millis));
        }
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
    step(Step::Wait { millis: 100 });
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
            if let Step::Wait { millis } = step {
                history.now = history.now.saturating_add(Duration::from_millis(millis));
            }
            let changes = history.plan(&step);
            history.commit(changes);
            let now = history.now;
            for key in history.keyring.keys().values() {
                let max = history.keyring.policy().max_versions;
                prop_assert!(key.accepted(now).count() <= max, "too many accepted versions");
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
                for (number, version) in &key.versions {
                    if version.state.kind() == KeyState::Revoked {
                        prop_assert_eq!(version, &after.versions[number], "a revoked version changed");
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
        let saved = serde_json::to_string(&history.keyring).expect("a keyring is JSON");
        let read: Keyring = serde_json::from_str(&saved).expect("it reads back");
        prop_assert_eq!(&read, &history.keyring, "a saved state reads back as another");
    }

    #[test]
    fn planning_twice_is_planning_once(steps in proptest::collection::vec(step(), 1..60)) {
        let mut history = History::begin();
        for step in steps {
            if let Step::Wait { millis } = step {
                history.now = history.now.saturating_add(Duration::from_millis(millis));
            }
            let changes = history.plan(&step);
            history.commit(changes);
        }
        let plan = rotation::plan(&history.keyring, history.now, usize::MAX);
        history.commit(plan);
        prop_assert_eq!(rotation::plan(&history.keyring, history.now, usize::MAX), Vec::new());
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
}
