//! How long a file may be served from, by whom, and what is left of it.

use super::*;
use crate::keyring::Freshness;

const AGE: Duration = Duration::from_secs(40);

/// A machine on which a sidecar was stopped whose keyring was confirmed, [`AGE`] ago.
fn stopped() -> Machine {
    let (machine, _control, mut sidecar) = begun();
    sidecar.beat(&machine, Timestamp::from_millis(START));
    sidecar.write();
    drop(sidecar);
    machine.hands.advance(AGE);
    machine
}

/// The sidecar holds its keyring, and does not serve it.
fn waits(machine: &Machine, sidecar: &mut Sidecar) {
    assert_eq!(sidecar.age(machine), None);
    assert!(sidecar.state().is_some());
    // A delta is enough for it, and the answer of the control plane.
    assert_eq!(sidecar.receiver.subscriptions()[0].revision, 1);
    sidecar.beat(machine, machine.clock.wall());
}

#[test]
fn age_goes_on_over_restarts() {
    let machine = stopped();
    let mut sidecar = machine.start();
    assert_eq!(sidecar.age(&machine), Some(AGE));
    machine.hands.advance(Duration::from_secs(20));
    assert_eq!(sidecar.age(&machine), Some(Duration::from_mins(1)));
    sidecar.write();
    drop(sidecar);

    // A clock that is set back makes nothing younger.
    machine
        .hands
        .set_wall(Timestamp::from_millis(START - 86_400_000));
    let sidecar = machine.start();
    assert_eq!(sidecar.age(&machine), Some(Duration::from_mins(1)));
}

#[test]
fn after_a_boot_a_file_serves_nothing_until_the_control_plane_has_answered() {
    let machine = stopped();
    machine.hands.reboot();
    // So long that this clock says more than the one before.
    machine.hands.advance(Duration::from_hours(1));
    let mut sidecar = machine.start();
    waits(&machine, &mut sidecar);
    sidecar.write();
    drop(sidecar);
    let sidecar = machine.start();
    assert_eq!(sidecar.age(&machine), Some(Duration::ZERO));
}

#[test]
fn a_file_that_was_taken_after_a_boot_and_never_confirmed_stays_without_an_age() {
    let machine = stopped();
    machine.hands.reboot();
    let mut sidecar = machine.start();
    sidecar.write();
    drop(sidecar);
    waits(&machine, &mut machine.start());
}

#[test]
fn in_another_time_namespace_a_file_serves_nothing_until_the_control_plane_has_answered() {
    let machine = stopped();
    machine.hands.enter_time_namespace();
    waits(&machine, &mut machine.start());
}

#[test]
fn a_file_that_was_renamed_serves_and_a_copy_does_not() {
    let machine = stopped();
    let moved = machine.dir.path().join("moved");
    fs::rename(machine.file(), &moved).expect("it is ours");
    let copied = fs::read(&moved).expect("it is there");
    fs::rename(&moved, machine.file()).expect("it is ours");
    let sidecar = machine.start();
    assert_eq!(sidecar.age(&machine), Some(AGE));
    drop(sidecar);

    // The number of its inode may well be that of the file that was removed.
    fs::remove_file(machine.file()).expect("it is there");
    restore_file(&machine.file(), &copied);
    waits(&machine, &mut machine.start());
}

#[test]
fn an_older_state_that_is_copied_over_a_file_does_not_serve() {
    let (machine, mut control, mut sidecar) = begun();
    sidecar.take(control.act(Act::Put(1, KeyState::Active)));
    sidecar.beat(&machine, Timestamp::from_millis(START));
    sidecar.write();
    let older = fs::read(machine.file()).expect("it is there");
    sidecar.take(control.act(Act::Put(1, KeyState::Revoked)));
    sidecar.write();
    drop(sidecar);
    let newest = fs::read(machine.file()).expect("it is there");
    // Into the same inode, as a backup is put back.
    for (bytes, age) in [(newest, Some(Duration::ZERO)), (older, None)] {
        fs::write(machine.file(), bytes).expect("it is ours");
        let sidecar = machine.start();
        assert!(sidecar.state().is_some());
        assert_eq!(sidecar.age(&machine), age);
    }
}

#[test]
fn a_link_to_a_file_that_was_made_anew_is_empty() {
    let machine = stopped();
    let link = machine.dir.path().join("link");
    let linked = |name: &Path| fs::hard_link(name, &link).expect("it is ours");
    let emptied = || {
        assert_eq!(fs::read(&link).expect("it is there"), b"");
        fs::remove_file(&link).expect("it is there");
    };
    // The one that was taken at the start, and one that this process has made.
    linked(&machine.file());
    let mut sidecar = machine.start();
    sidecar.write();
    emptied();
    linked(&machine.file());
    sidecar.take(Control::new().act(Act::Snapshot(true)));
    sidecar.write();
    emptied();
    assert_eq!(Some(machine.read().0), sidecar.state());
}

#[test]
fn a_file_does_not_serve_for_longer_than_was_granted() {
    let mut machine = stopped();
    machine.staleness.deny_after = Duration::from_hours(24);
    let freshness = |sidecar: &Sidecar| sidecar.slot().freshness(machine.clock.reading());
    // An hour without what has passed, and without a millisecond.
    machine.hands.advance(Duration::from_millis(3_559_999));
    let mut sidecar = machine.start();
    assert_eq!(freshness(&sidecar), Freshness::Warned);
    machine.hands.advance(Duration::from_millis(1));
    assert_eq!(freshness(&sidecar), Freshness::Stale);
    // However often it is written and taken.
    sidecar.write();
    drop(sidecar);
    let mut sidecar = machine.start();
    assert_eq!(freshness(&sidecar), Freshness::Stale);
    // Until the control plane answers.
    sidecar.beat(&machine, machine.clock.wall());
    machine.hands.advance(2 * STALENESS.deny_after);
    assert_eq!(freshness(&sidecar), Freshness::Warned);
}

#[test]
fn a_lower_limit_of_the_sidecar_holds_whatever_was_granted() {
    let mut machine = stopped();
    machine.staleness.deny_after = AGE;
    let sidecar = machine.start();
    let freshness = sidecar.slot().freshness(machine.clock.reading());
    assert_eq!(freshness, Freshness::Stale);
}

#[test]
fn a_file_keeps_its_name_and_counts_its_writes_over_rewrites_and_runs() {
    let (machine, mut control, mut sidecar) = begun();
    let mut last = 0;
    let id = sidecar.keeper.id;
    let mut grows = |machine: &Machine| {
        let contents = machine.contents();
        assert_eq!(contents.header.origin.id, id);
        assert!(contents.write > last, "{} after {last}", contents.write);
        last = contents.write;
    };
    for _ in 0..3 {
        for act in [Act::Put(1, KeyState::Active), Act::Snapshot(false)] {
            sidecar.take(control.act(act));
            sidecar.write();
            grows(&machine);
        }
        drop(sidecar);
        sidecar = machine.start();
        sidecar.write();
        grows(&machine);
    }
    drop(sidecar);
    restore_file(&machine.file(), b"something else");
    let sidecar = machine.start();
    assert_ne!(sidecar.keeper.id, id);
    assert_eq!(sidecar.keeper.write, 0);
}

#[test]
fn a_revocation_that_is_on_the_disk_ahead_of_its_revision_is_told() {
    let (_machine, mut control, mut sidecar) = begun();
    sidecar.write();
    let durable = |sidecar: &Sidecar| {
        let told = sidecar.receiver.next_durable()?;
        match told.kind {
            Some(Answer::Ack(ack)) => Some((ack.durable_revision, ack.durable_revoked_through)),
            other => panic!("no ack: {other:?}"),
        }
    };
    assert_eq!(durable(&sidecar), Some((1, 1)));
    let answers = sidecar.take(control.act(Act::RevokeAhead(1)));
    match &answers[0].kind {
        Some(Answer::Ack(ack)) => {
            assert_eq!((ack.revoked_through, ack.durable_revoked_through), (2, 1));
        }
        other => panic!("no ack: {other:?}"),
    }
    assert_eq!(durable(&sidecar), None);
    sidecar.write();
    assert_eq!(durable(&sidecar), Some((1, 2)));
}

#[test]
fn an_erased_file_leaves_nothing_behind() {
    let machine = stopped();
    for is_taken in [true, false] {
        let link = machine.dir.path().join("link");
        fs::hard_link(machine.file(), &link).expect("it is ours");
        let mut sidecar = machine.start();
        if !is_taken {
            sidecar.write();
            fs::remove_file(&link).expect("it is there");
            fs::hard_link(machine.file(), &link).expect("it is ours");
        }
        sidecar.keeper.journal.close(Ending::Erase);
        assert!(sidecar.keeper.turn());
        assert!(!machine.file().exists());
        assert_eq!(fs::read(&link).expect("it is there"), b"");
        assert_eq!(erasure(&sidecar), FileEnd::Erased);
        drop(sidecar);
        fs::remove_file(&link).expect("it is there");
        let mut sidecar = machine.start();
        assert_eq!(sidecar.state(), None);
        sidecar.take(Control::new().begin());
        sidecar.write();
    }
}

#[test]
fn a_file_that_is_not_where_it_was_is_not_erased() {
    for is_replaced in [false, true] {
        let machine = stopped();
        let mut sidecar = machine.start();
        let moved = machine.dir.path().join("moved");
        fs::rename(machine.file(), &moved).expect("it is ours");
        if is_replaced {
            fs::write(machine.file(), "other").expect("it is ours");
        }
        sidecar.keeper.journal.close(Ending::Erase);
        assert!(sidecar.keeper.turn());
        assert_eq!(erasure(&sidecar), FileEnd::Unknown);
        assert_eq!(machine.file().exists(), is_replaced);
        assert!(moved.exists());
    }
}

#[test]
fn where_there_never_was_a_file_nothing_is_left() {
    let machine = Machine::new();
    let mut sidecar = machine.start();
    sidecar.keeper.journal.close(Ending::Erase);
    assert!(sidecar.keeper.turn());
    assert_eq!(erasure(&sidecar), FileEnd::Erased);
}

fn erasure(sidecar: &Sidecar) -> FileEnd {
    let erasure = sidecar.keeper.disk.end();
    let erasure = futures_util::FutureExt::now_or_never(erasure);
    erasure.expect("it was tried")
}

fn not_served(number: u64) -> Vec<Kind> {
    vec![Kind::NotServed(discovery::NotServed {
        keyring: testing::keyring_name().to_string(),
        reason: "the rule was removed".to_owned(),
        number,
        is_forbidden: true,
    })]
}

/// What the receiver sends behind its answers: how many messages of usage, and what was dropped after them.
fn sent(sidecar: &mut Sidecar) -> (usize, Vec<(String, u64)>) {
    let (mut usage, mut dropped) = (0, Vec::new());
    while sidecar.receiver.has_usage() {
        match sidecar.receiver.next_usage().and_then(|sent| sent.kind) {
            Some(Answer::Usage(_)) => {
                assert!(dropped.is_empty(), "the last counts come before");
                usage += 1;
            }
            Some(Answer::Dropped(is)) => dropped.push((is.keyring, is.not_served)),
            other => panic!("neither usage nor dropped: {other:?}"),
        }
    }
    (usage, dropped)
}

#[test]
fn a_keyring_that_a_sidecar_may_not_have_is_dropped_when_memory_and_file_have_it_no_more() {
    let (machine, mut control, mut sidecar) = begun();
    let name = testing::keyring_name().to_string();
    sidecar.beat(&machine, Timestamp::from_millis(START));
    sidecar.write();
    sent(&mut sidecar);
    sidecar.take(not_served(7));
    assert_eq!((sidecar.state(), sidecar.age(&machine)), (None, None));
    assert_eq!(sent(&mut sidecar), (1, Vec::new()));
    sidecar.write();
    assert_eq!(sent(&mut sidecar), (0, vec![(name.clone(), 7)]));
    assert_eq!(machine.contents().keyrings.len(), 0);
    assert_eq!(sidecar.durable(), (Epoch::default(), Revision::default()));
    assert_eq!(sidecar.receiver.next_durable(), None);

    // Asked again on the next stream, it has nothing to write.
    sidecar.receiver.disconnected();
    assert_eq!(sidecar.receiver.subscriptions()[0].revision, 0);
    let written = machine.contents().write;
    sidecar.take(not_served(1));
    assert_eq!(sent(&mut sidecar), (1, vec![(name.clone(), 1)]));
    assert_eq!(sidecar.keeper.write, written);
    drop(sidecar);
    let mut sidecar = machine.start();
    assert_eq!(sidecar.state(), None);

    // What is served again begins anew, and is dropped anew.
    control.act(Act::Put(1, KeyState::Active));
    sidecar.take(control.begin());
    sidecar.write();
    assert_eq!(Some(machine.read().0), sidecar.state());
    assert_eq!(sidecar.age(&machine), None);
    sidecar.take(not_served(2));
    assert_eq!(sent(&mut sidecar).1, []);
    sidecar.write();
    assert_eq!(sent(&mut sidecar).1, [(name, 2)]);
    assert_eq!(machine.contents().keyrings.len(), 0);
}

#[test]
fn a_keyring_that_cannot_be_erased_from_the_disk_is_not_reported_as_dropped() {
    let (machine, _control, mut sidecar) = begun();
    sidecar.write();
    let elsewhere = machine.dir.path().with_extension("elsewhere");
    fs::rename(machine.dir.path(), &elsewhere).expect("it is ours");
    sidecar.keeper.backoff = Duration::ZERO;
    sidecar.take(not_served(1));
    sidecar.write();
    assert_eq!(sidecar.state(), None);
    assert_eq!(sent(&mut sidecar).1, []);
    // Nor on the next stream.
    sidecar.receiver.disconnected();
    sidecar.take(not_served(3));
    assert_eq!(sent(&mut sidecar).1, []);
    fs::rename(&elsewhere, machine.dir.path()).expect("it is ours");
    sidecar.keeper.backoff = Duration::ZERO;
    sidecar.write();
    assert_eq!(
        sent(&mut sidecar).1,
        [(testing::keyring_name().to_string(), 3)]
    );
    assert_eq!(machine.contents().keyrings.len(), 0);
}

#[test]
fn a_keyring_that_is_served_again_before_it_was_erased_is_not_reported_as_dropped() {
    let (machine, control, mut sidecar) = begun();
    sidecar.write();
    sidecar.take(not_served(1));
    sidecar.take(control.begin());
    sidecar.write();
    assert_eq!(sent(&mut sidecar).1, []);
    assert_eq!(Some(machine.read().0), sidecar.state());
}

#[test]
fn who_keeps_nothing_reports_at_once_what_was_dropped() {
    let keyrings = Keyrings::new([(testing::keyring_name(), STALENESS)]);
    let (clock, _hands) = Clock::manual(Timestamp::from_millis(START));
    let mut receiver = Receiver::new(&keyrings, clock);
    let messages = [Control::new().begin(), not_served(5)].concat();
    for kind in messages {
        let message = discovery::ControlMessage { kind: Some(kind) };
        receiver.receive(message).expect("the stream goes on");
    }
    let slot = keyrings.get(&testing::keyring_name());
    assert!(slot.expect("it is configured").load().is_none());
    assert!(matches!(
        receiver.next_usage().and_then(|sent| sent.kind),
        Some(Answer::Usage(_))
    ));
    match receiver.next_usage().and_then(|sent| sent.kind) {
        Some(Answer::Dropped(dropped)) => assert_eq!(dropped.not_served, 5),
        other => panic!("not dropped: {other:?}"),
    }
}

#[test]
fn a_keyring_on_demand_is_dropped_too() {
    let on_demand = Mode::OnDemand(CacheSettings::default());
    let keyrings = Keyrings::with_modes([(testing::keyring_name(), STALENESS, on_demand)]);
    let (clock, _hands) = Clock::manual(Timestamp::from_millis(START));
    let mut receiver = Receiver::new(&keyrings, clock);
    let slot = keyrings.get(&testing::keyring_name());
    let slot = slot.expect("it is configured");
    let mut tell = |kind| {
        let message = discovery::ControlMessage { kind: Some(kind) };
        receiver.receive(message).expect("the stream goes on");
    };
    let start = || {
        let start = discovery::Start {
            keyring: testing::keyring_name().to_string(),
            epoch: 7,
            revision: 1,
            nonce: 1,
        };
        let settings = Control::new().begin().remove(0);
        [settings, Kind::Start(start)]
    };
    let record = crate::snapshot::testing::record(1, KeyState::Active);
    let digest = record.digest;
    let found = discovery::LookupResult {
        keyring: testing::keyring_name().to_string(),
        epoch: 7,
        revision: 1,
        digest: digest.as_bytes().to_vec().into(),
        item: Some(crate::wire::item::encode(&record)),
        ..discovery::LookupResult::default()
    };
    start().into_iter().for_each(&mut tell);
    tell(Kind::LookupResult(found));
    let cache = slot.cache().expect("it is held on demand");
    assert!(slot.load().is_some() && cache.holds(&digest));
    not_served(1).into_iter().for_each(&mut tell);
    assert!(slot.load().is_none() && !cache.holds(&digest));
    start().into_iter().for_each(&mut tell);
    assert!(slot.load().is_some() && !cache.holds(&digest));
    assert_eq!(slot.confirmation(), None);
}

#[test]
fn while_another_process_uses_the_file_it_is_neither_read_nor_written() {
    let machine = stopped();
    let first = machine.start();
    let keyrings = Keyrings::new([(testing::keyring_name(), STALENESS)]);
    let mut receiver = Receiver::new(&keyrings, machine.clock.clone());
    let empty = Empty {
        node: &machine.node,
        keyrings: &keyrings,
        receiver: &mut receiver,
        latest: &LatestWall::default(),
        clock: &machine.clock,
    };
    let Begun { disk, kept } = begin::begin(&machine.settings(), empty).expect("it starts");
    assert!(kept.is_none());
    let problem = disk.health().problem.expect("it says so");
    assert!(problem.contains("another process uses"), "{problem}");
    assert!(receiver.disk().is_none());
    let slot = keyrings.get(&testing::keyring_name());
    assert!(slot.expect("it is configured").load().is_none());
    assert!(first.state().is_some());
}
