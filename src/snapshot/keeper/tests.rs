//! A sidecar that applies what comes, is killed at any moment, and starts again.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use proptest::{collection::vec, prelude::*, sample::select};
use tempfile::TempDir;

use super::*;
use crate::{
    clock::ManualClock,
    config::sidecar::SnapshotSettings,
    follow::receiver::Receiver,
    key::{Epoch, KeyState, Revision, Timestamp, testing},
    keyring::{Mode, Slot, Staleness, on_demand::CacheSettings},
    proto::discovery::{self, control_message::Kind, sidecar_message::Kind as Answer},
    sidecar::begin::{self, BeginError, Begun, Empty, KeptFile},
    snapshot::{
        read::{self, Contents, Tail},
        testing::{Act, Control, State},
    },
};

const START: i64 = 1_000_000_000_000;
const STALENESS: Staleness = Staleness {
    warn_after: Duration::from_secs(30),
    deny_after: Duration::from_hours(1),
};

mod measure;
mod serving;

/// A machine with a disk, on which a sidecar runs.
struct Machine {
    dir: TempDir,
    clock: Clock,
    hands: ManualClock,
    node: NodeSettings,
    staleness: Staleness,
}

/// A sidecar, without network and without a thread of its own for the file.
struct Sidecar {
    keyrings: Keyrings,
    receiver: Receiver,
    keeper: Keeper,
    latest: LatestWall,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (clock, hands) = Clock::manual(Timestamp::from_millis(START));
        SnapshotKey::make(&dir.path().join("snapshot.key")).expect("it is made");
        Self {
            dir,
            clock,
            hands,
            node: NodeSettings::named("edge-1".parse().expect("a name")),
            staleness: STALENESS,
        }
    }

    fn settings(&self) -> SnapshotSettings {
        SnapshotSettings {
            path: self.file(),
            key_file: self.dir.path().join("snapshot.key"),
            erase_on_stop: false,
        }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("keyring.snap")
    }

    fn start(&self) -> Sidecar {
        self.start_with(Mode::Full).expect("it starts")
    }

    fn start_with(&self, mode: Mode) -> Result<Sidecar, BeginError> {
        let keyrings = Keyrings::with_modes([(testing::keyring_name(), self.staleness, mode)]);
        let latest = LatestWall::default();
        let mut receiver = Receiver::new(&keyrings, self.clock.clone()).telling(latest.clone());
        let empty = Empty {
            node: &self.node,
            keyrings: &keyrings,
            receiver: &mut receiver,
            latest: &latest,
            clock: &self.clock,
        };
        let Begun { kept, .. } = begin::begin(&self.settings(), empty)?;
        let KeptFile { mut keeper, .. } = kept.expect("nobody else uses the file");
        keeper.patience = WritePatience {
            idle: Duration::ZERO,
            gather: Duration::ZERO,
        };
        Ok(Sidecar {
            keyrings,
            receiver,
            keeper,
            latest,
        })
    }

    /// What the file holds.
    fn contents(&self) -> Contents {
        let key = SnapshotKey::read(&self.settings().key_file).expect("it is there");
        let bytes = fs::read(self.file()).expect("it is there");
        read::read(&bytes[..], bytes.len() as u64, &key).expect("it is whole")
    }

    /// The keyring that the file holds.
    fn read(&self) -> (State, Tail) {
        let contents = self.contents();
        let keyring = contents.keyrings.values().next().expect("it has one");
        (State::of(keyring.view()), contents.tail)
    }
}

impl Sidecar {
    fn take(&mut self, messages: Vec<Kind>) -> Vec<discovery::SidecarMessage> {
        let mut answers = Vec::new();
        for kind in messages {
            let message = discovery::ControlMessage { kind: Some(kind) };
            let outcome = self.receiver.receive(message);
            answers.extend(outcome.expect("the stream goes on").answers);
        }
        answers
    }

    fn write(&mut self) {
        self.keeper.turn();
    }

    fn slot(&self) -> Arc<Slot> {
        let slot = self.keyrings.get(&testing::keyring_name());
        slot.expect("it is configured")
    }

    fn state(&self) -> Option<State> {
        self.slot().load().as_deref().map(State::of)
    }

    fn durable(&self) -> (Epoch, Revision) {
        let durable = self.keeper.disk.durable(&testing::keyring_name());
        (durable.epoch, durable.revision)
    }

    fn age(&self, machine: &Machine) -> Option<Duration> {
        self.slot().age(machine.clock.reading())
    }

    /// Asks the control plane, whose wall clock shows `wall`, and has everything confirmed.
    fn beat(&mut self, machine: &Machine, wall: Timestamp) {
        self.beat_for(machine, wall, machine.staleness.deny_after);
    }

    /// As [`Self::beat`], for so long.
    fn beat_for(&mut self, machine: &Machine, wall: Timestamp, serve_for: Duration) {
        let held = self.receiver.subscriptions().remove(0);
        let beat = match self.receiver.next_beat().kind {
            Some(discovery::sidecar_message::Kind::Beat(beat)) => beat.number,
            other => panic!("{other:?} is no beat"),
        };
        let pulse = discovery::KeyringPulse {
            keyring: held.keyring,
            epoch: held.epoch,
            revision: held.revision,
            set_digest: held.set_digest,
            serve_for_ms: serve_for.as_millis().try_into().expect("it is short"),
        };
        self.take(vec![Kind::BeatAnswer(discovery::BeatAnswer {
            beat,
            sent_at: Some(wall.to_wire()),
            beat_every_ms: 5_000,
            keyrings: vec![pulse],
        })]);
        assert_eq!(self.age(machine), Some(Duration::ZERO));
    }

    fn problem(&self) -> Option<String> {
        self.keeper.disk.health().problem
    }

    fn refused(&self) -> String {
        let refused = self.keeper.disk.health().refused;
        refused.expect("the file was refused")
    }
}

/// A machine whose sidecar has its keyring, and has nothing on disk yet.
fn begun() -> (Machine, Control, Sidecar) {
    let machine = Machine::new();
    let control = Control::new();
    let mut sidecar = machine.start();
    sidecar.take(control.begin());
    (machine, control, sidecar)
}

fn act() -> impl Strategy<Value = Act> {
    let number = || 0_u8..6;
    let state = || select(KeyState::ALL.to_vec());
    prop_oneof![
        6 => (number(), state()).prop_map(|(number, state)| Act::Put(number, state)),
        2 => number().prop_map(Act::Remove),
        2 => number().prop_map(Act::RevokeAhead),
        1 => number().prop_map(Act::Gap),
        1 => any::<bool>().prop_map(Act::Settings),
        1 => any::<bool>().prop_map(Act::Snapshot),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Killed after any write, it starts with exactly what it had applied by then.
    #[test]
    fn a_sidecar_starts_with_what_it_had_applied(
        acts in vec((act(), any::<bool>(), any::<bool>()), 1..30),
    ) {
        let (machine, mut control, mut sidecar) = begun();
        sidecar.write();
        for (act, writes, restarts) in acts {
            let former = sidecar.state().expect("it has its keyring");
            sidecar.take(control.act(act));
            if writes {
                sidecar.write();
                prop_assert_eq!(Some(machine.read().0), sidecar.state());
            }
            if restarts {
                let kept = machine.read().0;
                let was = sidecar.state();
                let mut position = sidecar.receiver.subscriptions();
                for held in &mut position {
                    // Revocations that overtook their deltas are kept, and are claimed anew.
                    prop_assert!(held.revoked_through >= held.revision);
                    held.revoked_through = held.revision;
                }
                drop(sidecar);
                sidecar = machine.start();
                prop_assert_eq!(sidecar.state(), Some(kept.clone()));
                if writes {
                    prop_assert_eq!(sidecar.state(), was);
                    prop_assert_eq!(sidecar.receiver.subscriptions(), position);
                } else {
                    let revoked: BTreeSet<_> = kept.revoked().into_iter().collect();
                    let since = former.revoked();
                    prop_assert!(revoked.iter().all(|number| since.contains(number)));
                }
                sidecar.write();
                prop_assert_eq!(machine.read().0, kept);
                // It goes on from there, or takes everything anew.
                sidecar.take(control.act(Act::Snapshot(false)));
            }
        }
    }
}

#[test]
fn a_tombstone_from_the_file_wins_over_what_comes_later() {
    let (machine, mut control, mut sidecar) = begun();
    sidecar.take(control.act(Act::Put(1, KeyState::Active)));
    sidecar.take(control.act(Act::RevokeAhead(1)));
    sidecar.take(control.act(Act::RevokeAhead(2)));
    sidecar.write();
    drop(sidecar);

    let mut sidecar = machine.start();
    sidecar.take(control.act(Act::Put(1, KeyState::Retiring)));
    sidecar.take(control.act(Act::Put(2, KeyState::Active)));
    assert_eq!(sidecar.state().expect("it is there").revoked(), [1, 2]);
    // Not even a rewritten history brings them back.
    sidecar.take(control.act(Act::Snapshot(true)));
    assert_eq!(sidecar.state().expect("it is there").revoked(), [1, 2]);
    sidecar.write();
    drop(sidecar);
    let sidecar = machine.start();
    assert_eq!(sidecar.state().expect("it is there").revoked(), [1, 2]);
}

#[test]
fn what_is_on_the_disk_is_told_and_nothing_else() {
    let machine = Machine::new();
    let mut control = Control::new();
    let mut sidecar = machine.start();
    let durable = |answers: &[discovery::SidecarMessage]| match &answers[0].kind {
        Some(Answer::Ack(ack)) => (ack.applied_revision, ack.durable_revision),
        other => panic!("no ack: {other:?}"),
    };
    let answers = sidecar.take(control.begin());
    assert_eq!(durable(&answers), (1, 0));
    assert_eq!(sidecar.receiver.next_durable(), None);
    sidecar.write();
    let told = sidecar.receiver.next_durable().expect("it is news");
    assert_eq!(durable(&[told]), (1, 1));
    assert_eq!(sidecar.receiver.next_durable(), None);

    let answers = sidecar.take(control.act(Act::Put(1, KeyState::Active)));
    assert_eq!(durable(&answers), (2, 1));
    fs::remove_dir_all(machine.dir.path()).expect("it is ours");
    sidecar.keeper.journal.close(Ending::Keep);
    sidecar.write();
    assert_eq!(sidecar.receiver.next_durable(), None);
    assert_eq!(sidecar.durable(), (Epoch::new(7), Revision::new(1)));
    let answers = sidecar.take(control.act(Act::Put(1, KeyState::Active)));
    assert_eq!(durable(&answers), (3, 1));
    // Of another history nothing is on the disk yet.
    let answers = sidecar.take(control.act(Act::Snapshot(true)));
    assert_eq!(durable(&answers), (4, 0));
}

#[test]
fn who_connects_anew_tells_anew() {
    let (_machine, _control, mut sidecar) = begun();
    sidecar.write();
    assert!(sidecar.receiver.next_durable().is_some());
    sidecar.receiver.connected();
    assert!(sidecar.receiver.next_durable().is_some());
    assert!(sidecar.receiver.next_durable().is_none());
}

#[test]
fn after_an_error_the_file_is_made_anew() {
    let (machine, mut control, mut sidecar) = begun();
    sidecar.keeper.backoff = Duration::ZERO;
    sidecar.write();
    fs::remove_dir_all(machine.dir.path()).expect("it is ours");

    sidecar.take(control.act(Act::Put(1, KeyState::Revoked)));
    sidecar.write();
    let health = sidecar.keeper.disk.health();
    assert_eq!((health.written, health.failed), (1, 1));
    assert!(health.problem.is_some());
    sidecar.keeper.backoff = Duration::ZERO;
    sidecar.write();
    assert_eq!(sidecar.keeper.disk.health().failed, 2);
    assert_eq!(sidecar.durable().1, Revision::new(1));

    fs::create_dir(machine.dir.path()).expect("it is ours");
    sidecar.write();
    assert_eq!(sidecar.problem(), None);
    assert_eq!(sidecar.durable().1, Revision::new(2));
    let bytes = fs::read(machine.file()).expect("it is there");
    let key = sidecar.keeper.key.clone();
    let contents = read::read(&bytes[..], bytes.len() as u64, &key).expect("it is whole");
    assert_eq!(
        contents.changes, 0,
        "nothing is appended to a file of which nobody knows"
    );
    let keyring = &contents.keyrings[&testing::keyring_name()];
    assert_eq!(State::of(keyring.view()).revoked(), [1]);
}

#[test]
fn a_file_that_somebody_removes_is_missed() {
    let (machine, mut control, mut sidecar) = begun();
    sidecar.keeper.backoff = Duration::ZERO;
    sidecar.write();
    fs::remove_file(machine.file()).expect("it is there");
    sidecar.take(control.act(Act::Put(1, KeyState::Active)));
    sidecar.write();
    assert_eq!(sidecar.durable().1, Revision::new(1));
    assert!(sidecar.problem().is_some());
    sidecar.write();
    assert_eq!(sidecar.durable().1, Revision::new(2));
    assert_eq!(Some(machine.read().0), sidecar.state());
}

#[test]
fn a_file_does_not_grow_for_ever() {
    let (machine, mut control, mut sidecar) = begun();
    sidecar.write();
    let mut sizes = Vec::new();
    for _ in 0..30 {
        for number in 0..100 {
            sidecar.take(control.act(Act::Settings(number % 2 == 0)));
        }
        sidecar.write();
        let size = fs::metadata(machine.file()).expect("it is there").len();
        assert_eq!(size, sidecar.keeper.disk.health().size);
        sizes.push(size);
    }
    let largest = sizes.iter().max().copied().unwrap_or_default();
    assert!(
        (MIN_APPENDED..MIN_APPENDED + (1 << 20)).contains(&largest),
        "{sizes:?}"
    );
    assert!(sizes.windows(2).any(|pair| pair[1] < pair[0]), "{sizes:?}");
    assert_eq!(Some(machine.read().0), sidecar.state());
}

#[test]
fn a_last_write_that_was_cut_off_is_left_out() {
    let (machine, mut control, mut sidecar) = begun();
    sidecar.take(control.act(Act::Put(1, KeyState::Active)));
    sidecar.write();
    let before = sidecar.state();
    sidecar.take(control.act(Act::Put(2, KeyState::Active)));
    sidecar.write();
    let len = fs::metadata(machine.file()).expect("it is there").len();
    let file = fs::OpenOptions::new().write(true).open(machine.file());
    let file = file.expect("it is ours");
    file.set_len(len - 1).expect("it is cut");
    assert_eq!(machine.read().1, Tail::Torn);
    drop(sidecar);

    let mut sidecar = machine.start();
    assert_eq!(sidecar.state(), before);
    sidecar.write();
    let (state, tail) = machine.read();
    assert_eq!((Some(state), tail), (before, Tail::Whole));
}

#[test]
fn what_cannot_be_taken_is_put_aside_with_the_reason() {
    let (machine, mut control, mut sidecar) = begun();
    sidecar.take(control.act(Act::Put(1, KeyState::Active)));
    sidecar.write();
    drop(sidecar);
    let good = fs::read(machine.file()).expect("it is there");
    let put = |bytes: &[u8], mode| {
        fs::write(machine.file(), bytes).expect("it is ours");
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(machine.file(), mode).expect("it is ours");
    };
    let altered = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let cases: [(Vec<u8>, u32, &str); 6] = [
        (good.clone(), 0o640, "mode is 640"),
        (b"something else".to_vec(), 0o600, "not a snapshot file"),
        (altered(9), 0o600, "format 3"),
        (altered(good.len() / 2), 0o600, "altered"),
        (good[..good.len() / 2].to_vec(), 0o600, "cut"),
        (Vec::new(), 0o600, "not a snapshot file"),
    ];
    for (bytes, mode, reason) in cases {
        put(&bytes, mode);
        let mut sidecar = machine.start();
        assert!(sidecar.refused().contains(reason), "{}", sidecar.refused());
        assert_eq!(sidecar.state(), None);
        assert_eq!(sidecar.age(&machine), None);
        assert!(!machine.file().exists());
        let aside = machine.dir.path().join("keyring.snap.refused");
        assert_eq!(fs::read(aside).expect("it was put aside"), bytes);
        // It takes everything anew, and keeps that.
        sidecar.take(control.begin());
        sidecar.write();
        assert_eq!(Some(machine.read().0), sidecar.state());
    }
}

#[test]
fn the_file_of_another_node_or_under_another_key_is_refused() {
    let (mut machine, _control, mut sidecar) = begun();
    sidecar.write();
    drop(sidecar);
    let good = fs::read(machine.file()).expect("it is there");

    let ours = machine.node.clone();
    machine.node = NodeSettings::named("edge-2".parse().expect("a name"));
    let sidecar = machine.start();
    assert!(
        sidecar.refused().contains("node edge-1"),
        "{}",
        sidecar.refused()
    );
    assert_eq!(sidecar.state(), None);
    drop(sidecar);

    machine.node = NodeSettings {
        cluster: "other".parse().expect("a name"),
        ..ours.clone()
    };
    restore_file(&machine.file(), &good);
    let sidecar = machine.start();
    assert!(
        sidecar.refused().contains("cluster default"),
        "{}",
        sidecar.refused()
    );
    drop(sidecar);

    machine.node = ours;
    restore_file(&machine.file(), &good);
    fs::remove_file(machine.settings().key_file).expect("it is there");
    SnapshotKey::make(&machine.settings().key_file).expect("it is made");
    let sidecar = machine.start();
    assert!(
        sidecar.refused().contains("another key"),
        "{}",
        sidecar.refused()
    );
    assert_eq!(sidecar.state(), None);
}

#[test]
fn a_sidecar_does_not_start_without_the_key_of_its_file() {
    let machine = Machine::new();
    let mode = fs::Permissions::from_mode(0o644);
    fs::set_permissions(machine.settings().key_file, mode).expect("it is ours");
    let error = machine
        .start_with(Mode::Full)
        .err()
        .expect("others may read it");
    assert!(matches!(error, BeginError::Key(_)), "{error:?}");
}

#[test]
fn a_keyring_that_is_not_held_in_full_any_more_is_left_out() {
    let (machine, _control, mut sidecar) = begun();
    sidecar.write();
    drop(sidecar);
    let on_demand = Mode::OnDemand(CacheSettings::default());
    let mut sidecar = machine.start_with(on_demand).expect("it starts");
    assert!(sidecar.slot().load().is_none());
    assert_eq!(sidecar.age(&machine), None);
    sidecar.write();
    assert_eq!(machine.contents().keyrings.len(), 0);
}

#[test]
fn a_keyring_that_was_never_confirmed_is_not_made_fresh_by_a_restart() {
    let (machine, _control, mut sidecar) = begun();
    sidecar.write();
    drop(sidecar);
    let sidecar = machine.start();
    assert!(sidecar.state().is_some());
    assert_eq!(sidecar.age(&machine), None);
}

#[test]
fn the_latest_time_is_remembered_unless_the_control_plane_says_otherwise() {
    let machine = Machine::new();
    let control = Control::new();
    let at = Timestamp::from_millis;
    let mut sidecar = machine.start();
    sidecar.take(control.begin());
    machine.hands.set_wall(at(START + 500_000));
    sidecar.write();
    drop(sidecar);
    machine.hands.set_wall(at(START));
    let mut sidecar = machine.start();
    assert_eq!(sidecar.latest.not_before(at(START)), at(START + 500_000));

    // The control plane says what time it is: the clock was ahead by mistake.
    sidecar.beat(&machine, at(START));
    sidecar.write();
    drop(sidecar);
    let sidecar = machine.start();
    assert_eq!(sidecar.latest.not_before(at(START)), at(START + 60_000));
}

fn restore_file(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("it is ours");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("it is ours");
}

#[test]
fn the_file_says_how_fresh_it_is_well_within_the_time_that_is_granted() {
    let (machine, _control, mut sidecar) = begun();
    sidecar.keeper.patience.idle = PULSE_EVERY;
    for (granted, pause) in [(15_000, 3_750), (60, 250), (86_400_000, 30_000)] {
        let granted = Duration::from_millis(granted);
        sidecar.beat_for(&machine, Timestamp::from_millis(START), granted);
        sidecar.keeper.is_unconfirmed = false;
        let pause = Duration::from_millis(pause);
        assert_eq!(sidecar.keeper.patience().idle, pause, "{granted:?}");
    }
}

#[test]
fn the_first_confirmation_is_waited_for_and_later_ones_are_not() {
    let (machine, _control, mut sidecar) = begun();
    sidecar.write();
    sidecar.keeper.patience.idle = PULSE_EVERY;
    assert_eq!(sidecar.keeper.patience().idle, UNCONFIRMED_PULSE);
    sidecar.beat(&machine, Timestamp::from_millis(START));
    sidecar.keeper.patience.idle = Duration::ZERO;
    sidecar.write();
    sidecar.keeper.patience.idle = PULSE_EVERY;
    assert_eq!(sidecar.keeper.patience().idle, PULSE_EVERY);
    drop(sidecar);
    let sidecar = machine.start();
    assert_eq!(sidecar.age(&machine), Some(Duration::ZERO));
}
