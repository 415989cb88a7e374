use std::time::Duration;

use super::*;
use crate::{
    clock::{Clock, ManualClock},
    follow::receiver::{Received, Receiver},
    key::{Epoch, Timestamp, testing},
    keyring::{MAX_KEYRINGS, Mode, Staleness, on_demand::CacheSettings},
    proto::discovery::{control_message::Kind, sidecar_message::Kind as Said},
    wire::testing::settings,
};

const DENY_AFTER: Duration = Duration::from_mins(1);

/// A sidecar that holds the keyring of tests by its name, and finds others by patterns.
struct Sidecar {
    receiver: Receiver,
    keyrings: Keyrings,
    hands: ManualClock,
}

fn name(text: &str) -> KeyringName {
    text.parse().expect("a name")
}

fn rule(pattern: &str, mode: Mode) -> PatternRule {
    PatternRule {
        pattern: pattern.parse().expect("a pattern"),
        mode,
        staleness: Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: DENY_AFTER,
        },
    }
}

fn listing(names: &[&str]) -> Kind {
    Kind::Listing(discovery::Listing {
        keyrings: names.iter().map(ToString::to_string).collect(),
        total: names.len() as u64,
    })
}

impl Sidecar {
    fn new() -> Self {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000));
        let keyrings = Keyrings::new([(testing::keyring_name(), Staleness::default())]);
        let rules = vec![
            rule("*-eu", Mode::OnDemand(CacheSettings::default())),
            rule("k*", Mode::Full),
        ];
        let mut receiver = Receiver::new(&keyrings, clock).finding(rules);
        receiver.subscriptions();
        receiver.connected();
        Self {
            receiver,
            keyrings,
            hands,
        }
    }

    fn take(&mut self, kind: Kind) -> Received {
        let message = discovery::ControlMessage { kind: Some(kind) };
        self.receiver.receive(message).expect("the stream goes on")
    }

    /// The names and modes to which it subscribes after a list.
    fn list(&mut self, names: &[&str]) -> Vec<(String, discovery::Mode)> {
        let answers = self.take(listing(names)).answers;
        let answers = answers.into_iter().flat_map(|answer| match answer.kind {
            Some(Said::Subscribe(subscribe)) => subscribe.subscriptions,
            other => panic!("{other:?}"),
        });
        answers
            .map(|asked| (asked.keyring.clone(), asked.mode()))
            .collect()
    }

    fn held(&self) -> Vec<String> {
        let slots = self.keyrings.load();
        slots.iter().map(|slot| slot.name().to_string()).collect()
    }

    /// An answer to a beat that confirms nothing. Returns the keyrings whose subscription ends.
    fn beat(&mut self) -> Vec<String> {
        let Some(Said::Beat(beat)) = self.receiver.next_beat().kind else {
            panic!("it is a beat");
        };
        let answer = discovery::BeatAnswer {
            beat: beat.number,
            sent_at: Some(Timestamp::from_millis(1_000).to_wire()),
            beat_every_ms: 5_000,
            keyrings: Vec::new(),
        };
        let answers = self.take(Kind::BeatAnswer(answer)).answers.into_iter();
        answers
            .map(|answer| match answer.kind {
                Some(Said::Unsubscribe(ended)) => ended.keyring,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    fn forbid(&mut self, keyring: &str, number: u64) {
        let refusal = discovery::NotServed {
            keyring: keyring.to_owned(),
            reason: "a rule".to_owned(),
            number,
            is_forbidden: true,
        };
        assert!(self.take(Kind::NotServed(refusal)).answers.is_empty());
    }

    /// The number of the `NotServed` that it answers with its next Dropped.
    fn dropped(&mut self) -> Option<u64> {
        while let Some(message) = self.receiver.next_usage() {
            if let Some(Said::Dropped(dropped)) = message.kind {
                return Some(dropped.not_served);
            }
        }
        None
    }
}

#[test]
fn a_list_is_subscribed_to_as_the_first_pattern_that_matches_says() {
    let mut sidecar = Sidecar::new();
    let find = sidecar.receiver.find().and_then(|message| message.kind);
    let Some(Said::Find(find)) = find else {
        panic!("it asks for a list");
    };
    assert_eq!(find.patterns, ["*-eu", "k*"]);
    assert!(!sidecar.receiver.is_answered());
    let subscribed = sidecar.list(&["k1", "k2-eu", "other", "payments"]);
    let modes = [
        ("k1".to_owned(), discovery::Mode::Full),
        ("k2-eu".to_owned(), discovery::Mode::OnDemand),
    ];
    assert_eq!(subscribed, modes);
    assert_eq!(sidecar.held(), ["k1", "k2-eu", "payments"]);
    let slot = sidecar.keyrings.get(&name("k1")).expect("it is held");
    assert_eq!(slot.staleness().deny_after, DENY_AFTER);
    // A list that repeats what is held changes nothing.
    assert_eq!(sidecar.list(&["k1", "k2-eu"]), []);
    // The next stream begins with all of them.
    sidecar.receiver.disconnected();
    let subscriptions = sidecar.receiver.subscriptions();
    let names = subscriptions.iter().map(|asked| asked.keyring.as_str());
    assert_eq!(names.collect::<Vec<_>>(), ["k1", "k2-eu", "payments"]);
}

#[test]
fn a_keyring_that_is_not_listed_is_served_until_it_is_stale_and_then_ended() {
    let mut sidecar = Sidecar::new();
    sidecar.list(&["k1", "k2"]);
    for keyring in ["k1", "k2"] {
        let slot = sidecar.keyrings.get(&name(keyring)).expect("it is held");
        slot.confirm(sidecar.receiver.clock().reading().into(), DENY_AFTER);
    }
    sidecar.list(&["k1"]);
    assert_eq!(sidecar.beat(), [""; 0], "it is fresh");
    sidecar.hands.advance(DENY_AFTER);
    assert_eq!(sidecar.beat(), ["k2"]);
    assert_eq!(sidecar.beat(), [""; 0], "it is ended once");
    assert_eq!(sidecar.held(), ["k1", "k2", "payments"]);
    sidecar.forbid("k2", 7);
    assert_eq!(sidecar.held(), ["k1", "payments"]);
    assert_eq!(sidecar.dropped(), Some(7));
    // The keyring by name stays, although no list has it.
    assert_eq!(sidecar.list(&["k1", "k2"]).len(), 1, "it is found again");
}

#[test]
fn nothing_is_ended_by_a_list_that_is_not_whole() {
    let mut sidecar = Sidecar::new();
    sidecar.list(&["k1"]);
    sidecar.take(Kind::Listing(discovery::Listing {
        keyrings: vec!["k0".to_owned()],
        total: 2,
    }));
    assert_eq!(sidecar.beat(), [""; 0]);
}

#[test]
fn a_keyring_that_the_sidecar_may_not_have_goes_away() {
    let mut sidecar = Sidecar::new();
    sidecar.list(&["k1", "k2-eu"]);
    let before = sidecar.keyrings.get(&name("k1")).expect("it is held");
    sidecar.take(Kind::Settings(discovery::KeyringSettings {
        keyring: "k1".to_owned(),
        ..settings(Epoch::new(1))
    }));
    sidecar.forbid("k1", 3);
    sidecar.forbid("k2-eu", 4);
    sidecar.forbid("payments", 5);
    assert!(before.load().is_none() && before.age(sidecar.receiver.clock().reading()).is_none());
    assert_eq!(
        sidecar.held(),
        ["payments"],
        "the file names it, so that it is shown"
    );
    let dropped = [sidecar.dropped(), sidecar.dropped(), sidecar.dropped()];
    assert_eq!(dropped, [Some(3), Some(4), Some(5)]);
    assert_eq!(sidecar.dropped(), None);
}

#[test]
fn keyrings_beyond_the_limit_are_counted_and_left_out() {
    let mut sidecar = Sidecar::new();
    let names: Vec<String> = (0..MAX_KEYRINGS + 3)
        .map(|at| format!("k{at:03}"))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let received = sidecar.take(listing(&names));
    assert_eq!(
        received.listed,
        Some(Listed {
            matching: MAX_KEYRINGS + 3,
            left_out: 4,
        })
    );
    assert_eq!(sidecar.held().len(), MAX_KEYRINGS);
    let cut = Kind::Listing(discovery::Listing {
        keyrings: vec!["k000".to_owned()],
        total: 5_000,
    });
    let listed = sidecar.take(cut).listed.expect("it is a list");
    assert_eq!((listed.matching, listed.left_out), (5_000, 4_999));
}

#[test]
fn a_keyring_of_the_file_is_held_if_a_pattern_finds_it_in_full() {
    let mut sidecar = Sidecar::new();
    for (keyring, is_held) in [("k1", true), ("k1-eu", false), ("other", false)] {
        let slot = sidecar.receiver.find_kept(&name(keyring));
        assert_eq!(slot.is_some(), is_held, "{keyring}");
    }
    assert_eq!(sidecar.held(), ["k1", "payments"]);
}
