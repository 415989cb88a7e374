//! The decision for every state of a request, a keyring and a key.

use prost::Message as _;

use super::*;
use crate::{
    authz::{
        settings::{Auth, Enforcement, PathPrefix, Preflight, RouteRule, Settings, SettingsParts},
        testing::{
            CONFIRMED_AT, DENY_AFTER, Judged, Message, REVISION, at_once, behind_proxies, judge,
            keyrings, parts, read_at, unconfirmed,
        },
    },
    clock::BootTime,
    key::{AllowedSources, KeyId, KeyRecord, Scopes, Secret, Window, testing},
};

/// A sidecar with one key, at one moment.
struct Sidecar {
    settings: SettingsParts,
    record: KeyRecord,
    secret: Secret,
    issued_only: bool,
    now: Timestamp,
    boot: BootTime,
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

impl Sidecar {
    fn new() -> Self {
        let secret = testing::secret(KeyId::generate().expect("the random source works"));
        Self {
            settings: parts(),
            record: testing::record_of(&secret),
            secret,
            issued_only: true,
            now: at(150),
            boot: CONFIRMED_AT,
        }
    }

    fn with(change: impl FnOnce(&mut KeyRecord)) -> Self {
        let mut sidecar = Self::new();
        change(&mut sidecar.record);
        sidecar
    }

    fn request(&self) -> Message {
        Message::get("/").header("x-api-key", self.secret.expose().to_owned())
    }

    fn judge(&self, message: &Message) -> Judged {
        let settings = Settings::new(self.settings.clone()).expect("valid settings");
        let keyrings = keyrings(vec![self.record.clone()], self.issued_only);
        let [joined, raw] = [message.joined(), message.raw()]
            .map(|request| judge(&settings, &keyrings, &request, self.now, self.boot).0);
        assert_eq!(joined.outcome, raw.outcome);
        joined
    }

    fn outcome(&self) -> Outcome {
        self.judge(&self.request()).outcome
    }
}

/// The reasons to deny a request to [`all_wrong`], in the order of the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wrong {
    Malformed,
    NoKeyring,
    Unavailable,
    Stale,
    Ambiguous,
    Missing,
    Format,
    Unknown,
    Revoked,
    Retired,
    Expired,
    NotYet,
    Source,
    Scope,
}

const WRONGS: [(Wrong, DenyReason); 14] = [
    (Wrong::Malformed, DenyReason::MalformedRequest),
    (Wrong::NoKeyring, DenyReason::UnknownKeyring),
    (Wrong::Unavailable, DenyReason::KeyringUnavailable),
    (Wrong::Stale, DenyReason::KeyringStale),
    (Wrong::Ambiguous, DenyReason::AmbiguousCredential),
    (Wrong::Missing, DenyReason::MissingCredential),
    (Wrong::Format, DenyReason::MalformedCredential),
    (Wrong::Unknown, DenyReason::UnknownKey),
    (Wrong::Revoked, DenyReason::Revoked),
    (Wrong::Retired, DenyReason::Retired),
    (Wrong::Expired, DenyReason::Expired),
    (Wrong::NotYet, DenyReason::NotYetValid),
    (Wrong::Source, DenyReason::SourceNotAllowed),
    (Wrong::Scope, DenyReason::InsufficientScope),
];

/// Returns the decision on a request with these wrongs; none if they exclude each other.
fn judged_with(wrongs: &[Wrong]) -> Option<Judged> {
    use Wrong::{
        Ambiguous, Expired, Format, Malformed, Missing, NoKeyring, NotYet, Retired, Revoked, Scope,
        Source, Stale, Unavailable, Unknown,
    };
    let has = |wrong| wrongs.contains(&wrong);
    let count = |some: &[Wrong]| some.iter().filter(|wrong| has(**wrong)).count();
    let exclusive: [&[Wrong]; 4] = [
        &[NoKeyring, Unavailable],
        &[Ambiguous, Missing],
        &[Revoked, Retired],
        &[Missing, Format],
    ];
    if exclusive.iter().any(|some| count(some) > 1) {
        return None;
    }
    let mut sidecar = Sidecar::with(|record| {
        if has(Expired) {
            record.window.expires_at = Some(at(150));
        }
        if has(NotYet) {
            record.window.not_before = Some(at(151));
        }
        if has(Retired) {
            record.state = KeyState::Retired;
        }
        if has(Revoked) {
            record.state = KeyState::Revoked;
        }
        if has(Source) {
            record.allowed_sources = AllowedSources::parse(&["10.0.0.0/8"]).expect("a block");
        }
    });
    if has(Stale) {
        sidecar.boot = CONFIRMED_AT.saturating_add(DENY_AFTER);
    }
    let key = match (has(Format), has(Unknown)) {
        (true, _) => "no-token".to_owned(),
        (false, true) => {
            let id = KeyId::generate().expect("the random source works");
            testing::secret(id).expose().to_owned()
        }
        (false, false) => sidecar.secret.expose().to_owned(),
    };
    let mut message = Message::get("/");
    if !has(Missing) {
        message = message.header("x-api-key", key);
    }
    if has(Ambiguous) {
        message = message.header("authorization", "Bearer other");
    }
    if has(Malformed) {
        message = message.header("x_relatch consumer", "root");
    }
    if has(NoKeyring) {
        message = message.extension("relatch.keyring", "other");
    }
    if has(Unavailable) {
        message = message.extension("relatch.keyring", "empty");
    }
    if has(Scope) {
        message = message.extension("relatch.scopes", "admin");
    }
    Some(sidecar.judge(&message))
}

fn outcome_with(wrongs: &[Wrong]) -> Option<Outcome> {
    judged_with(wrongs).map(|judged| judged.outcome)
}

#[test]
fn a_good_request_is_allowed() {
    assert_eq!(outcome_with(&[]), Some(Outcome::Allowed));
}

#[test]
fn every_wrong_alone_is_denied_with_its_reason() {
    for (wrong, reason) in WRONGS {
        assert_eq!(
            outcome_with(&[wrong]),
            Some(Outcome::Denied(reason)),
            "{wrong:?}"
        );
    }
}

#[test]
fn of_two_wrongs_the_first_in_the_order_wins() {
    let mut pairs = 0;
    for (at, (first, reason)) in WRONGS.into_iter().enumerate() {
        for (second, _) in &WRONGS[at + 1..] {
            let Some(outcome) = outcome_with(&[first, *second]) else {
                continue;
            };
            assert_eq!(outcome, Outcome::Denied(reason), "{first:?} and {second:?}");
            pairs += 1;
        }
    }
    assert_eq!(pairs, 14 * 13 / 2 - 4);
}

#[test]
fn windows_are_half_open_to_the_millisecond() {
    let mut sidecar = Sidecar::with(|record| {
        record.window = Window::new(Some(at(100)), Some(at(200)));
    });
    for (now, outcome) in [
        (99, Outcome::Denied(DenyReason::NotYetValid)),
        (100, Outcome::Allowed),
        (199, Outcome::Allowed),
        (200, Outcome::Denied(DenyReason::Expired)),
        (201, Outcome::Denied(DenyReason::Expired)),
    ] {
        sidecar.now = at(now);
        assert_eq!(sidecar.outcome(), outcome, "at {now}");
    }
}

#[test]
fn retiring_version_is_accepted_until_it_expires_and_its_deadline_announced() {
    let mut sidecar = Sidecar::with(|record| {
        record.state = KeyState::Retiring;
        record.retires_at = Some(at(200));
        record.window.expires_at = Some(at(300));
    });
    for (now, outcome) in [
        (199, Outcome::Allowed),
        (200, Outcome::Allowed),
        (299, Outcome::Allowed),
        (300, Outcome::Denied(DenyReason::Expired)),
    ] {
        sidecar.now = at(now);
        assert_eq!(sidecar.outcome(), outcome, "at {now}");
    }
    sidecar.now = at(199);
    let judged = sidecar.judge(&sidecar.request());
    assert_eq!(judged.outcome, Outcome::Allowed);
    assert_eq!(judged.sunset, Some(at(200)));
}

#[test]
fn allowed_sources_are_about_the_client() {
    let mut sidecar = Sidecar::with(|record| {
        let blocks = ["203.0.113.0/24", "10.0.0.1"];
        record.allowed_sources = AllowedSources::parse(&blocks).expect("blocks");
    });
    sidecar.settings = behind_proxies();
    let refused = Outcome::Denied(DenyReason::SourceNotAllowed);
    for (peer, forwarded_for, outcome) in [
        ("10.0.0.2", "203.0.113.9", Outcome::Allowed),
        ("10.0.0.2", "192.0.2.1", refused),
        ("10.0.0.2", "203.0.113.9, 192.0.2.1", refused),
        // The client is unknown. The address of its proxy does not stand for it.
        ("10.0.0.1", "203.0.113.9, unknown", refused),
        // A forged header.
        ("192.0.2.1", "203.0.113.9", refused),
        ("203.0.113.7", "192.0.2.1", Outcome::Allowed),
    ] {
        let request = sidecar.request().from(peer);
        let request = request.header("x-forwarded-for", forwarded_for);
        let found = sidecar.judge(&request).outcome;
        assert_eq!(found, outcome, "{peer}, {forwarded_for}");
    }
    sidecar.record.allowed_sources = AllowedSources::default();
    let request = sidecar.request().from("10.0.0.1");
    let unknown = request.header("x-forwarded-for", "unknown");
    assert_eq!(sidecar.judge(&unknown).outcome, Outcome::Allowed);
}

#[test]
fn a_keyring_is_stale_from_its_limit_on() {
    let mut sidecar = Sidecar::new();
    let limit = CONFIRMED_AT.saturating_add(DENY_AFTER);
    sidecar.boot = limit.saturating_sub(Duration::from_millis(1));
    assert_eq!(sidecar.outcome(), Outcome::Allowed);
    sidecar.boot = limit;
    assert_eq!(sidecar.outcome(), Outcome::Denied(DenyReason::KeyringStale));
}

#[test]
fn a_view_that_was_never_confirmed_is_not_used() {
    let sidecar = Sidecar::new();
    let settings = Settings::new(sidecar.settings.clone()).expect("valid settings");
    let unconfirmed = unconfirmed(vec![sidecar.record.clone()], true);
    let slot = unconfirmed.get(&testing::keyring_name());
    let slot = slot.expect("it was made");
    let look = slot.look(read_at(sidecar.boot));
    assert!(look.view().is_some());
    let looked_up = LookedUp::default();
    let held = HeldKeyring::new(&look, &looked_up);
    let request = sidecar.request().raw().encode_to_vec();
    let question = Question::read(&settings, &request).expect("a question");
    let decision = at_once(decide(&question, Some(&held), sidecar.now));
    assert_eq!(
        decision.outcome(),
        Outcome::Denied(DenyReason::KeyringUnavailable)
    );
}

#[test]
fn optional_routes_pass_a_missing_credential_and_no_wrong_one() {
    let sidecar = Sidecar::new();
    let optional = |message: Message| {
        let message = message.extension("relatch.auth", "optional");
        sidecar.judge(&message).outcome
    };
    assert_eq!(optional(Message::get("/")), Outcome::Anonymous);
    assert_eq!(optional(sidecar.request()), Outcome::Allowed);
    assert_eq!(
        optional(Message::get("/").header("x-api-key", "wrong")),
        Outcome::Denied(DenyReason::MalformedCredential)
    );
    assert_eq!(
        optional(sidecar.request().header("authorization", "Bearer x")),
        Outcome::Denied(DenyReason::AmbiguousCredential)
    );
    let elsewhere = Message::get("/").extension("relatch.keyring", "empty");
    assert_eq!(
        optional(elsewhere),
        Outcome::Denied(DenyReason::KeyringUnavailable)
    );
}

#[test]
fn keys_of_another_system_are_looked_up_where_they_are_allowed() {
    let mut sidecar = Sidecar::new();
    sidecar.issued_only = false;
    let outcome = |key: String| {
        let message = Message::get("/").header("x-api-key", key);
        sidecar.judge(&message).outcome
    };
    assert_eq!(
        outcome("ak_live_0123".to_owned()),
        Outcome::Denied(DenyReason::UnknownKey)
    );
    assert_eq!(
        outcome("x".repeat(513)),
        Outcome::Denied(DenyReason::MalformedCredential)
    );
}

#[test]
fn identity_is_known_only_once_the_key_was_verified() {
    for (wrong, _) in WRONGS {
        let judged = judged_with(&[wrong]).expect("one wrong is possible");
        let is_verified = wrong >= Wrong::Revoked;
        assert_eq!(judged.record.is_some(), is_verified, "{wrong:?}");
    }
}

#[test]
fn a_decision_tells_what_it_was_based_on() {
    for (wrong, has_keyring, revision) in [
        (Wrong::Malformed, false, None),
        (Wrong::NoKeyring, false, None),
        (Wrong::Unavailable, true, None),
        (Wrong::Unknown, true, Some(REVISION)),
    ] {
        let judged = judged_with(&[wrong]).expect("one wrong is possible");
        assert_eq!(judged.has_keyring, has_keyring, "{wrong:?}");
        assert_eq!(judged.revision, revision, "{wrong:?}");
    }
}

/// Returns a sidecar with `preflight: allow` for every path.
fn with_preflights() -> Sidecar {
    let mut sidecar = Sidecar::new();
    sidecar.settings.routes = vec![RouteRule {
        host: None,
        path_prefix: PathPrefix::default(),
        keyring: testing::keyring_name(),
        scopes: Scopes::default(),
        auth: Auth::Required,
        preflight: Preflight::Allow,
        enforcement: None,
        credentials: None,
    }];
    sidecar
}

#[test]
fn a_preflight_passes_where_a_rule_says_so_and_with_it_nothing_else() {
    let preflight = || {
        Message::get("/orders")
            .method("OPTIONS")
            .header("origin", "https://app.example")
            .header("access-control-request-method", "PUT")
    };
    let mut sidecar = with_preflights();
    assert_eq!(sidecar.judge(&preflight()).outcome, Outcome::Preflight);
    let missing = Outcome::Denied(DenyReason::MissingCredential);
    assert_eq!(sidecar.judge(&Message::get("/orders")).outcome, missing);
    assert_eq!(Sidecar::new().judge(&preflight()).outcome, missing);
    // Its credentials are not judged, and do not pass either.
    let wrong = preflight().header("x-api-key", "wrong");
    assert_eq!(sidecar.judge(&wrong).outcome, Outcome::Preflight);
    let inseparable = preflight().header("cookie", b"a=\xff; api_key=K".to_vec());
    assert_eq!(
        sidecar.judge(&inseparable).outcome,
        Outcome::Denied(DenyReason::MalformedRequest)
    );
    let both = inseparable.header("x-api-key", "K L");
    assert_eq!(
        sidecar.judge(&both).outcome,
        Outcome::Denied(DenyReason::MalformedCredential)
    );
    // A browser can then read why its request is denied.
    sidecar.boot = CONFIRMED_AT.saturating_add(DENY_AFTER);
    assert_eq!(sidecar.judge(&preflight()).outcome, Outcome::Preflight);
}

#[test]
fn a_trial_denies_only_what_must_not_reach_the_upstream() {
    let in_trial = |removes_credential| {
        let mut sidecar = Sidecar::new();
        let observed = Enforcement::Observed { removes_credential };
        sidecar.settings.enforcements.named = vec![(testing::keyring_name(), observed)];
        sidecar
    };
    let denied = |reason| Outcome::Denied(reason);
    let would_deny = |reason| Outcome::WouldDeny(reason);
    let inseparable = Message::get("/").header("cookie", b"a=\xff; api_key=K".to_vec());
    let ambiguous = Message::get("/?api_key=K").header("x-api-key", "L");
    let malformed = Message::get("/").header("x-api-key", "K L");
    let header_name = Message::get("/").header("x relatch consumer", "root");
    let unknown = Message::get("/").extension("relatch.keyring", "other");
    for removes in [false, true] {
        let sidecar = in_trial(removes);
        let outcome = |message: &Message| sidecar.judge(message).outcome;
        assert_eq!(outcome(&sidecar.request()), Outcome::Allowed);
        let missing = would_deny(DenyReason::MissingCredential);
        assert_eq!(outcome(&Message::get("/")), missing);
        let ambiguous_credential = would_deny(DenyReason::AmbiguousCredential);
        assert_eq!(outcome(&ambiguous), ambiguous_credential);
        let malformed_credential = would_deny(DenyReason::MalformedCredential);
        assert_eq!(outcome(&malformed), malformed_credential);
        let malformed_request = DenyReason::MalformedRequest;
        let expected = if removes {
            denied(malformed_request)
        } else {
            would_deny(malformed_request)
        };
        assert_eq!(outcome(&inseparable), expected);
        assert_eq!(outcome(&header_name), denied(malformed_request));
        assert_eq!(outcome(&unknown), denied(DenyReason::UnknownKeyring));
    }
}

#[test]
fn a_request_without_a_known_route_passes_only_where_everything_is_a_trial() {
    let mut sidecar = with_preflights();
    let observed = Enforcement::Observed {
        removes_credential: false,
    };
    let mut below = sidecar.settings.routes[0].clone();
    below.path_prefix = "/admin".parse().expect("a path");
    sidecar.settings.routes.push(below);
    sidecar.settings.enforcements.named = vec![(testing::keyring_name(), observed)];
    let odd = Message::get("/a/%2e%2e/admin");
    let malformed = DenyReason::MalformedRequest;
    let judged = sidecar.judge(&odd);
    assert_eq!(judged.outcome, Outcome::WouldDeny(malformed));
    // What the Envoy route enforces stays enforced.
    for extension in [("relatch.enforce", "true"), ("relatch.keyring", "other")] {
        let enforced = odd.clone().extension(extension.0, extension.1);
        let outcome = sidecar.judge(&enforced).outcome;
        assert_eq!(outcome, Outcome::Denied(malformed), "{extension:?}");
    }
    // Where keys are removed, it is unknown from which places.
    sidecar.settings.routes[1].enforcement = Some(Enforcement::Observed {
        removes_credential: true,
    });
    assert_eq!(sidecar.judge(&odd).outcome, Outcome::Denied(malformed));
    sidecar.settings.routes[1].enforcement = Some(Enforcement::Enforced);
    assert_eq!(sidecar.judge(&odd).outcome, Outcome::Denied(malformed));
    sidecar.settings.routes.pop();
    let enforced = ("other".parse().expect("a name"), Enforcement::Enforced);
    sidecar.settings.enforcements.named.push(enforced);
    let host = RouteRule {
        host: Some("a.example".parse().expect("a host")),
        ..sidecar.settings.routes[0].clone()
    };
    sidecar.settings.routes.push(host);
    let odd = Message::get("/").host("name..");
    assert_eq!(sidecar.judge(&odd).outcome, Outcome::Denied(malformed));
}

/// Envoy joins two headers with a comma. What is behind it is not a credential to judge, and must not
/// reach the upstream either.
#[test]
fn a_credential_behind_a_comma_passes_neither_a_trial_that_removes_nor_a_preflight() {
    let header = Message::get("/").header("authorization", "Basic abc, Bearer K");
    let cookie = Message::get("/").header("cookie", "a=1,api_key=K");
    let ambiguous = DenyReason::AmbiguousCredential;
    for (message, removable) in [(header, true), (cookie, false)] {
        let mut trial = Sidecar::new();
        let removes = Enforcement::Observed {
            removes_credential: true,
        };
        trial.settings.enforcements.named = vec![(testing::keyring_name(), removes)];
        let expected = if removable {
            Outcome::WouldDeny(ambiguous)
        } else {
            Outcome::Denied(ambiguous)
        };
        assert_eq!(trial.judge(&message).outcome, expected);
        let enforced = Outcome::Denied(ambiguous);
        assert_eq!(Sidecar::new().judge(&message).outcome, enforced);
        let preflight = message
            .method("OPTIONS")
            .header("origin", "https://app.example")
            .header("access-control-request-method", "PUT");
        let expected = if removable {
            Outcome::Preflight
        } else {
            enforced
        };
        assert_eq!(with_preflights().judge(&preflight).outcome, expected);
    }
}
