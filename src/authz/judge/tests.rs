use std::{sync::Mutex, time::Duration};

use prost::Message as _;

use super::*;
use crate::{
    authz::{
        Auth, DenyReason, Enforcement, Outcome, Preflight, RouteRule, Settings, SettingsParts,
        testing::{Message, REVISION, behind_proxies, keyrings, parts, settings, written},
    },
    budget::Rate,
    key::{AllowedSources, KeyId, KeyRecord, Scopes, Secret, Use, Window, testing},
    keyring::CallerUse,
    proto::auth::{CheckRequest, CheckResponse, check_response::HttpResponse},
};

const OF_ENVOY: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const OF_CALLER: &str = "00-1bf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

const NOW: Timestamp = Timestamp::from_millis(5_000);
const SOURCE: &str = "192.0.2.1";

/// An observer that stores what it receives.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<(Outcome, Option<TraceParent>)>>);

impl Observer for Recorder {
    fn observe(&self, event: &CheckEvent<'_>) {
        let told = (event.decision.outcome(), event.parent);
        self.0.lock().expect("no test panics here").push(told);
    }
}

#[derive(Debug)]
struct Failing;

impl Observer for Failing {
    fn observe(&self, _: &CheckEvent<'_>) {
        panic!("the observer is broken");
    }
}

fn judge(observer: Arc<dyn Observer>) -> (Judge, Secret) {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let keyrings = keyrings(vec![testing::record_of(&secret)], true);
    let (clock, _) = Clock::manual(NOW);
    let settings = Arc::new(settings());
    (Judge::new(settings, &keyrings, clock, observer), secret)
}

fn told(recorder: &Recorder) -> Vec<(Outcome, Option<TraceParent>)> {
    recorder.0.lock().expect("no test panics here").clone()
}

fn answer(judge: &Judge, request: &CheckRequest) -> CheckResponse {
    written(|answer| {
        let message = request.encode_to_vec();
        let missing = judge.answer(&judge.begin(&message, Metadata::default()), answer);
        assert!(missing.is_none(), "the keyring is held in full");
    })
}

fn code(response: &CheckResponse) -> Option<i32> {
    response.status.as_ref().map(|status| status.code)
}

#[test]
fn a_check_is_answered_and_told_of() {
    let recorder = Arc::new(Recorder::default());
    let (judge, secret) = judge(recorder.clone());
    let message = Message::get("/").header("traceparent", OF_CALLER);
    let message = message.header("x-api-key", secret.expose().to_owned());
    assert_eq!(code(&answer(&judge, &message.joined())), Some(0));

    let of_envoy = TraceParent::parse(OF_ENVOY.as_bytes());
    let message = message.raw().encode_to_vec();
    let metadata = Metadata {
        parent: of_envoy,
        timeout: None,
    };
    let check = judge.begin(&message, metadata);
    written(|answer| assert!(judge.answer(&check, answer).is_none()));

    let parent = |text: &str| TraceParent::parse(text.as_bytes());
    assert_eq!(
        told(&recorder),
        [
            (Outcome::Allowed, parent(OF_CALLER)),
            (Outcome::Allowed, parent(OF_ENVOY))
        ]
    );
}

#[test]
fn a_check_that_waits_keeps_what_a_decision_needs() {
    let (judge, secret) = judge(Arc::new(Recorder::default()));
    let message = Message::get("/").header("x-api-key", secret.expose().to_owned());
    let mut message = message.joined().encode_to_vec();
    let needed = message.len();
    // A field of the whole message that nobody reads, and one with a group.
    message.extend([&[15 << 3 | 2, 100][..], &[b'a'; 100]].concat());
    let with_group = [&message[..], &[7 << 3 | 3, 7 << 3 | 4]].concat();
    for (message, kept) in [(&message, needed + 20), (&with_group, with_group.len())] {
        let check = judge.begin(message, Metadata::default()).into_owned();
        assert!(check.message.len() <= kept, "{} bytes", check.message.len());
        let response = written(|answer| assert!(judge.answer(&check, answer).is_none()));
        assert_eq!(code(&response), Some(0));
    }
}

#[test]
fn a_panic_becomes_a_denial_that_is_told_of() {
    let recorder = Arc::new(Recorder::default());
    let (judge, _) = judge(recorder.clone());
    let answer = written(|answer| {
        let check = judge.begin(b"", Metadata::default());
        judge.answer_by(&check, answer, |answer| {
            answer.extend_from_slice(b"half an allow");
            panic!("a broken invariant");
        });
    });
    assert_eq!(code(&answer), Some(14));
    assert!(matches!(
        answer.http_response,
        Some(HttpResponse::DeniedResponse(_))
    ));
    let expected = Outcome::Denied(DenyReason::InternalError);
    assert_eq!(told(&recorder), [(expected, None)]);
}

#[test]
fn a_broken_observer_does_not_change_the_answer() {
    let (judge, secret) = judge(Arc::new(Failing));
    let message = Message::get("/").header("x-api-key", secret.expose().to_owned());
    assert_eq!(code(&answer(&judge, &message.joined())), Some(0));
    assert_eq!(code(&answer(&judge, &Message::get("/").joined())), Some(16));
}

#[test]
fn a_source_that_fails_too_often_is_told_so_and_its_good_keys_pass() {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let keyrings = keyrings(vec![testing::record_of(&secret)], true);
    let (clock, hands) = Clock::manual(NOW);
    let settings = Settings::new(SettingsParts {
        failed_credentials: Rate {
            per_second: 1,
            burst: 2,
        },
        ..parts()
    });
    let settings = Arc::new(settings.expect("valid settings"));
    let recorder = Arc::new(Recorder::default());
    let judge = Judge::new(settings, &keyrings, clock, recorder.clone());
    let unknown = testing::secret(KeyId::generate().expect("the random source works"));
    let check = |source: &'static str, key: &str| {
        let message = Message::get("/").from(source);
        let message = message.header("x-api-key", key.to_owned());
        answer(&judge, &message.joined());
    };
    check(SOURCE, unknown.expose());
    check(SOURCE, "typo");
    check(SOURCE, unknown.expose());
    check(SOURCE, "typo");
    check(SOURCE, secret.expose());
    // A check without a source address is not charged.
    check("", unknown.expose());
    hands.advance(Duration::from_secs(1));
    check(SOURCE, unknown.expose());
    let outcomes: Vec<_> = told(&recorder)
        .iter()
        .map(|(outcome, _)| *outcome)
        .collect();
    assert_eq!(
        outcomes,
        [
            Outcome::Denied(DenyReason::UnknownKey),
            Outcome::Denied(DenyReason::MalformedCredential),
            Outcome::Denied(DenyReason::TooManyFailures),
            Outcome::Denied(DenyReason::TooManyFailures),
            Outcome::Allowed,
            Outcome::Denied(DenyReason::UnknownKey),
            Outcome::Denied(DenyReason::UnknownKey),
        ]
    );
}

#[test]
fn the_budget_of_failed_credentials_is_the_one_of_the_client() {
    let keyrings = keyrings(Vec::new(), true);
    let (clock, _) = Clock::manual(NOW);
    let settings = Settings::new(SettingsParts {
        failed_credentials: Rate {
            per_second: 1,
            burst: 1,
        },
        ..behind_proxies()
    });
    let settings = Arc::new(settings.expect("valid settings"));
    let judge = Judge::new(settings, &keyrings, clock, Arc::new(Failing));
    let is_too_many = |peer: &'static str, forwarded_for: &'static str| {
        let message = Message::get("/").from(peer);
        let message = message.header("x-forwarded-for", forwarded_for);
        let message = message.header("x-api-key", "typo");
        code(&answer(&judge, &message.raw())) == Some(8)
    };
    // Of the same client, whichever way it comes and whatever it sends.
    assert!(!is_too_many("10.0.0.1", "203.0.113.9"));
    assert!(is_too_many("10.0.0.2", "192.0.2.66, 203.0.113.9, 10.0.0.3"));
    assert!(is_too_many("203.0.113.9", "192.0.2.67"));
    // The peer stands for clients that are unknown.
    assert!(!is_too_many("10.0.0.1", "unknown"));
    assert!(is_too_many("10.0.0.1", "_hidden"));
    assert!(is_too_many("10.0.0.1", ""));
}

/// Returns the counted uses of the only version in the keyring.
fn counted(judge: &Judge) -> Vec<Use> {
    let basis = judge.basis.load();
    let slot = basis.slot("payments").expect("it is held");
    let used = slot.usage().take_used();
    used.iter()
        .map(|usage| slot.usage().get(*usage).read())
        .collect()
}

#[test]
fn a_clock_that_is_set_back_revives_no_expired_key() {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let life = Duration::from_secs(1);
    let record = KeyRecord {
        window: Window::new(None, Some(NOW.saturating_add(life))),
        ..testing::record_of(&secret)
    };
    let keyrings = keyrings(vec![record], true);
    let (clock, hands) = Clock::manual(NOW);
    let observer = Arc::new(Recorder::default());
    let judge = Judge::new(Arc::new(settings()), &keyrings, clock, observer);
    let message = Message::get("/").header("x-api-key", secret.expose().to_owned());
    let now = || code(&answer(&judge, &message.joined()));
    assert_eq!(now(), Some(0));
    hands.set_wall(NOW.saturating_add(life));
    assert_eq!(now(), Some(16));
    hands.set_wall(NOW);
    assert_eq!(now(), Some(16), "it was revived");
}

fn judge_of(record: KeyRecord, observer: Arc<dyn Observer>) -> Judge {
    let keyrings = keyrings(vec![record], true);
    let (clock, _) = Clock::manual(NOW);
    Judge::new(Arc::new(settings()), &keyrings, clock, observer)
}

#[test]
fn every_check_of_a_verified_key_is_counted_whatever_becomes_of_it() {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let record = testing::record_of(&secret);
    let message = Message::get("/").header("x-api-key", secret.expose().to_owned());
    let scopes = message.clone().extension("relatch.scopes", "write");
    let with = |state, window| KeyRecord {
        state,
        window,
        ..record.clone()
    };
    let always = Window::default();
    let later = Timestamp::from_millis(5_001);
    let inner = KeyRecord {
        allowed_sources: AllowedSources::parse(&["10.0.0.0/8"]).expect("a block"),
        ..record.clone()
    };
    for (record, message, denied) in [
        (record.clone(), &message, 0),
        (with(KeyState::Pending, always), &message, 0),
        (with(KeyState::Retiring, always), &message, 0),
        (with(KeyState::Retired, always), &message, 1),
        (with(KeyState::Revoked, always), &message, 1),
        (
            with(KeyState::Active, Window::new(None, Some(NOW))),
            &message,
            1,
        ),
        (
            with(KeyState::Active, Window::new(Some(later), None)),
            &message,
            1,
        ),
        (inner, &message, 1),
        (record.clone(), &scopes, 1),
    ] {
        let judge = judge_of(record.clone(), Arc::new(Failing));
        let answer = answer(&judge, &message.joined());
        assert_eq!(code(&answer) != Some(0), denied == 1);
        let expected = Use {
            requests: 1,
            denied,
            first_used: Some(NOW),
            last_used: Some(NOW),
        };
        assert_eq!(counted(&judge), [expected], "{:?}", record.state);
    }
}

#[test]
fn a_key_that_was_not_verified_is_not_counted() {
    let (judge, secret) = judge(Arc::new(Recorder::default()));
    let other = testing::secret(KeyId::generate().expect("the random source works"));
    let key =
        |message: Message, secret: &Secret| message.header("x-api-key", secret.expose().to_owned());
    let elsewhere = Message::get("/").extension("relatch.keyring", "empty");
    for message in [
        Message::get("/"),
        Message::get("/").header("x-api-key", "K"),
        key(Message::get("/"), &other),
        key(elsewhere, &secret),
        key(key(Message::get("/"), &secret), &other),
    ] {
        assert_ne!(code(&answer(&judge, &message.raw())), Some(0));
        assert_eq!(counted(&judge), []);
    }
}

#[test]
fn callers_are_noted_only_of_versions_that_should_not_be_used_any_more() {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let message = Message::get("/v1/orders/17?api_key=").from("192.0.2.7");
    let message = message.header("user-agent", "curl/8.5");
    let message = message.header("x-api-key", secret.expose().to_owned());
    for (state, is_noted) in [
        (KeyState::Pending, false),
        (KeyState::Active, false),
        (KeyState::Retiring, true),
        (KeyState::Retired, true),
        (KeyState::Revoked, true),
    ] {
        let record = KeyRecord {
            state,
            ..testing::record_of(&secret)
        };
        let judge = judge_of(record, Arc::new(Recorder::default()));
        let _answer = answer(&judge, &message.joined());
        let basis = judge.basis.load();
        let slot = basis.slot("payments").expect("it is held");
        let used = slot.usage().take_used();
        let usage = slot.usage().get(used[0]);
        let expected = CallerUse {
            source: Some([192, 0, 2, 7].into()),
            user_agent: "curl/8.5".to_owned(),
            route: "api.example.com/v1/orders".to_owned(),
            requests: 1,
            last_used: NOW,
        };
        let expected: &[CallerUse] = if is_noted { &[expected] } else { &[] };
        assert_eq!(usage.callers(), expected, "{state:?}");
    }
}

#[test]
fn callers_are_named_by_the_address_of_the_client() {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    for (forwarded_for, source) in [
        ("192.0.2.66, 203.0.113.9", Some([203, 0, 113, 9].into())),
        ("unknown", None),
    ] {
        let record = KeyRecord {
            state: KeyState::Retiring,
            ..testing::record_of(&secret)
        };
        let (clock, _) = Clock::manual(NOW);
        let settings = Arc::new(Settings::new(behind_proxies()).expect("valid settings"));
        let keyrings = keyrings(vec![record], true);
        let judge = Judge::new(settings, &keyrings, clock, Arc::new(Failing));
        let message = Message::get("/").from("10.0.0.1");
        let message = message.header("x-forwarded-for", forwarded_for);
        let message = message.header("x-api-key", secret.expose().to_owned());
        assert_eq!(code(&answer(&judge, &message.joined())), Some(0));
        let basis = judge.basis.load();
        let slot = basis.slot("payments").expect("it is held");
        let used = slot.usage().take_used();
        let callers = slot.usage().get(used[0]).callers();
        let sources: Vec<_> = callers.iter().map(|caller| caller.source).collect();
        assert_eq!(sources, [source]);
    }
}

#[test]
fn every_keyring_is_found_by_its_name_and_no_other() {
    let (judge, _) = judge(Arc::new(Recorder::default()));
    let basis = judge.basis.load();
    for name in ["payments", "empty"] {
        let slot = basis.slot(name).expect("it is held");
        assert_eq!(slot.name().as_str(), name);
    }
    for name in ["", "payment", "Payments", "zzz"] {
        assert!(basis.slot(name).is_none(), "{name:?} was found");
    }
    let payments = basis.slot("payments").expect("it is held").load();
    let revision = payments.as_ref().map(|view| view.revision());
    assert_eq!(revision, Some(REVISION));
}

#[test]
fn a_check_keeps_the_keyrings_that_it_began_with() {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let keyrings = keyrings(vec![testing::record_of(&secret)], true);
    let (clock, _) = Clock::manual(NOW);
    let observer = Arc::new(Recorder::default());
    let judge = Judge::new(Arc::new(settings()), &keyrings, clock, observer);
    let message = Message::get("/").header("x-api-key", secret.expose().to_owned());
    let message = message.joined().encode_to_vec();
    let begun = judge.begin(&message, Metadata::default());
    keyrings.remove(&testing::keyring_name());
    let outcome = |check: &Check<'_>| {
        let response = written(|answer| assert!(judge.answer(check, answer).is_none()));
        response.status.map_or(0, |status| status.code)
    };
    assert_eq!(outcome(&begun), 0, "it is judged by what it began with");
    let next = judge.begin(&message, Metadata::default());
    assert_ne!(outcome(&next), 0);
}

#[test]
fn settings_change_together_with_keyrings_and_a_new_rate_begins_anew() {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let keyrings = keyrings(vec![testing::record_of(&secret)], true);
    let (clock, _) = Clock::manual(NOW);
    let observer = Arc::new(Recorder::default());
    let judge = Judge::new(Arc::new(settings()), &keyrings, clock, observer.clone());
    let bad = Message::get("/").from(SOURCE).header("x-api-key", "rl_bad");
    let reason = || {
        answer(&judge, &bad.clone().joined());
        told(&observer).last().map(|(outcome, _)| *outcome)
    };
    let failed = Some(Outcome::Denied(DenyReason::MalformedCredential));
    let too_many = Some(Outcome::Denied(DenyReason::TooManyFailures));
    assert_eq!([reason(), reason()], [failed, failed]);
    let strict = SettingsParts {
        failed_credentials: Rate {
            per_second: 1,
            burst: 1,
        },
        ..parts()
    };
    let strict = Arc::new(Settings::new(strict).expect("valid settings"));
    judge.settle(Arc::clone(&strict).into());
    assert_eq!(reason(), failed, "it waits for the change of the keyrings");
    keyrings.remove(&"empty".parse().expect("a name"));
    assert_eq!([reason(), reason()], [failed, too_many]);
    // A change of keyrings alone, and the same rate again, keep what was counted.
    judge.settle(strict.into());
    keyrings.remove(&"empty".parse().expect("a name"));
    assert_eq!(reason(), too_many);
}

#[test]
fn a_trial_spends_a_budget_of_its_own() {
    let observer = Arc::new(Recorder::default());
    let keyrings = keyrings(vec![], true);
    let (clock, _) = Clock::manual(NOW);
    let trial = Enforcement::Observed {
        removes_credential: false,
    };
    let rule = RouteRule {
        host: None,
        path_prefix: "/trial".parse().expect("a path"),
        keyring: testing::keyring_name(),
        scopes: Scopes::default(),
        auth: Auth::Required,
        preflight: Preflight::Deny,
        enforcement: Some(trial),
        credentials: None,
    };
    let settings = SettingsParts {
        failed_credentials: Rate {
            per_second: 1,
            burst: 1,
        },
        routes: vec![rule],
        ..parts()
    };
    let settings = Arc::new(Settings::new(settings).expect("valid settings"));
    let judge = Judge::new(settings, &keyrings, clock, observer.clone());
    let outcome = |path: &'static str| {
        let bad = Message::get(path).header("x-api-key", "rl_bad");
        answer(&judge, &bad.joined());
        told(&observer).last().map(|(outcome, _)| *outcome)
    };
    let (failed, too_many) = (DenyReason::MalformedCredential, DenyReason::TooManyFailures);
    assert_eq!(outcome("/trial"), Some(Outcome::WouldDeny(failed)));
    assert_eq!(outcome("/trial"), Some(Outcome::WouldDeny(too_many)));
    assert_eq!(outcome("/"), Some(Outcome::Denied(failed)));
    assert_eq!(outcome("/"), Some(Outcome::Denied(too_many)));
}
