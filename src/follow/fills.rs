//! Tests of a keyring that is held on demand, whatever is delayed, lost, evicted or answered by a
//! control plane that lags. It never allows a key that was revoked, and never calls a key unknown
//! that it should know. Of a key it holds either nothing or every version that was accepted at the
//! acked revision.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use proptest::prelude::*;
use prost::Message;

use super::receiver::{Leave, Received, Receiver};
use crate::{
    clock::{Clock, ManualClock},
    control::{
        journal::LogState,
        served::{FedKeyring, LookedUp},
    },
    key::{
        Change, Epoch, KeyDigest, KeyId, KeyState, Keyring, Prefix, Revision, RotationId, Secret,
        Timestamp, Window,
        operation::{self, OldEnds, StageSpec, Which},
        testing,
    },
    keyring::{
        Keyrings, Mode, Slot, Staleness,
        on_demand::{Answer, CacheSettings, CachedKey, Finding, KeyCache, Waiting},
    },
    proto::discovery::{self, control_message::Kind, sidecar_message::Kind as Said},
    wire::{
        item,
        testing::{settings, spec},
    },
};

/// An event of the world. Numbers choose among what there is.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Changes of the keyring, which every replica learns in its time.
    Create,
    Stage(usize),
    HandOver(usize),
    Retire(usize),
    RollBack(usize),
    Revoke(usize),
    /// A history that lost its end.
    Rewrite(usize),
    /// A replica reads one more change.
    CatchUp(usize),
    Connect(usize),
    Disconnect,
    /// The control plane sends a message of this kind, if there is one.
    Tell(Tell),
    /// The next message arrives.
    Deliver,
    /// The sidecar sends its lookups.
    Ask,
    /// All of these, a few times over.
    Flow(usize),
    Check(usize),
    /// A check that waits looks at its answer.
    Collect(usize),
    Evict(usize),
    Advance(u64),
}

#[derive(Clone, Copy, Debug)]
enum Tell {
    Revocation,
    /// Of which only the digests can be read.
    TornRevocation,
    /// Of which nothing can be read.
    BrokenRevocation,
    Delta,
    LookupResult,
    BeatAnswer,
}

/// A sidecar that holds a keyring on demand, and all the control planes that it may meet.
struct World {
    epoch: Epoch,
    /// The keyring as it is in the store.
    head: FedKeyring,
    log: Vec<Change>,
    replicas: Vec<FedKeyring>,
    stream: Option<Stream>,
    receiver: Receiver,
    keyrings: Keyrings,
    clock: Clock,
    hands: ManualClock,
    /// Of every version that ever was, and of one that never is.
    secrets: Vec<Secret>,
    waiting: Vec<(KeyDigest, Waiting)>,
    /// When each version was created and revoked, by epoch.
    facts: HashMap<(Epoch, KeyDigest), Facts>,
    /// Digests whose revocation has arrived.
    told_revoked: HashSet<KeyDigest>,
    acked: Acked,
}

#[derive(Clone, Copy, Debug)]
struct Facts {
    key_id: KeyId,
    created_at: Revision,
    /// Since when it is accepted without a break; none while it is not.
    live_since: Option<Revision>,
    revoked_at: Option<Revision>,
}

/// The revisions that the sidecar last reported as in use.
#[derive(Clone, Copy, Debug, Default)]
struct Acked {
    epoch: Epoch,
    applied: Revision,
    revoked_through: Revision,
}

/// The stream to a replica, as a session would keep it.
struct Stream {
    replica: usize,
    epoch: Epoch,
    /// The revision that the sidecar was sent; none before the start.
    sent: Option<Revision>,
    revoked_through: Revision,
    asked: VecDeque<KeyDigest>,
    transit: VecDeque<Kind>,
}

const REPLICAS: usize = 3;

impl World {
    fn new() -> Self {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000_000));
        let mode = Mode::OnDemand(CacheSettings::default());
        let keyrings =
            Keyrings::with_modes([(testing::keyring_name(), Staleness::default(), mode)]);
        let first =
            operation::create_keyring(testing::keyring_name(), Prefix::default(), false, None)
                .expect("a valid keyring");
        let epoch = Epoch::new(1);
        let begin = || begin(epoch, clock.wall(), &first);
        let mut world = Self {
            epoch,
            head: begin(),
            replicas: (0..REPLICAS).map(|_| begin()).collect(),
            log: vec![first.clone()],
            stream: None,
            receiver: Receiver::new(&keyrings, clock.clone()),
            keyrings,
            clock,
            hands,
            secrets: vec![testing::secret(key_id())],
            waiting: Vec::new(),
            facts: HashMap::new(),
            told_revoked: HashSet::new(),
            acked: Acked::default(),
        };
        let consumer = "checkout".parse().expect("a valid id");
        let changes = world.head.keyring.create_consumer(consumer, String::new());
        world.commit(changes.expect("a new consumer"));
        world
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Create => {
                let key_id = key_id();
                let secret = testing::secret(key_id);
                let changes = self.head.keyring.create_key(
                    spec(key_id),
                    &secret.presented(),
                    &testing::pepper(),
                    self.clock.wall(),
                );
                self.secrets.push(secret);
                self.commit(changes.expect("a new key"));
            }
            Act::Stage(which) => self.stage(which),
            Act::HandOver(which) => self.hand_over(which),
            Act::Retire(which) => self.retire(which),
            Act::RollBack(which) => {
                if let Some(key_id) = self.key_at(which) {
                    let now = self.clock.wall();
                    let rolled_back = self.head.keyring.roll_back(key_id, "test", now);
                    self.commit(rolled_back.unwrap_or_default());
                }
            }
            Act::Revoke(which) => {
                if let Some(key_id) = self.key_at(which) {
                    let revoked = self.head.keyring.revoke(key_id, Which::All, "test");
                    self.commit(revoked.unwrap_or_default());
                }
            }
            Act::Rewrite(lost) => self.rewrite(lost),
            Act::CatchUp(which) => {
                let replica = &mut self.replicas[which % REPLICAS];
                if replica.revision() < self.head.revision() {
                    apply_next(replica, &self.log, self.clock.wall());
                }
            }
            Act::Connect(which) => self.connect(which % REPLICAS),
            Act::Disconnect => self.disconnect(),
            Act::Tell(tell) => self.tell(tell),
            Act::Deliver => self.deliver(),
            Act::Ask => self.ask(),
            Act::Flow(rounds) => {
                for _ in 0..rounds {
                    self.ask();
                    for tell in [Tell::Revocation, Tell::Delta, Tell::LookupResult] {
                        self.tell(tell);
                        self.deliver();
                    }
                }
            }
            Act::Check(which) => {
                let digest = self.digest_at(which);
                self.check(&digest, which);
            }
            Act::Collect(which) => {
                if !self.waiting.is_empty() {
                    let (digest, waiting) = self.waiting.swap_remove(which % self.waiting.len());
                    self.judge(&digest, waiting.collect().as_ref());
                }
            }
            Act::Evict(which) => self.cache().evict(&self.digest_at(which)),
            Act::Advance(millis) => self.hands.advance(Duration::from_millis(millis)),
        }
    }

    fn stage(&mut self, which: usize) {
        let Some(key_id) = self.key_at(which) else {
            return;
        };
        let now = self.clock.wall();
        let stage = StageSpec {
            key_id,
            rotation: RotationId::generate().expect("the random source works"),
            window: Window::default(),
            withdraw_after: now.saturating_add(Duration::from_mins(1)),
        };
        let secret = testing::secret(key_id);
        let keyring = &self.head.keyring;
        if let Ok(staged) = keyring.stage(stage, &secret.presented(), &testing::pepper(), now) {
            self.secrets.push(secret);
            self.commit(staged);
        }
    }

    fn hand_over(&mut self, which: usize) {
        let keyring = &self.head.keyring;
        let staged = self.key_at(which).and_then(|key_id| {
            let key = keyring.keys().get(&key_id)?;
            Some((key_id, key.pending()?.rotation?))
        });
        if let Some((key_id, rotation)) = staged {
            let now = self.clock.wall();
            let old_ends = OldEnds::AfterOverlap(None);
            let handed_over = keyring.hand_over(key_id, rotation, &old_ends, now);
            self.commit(handed_over.expect("it is staged"));
        }
    }

    fn retire(&mut self, which: usize) {
        let keyring = &self.head.keyring;
        let old = self.key_at(which).and_then(|key_id| {
            let key = keyring.keys().get(&key_id)?;
            Some((key_id, key.retiring().next()?.number))
        });
        if let Some((key_id, version)) = old {
            self.commit(vec![Change::VersionRetired {
                key_id,
                version,
                reason: "test".into(),
                forced: true,
            }]);
        }
    }

    fn commit(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.log.push(change);
            apply_next(&mut self.head, &self.log, self.clock.wall());
            self.note_facts();
        }
    }

    fn note_facts(&mut self) {
        let revision = self.head.revision();
        for record in self.head.keyring.records() {
            let facts = self.facts.entry((self.epoch, record.digest));
            let facts = facts.or_insert(Facts {
                key_id: record.key_id,
                created_at: revision,
                live_since: None,
                revoked_at: None,
            });
            if record.state.is_live() {
                facts.live_since.get_or_insert(revision);
            } else {
                facts.live_since = None;
            }
            if record.state == KeyState::Revoked {
                facts.revoked_at.get_or_insert(revision);
            }
        }
    }

    /// Restores a backup: the history continues from an earlier revision, and is another one from
    /// there.
    fn rewrite(&mut self, lost: usize) {
        self.epoch = Epoch::new(self.epoch.get() + 1);
        let kept = self.log.len().saturating_sub(lost).max(2);
        self.log.truncate(kept);
        let begin = || begin(self.epoch, self.clock.wall(), &self.log[0]);
        self.replicas = (0..REPLICAS).map(|_| begin()).collect();
        self.head = begin();
        while self.head.revision().get() < self.log.len() as u64 {
            apply_next(&mut self.head, &self.log, self.clock.wall());
            self.note_facts();
        }
        for replica in &mut self.replicas {
            while replica.revision() < self.head.revision() {
                apply_next(replica, &self.log, self.clock.wall());
            }
        }
        // A session that meets a new epoch begins the keyring anew on its stream.
        if let Some(stream) = &mut self.stream {
            stream.epoch = self.epoch;
            stream.sent = None;
            stream.revoked_through = self.replicas[stream.replica].revision();
            stream
                .transit
                .push_back(Kind::Settings(settings(self.epoch)));
        }
    }

    fn connect(&mut self, replica: usize) {
        self.disconnect();
        let subscription = self.receiver.subscriptions().remove(0);
        let held = Revision::new(subscription.revision);
        let serves = &self.replicas[replica];
        let is_same_history = Epoch::new(subscription.epoch) == self.epoch;
        let can_follow = is_same_history
            && (held >= serves.revision() || serves.feed.step_after(held).is_some());
        let at = held.min(serves.revision());
        self.stream = Some(Stream {
            replica,
            epoch: self.epoch,
            sent: can_follow.then_some(at),
            revoked_through: if is_same_history {
                Revision::new(subscription.revoked_through)
            } else {
                serves.revision()
            },
            asked: VecDeque::new(),
            transit: VecDeque::from([Kind::Settings(settings(self.epoch))]),
        });
        self.receiver.connected();
    }

    fn disconnect(&mut self) {
        if self.stream.take().is_some() {
            self.receiver.disconnected();
        }
    }

    fn tell(&mut self, tell: Tell) {
        let Some(stream) = &mut self.stream else {
            return;
        };
        let replica = &self.replicas[stream.replica];
        let Some(sent) = stream.sent else {
            let start = discovery::Start {
                keyring: testing::keyring_name().to_string(),
                epoch: stream.epoch.get(),
                revision: replica.revision().get(),
                nonce: 0,
            };
            stream.sent = Some(replica.revision());
            stream.revoked_through = stream.revoked_through.max(replica.revision());
            stream.transit.push_back(Kind::Start(start));
            return;
        };
        match tell {
            Tell::Revocation | Tell::TornRevocation | Tell::BrokenRevocation => {
                if let Some(step) = replica.feed.revocation_after(stream.revoked_through) {
                    stream.revoked_through = step.revision;
                    let revocations = step.revocations.clone().expect("it revokes");
                    let revocations = spoilt(revocations, tell);
                    stream.transit.push_back(Kind::Revocations(revocations));
                }
            }
            Tell::Delta => {
                if let Some(step) = replica.feed.step_after(sent) {
                    stream.sent = Some(step.revision);
                    stream.transit.push_back(Kind::Delta(step.delta.clone()));
                }
            }
            Tell::LookupResult => {
                if let Some(digest) = stream.asked.pop_front() {
                    let LookedUp {
                        revision,
                        item,
                        siblings,
                    } = replica.lookup(&digest);
                    stream
                        .transit
                        .push_back(Kind::LookupResult(discovery::LookupResult {
                            keyring: testing::keyring_name().to_string(),
                            epoch: stream.epoch.get(),
                            revision: revision.get(),
                            digest: digest.as_bytes().to_vec().into(),
                            item,
                            siblings,
                        }));
                }
            }
            Tell::BeatAnswer => {
                if sent >= replica.revision() {
                    let Some(Said::Beat(beat)) = self.receiver.next_beat().kind else {
                        panic!("the sidecar asks for nothing");
                    };
                    let pulse = discovery::KeyringPulse {
                        keyring: testing::keyring_name().to_string(),
                        epoch: stream.epoch.get(),
                        revision: replica.revision().get(),
                        set_digest: replica.feed.set_digest(),
                        serve_for_ms: 60_000,
                    };
                    stream
                        .transit
                        .push_back(Kind::BeatAnswer(discovery::BeatAnswer {
                            beat: beat.number,
                            sent_at: Some(self.clock.wall().to_wire()),
                            beat_every_ms: 5_000,
                            keyrings: vec![pulse],
                        }));
                }
            }
        }
    }

    fn deliver(&mut self) {
        let Some(stream) = &mut self.stream else {
            return;
        };
        let Some(kind) = stream.transit.pop_front() else {
            return;
        };
        let revoked = revoked_by(&kind);
        let received = self
            .receiver
            .receive(discovery::ControlMessage { kind: Some(kind) });
        self.told_revoked.extend(revoked);
        match received {
            Ok(outcome) => self.hear(outcome),
            Err(Leave::Lagging { .. }) => self.disconnect(),
            Err(leave @ (Leave::Protocol(_) | Leave::Drain { .. })) => panic!("{leave}"),
        }
    }

    fn hear(&mut self, Received { answers, .. }: Received) {
        for answer in answers {
            match answer.kind.expect("an answer is something") {
                Said::Ack(ack) => {
                    self.acked = Acked {
                        epoch: Epoch::new(ack.epoch),
                        applied: Revision::new(ack.applied_revision),
                        revoked_through: Revision::new(ack.revoked_through),
                    };
                }
                Said::Nack(nack) => {
                    self.acked = Acked {
                        epoch: Epoch::new(nack.epoch),
                        applied: Revision::new(nack.applied_revision),
                        revoked_through: Revision::new(nack.revoked_through),
                    };
                }
                Said::Resync(_) => {
                    if let Some(stream) = &mut self.stream {
                        stream.sent = None;
                    }
                }
                Said::Usage(_) => {}
                said @ (Said::Hello(_)
                | Said::Goodbye(_)
                | Said::Lookup(_)
                | Said::Beat(_)
                | Said::Dropped(_)
                | Said::Find(_)
                | Said::Subscribe(_)
                | Said::Unsubscribe(_)) => {
                    panic!("{said:?} is no answer")
                }
            }
        }
    }

    fn ask(&mut self) {
        while let Some(message) = self.receiver.next_lookup() {
            let Some(Said::Lookup(lookup)) = message.kind else {
                panic!("{message:?} is no lookup");
            };
            let digest = KeyDigest::from_slice(&lookup.digest).expect("a digest");
            let stream = self.stream.as_mut().expect("it is not asked offline");
            stream.asked.push_back(digest);
        }
    }

    fn check(&mut self, digest: &KeyDigest, which: usize) {
        let view = self.slot().load();
        let Some(view) = view.as_ref() else {
            return;
        };
        let presented = self.secret_at(which).presented();
        let now = self.clock.boot();
        let cache = self.cache();
        match cache.find(&view.settings().peppers, &presented, &[], now) {
            Finding::Held(cached) => self.judge(digest, Some(&Answer::Held(cached))),
            Finding::Unknown => self.judge(digest, Some(&Answer::Unknown)),
            Finding::Ended(cached, ended) => {
                // It is used if the lookup fails.
                self.judge(digest, Some(&Answer::Held(cached)));
                self.look_up(digest, ended);
            }
            Finding::Missing(missing) => self.look_up(digest, missing),
        }
    }

    fn look_up(&mut self, expected: &KeyDigest, digest: KeyDigest) {
        assert_eq!(&digest, expected);
        if let Ok(waiting) = self.cache().look_up(digest, self.clock.boot()) {
            self.waiting.push((digest, waiting));
        }
    }

    fn judge(&self, digest: &KeyDigest, answer: Option<&Answer>) {
        let known = self.facts.get(&(self.acked.epoch, *digest));
        match answer {
            Some(Answer::Held(cached)) if is_accepted(cached) => {
                assert!(
                    !self.told_revoked.contains(digest),
                    "a key is allowed though its revocation has arrived"
                );
                let revoked_at = known.and_then(|known| known.revoked_at);
                assert!(
                    revoked_at.is_none_or(|at| at > self.acked.revoked_through),
                    "a key is allowed though its revocation was acked"
                );
            }
            Some(Answer::Unknown) => assert!(
                known.is_none_or(|known| known.created_at > self.acked.applied),
                "a key is unknown though it was acked"
            ),
            Some(Answer::Held(_) | Answer::Failed(_)) | None => {}
        }
    }

    /// Asserts that, of a key with any held version, every version is held that was accepted at the
    /// acked revision. A version that has ended since may be missing, because a later lookup does
    /// not report it.
    fn judge_groups(&self) {
        let Acked { epoch, applied, .. } = self.acked;
        let cache = self.cache();
        let known = || self.facts.iter().filter(|((of, _), _)| *of == epoch);
        let held: HashSet<KeyId> = known()
            .filter(|((_, digest), _)| cache.holds(digest))
            .map(|(_, facts)| facts.key_id)
            .collect();
        for ((_, digest), facts) in known() {
            let is_accepted = facts.live_since.is_some_and(|since| since <= applied);
            assert!(
                !is_accepted || !held.contains(&facts.key_id) || cache.holds(digest),
                "a key is held without a version that was acked"
            );
        }
    }

    /// Delivers everything, and asserts that every key is then judged as in the store.
    fn settle(&mut self) {
        for replica in &mut self.replicas {
            while replica.revision() < self.head.revision() {
                apply_next(replica, &self.log, self.clock.wall());
            }
        }
        self.waiting.clear();
        self.connect(0);
        self.run_dry();
        // After this time, a digest that was looked up too often may be looked up again.
        self.hands.advance(Duration::from_mins(1));
        for which in 0..self.secrets.len() {
            let digest = self.digest_at(which);
            self.check(&digest, which);
            self.run_dry();
            self.waiting.clear();
            let now = self.clock.boot();
            let peppers = [testing::pepper()];
            let presented = self.secret_at(which).presented();
            let found = self.cache().find(&peppers, &presented, &[], now);
            let expected = self.head.keyring.find(&digest);
            let expected = expected.and_then(|which| self.head.keyring.record(which));
            match (found, expected) {
                (Finding::Held(cached), Some(expected)) => {
                    let expected = if self.told_revoked.contains(&digest) {
                        KeyState::Revoked
                    } else {
                        expected.state
                    };
                    assert_eq!(cached.key().held().state(), expected);
                }
                (Finding::Unknown, None) => {}
                (found, expected) => panic!("{found:?} was found of {expected:?}"),
            }
        }
        let position = self.slot().load().as_ref().map(|view| view.revision());
        assert_eq!(position, Some(self.head.revision()));
    }

    fn run_dry(&mut self) {
        loop {
            self.ask();
            for tell in [Tell::Revocation, Tell::Delta, Tell::LookupResult] {
                self.tell(tell);
            }
            let stream = self.stream.as_ref().expect("the stream goes on");
            if stream.transit.is_empty() {
                break;
            }
            self.deliver();
        }
        self.tell(Tell::BeatAnswer);
        self.deliver();
        assert!(self.stream.is_some(), "the stream goes on");
    }

    fn slot(&self) -> Arc<Slot> {
        let slot = self.keyrings.get(&testing::keyring_name());
        slot.expect("the keyring is configured")
    }

    fn cache(&self) -> Arc<KeyCache> {
        self.slot().cache().cloned().expect("it is held on demand")
    }

    fn key_at(&self, which: usize) -> Option<KeyId> {
        let keys = self.head.keyring.keys();
        keys.keys().nth(which % keys.len().max(1)).copied()
    }

    /// The newest is number zero.
    fn secret_at(&self, which: usize) -> &Secret {
        let secrets = &self.secrets;
        &secrets[secrets.len() - 1 - which % secrets.len()]
    }

    fn digest_at(&self, which: usize) -> KeyDigest {
        testing::pepper().digest(&self.secret_at(which).presented())
    }
}

fn begin(epoch: Epoch, at: Timestamp, first: &Change) -> FedKeyring {
    let keyring = Keyring::begin(at, first).expect("a first change");
    FedKeyring::from_keyring(epoch, keyring)
}

/// Applies the change of the log that follows.
fn apply_next(keyring: &mut FedKeyring, log: &[Change], at: Timestamp) {
    let index = usize::try_from(keyring.revision().get()).expect("a short log");
    keyring
        .apply(keyring.revision().next(), at, &log[index])
        .expect("it was possible when it was planned");
}

/// Returns the digests that a message revokes.
fn revoked_by(kind: &Kind) -> Vec<KeyDigest> {
    let items = match kind {
        Kind::Revocations(message) => {
            let message = discovery::Revocations::decode(message.clone()).expect("just encoded");
            message.items
        }
        Kind::Delta(message) => {
            let message = discovery::Delta::decode(message.clone()).expect("just encoded");
            message.revocations
        }
        Kind::LookupResult(result) => {
            let found = result.item.iter();
            let revoked = found.filter(|item| {
                let record = item::decode(item).expect("just encoded");
                record.state == KeyState::Revoked
            });
            revoked.cloned().collect()
        }
        Kind::Settings(_)
        | Kind::Snapshot(_)
        | Kind::BeatAnswer(_)
        | Kind::Drain(_)
        | Kind::NotServed(_)
        | Kind::UsageAck(_)
        | Kind::Start(_)
        | Kind::Listing(_) => return Vec::new(),
    };
    let digests = items.iter().map(|item| item::digest_of(&item.record));
    digests.flatten().collect()
}

/// Revocations as they arrive.
fn spoilt(revocations: bytes::Bytes, tell: Tell) -> bytes::Bytes {
    let mut message = discovery::Revocations::decode(revocations.clone()).expect("just encoded");
    let records = message.items.iter_mut().map(|item| &mut item.record);
    match tell {
        Tell::TornRevocation => {
            records.for_each(|record| *record = [&record[..], b"\xff"].concat().into());
        }
        Tell::BrokenRevocation => {
            records.for_each(|record| *record = bytes::Bytes::from_static(b"\xff"));
        }
        Tell::Revocation | Tell::Delta | Tell::LookupResult | Tell::BeatAnswer => {
            return revocations;
        }
    }
    message.encode_to_vec().into()
}

fn is_accepted(cached: &CachedKey) -> bool {
    cached.key().held().state().is_live()
}

fn key_id() -> KeyId {
    KeyId::generate().expect("the random source works")
}

fn act() -> impl Strategy<Value = Act> {
    let which = || 0_usize..6;
    prop_oneof![
        3 => Just(Act::Create),
        3 => which().prop_map(Act::Stage),
        2 => which().prop_map(Act::HandOver),
        1 => which().prop_map(Act::Retire),
        1 => which().prop_map(Act::RollBack),
        3 => which().prop_map(Act::Revoke),
        1 => (0_usize..10).prop_map(Act::Rewrite),
        6 => which().prop_map(Act::CatchUp),
        4 => which().prop_map(Act::Connect),
        1 => Just(Act::Disconnect),
        12 => tell().prop_map(Act::Tell),
        14 => Just(Act::Deliver),
        8 => Just(Act::Ask),
        6 => (1_usize..5).prop_map(Act::Flow),
        10 => which().prop_map(Act::Check),
        8 => which().prop_map(Act::Collect),
        2 => which().prop_map(Act::Evict),
        1 => (1_u64..20_000).prop_map(Act::Advance),
    ]
}

/// Rotations of a few keys that are looked up all the time.
fn busy() -> impl Strategy<Value = Act> {
    let which = || 0_usize..3;
    prop_oneof![
        1 => Just(Act::Create),
        6 => which().prop_map(Act::Stage),
        4 => which().prop_map(Act::HandOver),
        3 => which().prop_map(Act::Retire),
        2 => which().prop_map(Act::RollBack),
        8 => which().prop_map(Act::Check),
        12 => act(),
    ]
}

fn tell() -> impl Strategy<Value = Tell> {
    prop_oneof![
        3 => Just(Tell::Revocation),
        1 => Just(Tell::TornRevocation),
        1 => Just(Tell::BrokenRevocation),
        4 => Just(Tell::Delta),
        6 => Just(Tell::LookupResult),
        1 => Just(Tell::BeatAnswer),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_fill_brings_back_what_a_revocation_ended(
        acts in proptest::collection::vec(act(), 0..150),
    ) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
        }
        world.settle();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whoever_holds_a_version_holds_every_one_that_was_acked(
        acts in proptest::collection::vec(busy(), 0..150),
    ) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
            world.judge_groups();
        }
        world.settle();
    }
}
