use std::time::Duration;

use super::*;
use crate::{
    key::{KeyId, Prefix, Secret, Timestamp, testing},
    keyring::{Caller, Keyrings, Staleness, VersionUsage},
};

/// A keyring of one key version, which is used between the changes.
struct World {
    slot: Arc<Slot>,
    mirror: Mirror,
    secret: Secret,
    uses: u64,
}

const EPOCH: Epoch = Epoch::new(1);
const NOW: Timestamp = Timestamp::from_millis(5_000);

impl World {
    fn new() -> Self {
        let staleness = Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: Duration::from_hours(1),
        };
        let keyrings = Keyrings::new([(testing::keyring_name(), staleness)]);
        let slot = keyrings.get(&testing::keyring_name()).expect("it was made");
        let mut world = Self {
            slot: Arc::clone(&slot),
            mirror: Mirror::new(slot),
            secret: testing::secret(KeyId::generate().expect("the random source works")),
            uses: 0,
        };
        world.mirror.adopt(KeyringSettings {
            prefix: Prefix::default(),
            issued_only: true,
            peppers: vec![testing::pepper()],
            help_url: None,
        });
        world.snapshot(EPOCH, KeyState::Active);
        world
    }

    fn record(&self, state: KeyState) -> KeyRecord {
        KeyRecord {
            state,
            ..testing::record_of(&self.secret)
        }
    }

    fn announced(&self, state: KeyState) -> Announced {
        Announced {
            record: self.record(state),
            hash: 1,
        }
    }

    fn snapshot(&mut self, epoch: Epoch, state: KeyState) {
        let revision = self.mirror.position().revision.next();
        let builder = self.mirror.begin_snapshot(epoch, revision, 1);
        let mut builder = builder.expect("settings have come");
        builder.add(&self.announced(state));
        let finished = self.mirror.finish_snapshot(builder, None, 0);
        finished.expect("it does not shrink");
    }

    fn delta(&mut self, upserts: Vec<Announced>, removals: &[KeyDigest]) {
        let KeyringPosition {
            epoch, revision, ..
        } = self.mirror.position();
        let next = revision.next();
        let applied = self
            .mirror
            .apply_delta(epoch, revision, next, Vec::new(), upserts, removals);
        applied.expect("it follows what is held");
    }

    fn enter(&mut self, state: KeyState) {
        let announced = self.announced(state);
        self.delta(vec![announced], &[]);
    }

    fn remove(&mut self) {
        let digest = self.record(KeyState::Active).digest;
        self.delta(Vec::new(), &[digest]);
    }

    fn view(&self) -> Arc<KeyringView> {
        let view = self.slot.load();
        Arc::clone(view.as_ref().expect("a snapshot was taken"))
    }

    /// Counts a use as a check does that sees `view`.
    fn count(&mut self, view: &KeyringView) {
        let held = view.find(&self.secret.presented()).expect("it is held");
        let usage = self.slot.usage();
        usage.count(usage.of(&held), NOW, false);
        self.uses += 1;
    }

    fn usage(&self) -> &VersionUsage {
        let version = self.record(KeyState::Active).version_ref();
        self.slot.usage().find(version).expect("it was used")
    }

    fn assert_counted(&self, what: &str) {
        assert_eq!(self.usage().read().requests, self.uses, "after {what}");
    }

    fn note_caller(&self) {
        let caller = Caller::new(None, b"curl", b"api", b"/v1");
        self.usage().note_caller(&caller, NOW);
    }

    fn callers(&self) -> usize {
        self.usage().callers().len()
    }

    fn state(&self) -> Option<KeyState> {
        let digest = self.record(KeyState::Active).digest;
        self.view().lookup(&digest).map(|held| held.state())
    }
}

/// What becomes of a record, and its name.
type Change = (&'static str, fn(&mut World));

#[test]
fn a_count_outlives_every_change_of_its_record() {
    let mut world = World::new();
    let changes: [Change; 7] = [
        ("a change of state", |world| {
            world.enter(KeyState::Retiring);
        }),
        ("new settings", |world| {
            let view = world.slot.load();
            let settings = view.as_ref().expect("a view").settings().clone();
            world.mirror.adopt(settings);
        }),
        ("a snapshot", |world| {
            world.snapshot(EPOCH, KeyState::Active);
        }),
        ("a new epoch", |world| {
            world.snapshot(Epoch::new(2), KeyState::Active);
        }),
        ("its removal and return", |world| {
            world.remove();
            world.enter(KeyState::Active);
        }),
        ("a revocation ahead of its delta", |world| {
            world.mirror.revoke(vec![world.record(KeyState::Active)]);
        }),
        ("a snapshot that does not know of the revocation", |world| {
            world.snapshot(Epoch::new(3), KeyState::Active);
        }),
    ];
    for (what, change) in changes {
        // A check that began before the change, and counts after it.
        let before = world.view();
        world.count(&before);
        change(&mut world);
        world.count(&before);
        let after = world.view();
        world.count(&after);
        world.assert_counted(what);
    }
    assert_eq!(world.state(), Some(KeyState::Revoked));
    assert_eq!(world.slot.usage().take_used().len(), 1);
}

#[test]
fn callers_are_forgotten_when_their_version_is_active_again_or_gone() {
    let mut world = World::new();
    world.count(&world.view());
    for state in [KeyState::Retiring, KeyState::Retired] {
        world.enter(state);
        world.note_caller();
    }
    assert_eq!(world.callers(), 1);
    world.snapshot(EPOCH, KeyState::Retiring);
    assert_eq!(world.callers(), 1, "it is on its way out still");

    world.enter(KeyState::Active);
    assert_eq!(world.callers(), 0, "it was rolled back");

    world.enter(KeyState::Retiring);
    world.note_caller();
    world.snapshot(EPOCH, KeyState::Active);
    assert_eq!(world.callers(), 0, "it was rolled back by a snapshot");

    world.enter(KeyState::Retired);
    world.note_caller();
    world.remove();
    assert_eq!(world.callers(), 0, "it is gone");
}

#[test]
fn a_delta_never_leads_back() {
    let mut world = World::new();
    let KeyringPosition {
        epoch, revision, ..
    } = world.mirror.position();
    for to in [revision, Revision::default()] {
        let upserts = vec![world.announced(KeyState::Retired)];
        let applied = world
            .mirror
            .apply_delta(epoch, revision, to, Vec::new(), upserts, &[]);
        let from = revision;
        assert_eq!(applied, Err(DeltaError::Backwards { from, to }));
    }
    assert_eq!(world.mirror.position().revision, revision);
    assert_eq!(world.state(), Some(KeyState::Active));
}

#[test]
fn what_a_delta_revokes_is_revoked_whatever_its_record_says() {
    let mut world = World::new();
    let KeyringPosition {
        epoch,
        revision,
        set_digest,
    } = world.mirror.position();
    let revocations = vec![world.announced(KeyState::Active)];
    let applied = world.mirror.apply_delta(
        epoch,
        revision,
        revision.next(),
        revocations,
        Vec::new(),
        &[],
    );
    applied.expect("it follows what is held");
    assert_eq!(world.state(), Some(KeyState::Revoked));
    // It counts as it was announced.
    assert_eq!(world.mirror.position().set_digest, set_digest);
}
