//! For any messages of a control plane, in any order, a sidecar does not panic and answers within bounds. A received
//! revocation is never undone, no keyring goes back within its epoch, and an item that cannot be read is named and not
//! counted.

use std::{
    collections::HashSet,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prost::Message as _;
use relatch::{
    clock::{Clock, ManualClock},
    follow::receiver::{Leave, Received, Receiver},
    key::{
        AllowedSources, Epoch, KeyDigest, KeyId, KeyRecord, KeyState, KeyringName, MasterPepper,
        Pepper, PepperId, Prefix, PresentedKey, Revision, Scopes, Timestamp, VersionNumber, Window,
    },
    keyring::{
        KeyringSettings, Keyrings, Mode, Slot, Staleness,
        on_demand::{Answer as Looked, CacheSettings, Finding, Waiting},
    },
    proto::discovery::{self, control_message::Kind, sidecar_message::Kind as Answer},
    wire::{item, settings},
};

use super::input::Input;

/// The first byte selects what the others are. Even: serialized messages, each after its length of two bytes. Odd: actions of
/// a control plane and its sidecar, byte by byte.
pub(crate) fn holds(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else {
        return;
    };
    let mut sidecar = Sidecar::new();
    let mut input = Input(bytes);
    for _ in 0..MAX_ACTS {
        if input.is_empty() {
            break;
        }
        if mode % 2 == 0 {
            sidecar.take_serialized(&mut input);
        } else {
            sidecar.act(&mut input);
        }
    }
    sidecar.reconnect();
}

/// The most messages: enough for every order of two kinds.
const MAX_ACTS: usize = 200;
/// The largest message of a sidecar that a control plane accepts, in bytes.
const MAX_ANSWER: usize = 256 << 10;
/// The most items that a nack names.
const MAX_NAMED: usize = 100;
/// The number of keys in messages.
const KEYS: u8 = 8;

/// A keyring that is held in full, and a keyring on demand.
#[derive(Clone, Copy, Debug)]
enum Which {
    Full,
    Lazy,
}

struct Sidecar {
    receiver: Receiver,
    keyrings: Keyrings,
    clock: Clock,
    hands: ManualClock,
    /// For each keyring: the revocations that were received.
    revoked: [HashSet<KeyDigest>; 2],
    /// The checks that wait for lookups.
    waiting: Vec<Waiting>,
}

/// A key in messages.
struct Known {
    secret: String,
    digest: KeyDigest,
}

impl Which {
    const ALL: [Self; 2] = [Self::Full, Self::Lazy];

    fn name(self) -> KeyringName {
        let name = match self {
            Self::Full => "full",
            Self::Lazy => "lazy",
        };
        name.parse().expect("a name")
    }
}

impl Sidecar {
    fn new() -> Self {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000_000));
        let staleness = Staleness::default();
        let lazy = Mode::OnDemand(CacheSettings::default());
        let keyrings = Keyrings::with_modes([
            (Which::Full.name(), staleness, Mode::Full),
            (Which::Lazy.name(), staleness, lazy),
        ]);
        let mut receiver = Receiver::new(&keyrings, clock.clone());
        receiver.connected();
        Self {
            receiver,
            keyrings,
            clock,
            hands,
            revoked: Default::default(),
            waiting: Vec::new(),
        }
    }

    fn take_serialized(&mut self, input: &mut Input<'_>) {
        let len = usize::from(u16::from_be_bytes([input.byte(), input.byte()]));
        if let Ok(message) = discovery::ControlMessage::decode(input.bytes(len))
            && let Some(kind) = message.kind
        {
            self.take(&kind);
        }
    }

    fn act(&mut self, input: &mut Input<'_>) {
        let action = input.byte();
        let which = Which::ALL[usize::from(input.byte() % 2)];
        match action % 12 {
            0 => self.take(&Kind::Settings(settings_of(which, input))),
            1 => self.snapshot(which, input),
            2 | 3 => {
                let delta = self.delta(which, input);
                self.take(&Kind::Delta(delta.encode_to_vec().into()));
            }
            4 => {
                let revocations = self.revocations(which, input);
                self.take(&Kind::Revocations(revocations.encode_to_vec().into()));
            }
            5 => {
                let answer = self.beat_answer(which, input);
                self.take(&Kind::BeatAnswer(answer));
            }
            6 => {
                let start = discovery::Start {
                    keyring: which.name().to_string(),
                    epoch: self.epoch(which, input),
                    revision: self.revision(which, input),
                    nonce: 1,
                };
                self.take(&Kind::Start(start));
            }
            7 => {
                let result = self.lookup_result(which, input);
                self.take(&Kind::LookupResult(result));
            }
            8 => self.ask(input),
            9 => self
                .hands
                .advance(Duration::from_secs(u64::from(input.byte()))),
            10 => self.reconnect(),
            _ => self.take_serialized(input),
        }
    }

    /// Handles a message, and verifies the result.
    fn take(&mut self, kind: &Kind) {
        let before = Which::ALL.map(|which| self.position(which));
        let poison = poison(kind);
        let outcome = self.receiver.receive(discovery::ControlMessage {
            kind: Some(kind.clone()),
        });
        match &outcome {
            Ok(outcome) => {
                self.check_answers(outcome);
                if let Some(poison) = poison {
                    check_names(outcome, &poison);
                }
                self.note_revocations(kind);
            }
            Err(Leave::Drain { .. } | Leave::Lagging { .. } | Leave::Protocol(_)) => {
                self.reconnect();
            }
        }
        for (which, before) in Which::ALL.into_iter().zip(before) {
            if let (Some(before), Some(after)) = (before, self.position(which))
                && before.0 == after.0
            {
                assert!(
                    before.1 <= after.1,
                    "{which:?} goes back: {before:?} to {after:?}"
                );
            }
            self.check_revoked(which);
        }
    }

    fn check_answers(&self, outcome: &Received) {
        // An answer to a beat has one for each keyring.
        assert!(
            outcome.answers.len() <= 16,
            "{} answers",
            outcome.answers.len()
        );
        for answer in &outcome.answers {
            assert!(answer.encoded_len() <= MAX_ANSWER, "an answer is too large");
            let (keyring, epoch, applied) = match &answer.kind {
                Some(Answer::Ack(ack)) => (&ack.keyring, ack.epoch, ack.applied_revision),
                Some(Answer::Nack(nack)) => {
                    assert!(!nack.items.is_empty() && nack.items.len() <= MAX_NAMED);
                    (&nack.keyring, nack.epoch, nack.applied_revision)
                }
                Some(
                    Answer::Hello(_)
                    | Answer::Resync(_)
                    | Answer::Goodbye(_)
                    | Answer::Usage(_)
                    | Answer::Lookup(_)
                    | Answer::Beat(_)
                    | Answer::Dropped(_)
                    | Answer::Find(_)
                    | Answer::Subscribe(_)
                    | Answer::Unsubscribe(_),
                ) => continue,
                None => panic!("an answer without content"),
            };
            let held = Which::ALL.into_iter().find_map(|which| {
                let is_it = which.name().as_str() == keyring;
                is_it.then(|| self.position(which)).flatten()
            });
            match held {
                Some((held, revision)) if held.get() == epoch => {
                    assert_eq!(applied, revision.get(), "an answer claims another revision");
                }
                Some(_) | None => assert_eq!(applied, 0, "an answer claims what is not held"),
            }
        }
    }

    /// Records the revocations of a message, which hold from now on, even if the rest of the message was not applied.
    fn note_revocations(&mut self, kind: &Kind) {
        let (keyring, items) = match kind {
            Kind::Delta(delta) => {
                let delta = discovery::Delta::decode(delta.clone()).expect("it was taken");
                (delta.keyring, delta.revocations)
            }
            Kind::Revocations(message) => {
                let message =
                    discovery::Revocations::decode(message.clone()).expect("it was taken");
                (message.keyring, message.items)
            }
            Kind::LookupResult(result) => {
                let is_revoked = |found: &discovery::Item| {
                    item::decode(found).is_ok_and(|record| record.state == KeyState::Revoked)
                };
                let items = result.item.iter().chain(&result.siblings);
                let lazy = result.keyring == Which::Lazy.name().as_str();
                let revoked = items.filter(|found| lazy && is_revoked(found));
                (result.keyring.clone(), revoked.cloned().collect())
            }
            Kind::Settings(_)
            | Kind::Snapshot(_)
            | Kind::BeatAnswer(_)
            | Kind::Drain(_)
            | Kind::NotServed(_)
            | Kind::UsageAck(_)
            | Kind::Start(_)
            | Kind::Listing(_) => return,
        };
        for which in Which::ALL {
            if which.name().as_str() == keyring {
                let digests = items
                    .iter()
                    .filter_map(|found| item::digest_of(&found.record));
                self.revoked[which as usize].extend(digests);
            }
        }
    }

    fn check_revoked(&self, which: Which) {
        let revoked = &self.revoked[which as usize];
        let slot = self.slot(which);
        let view = slot.load();
        for digest in revoked {
            if let Some(held) = view.as_ref().and_then(|view| view.lookup(digest)) {
                assert_eq!(
                    held.state(),
                    KeyState::Revoked,
                    "{which:?}: a revocation is undone"
                );
            }
        }
        if let Some(cache) = slot.cache() {
            for known in known()
                .iter()
                .filter(|known| revoked.contains(&known.digest))
            {
                let key = PresentedKey::new(known.secret.as_bytes()).expect("printable");
                match cache.find(&[pepper()], &key, &[], self.clock.boot()) {
                    Finding::Held(cached) | Finding::Ended(cached, _) => {
                        assert_is_revoked(cached.key().held().state());
                    }
                    Finding::Unknown | Finding::Missing(_) => {}
                }
            }
            for waiting in &self.waiting {
                if let Some(Looked::Held(cached)) = waiting.collect()
                    && revoked.contains(waiting.digest())
                {
                    assert_is_revoked(cached.key().held().state());
                }
            }
        }
    }

    fn snapshot(&mut self, which: Which, input: &mut Input<'_>) {
        let (epoch, revision) = (self.epoch(which, input), self.revision(which, input));
        let shape = input.byte();
        let items = items(input, None);
        let total = items.len() as u64;
        let cut = usize::from(shape % 4).min(items.len());
        let (first, second) = items.split_at(cut);
        let hashes = items.iter().map(item::hash);
        let set_digest = hashes.fold(0_u64, u64::wrapping_add);
        let chunk = |index, last, items: &[discovery::Item]| discovery::SnapshotChunk {
            keyring: which.name().to_string(),
            epoch,
            revision,
            nonce: 1,
            index,
            last,
            total_items: if shape & 0x10 == 0 { total } else { u64::MAX },
            set_digest: set_digest.wrapping_add(u64::from(shape & 0x20)),
            items: items.to_vec(),
            confirmed_items: if shape & 0x40 == 0 { total } else { 0 },
            id: u64::from(shape % 3),
        };
        let chunks = if cut == 0 {
            vec![chunk(0, true, second)]
        } else {
            vec![chunk(0, false, first), chunk(1, shape & 0x80 == 0, second)]
        };
        for chunk in chunks {
            self.take(&Kind::Snapshot(chunk.encode_to_vec().into()));
        }
    }

    fn delta(&self, which: Which, input: &mut Input<'_>) -> discovery::Delta {
        let epoch = self.epoch(which, input);
        let prev_revision = self.revision(which, input);
        let removed = input.byte();
        discovery::Delta {
            keyring: which.name().to_string(),
            epoch,
            prev_revision,
            revision: self.revision(which, input),
            nonce: 1,
            revocations: items(input, Some(discovery::KeyState::Revoked)),
            upserts: items(input, None),
            removals: (0..removed % 3)
                .map(|number| discovery::ItemRef {
                    name: format!("removal {number}"),
                    digest: match removed {
                        0xf0.. => b"short".to_vec().into(),
                        _ => digest_of(removed / 3 + number).as_bytes().to_vec().into(),
                    },
                })
                .collect(),
        }
    }

    fn revocations(&self, which: Which, input: &mut Input<'_>) -> discovery::Revocations {
        discovery::Revocations {
            keyring: which.name().to_string(),
            epoch: self.epoch(which, input),
            revision: self.revision(which, input),
            nonce: 1,
            items: items(input, Some(discovery::KeyState::Revoked)),
            ..Default::default()
        }
    }

    /// The answer to a beat, mostly to the current one.
    fn beat_answer(&mut self, which: Which, input: &mut Input<'_>) -> discovery::BeatAnswer {
        let Some(Answer::Beat(beat)) = self.receiver.next_beat().kind else {
            panic!("it asks for nothing");
        };
        let shape = input.byte();
        let beat = match shape {
            0..0xc0 => beat.number,
            _ => u64::from(shape % 16),
        };
        let time = |byte: u8| match byte {
            0xff => None,
            0xfe => Some(prost_types::Timestamp {
                seconds: i64::MAX,
                nanos: i32::MAX,
            }),
            0xfd => Some(prost_types::Timestamp {
                seconds: i64::MIN,
                nanos: i32::MIN,
            }),
            seconds => Some(prost_types::Timestamp {
                seconds: 1_000 + i64::from(seconds),
                nanos: 0,
            }),
        };
        let (epoch, revision) = (self.epoch(which, input), self.revision(which, input));
        let set_digest = self.slot(which).load().as_ref().map_or(0, |view| {
            let hashes = view.announced().map(|announced| announced.hash);
            hashes.fold(0, u64::wrapping_add)
        });
        discovery::BeatAnswer {
            beat,
            sent_at: time(input.byte()),
            beat_every_ms: u32::from(shape) * 100,
            keyrings: vec![discovery::KeyringPulse {
                keyring: which.name().to_string(),
                epoch,
                revision,
                set_digest: set_digest.wrapping_add(u64::from(input.byte() & 1)),
                serve_for_ms: u64::from(input.byte()) * 100,
            }],
        }
    }

    fn lookup_result(&self, which: Which, input: &mut Input<'_>) -> discovery::LookupResult {
        let (epoch, revision) = (self.epoch(which, input), self.revision(which, input));
        let key = input.byte();
        let item = match input.byte() {
            0..0x20 => None,
            0x20..0x30 => Some(item_of(key.wrapping_add(1), input, None)),
            0x30.. => Some(item_of(key, input, None)),
        };
        let siblings = (1..=key >> 6).map(|next| item_of(key.wrapping_add(next), input, None));
        discovery::LookupResult {
            keyring: which.name().to_string(),
            epoch,
            revision,
            digest: digest_of(key).as_bytes().to_vec().into(),
            item,
            siblings: siblings.collect(),
        }
    }

    /// A check asks for a key of the keyring on demand, and some waiting checks end.
    fn ask(&mut self, input: &mut Input<'_>) {
        let byte = input.byte();
        if byte & 0x80 != 0 {
            self.waiting.clear();
        }
        let slot = self.slot(Which::Lazy);
        let cache = slot.cache().expect("it is held on demand");
        let looked = cache.look_up(*digest_of(byte), self.clock.boot());
        self.waiting.extend(looked.ok());
        while self.receiver.next_lookup().is_some() {}
    }

    fn reconnect(&mut self) {
        self.receiver.disconnected();
        let subscriptions = self.receiver.subscriptions();
        assert_eq!(subscriptions.len(), Which::ALL.len());
        // The digest counts only items that could be read.
        let full = &subscriptions[Which::Full as usize];
        let view = self.slot(Which::Full).load();
        let hashes = view.iter().flat_map(|view| view.announced());
        let sum = hashes.fold(0, |sum: u64, announced| sum.wrapping_add(announced.hash));
        assert_eq!(full.set_digest, sum);
        self.receiver.connected();
    }

    fn slot(&self, which: Which) -> Arc<Slot> {
        let slot = self.keyrings.get(&which.name());
        slot.expect("it is configured")
    }

    fn position(&self, which: Which) -> Option<(Epoch, Revision)> {
        let view = self.slot(which).load();
        view.as_ref().map(|view| (view.epoch(), view.revision()))
    }

    /// An epoch: mostly the current one.
    fn epoch(&self, which: Which, input: &mut Input<'_>) -> u64 {
        let held = self.position(which).map_or(1, |(epoch, _)| epoch.get());
        match input.byte() {
            0..0xe0 => held,
            byte => u64::from(byte % 4),
        }
    }

    /// A revision: mostly near the current one.
    fn revision(&self, which: Which, input: &mut Input<'_>) -> u64 {
        let held = self.position(which);
        let held = held.map_or(0, |(_, revision)| revision.get());
        match input.byte() {
            byte @ 0..0xc0 => held.saturating_add(u64::from(byte % 3)),
            byte @ 0xc0..0xf8 => u64::from(byte % 16),
            byte @ 0xf8..0xff => held.saturating_sub(u64::from(byte % 4)),
            0xff => u64::MAX,
        }
    }
}

fn assert_is_revoked(state: KeyState) {
    assert_eq!(state, KeyState::Revoked, "a revocation is undone");
}

/// The names of the items of a message that cannot be read.
fn poison(kind: &Kind) -> Option<Vec<String>> {
    let unreadable = |items: &[discovery::Item]| {
        let unreadable = items.iter().filter(|found| item::decode(found).is_err());
        unreadable
            .map(|found| found.name.clone())
            .collect::<Vec<_>>()
    };
    // The digest is enough for a revocation.
    let unrevoked = |items: &[discovery::Item]| {
        let unreadable = items.iter();
        let unreadable = unreadable.filter(|found| item::digest_of(&found.record).is_none());
        unreadable
            .map(|found| found.name.clone())
            .collect::<Vec<_>>()
    };
    match kind {
        Kind::Delta(delta) => {
            let delta = discovery::Delta::decode(delta.clone()).ok()?;
            let mut names = unrevoked(&delta.revocations);
            names.extend(unreadable(&delta.upserts));
            let removals = delta.removals.iter();
            let short = removals.filter(|removal| removal.digest.len() != KeyDigest::LEN);
            names.extend(short.map(|removal| removal.name.clone()));
            Some(names)
        }
        Kind::Revocations(message) => {
            let message = discovery::Revocations::decode(message.clone()).ok()?;
            Some(unrevoked(&message.items))
        }
        Kind::Snapshot(chunk) => {
            let chunk = discovery::SnapshotChunk::decode(chunk.clone()).ok()?;
            Some(unreadable(&chunk.items))
        }
        Kind::Settings(_)
        | Kind::BeatAnswer(_)
        | Kind::Drain(_)
        | Kind::NotServed(_)
        | Kind::UsageAck(_)
        | Kind::Start(_)
        | Kind::LookupResult(_)
        | Kind::Listing(_) => None,
    }
}

/// An ack confirms all of its message; a nack names the items that could not be read.
fn check_names(outcome: &Received, poison: &[String]) {
    for answer in &outcome.answers {
        match &answer.kind {
            Some(Answer::Ack(_)) => assert_eq!(poison.len(), 0, "what cannot be read is acked"),
            Some(Answer::Nack(nack)) => {
                // A name that is not the name of an item is cut.
                let is_named = |name: &String| {
                    let mut named = nack.items.iter();
                    named.any(|item| {
                        item.name == *name
                            || (item.name.len() >= 90 && name.starts_with(&item.name))
                    })
                };
                // Nothing of a snapshot that waits for a confirmation is used.
                let is_held = nack.items[0].name == "snapshot";
                let named = poison.iter().filter(|name| is_named(name)).count();
                let has_room = nack.items.len() < MAX_NAMED && !is_held;
                assert!(!has_room || named == poison.len(), "not all is named");
            }
            Some(
                Answer::Hello(_)
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
}

fn pepper() -> Pepper {
    static PEPPER: OnceLock<Pepper> = OnceLock::new();
    let made = PEPPER.get_or_init(|| {
        let master = MasterPepper::new(PepperId::new(1), &[7; Pepper::LEN]);
        master.expect("32 bytes").for_keyring(&Which::Full.name())
    });
    made.clone()
}

fn known() -> &'static [Known] {
    static KNOWN: OnceLock<Vec<Known>> = OnceLock::new();
    KNOWN.get_or_init(|| {
        let known = (0..KEYS).map(|number| {
            let secret = format!("imported-key-{number}");
            let key = PresentedKey::new(secret.as_bytes()).expect("printable");
            let digest = pepper().digest(&key);
            Known { secret, digest }
        });
        known.collect()
    })
}

fn digest_of(key: u8) -> &'static KeyDigest {
    &known()[usize::from(key % KEYS)].digest
}

fn settings_of(which: Which, input: &mut Input<'_>) -> discovery::KeyringSettings {
    let settings = KeyringSettings {
        prefix: Prefix::default(),
        issued_only: false,
        peppers: vec![pepper()],
        help_url: None,
    };
    let shape = input.byte();
    let epoch = Epoch::new(u64::from(shape % 4));
    let mut settings = settings::encode(&which.name(), epoch, &settings);
    match shape {
        0xfe => settings.prefix.clear(),
        0xff => settings.peppers.clear(),
        _ => {}
    }
    settings
}

/// Some items, seldom many, and sometimes one that cannot be read.
fn items(input: &mut Input<'_>, state: Option<discovery::KeyState>) -> Vec<discovery::Item> {
    let count = input.byte();
    let items = (0..count % 4).map(|_| {
        let key = input.byte();
        item_of(key, input, state)
    });
    let mut items: Vec<_> = items.collect();
    // More items than a nack names, and longer than a message may be.
    let (poisoned, more) = match count {
        0xff => (104, "long".repeat(700)),
        0xf0.. => (usize::from(count % 16), String::new()),
        _ => (0, String::new()),
    };
    items.extend((0..poisoned).map(|number| discovery::Item {
        name: format!("{number}{more}"),
        record: b"\xff".to_vec().into(),
    }));
    items
}

fn item_of(key: u8, input: &mut Input<'_>, state: Option<discovery::KeyState>) -> discovery::Item {
    let shape = input.byte();
    let key_id: KeyId = "0123456789ab".parse().expect("an id");
    let record = KeyRecord {
        digest: *digest_of(key),
        pepper: pepper().id(),
        key_id,
        version: VersionNumber::new(u32::from(key % KEYS) + 1).expect("not zero"),
        consumer: "checkout".parse().expect("a consumer"),
        state: KeyState::ALL[usize::from(shape % 8) % KeyState::ALL.len()],
        window: Window::default(),
        retiring_since: None,
        retires_at: None,
        scopes: Scopes::default(),
        allowed_sources: AllowedSources::default(),
        replaced_by: None,
        rotation: None,
    };
    let mut item = item::encode(&record);
    let mut message = discovery::KeyVersion::decode(item.record.clone()).expect("just encoded");
    match (shape, state) {
        (0xfe.., _) => message.digest = b"short".to_vec().into(),
        (0xfc.., _) => message.state = 99,
        // Sometimes the state differs from the requested one.
        (0xf8.., _) | (_, None) => {}
        (_, Some(state)) => message.state = state.into(),
    }
    item.record = message.encode_to_vec().into();
    item
}
