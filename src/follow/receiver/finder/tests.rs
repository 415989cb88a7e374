use std::{sync::Arc, time::Duration};

use super::*;
use crate::{
    clock::{Clock, ManualClock},
    follow::receiver::{Received, Receiver},
    key::{Epoch, Timestamp, testing},
    keyring::{MAX_KEYRINGS, Mode, PatternRule, Staleness, Wanted, on_demand::CacheSettings},
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
        let named = [(testing::keyring_name(), Staleness::default(), Mode::Full)];
        let rules = vec![
            rule("*-eu", Mode::OnDemand(CacheSettings::default())),
            rule("k*", Mode::Full),
        ];
        let keyrings = Keyrings::of(Wanted::new(named, rules));
        let mut receiver = Receiver::new(&keyrings, clock);
        receiver.subscriptions();
        let find = receiver.find().and_then(|message| message.kind);
        let Some(Said::Find(find)) = find else {
            panic!("it asks for a list");
        };
        assert_eq!(find.patterns, ["*-eu", "k*"]);
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
    // The named keyring is kept, also if it is in no list.
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

impl Sidecar {
    /// What it says about a new configuration that names `named`, with `deny_after`, and finds by
    /// `pattern`.
    fn configure(&mut self, named: &[&str], pattern: &str, deny_after: Duration) -> Vec<Said> {
        let staleness = Staleness {
            deny_after,
            ..Staleness::default()
        };
        let named = named.iter().map(|text| (name(text), staleness, Mode::Full));
        let wanted = Wanted::new(named, vec![rule(pattern, Mode::Full)]);
        let configured = self.keyrings.reconfigure(wanted, || {});
        configured.expect("nothing changes its mode");
        let messages = self.receiver.reconfigure().into_iter();
        messages.filter_map(|message| message.kind).collect()
    }
}

#[test]
fn a_new_configuration_is_followed_on_the_open_stream() {
    let hour = Duration::from_hours(1);
    let mut sidecar = Sidecar::new();
    sidecar.list(&["k1"]);
    assert_eq!(sidecar.receiver.reconfigure(), []);
    let said = sidecar.configure(&["payments", "new"], "k*", hour);
    let [Said::Subscribe(subscribed), Said::Find(find)] = &said[..] else {
        panic!("{said:?}");
    };
    assert_eq!(subscribed.subscriptions[0].keyring, "new");
    assert_eq!(
        (subscribed.subscriptions.len(), &find.patterns[..]),
        (1, &["k*".to_owned()][..])
    );

    // Another limit, and a keyring less.
    let said = sidecar.configure(&["new"], "k*", Duration::from_mins(5));
    let [Said::Subscribe(subscribed), Said::Unsubscribe(ended)] = &said[..] else {
        panic!("{said:?}");
    };
    assert_eq!(subscribed.subscriptions[0].deny_after_ms, 300_000);
    assert_eq!(ended.keyring, "payments");
    assert_eq!(
        sidecar.held(),
        ["k1", "new"],
        "checks do not see it any more"
    );
    assert_eq!(sidecar.receiver.reconfigure(), []);

    // It comes back before it is erased: it is erased, and subscribed to anew.
    assert_eq!(
        sidecar
            .configure(&["new", "payments"], "k*", Duration::from_mins(5))
            .len(),
        0
    );
    let refusal = discovery::NotServed {
        keyring: "payments".to_owned(),
        reason: String::new(),
        number: 9,
        is_forbidden: true,
    };
    let answers = sidecar.take(Kind::NotServed(refusal)).answers;
    assert!(
        matches!(&answers[0].kind, Some(Said::Subscribe(again)) if again.subscriptions[0].keyring == "payments")
    );
    assert_eq!(sidecar.dropped(), Some(9));
    assert_eq!(sidecar.held(), ["k1", "new", "payments"]);
}

#[test]
fn what_a_configuration_gives_up_while_there_is_no_stream_ends_on_the_next_one() {
    let mut sidecar = Sidecar::new();
    sidecar.receiver.disconnected();
    let wanted = Wanted::new([], vec![rule("k*", Mode::Full)]);
    sidecar
        .keyrings
        .reconfigure(wanted, || {})
        .expect("nothing changes its mode");
    let subscriptions = sidecar.receiver.subscriptions();
    assert_eq!(
        subscriptions[0].keyring, "payments",
        "it is still in memory"
    );
    assert!(sidecar.receiver.find().is_some());
    sidecar.receiver.connected();
    let messages = sidecar.receiver.reconfigure();
    assert!(
        matches!(&messages[..], [discovery::SidecarMessage { kind: Some(Said::Unsubscribe(ended)) }] if ended.keyring == "payments")
    );
    sidecar.forbid("payments", 1);
    assert_eq!(sidecar.receiver.subscriptions(), []);
}

#[test]
fn a_keyring_that_is_given_up_and_asked_for_again_without_a_stream_continues() {
    let mut sidecar = Sidecar::new();
    let slot = sidecar.keyrings.get(&testing::keyring_name());
    let slot = slot.expect("it is held");
    sidecar.receiver.disconnected();
    for named in [&[][..], &[testing::keyring_name()]] {
        let named = named.iter().cloned();
        let named = named.map(|name| (name, Staleness::default(), Mode::Full));
        let wanted = Wanted::new(named, Vec::new());
        let configured = sidecar.keyrings.reconfigure(wanted, || {});
        configured.expect("nothing changes its mode");
    }
    assert_eq!(sidecar.receiver.subscriptions().len(), 1);
    sidecar.receiver.connected();
    assert_eq!(sidecar.receiver.reconfigure(), []);
    sidecar.take(Kind::Settings(settings(Epoch::new(1))));
    let again = sidecar.keyrings.get(&testing::keyring_name());
    let again = again.expect("it is held");
    assert!(
        Arc::ptr_eq(&slot, &again),
        "what arrives is in use for checks"
    );
}

#[test]
fn an_answer_to_a_beat_before_the_patterns_does_not_show_that_they_are_ignored() {
    let mut sidecar = Sidecar::new();
    let Some(Said::Beat(before)) = sidecar.receiver.next_beat().kind else {
        panic!("it is a beat");
    };
    sidecar.list(&["k1"]);
    let hour = Duration::from_hours(1);
    assert!(!sidecar.configure(&["payments"], "x*", hour).is_empty());
    let answer = |beat| {
        Kind::BeatAnswer(discovery::BeatAnswer {
            beat,
            sent_at: Some(Timestamp::from_millis(1_000).to_wire()),
            beat_every_ms: 5_000,
            keyrings: Vec::new(),
        })
    };
    sidecar.take(answer(before.number));
    assert!(!sidecar.receiver.finder.is_ignored());
    let Some(Said::Beat(after)) = sidecar.receiver.next_beat().kind else {
        panic!("it is a beat");
    };
    sidecar.take(answer(after.number));
    assert!(sidecar.receiver.finder.is_ignored());
}
