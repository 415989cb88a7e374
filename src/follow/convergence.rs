//! Whatever a stream loses, repeats or brings early, a sidecar ends up with what the control plane has, and a revocation
//! that has arrived is never undone.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use proptest::prelude::*;
use prost::Message;

use super::receiver::{BeatNews, Leave, Received, Receiver};
use crate::{
    clock::{Clock, ManualClock},
    control::{journal::LogState, served::FedKeyring, steps::EncodedStep},
    key::{
        Change, Epoch, KeyDigest, KeyId, KeyState, PresentedKey, Revision, RotationId, Timestamp,
        Window,
        operation::{self, OldEnds, StageSpec, Which},
        testing,
    },
    keyring::{Freshness, HeldKey, Keyrings, Slot, Staleness},
    proto::discovery::{
        self, ResyncReason, control_message::Kind, sidecar_message::Kind as Answer,
    },
    wire::{
        item,
        testing::{settings, spec},
    },
};

const EPOCH: Epoch = Epoch::new(7);
const STALENESS: Staleness = Staleness {
    warn_after: Duration::from_secs(30),
    deny_after: Duration::from_mins(1),
};

/// A change of the keyring.
#[derive(Clone, Copy, Debug)]
enum Act {
    CreateKey,
    Rotate(usize),
    Revoke(usize),
}

/// The way in which the stream treats a step.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Deliver,
    RevocationsFirst,
    Twice,
    Lose,
    LoseAllButRevocations,
    /// Of its revocations only the digests can be read.
    Unreadable,
    /// Nothing of its revocations can be read, where it has any, first in the lane or not.
    Broken {
        overtakes: bool,
    },
}

/// A control plane's keyring and a sidecar's receiver, with a stream between them that the test plays.
struct Pair {
    control: FedKeyring,
    receiver: Receiver,
    keyrings: Keyrings,
    hands: ManualClock,
    clock: Clock,
    /// Digests whose revocation the sidecar has received.
    revoked: HashSet<KeyDigest>,
    /// When each version was revoked.
    revoked_at: HashMap<KeyDigest, Revision>,
}

impl Pair {
    fn new() -> Self {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000_000));
        let keyrings = Keyrings::new([(testing::keyring_name(), STALENESS)]);
        let first = operation::create_keyring(
            testing::keyring_name(),
            crate::key::Prefix::default(),
            false,
            None,
        )
        .expect("a valid keyring");
        let mut pair = Self {
            control: FedKeyring::from_keyring(
                EPOCH,
                crate::key::Keyring::begin(clock.wall(), &first).expect("a first change"),
            ),
            receiver: Receiver::new(&keyrings, clock.clone()),
            keyrings,
            hands,
            clock,
            revoked: HashSet::new(),
            revoked_at: HashMap::new(),
        };
        let consumer = "checkout".parse().expect("a valid id");
        let changes = pair
            .control
            .keyring
            .create_consumer(consumer, String::new());
        pair.commit(changes.expect("a new consumer"));
        pair.receive(Kind::Settings(settings(EPOCH)))
            .expect("settings are taken");
        pair
    }

    fn commit(&mut self, changes: Vec<Change>) {
        for change in changes {
            let revision = self.control.revision().next();
            self.control
                .apply(revision, self.clock.wall(), &change)
                .expect("an operation plans only possible changes");
            for record in self.control.keyring.records() {
                if record.state == KeyState::Revoked {
                    self.revoked_at.entry(record.digest).or_insert(revision);
                }
            }
        }
    }

    fn act(&mut self, act: Act) {
        let now = self.clock.wall();
        let keyring = &self.control.keyring;
        let key_at = |index: usize| {
            keyring
                .keys()
                .keys()
                .nth(index % keyring.keys().len().max(1))
        };
        let changes = match act {
            Act::CreateKey => {
                let key_id = KeyId::generate().expect("the random source works");
                let secret = testing::secret(key_id);
                keyring
                    .create_key(spec(key_id), &secret.presented(), &testing::pepper(), now)
                    .expect("a new key")
            }
            Act::Rotate(index) => {
                let Some(key_id) = key_at(index).copied() else {
                    return;
                };
                let rotation = RotationId::generate().expect("the random source works");
                let stage = StageSpec {
                    key_id,
                    rotation,
                    window: Window::default(),
                    withdraw_after: now.saturating_add(Duration::from_mins(1)),
                };
                let secret = testing::secret(key_id);
                let Ok(staged) = keyring.stage(stage, &secret.presented(), &testing::pepper(), now)
                else {
                    return;
                };
                self.commit(staged);
                self.control
                    .keyring
                    .hand_over(key_id, rotation, &OldEnds::AfterOverlap(None), now)
                    .expect("it was just staged")
            }
            Act::Revoke(index) => {
                let Some(key_id) = key_at(index).copied() else {
                    return;
                };
                keyring
                    .revoke(key_id, Which::All, "test")
                    .unwrap_or_default()
            }
        };
        self.commit(changes);
    }

    fn receive(&mut self, kind: Kind) -> Result<Received, Leave> {
        let outcome = self
            .receiver
            .receive(discovery::ControlMessage { kind: Some(kind) })?;
        for answer in &outcome.answers {
            match &answer.kind {
                Some(Answer::Ack(ack)) if ack.epoch == EPOCH.get() => {
                    self.assert_in_force(ack.revoked_through);
                }
                Some(Answer::Nack(nack)) if nack.epoch == EPOCH.get() => {
                    self.assert_in_force(nack.revoked_through);
                }
                Some(
                    Answer::Ack(_)
                    | Answer::Nack(_)
                    | Answer::Hello(_)
                    | Answer::Resync(_)
                    | Answer::Goodbye(_)
                    | Answer::Usage(_)
                    | Answer::Lookup(_)
                    | Answer::Beat(_)
                    | Answer::Dropped(_)
                    | Answer::Find(_)
                    | Answer::Subscribe(_)
                    | Answer::Unsubscribe(_),
                )
                | None => {}
            }
        }
        Ok(outcome)
    }

    /// Asserts that no version is accepted whose revocation the sidecar reports as in force.
    fn assert_in_force(&self, revoked_through: u64) {
        for (digest, revoked_at) in &self.revoked_at {
            if revoked_at.get() <= revoked_through {
                assert!(
                    matches!(self.state_of(digest), Some(KeyState::Revoked) | None),
                    "revocations up to {revoked_through} are claimed, and one of {revoked_at} is not in force"
                );
            }
        }
    }

    /// Delivers a step; returns whether the sidecar requests a snapshot because of a revocation
    /// that it cannot read.
    fn deliver(&mut self, step: &EncodedStep, fate: Fate) -> bool {
        let revocations = || step.revocations.clone().map(Kind::Revocations);
        let delta = || Some(Kind::Delta(step.delta.clone()));
        let messages = match fate {
            Fate::Deliver => vec![delta()],
            Fate::RevocationsFirst => vec![revocations(), delta()],
            Fate::Twice => vec![delta(), delta()],
            Fate::Lose => vec![],
            Fate::LoseAllButRevocations => vec![revocations()],
            Fate::Unreadable => {
                let (lane, delta) = spoilt(step, &torn);
                vec![lane, delta]
            }
            Fate::Broken { overtakes } => {
                let (lane, delta) = spoilt(step, &broken);
                vec![lane.filter(|_| overtakes), delta]
            }
        };
        let mut asks = false;
        for message in messages.into_iter().flatten() {
            let outcome = self.receive(message).expect("the stream goes on");
            asks |= resync_reason(&outcome) == Some(ResyncReason::RevocationUnreadable);
        }
        if !matches!(fate, Fate::Lose | Fate::Broken { .. }) {
            self.note_revocations(step);
        }
        asks
    }

    fn note_revocations(&mut self, step: &EncodedStep) {
        if let Some(revocations) = &step.revocations {
            let message =
                discovery::Revocations::decode(revocations.clone()).expect("just encoded");
            let records = message.items.iter().map(item::decode);
            self.revoked
                .extend(records.map(|record| record.expect("just encoded").digest));
        }
    }

    fn snapshot(&mut self) -> Result<Received, Leave> {
        let snapshot = self.control.feed.snapshot(&self.control.keyring, 0, 0);
        let mut last = Ok(Received::default());
        for chunk in &snapshot.chunks {
            last = Ok(self.receive(Kind::Snapshot(chunk.clone()))?);
        }
        last
    }

    /// Sends a beat and returns its number.
    fn ask(&mut self) -> u64 {
        match self.receiver.next_beat().kind {
            Some(Answer::Beat(beat)) => beat.number,
            other => panic!("{other:?} is no beat"),
        }
    }

    /// Returns the answer of a control plane to a beat now.
    fn answer_to(&self, beat: u64, serve_for: Duration) -> discovery::BeatAnswer {
        discovery::BeatAnswer {
            beat,
            sent_at: Some(self.clock.wall().to_wire()),
            beat_every_ms: 5_000,
            keyrings: vec![discovery::KeyringPulse {
                keyring: testing::keyring_name().to_string(),
                epoch: EPOCH.get(),
                revision: self.control.revision().get(),
                set_digest: self.control.feed.set_digest(),
                serve_for_ms: serve_for.as_millis().try_into().expect("short"),
            }],
        }
    }

    /// A beat that is answered at once.
    fn beat(&mut self) -> Result<Received, Leave> {
        let beat = self.ask();
        let answer = self.answer_to(beat, STALENESS.deny_after);
        self.receive(Kind::BeatAnswer(answer))
    }

    fn slot(&self) -> Arc<Slot> {
        self.keyrings
            .get(&testing::keyring_name())
            .expect("the keyring is configured")
    }

    fn state_of(&self, digest: &KeyDigest) -> Option<KeyState> {
        let view = self.slot().load();
        let held = view.as_ref()?.lookup(digest)?;
        Some(held.state())
    }

    fn assert_converged(&self) {
        let view = self.slot().load();
        let view = view.as_ref().expect("a snapshot was taken");
        assert_eq!(view.revision(), self.control.revision());
        assert_eq!(view.len(), self.control.keyring.version_count());
        for record in self.control.keyring.records() {
            assert_eq!(
                view.lookup(&record.digest).map(HeldKey::to_record),
                Some(record)
            );
        }
    }

    fn assert_revocations_hold(&self) {
        if self.slot().load().is_some() {
            for digest in &self.revoked {
                if let Some(state) = self.state_of(digest) {
                    assert_eq!(state, KeyState::Revoked);
                }
            }
        }
    }
}

/// The lane message of a step, where it has one, and its delta, with other revocations.
fn spoilt(
    step: &EncodedStep,
    spoil: &dyn Fn(&mut discovery::Item),
) -> (Option<Kind>, Option<Kind>) {
    let lane = step.revocations.clone().map(|lane| {
        let mut lane = discovery::Revocations::decode(lane).expect("just encoded");
        lane.items.iter_mut().for_each(spoil);
        Kind::Revocations(lane.encode_to_vec().into())
    });
    let mut delta = discovery::Delta::decode(step.delta.clone()).expect("just encoded");
    delta.revocations.iter_mut().for_each(spoil);
    (lane, Some(Kind::Delta(delta.encode_to_vec().into())))
}

/// Leaves nothing that can be read of an item but the digest.
fn torn(item: &mut discovery::Item) {
    item.record = [&item.record[..], b"\xff"].concat().into();
    assert!(item::decode(item).is_err());
}

/// Leaves nothing that can be read of an item.
fn broken(item: &mut discovery::Item) {
    item.record = bytes::Bytes::from_static(b"\xff");
}

fn nack(outcome: &Received) -> &discovery::Nack {
    match &outcome.answers[0].kind {
        Some(Answer::Nack(nack)) => nack,
        other => panic!("{other:?} is no nack"),
    }
}

fn resync_reason(outcome: &Received) -> Option<ResyncReason> {
    outcome
        .answers
        .iter()
        .find_map(|answer| match &answer.kind {
            Some(Answer::Resync(resync)) => ResyncReason::try_from(resync.reason).ok(),
            Some(
                Answer::Hello(_)
                | Answer::Ack(_)
                | Answer::Nack(_)
                | Answer::Goodbye(_)
                | Answer::Usage(_)
                | Answer::Lookup(_)
                | Answer::Beat(_)
                | Answer::Dropped(_)
                | Answer::Find(_)
                | Answer::Subscribe(_)
                | Answer::Unsubscribe(_),
            )
            | None => None,
        })
}

fn acks(outcome: &Received) -> Vec<&discovery::Ack> {
    outcome
        .answers
        .iter()
        .filter_map(|answer| match &answer.kind {
            Some(Answer::Ack(ack)) => Some(ack),
            Some(
                Answer::Hello(_)
                | Answer::Nack(_)
                | Answer::Resync(_)
                | Answer::Goodbye(_)
                | Answer::Usage(_)
                | Answer::Lookup(_)
                | Answer::Beat(_)
                | Answer::Dropped(_)
                | Answer::Find(_)
                | Answer::Subscribe(_)
                | Answer::Unsubscribe(_),
            )
            | None => None,
        })
        .collect()
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::CreateKey),
        2 => (0_usize..8).prop_map(Act::Rotate),
        2 => (0_usize..8).prop_map(Act::Revoke),
    ]
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => Just(Fate::Deliver),
        2 => Just(Fate::RevocationsFirst),
        1 => Just(Fate::Twice),
        1 => Just(Fate::Lose),
        1 => Just(Fate::LoseAllButRevocations),
        2 => Just(Fate::Unreadable),
        2 => any::<bool>().prop_map(|overtakes| Fate::Broken { overtakes }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_stream_converges(
        before in proptest::collection::vec(act(), 0..6),
        after in proptest::collection::vec((act(), fate(), 0_u8..3), 0..25),
    ) {
        let mut pair = Pair::new();
        for act in before {
            pair.act(act);
        }
        pair.snapshot().expect("the first snapshot is taken");
        for (act, fate, luck) in after {
            // The snapshot that the sidecar requests comes at once, a little later or not at all;
            // so does a heartbeat.
            let (comes_soon, resyncs_now) = (luck > 0, luck > 1);
            let start = pair.control.revision();
            pair.act(act);
            let mut at = start;
            while let Some(step) = pair.control.feed.step_after(at).cloned() {
                at = step.revision;
                if pair.deliver(&step, fate) && comes_soon {
                    pair.snapshot().expect("a newer snapshot is taken");
                    at = pair.control.revision();
                }
            }
            pair.assert_revocations_hold();
            if resyncs_now {
                let outcome = pair.beat().expect("the stream goes on");
                if resync_reason(&outcome).is_some() {
                    pair.snapshot().expect("a newer snapshot is taken");
                }
                pair.assert_revocations_hold();
            }
        }
        let _ = pair.beat().expect("the stream goes on");
        pair.snapshot().expect("a snapshot of the same or a newer revision is taken");
        let settled = pair.beat().expect("the stream goes on");
        prop_assert_eq!(resync_reason(&settled), None);
        pair.assert_converged();
    }
}

fn pair_with_keys(count: usize) -> Pair {
    let mut pair = Pair::new();
    for _ in 0..count {
        pair.act(Act::CreateKey);
    }
    pair.snapshot().expect("the first snapshot is taken");
    pair
}

#[test]
fn a_lost_delta_is_found_by_the_next_beat() {
    let mut pair = pair_with_keys(2);
    pair.act(Act::CreateKey);
    let outcome = pair.beat().expect("the stream goes on");
    assert_eq!(resync_reason(&outcome), Some(ResyncReason::Gap));
}

#[test]
fn a_gap_is_never_applied_across() {
    let mut pair = pair_with_keys(1);
    let held = pair.control.revision();
    pair.act(Act::CreateKey);
    pair.act(Act::CreateKey);
    let second = pair.control.feed.step_after(held.next()).cloned();
    let outcome = pair.receive(Kind::Delta(second.expect("two steps").delta));
    let outcome = outcome.expect("the stream goes on");
    assert_eq!(resync_reason(&outcome), Some(ResyncReason::Gap));
    let view = pair.slot().load();
    assert_eq!(view.as_ref().map(|view| view.revision()), Some(held));
}

#[test]
fn a_revocation_in_the_lane_is_acked_before_its_delta() {
    let mut pair = pair_with_keys(1);
    let held = pair.control.revision();
    pair.act(Act::Revoke(0));
    let step = pair.control.feed.step_after(held).cloned().expect("a step");
    let lane = step.revocations.clone().expect("it revokes");
    let outcome = pair.receive(Kind::Revocations(lane)).expect("it goes on");
    let ack = acks(&outcome)[0];
    assert_eq!(ack.applied_revision, held.get());
    assert_eq!(ack.revoked_through, step.revision.get());
    let outcome = pair.receive(Kind::Delta(step.delta)).expect("it goes on");
    assert_eq!(acks(&outcome)[0].applied_revision, step.revision.get());
    assert_eq!(resync_reason(&pair.beat().expect("it goes on")), None);
}

#[test]
fn a_revocation_in_the_lane_claims_nothing_where_an_earlier_one_was_missed() {
    let mut pair = pair_with_keys(3);
    let held = pair.control.revision();
    pair.act(Act::Revoke(0));
    pair.act(Act::Revoke(1));
    let missed = pair.control.feed.step_after(held).cloned().expect("a step");
    let second = pair.control.feed.revocation_after(missed.revision).cloned();
    let lane = second.and_then(|step| step.revocations);
    let overtaking = Kind::Revocations(lane.expect("it revokes"));
    let outcome = pair.receive(overtaking.clone()).expect("it goes on");
    assert_eq!(acks(&outcome)[0].revoked_through, held.get());
    assert_eq!(pair.receiver.subscriptions()[0].revoked_through, held.get());
    // The revocation that overtook it counts as soon as it has arrived.
    let outcome = pair.receive(Kind::Delta(missed.delta)).expect("it goes on");
    assert_eq!(
        acks(&outcome)[0].revoked_through,
        pair.control.revision().get()
    );
    assert_eq!(
        pair.receiver.subscriptions()[0].revoked_through,
        pair.control.revision().get()
    );
}

#[test]
fn a_revocation_of_which_only_the_digest_can_be_read_is_in_force() {
    for overtakes in [true, false] {
        let mut pair = pair_with_keys(2);
        let held = pair.control.revision();
        let record = pair.control.keyring.records().next().expect("a key");
        pair.act(Act::Revoke(0));
        let step = pair.control.feed.step_after(held).cloned().expect("a step");
        let (lane, delta) = spoilt(&step, &torn);
        let message = if overtakes { lane } else { delta };
        let outcome = pair.receive(message.expect("it revokes"));
        let outcome = outcome.expect("the stream goes on");
        assert_eq!(acks(&outcome)[0].revoked_through, step.revision.get());
        // The rest of the record is still known.
        let view = pair.slot().load();
        let held = view.as_ref().and_then(|view| view.record(&record.digest));
        let revoked = crate::key::KeyRecord {
            state: KeyState::Revoked,
            ..record
        };
        assert_eq!(held, Some(revoked));
    }
}

#[test]
fn of_a_version_that_is_not_held_the_revocation_is_remembered_by_its_digest() {
    let mut pair = pair_with_keys(1);
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let record = testing::record_of(&secret);
    let mut item = item::encode(&record);
    torn(&mut item);
    let lane = discovery::Revocations {
        keyring: testing::keyring_name().to_string(),
        epoch: EPOCH.get(),
        revision: pair.control.revision().get() + 1,
        nonce: 1,
        items: vec![item],
        complete_after: pair.control.revision().get(),
    };
    let lane = Kind::Revocations(lane.encode_to_vec().into());
    pair.receive(lane).expect("the stream goes on");
    assert_eq!(pair.state_of(&record.digest), Some(KeyState::Revoked));
    // A snapshot that has the version as one that is accepted does not undo it.
    pair.snapshot().expect("the same snapshot is taken");
    assert_eq!(pair.state_of(&record.digest), Some(KeyState::Revoked));
}

#[test]
fn nothing_is_claimed_beyond_a_revocation_that_cannot_be_read_until_a_snapshot_is_in_use() {
    for overtakes in [true, false] {
        let mut pair = pair_with_keys(2);
        let held = pair.control.revision();
        pair.act(Act::Revoke(0));
        let step = pair.control.feed.step_after(held).cloned().expect("a step");
        let (lane, delta) = spoilt(&step, &broken);
        let message = if overtakes { lane } else { delta };
        let outcome = pair.receive(message.expect("it revokes"));
        let outcome = outcome.expect("the stream goes on");
        assert_eq!(nack(&outcome).revoked_through, held.get());
        let asks = resync_reason(&outcome);
        assert_eq!(asks, Some(ResyncReason::RevocationUnreadable));
        // A later revocation that can be read changes nothing about that.
        let after = pair.control.revision();
        pair.act(Act::Revoke(1));
        let later = pair.control.feed.revocation_after(after).cloned();
        let later = later.and_then(|step| step.revocations).expect("it revokes");
        let outcome = pair.receive(Kind::Revocations(later)).expect("it goes on");
        assert_eq!(acks(&outcome)[0].revoked_through, held.get());
        assert_eq!(pair.receiver.subscriptions()[0].revoked_through, held.get());
        let outcome = pair.snapshot().expect("a newer snapshot is taken");
        let ack = acks(&outcome)[0];
        assert!(ack.is_whole);
        assert_eq!(ack.revoked_through, pair.control.revision().get());
    }
}

#[test]
fn a_nack_says_where_it_does_not_name_all() {
    for (refused, has_more) in [(100, false), (101, true)] {
        let mut pair = pair_with_keys(1);
        let held = pair.control.revision();
        pair.act(Act::CreateKey);
        let step = pair.control.feed.step_after(held).cloned().expect("a step");
        let mut delta = discovery::Delta::decode(step.delta).expect("just encoded");
        delta.upserts = (0..refused)
            .map(|number| discovery::Item {
                name: format!("poison/{number}"),
                record: bytes::Bytes::from_static(b"\xff"),
            })
            .collect();
        let outcome = pair.receive(Kind::Delta(delta.encode_to_vec().into()));
        let outcome = outcome.expect("the stream goes on");
        let nack = nack(&outcome);
        assert_eq!((nack.items.len(), nack.has_more), (100, has_more));
        assert!(!nack.is_whole);
    }
}

#[test]
fn a_poison_item_does_not_hold_a_revocation_back() {
    let mut pair = pair_with_keys(2);
    let held = pair.control.revision();
    pair.act(Act::Revoke(0));
    let step = pair.control.feed.step_after(held).cloned().expect("a step");
    let mut delta = discovery::Delta::decode(step.delta.clone()).expect("just encoded");
    delta.upserts.push(discovery::Item {
        name: "poison/1".to_owned(),
        record: bytes::Bytes::from_static(b"\xff"),
    });
    let outcome = pair
        .receive(Kind::Delta(delta.encode_to_vec().into()))
        .expect("the stream goes on");
    let Some(Answer::Nack(nack)) = &outcome.answers[0].kind else {
        panic!("the poison item was not refused");
    };
    assert_eq!(nack.items[0].name, "poison/1");
    assert_eq!(nack.revoked_through, step.revision.get());
    pair.note_revocations(&step);
    assert_eq!(pair.revoked.len(), 1);
    pair.assert_revocations_hold();
}

#[test]
fn a_new_epoch_keeps_the_revocations_of_the_old_one() {
    let mut pair = pair_with_keys(2);
    let (records, epoch) = (pair.control.keyring.records(), Epoch::new(8));
    let digests: Vec<_> = records.map(|record| record.digest).collect();
    let lost = pair.control.keyring.clone();
    let held = pair.control.revision();
    pair.act(Act::Revoke(0));
    let step = pair.control.feed.step_after(held).cloned().expect("a step");
    pair.deliver(&step, Fate::Deliver);
    pair.control = FedKeyring {
        feed: crate::control::feed::Feed::new(epoch, &lost),
        keyring: lost,
    };
    pair.snapshot().expect("a snapshot of a new epoch is taken");
    let revoked = digests
        .iter()
        .filter(|digest| pair.state_of(digest) == Some(KeyState::Revoked));
    assert_eq!(revoked.count(), 1);
    let view = pair.slot().load();
    assert_eq!(view.as_ref().map(|view| view.epoch()), Some(epoch));
}

#[test]
fn an_older_revision_of_the_same_epoch_is_left() {
    let mut pair = pair_with_keys(2);
    let older = pair.control.keyring.clone();
    pair.act(Act::CreateKey);
    pair.snapshot().expect("a newer snapshot is taken");
    let held = pair.control.revision();
    pair.control = FedKeyring {
        feed: crate::control::feed::Feed::new(EPOCH, &older),
        keyring: older,
    };
    let lagging = Leave::Lagging {
        keyring: testing::keyring_name(),
        held,
        found: Revision::new(held.get() - 1),
    };
    assert_eq!(pair.snapshot().expect_err("it lags"), lagging);
    assert_eq!(pair.beat().expect_err("it lags"), lagging);
}

#[test]
fn a_snapshot_that_drops_more_than_half_is_held_until_its_number_is_confirmed() {
    let mut pair = pair_with_keys(5);
    let mut other = Pair::new();
    other.act(Act::CreateKey);
    other.act(Act::CreateKey);
    let epoch = Epoch::new(8);
    let snapshot = |confirmed| {
        crate::control::feed::Feed::new(epoch, &other.control.keyring).snapshot(
            &other.control.keyring,
            confirmed,
            0,
        )
    };
    let outcome = pair.receive(Kind::Snapshot(snapshot(0).chunks[0].clone()));
    let outcome = outcome.expect("the stream goes on");
    assert!(!nack(&outcome).is_whole, "it is not in use");
    assert_eq!(pair.slot().load().as_ref().map(|view| view.len()), Some(5));
    let outcome = pair.receive(Kind::Snapshot(snapshot(2).chunks[0].clone()));
    assert_eq!(acks(&outcome.expect("the stream goes on")).len(), 1);
    assert_eq!(pair.slot().load().as_ref().map(|view| view.len()), Some(2));
}

#[test]
fn a_held_snapshot_is_asked_for_again_until_it_is_confirmed() {
    let mut pair = pair_with_keys(5);
    let mut other = Pair::new();
    other.act(Act::CreateKey);
    let snapshot = crate::control::feed::Feed::new(Epoch::new(8), &other.control.keyring).snapshot(
        &other.control.keyring,
        0,
        0,
    );
    for wait in [0, 10, 20] {
        pair.hands.advance(Duration::from_secs(wait));
        let held = pair.receive(Kind::Snapshot(snapshot.chunks[0].clone()));
        held.expect("the stream goes on");
        let outcome = pair.beat().expect("the stream goes on");
        assert_eq!(resync_reason(&outcome), Some(ResyncReason::SnapshotHeld));
    }
}

#[test]
fn a_snapshot_with_a_missing_chunk_is_refused() {
    let mut pair = pair_with_keys(1);
    let snapshot = pair.control.feed.snapshot(&pair.control.keyring, 0, 0);
    let mut chunk = discovery::SnapshotChunk::decode(snapshot.chunks[0].clone()).expect("encoded");
    chunk.total_items += 1;
    let cut = pair.receive(Kind::Snapshot(chunk.encode_to_vec().into()));
    assert!(matches!(cut, Err(Leave::Protocol(_))));
    chunk.index = 1;
    let out_of_order = pair.receive(Kind::Snapshot(chunk.encode_to_vec().into()));
    assert!(matches!(out_of_order, Err(Leave::Protocol(_))));
}

fn freshness(pair: &Pair) -> Freshness {
    pair.slot().freshness(pair.clock.reading())
}

fn age(pair: &Pair) -> Option<Duration> {
    pair.slot().age(pair.clock.reading())
}

#[test]
fn freshness_counts_from_the_sending_of_the_beat() {
    let mut pair = pair_with_keys(1);
    assert_eq!((age(&pair), freshness(&pair)), (None, Freshness::Stale));
    pair.beat().expect("the stream goes on");
    assert_eq!(age(&pair), Some(Duration::ZERO));
    let beat = pair.ask();
    pair.hands.advance(Duration::from_secs(40));
    let answer = pair.answer_to(beat, STALENESS.deny_after);
    pair.receive(Kind::BeatAnswer(answer)).expect("it goes on");
    assert_eq!(age(&pair), Some(Duration::from_secs(40)));
    assert_eq!(freshness(&pair), Freshness::Warned);
}

#[test]
fn answers_that_waited_while_the_sidecar_was_stopped_make_nothing_fresh() {
    let mut pair = pair_with_keys(2);
    pair.beat().expect("the stream goes on");
    // The answers wait, because the process is stopped.
    let held_up: Vec<_> = (0..3)
        .map(|_| {
            let beat = pair.ask();
            pair.hands.advance(Duration::from_secs(1));
            pair.answer_to(beat, STALENESS.deny_after)
        })
        .collect();
    pair.hands.advance(STALENESS.deny_after);
    for answer in held_up {
        pair.receive(Kind::BeatAnswer(answer)).expect("it goes on");
        assert_eq!(freshness(&pair), Freshness::Stale, "{:?}", age(&pair));
    }
    // Asking again does.
    pair.beat().expect("the stream goes on");
    assert_eq!(freshness(&pair), Freshness::Fresh);
}

#[test]
fn a_step_of_the_wall_clock_denies_until_the_sidecar_has_asked_again() {
    let mut pair = pair_with_keys(1);
    pair.beat().expect("the stream goes on");
    let wall = pair.clock.wall();
    pair.hands
        .set_wall(wall.saturating_add(STALENESS.deny_after));
    assert_eq!(freshness(&pair), Freshness::Stale);
    pair.beat().expect("the stream goes on");
    assert_eq!(freshness(&pair), Freshness::Fresh);
    // The wall clock is set right again: the boot clock decides.
    pair.hands.set_wall(wall);
    assert_eq!(freshness(&pair), Freshness::Fresh);
    pair.hands.advance(STALENESS.deny_after);
    assert_eq!(freshness(&pair), Freshness::Stale);
}

#[test]
fn a_sidecar_serves_for_what_it_is_granted_and_its_own_limit() {
    let mut pair = pair_with_keys(1);
    let mut granted = |serve_for| {
        let beat = pair.ask();
        let answer = pair.answer_to(beat, Duration::from_secs(serve_for));
        pair.receive(Kind::BeatAnswer(answer)).expect("it goes on");
        let now = pair.clock.reading();
        let fresh_after = |seconds: u64| {
            let mut later = now;
            later.boot = later.boot.saturating_add(Duration::from_secs(seconds));
            pair.slot().freshness(later) != Freshness::Stale
        };
        let serves = (0..100).find(|seconds| !fresh_after(*seconds));
        pair.hands.advance(Duration::from_secs(1));
        serves.expect("it does not serve for ever")
    };
    assert_eq!(granted(4), 4);
    assert_eq!(granted(3_600), 60);
    assert_eq!(granted(2), 2);
    assert_eq!(granted(0), 0);
}

#[test]
fn an_answer_that_is_older_than_the_newest_or_to_no_beat_changes_nothing() {
    let mut pair = pair_with_keys(1);
    let (first, second) = (pair.ask(), pair.ask());
    pair.hands.advance(Duration::from_secs(10));
    let receive = |pair: &mut Pair, beat| {
        let answer = pair.answer_to(beat, Duration::from_secs(30));
        pair.receive(Kind::BeatAnswer(answer)).expect("it goes on")
    };
    receive(&mut pair, second + 1);
    assert_eq!(age(&pair), None);
    let outcome = receive(&mut pair, second);
    assert_eq!(outcome.beat, Some(BeatNews::Answered));
    assert_eq!(age(&pair), Some(Duration::from_secs(10)));
    pair.hands.advance(Duration::from_secs(1));
    for beat in [first, second] {
        let outcome = receive(&mut pair, beat);
        assert_eq!((outcome.beat, outcome.clock_skew_ms), (None, None));
        assert_eq!(age(&pair), Some(Duration::from_secs(11)));
    }
    // The answer to a beat of a stream that has ended changes nothing either.
    let lost = pair.ask();
    pair.receiver.disconnected();
    receive(&mut pair, lost);
    assert_eq!(age(&pair), Some(Duration::from_secs(11)));
}

#[test]
fn an_answer_confirms_nothing_of_which_changes_are_missing() {
    let mut pair = pair_with_keys(1);
    pair.beat().expect("the stream goes on");
    pair.hands.advance(Duration::from_secs(10));
    pair.act(Act::CreateKey);
    let outcome = pair.beat().expect("the stream goes on");
    assert_eq!(resync_reason(&outcome), Some(ResyncReason::Gap));
    assert_eq!(age(&pair), Some(Duration::from_secs(10)));
    let outcome = pair.snapshot().expect("it is taken");
    assert_eq!(outcome.beat, Some(BeatNews::Due), "it is to be confirmed");
    pair.beat().expect("the stream goes on");
    assert_eq!(age(&pair), Some(Duration::ZERO));
}

#[test]
fn a_beat_and_its_answer_are_small() {
    let mut pair = pair_with_keys(1);
    let beat = pair.receiver.next_beat();
    let answer = discovery::BeatAnswer {
        beat: u64::from(u32::MAX),
        ..pair.answer_to(1, Duration::from_hours(1))
    };
    let answer = discovery::ControlMessage {
        kind: Some(Kind::BeatAnswer(answer)),
    };
    assert!(beat.encoded_len() <= 13, "{}", beat.encoded_len());
    assert!(answer.encoded_len() <= 70, "{}", answer.encoded_len());
}

#[test]
fn resyncs_for_an_unexplained_difference_are_spaced() {
    let mut pair = pair_with_keys(1);
    let mut mismatching = |advance| {
        pair.hands.advance(Duration::from_secs(advance));
        let beat = pair.ask();
        let mut answer = pair.answer_to(beat, STALENESS.deny_after);
        answer.keyrings[0].set_digest += 1;
        let outcome = pair
            .receive(Kind::BeatAnswer(answer))
            .expect("the stream goes on");
        let asked = resync_reason(&outcome);
        if asked.is_some() {
            pair.snapshot().expect("the same snapshot is taken");
        }
        asked
    };
    assert_eq!(mismatching(0), Some(ResyncReason::DigestMismatch));
    assert_eq!(mismatching(9), None);
    assert_eq!(mismatching(1), Some(ResyncReason::DigestMismatch));
    assert_eq!(mismatching(19), None);
    assert_eq!(mismatching(1), Some(ResyncReason::DigestMismatch));
}

#[test]
fn a_presented_key_is_found_after_a_snapshot() {
    let mut pair = Pair::new();
    let key_id = KeyId::generate().expect("the random source works");
    let secret = testing::secret(key_id);
    let changes = pair.control.keyring.create_key(
        spec(key_id),
        &secret.presented(),
        &testing::pepper(),
        pair.clock.wall(),
    );
    pair.commit(changes.expect("a new key"));
    pair.snapshot().expect("the first snapshot is taken");
    let view = pair.slot().load();
    let view = view.as_ref().expect("a snapshot was taken");
    assert_eq!(
        view.find(&secret.presented()).map(|held| held.key_id()),
        Some(key_id)
    );
    let other = PresentedKey::new(b"rlk_something_else").expect("printable");
    assert!(view.find(&other).is_none());
}
