use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    key::{KeyId, Use, VersionNumber, testing},
    keyring::{Caller, Staleness},
};

const VERSIONS: usize = 4;
const EPOCH: Epoch = Epoch::new(1);

/// An event of a sidecar, its streams or its control plane.
#[derive(Clone, Copy, Debug)]
enum Act {
    Use(usize, bool),
    Tick(u64),
    /// The wall clock is set back.
    SetBack(u64),
    Report,
    /// The next message of a stream arrives; if the stream is an old one, it arrives late.
    Deliver(usize),
    /// The next message arrives, and will arrive once more.
    DeliverTwice(usize),
    /// The next ack of the newest stream arrives.
    Ack,
    Reconnect,
    /// The store is restored from a backup without any counts.
    Restore,
}

/// A stream on its way: messages to the control plane, acks from it.
#[derive(Debug, Default)]
struct Stream {
    messages: VecDeque<discovery::Usage>,
    acks: VecDeque<u64>,
}

/// A sidecar that counts, and a control plane that keeps the larger number.
struct Model {
    slot: Arc<Slot>,
    usages: Vec<UsageIndex>,
    reporter: Reporter,
    now: Timestamp,
    epoch: Epoch,
    streams: Vec<Stream>,
    stored: HashMap<(String, u32), Use>,
    /// The counts at the time of a report, by the sequence of its last message.
    counted: HashMap<u64, Vec<Use>>,
    /// The last beat that was answered.
    beat: u64,
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn slot() -> (Keyrings, Arc<Slot>) {
    let keyrings = Keyrings::new([(testing::keyring_name(), Staleness::default())]);
    let slot = keyrings.get(&testing::keyring_name()).expect("it was made");
    (keyrings, slot)
}

fn usages(slot: &Slot, count: u32) -> Vec<UsageIndex> {
    let key_id = KeyId::generate().expect("the random source works");
    let version = |number| VersionNumber::new(number).expect("it is not zero");
    (1..=count)
        .map(|number| VersionRef {
            key_id,
            version: version(number),
        })
        .map(|version| slot.usage().of_version(version))
        .collect()
}

fn told(message: &discovery::Usage) -> impl Iterator<Item = &discovery::VersionUsage> {
    message
        .keyrings
        .iter()
        .flat_map(|keyring| &keyring.versions)
}

/// The beat to whose answer a whole report replies.
fn complete_until(message: &discovery::Usage) -> Option<u64> {
    let beat = message.complete_until_beat;
    (beat > 0).then_some(beat)
}

impl Model {
    fn new() -> Self {
        let (keyrings, slot) = slot();
        let mut reporter = Reporter::new(&keyrings);
        reporter.entered(slot.name(), EPOCH);
        Self {
            usages: usages(&slot, u32::try_from(VERSIONS).expect("few")),
            slot,
            reporter,
            now: at(1_000_000),
            epoch: EPOCH,
            streams: vec![Stream::default()],
            stored: HashMap::new(),
            counted: HashMap::new(),
            beat: 0,
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Use(version, denied) => {
                let usage = self.usages[version];
                self.slot.usage().count(usage, self.now, denied);
            }
            Act::Tick(millis) => self.now = self.now.saturating_add(Duration::from_millis(millis)),
            Act::SetBack(millis) => {
                self.now = self.now.saturating_sub(Duration::from_millis(millis));
            }
            Act::Report => self.report(),
            Act::Deliver(stream) => self.deliver(stream, false),
            Act::DeliverTwice(stream) => self.deliver(stream, true),
            Act::Ack => {
                if let Some(sequence) = self.newest().acks.pop_front() {
                    self.reporter.acked(sequence);
                }
            }
            Act::Reconnect => {
                self.reporter.reconnected();
                self.streams.push(Stream::default());
            }
            Act::Restore => {
                self.epoch = Epoch::new(self.epoch.get() + 1);
                self.stored.clear();
                self.streams = vec![Stream::default()];
                self.reporter.reconnected();
                self.reporter.entered(self.slot.name(), self.epoch);
            }
        }
    }

    fn report(&mut self) {
        self.beat += 1;
        let report = self.reporter.report(self.beat);
        let last = report.last().expect("there is one");
        assert_eq!(complete_until(last), Some(self.beat));
        let usages = self.usages.iter();
        let counted = usages.map(|usage| self.slot.usage().get(*usage).read());
        let counted = counted.collect();
        self.counted.insert(last.sequence, counted);
        self.newest().messages.extend(report);
    }

    fn deliver(&mut self, stream: usize, again: bool) {
        let at = stream % self.streams.len();
        let stream = &mut self.streams[at];
        let Some(message) = stream.messages.front().cloned() else {
            return;
        };
        if !again {
            stream.messages.pop_front();
        }
        stream.acks.push_back(message.sequence);
        for told in told(&message) {
            let held = self.stored.entry((told.key_id.clone(), told.version));
            let held = held.or_default();
            let (first, last) = (at_ms(told.first_used_ms), at_ms(told.last_used_ms));
            *held = Use {
                requests: held.requests.max(told.requests),
                denied: held.denied.max(told.denied),
                first_used: Some(held.first_used.map_or(first, |held| held.min(first))),
                last_used: held.last_used.max(Some(last)),
            };
        }
        if complete_until(&message).is_some() {
            self.assert_holds(&self.counted[&message.sequence]);
        }
    }

    /// The store has at least what was counted.
    fn assert_holds(&self, counted: &[Use]) {
        for (usage, counted) in self.usages.iter().zip(counted) {
            let stored = self.stored_of(self.slot.usage().get(*usage));
            assert!(
                stored.requests >= counted.requests
                    && stored.denied >= counted.denied
                    && stored.last_used >= counted.last_used,
                "{stored:?} is said to be complete, and is not {counted:?}"
            );
        }
    }

    fn assert_exact(&self) {
        for usage in &self.usages {
            let usage = self.slot.usage().get(*usage);
            assert_eq!(self.stored_of(usage), usage.read());
        }
    }

    fn stored_of(&self, usage: &VersionUsage) -> Use {
        let VersionRef { key_id, version } = usage.version();
        let stored = self.stored.get(&(key_id.to_string(), version.get()));
        stored.copied().unwrap_or_default()
    }

    fn newest(&mut self) -> &mut Stream {
        self.streams.last_mut().expect("there is always one")
    }

    /// One report arrives, and so do the acks of its stream.
    fn settle(&mut self) {
        self.report();
        let newest = self.streams.len() - 1;
        while !self.newest().messages.is_empty() {
            self.deliver(newest, false);
        }
        while !self.newest().acks.is_empty() {
            self.act(Act::Ack);
        }
    }
}

fn at_ms(millis: i64) -> Timestamp {
    assert_ne!(millis, 0, "a used version has its times");
    at(millis)
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        10 => (0..VERSIONS, any::<bool>()).prop_map(|(version, denied)| Act::Use(version, denied)),
        3 => (0_u64..5_000).prop_map(Act::Tick),
        1 => (0_u64..20_000).prop_map(Act::SetBack),
        5 => Just(Act::Report),
        6 => (0_usize..4).prop_map(Act::Deliver),
        1 => (0_usize..4).prop_map(Act::DeliverTwice),
        5 => Just(Act::Ack),
        1 => Just(Act::Reconnect),
        1 => Just(Act::Restore),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a stream loses, repeats or brings late, the store ends at the exact counts, and
    /// counts that are reported as complete are complete at every moment.
    #[test]
    fn the_store_ends_at_the_exact_counts(acts in vec(act(), 0..80)) {
        let mut model = Model::new();
        for act in acts {
            model.act(act);
        }
        model.settle();
        model.assert_exact();
        prop_assert_eq!(model.reporter.progress().unacked, 0);
        let report = model.reporter.report(model.beat + 1);
        prop_assert_eq!(told(&report[0]).count(), 0, "what was acked is not told again");
    }
}

#[test]
fn an_idle_sidecar_tells_that_nothing_is_missing_since_it_asked() {
    let mut model = Model::new();
    for (sequence, beat) in [(1, 1), (2, 2), (3, 7)] {
        let report = model.reporter.report(beat);
        assert_eq!((report.len(), report[0].sequence), (1, sequence));
        assert_eq!(report[0].complete_until_beat, beat);
        assert!(!report[0].is_final, "checks go on");
    }
}

#[test]
fn whatever_is_reported_once_no_check_is_under_way_is_final() {
    let mut model = Model::new();
    model.act(Act::Use(0, false));
    drop(model.reporter.report(1));
    for report in [
        model.reporter.last_report(),
        model.reporter.report(2),
        model.reporter.last_report(),
    ] {
        assert_eq!(told(&report[0]).count(), 1);
        assert!(report[0].is_final);
    }
}

#[test]
fn an_ack_that_nobody_can_have_sent_changes_nothing() {
    let mut model = Model::new();
    model.act(Act::Use(0, false));
    drop(model.reporter.report(1));
    model.reporter.acked(2);
    let expected = ReportProgress {
        acked: 0,
        unacked: 1,
    };
    assert_eq!(model.reporter.progress(), expected);
    model.reporter.acked(1);
    assert_eq!(model.reporter.progress().unacked, 0);
}

#[test]
fn messages_are_bounded_and_only_the_last_says_that_the_report_is_whole() {
    let (keyrings, slot) = slot();
    let mut reporter = Reporter::new(&keyrings);
    let usages = usages(&slot, 1_201);
    for usage in &usages {
        slot.usage().count(*usage, at(5), false);
    }
    let report = reporter.report(1);
    let sizes: Vec<_> = report.iter().map(|message| told(message).count()).collect();
    assert_eq!(sizes, [MAX_VERSIONS, MAX_VERSIONS, 201]);
    let complete: Vec<_> = report.iter().map(|m| complete_until(m).is_some()).collect();
    assert_eq!(complete, [false, false, true]);
    let sequences: Vec<_> = report.iter().map(|message| message.sequence).collect();
    assert_eq!(sequences, [1, 2, 3]);

    let long = "x".repeat(200);
    for usage in &usages {
        for source in 0..16 {
            let source = [0x2001, 0xdb8, 1, 2, 3, 4, 5, source].into();
            let caller = Caller::new(Some(source), long.as_bytes(), long.as_bytes(), b"/");
            slot.usage().get(*usage).note_caller(&caller, at(5));
        }
    }
    let report = reporter.report(1);
    let largest = report.iter().map(Message::encoded_len).max();
    assert!(largest.is_some_and(|bytes| (MAX_BYTES..=160 << 10).contains(&bytes)));
}

#[test]
fn a_book_that_takes_several_reports_is_told_to_its_end_and_whole_only_then() {
    let (keyrings, slot) = slot();
    let mut reporter = Reporter::new(&keyrings);
    let room = MAX_MESSAGES * MAX_VERSIONS;
    for usage in usages(&slot, u32::try_from(room + 2).expect("it is bounded")) {
        slot.usage().count(usage, at(5), false);
    }
    let first = reporter.report(5);
    assert_eq!(first.len(), MAX_MESSAGES);
    assert!(
        first
            .iter()
            .all(|message| complete_until(message).is_none())
    );
    // Without an ack the rest comes first; the versions that had room beside it are reported again.
    let second = reporter.report(6);
    assert!(
        second
            .iter()
            .all(|message| complete_until(message).is_none())
    );
    reporter.acked(second[0].sequence);
    assert_eq!(reporter.progress().unacked, room - MAX_VERSIONS);
    let third = reporter.report(7);
    let last = third.last().expect("there is one");
    assert_eq!(complete_until(last), Some(7));
}
