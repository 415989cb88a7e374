use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use prost::Message as _;

use super::*;
use crate::{
    authz::{
        Authorizer, CheckEvent, DenyReason, Metadata, Observer, Outcome, Settings, SettingsParts,
        testing::{Message, parts, settings},
    },
    budget::Rate,
    clock::{Clock, ManualClock},
    key::{
        Epoch, KeyId, KeyRecord, KeyState, Prefix, Revision, Secret, Timestamp, Window, testing,
    },
    keyring::{
        KeyringSettings, Keyrings, Mode, Slot, Staleness,
        on_demand::{CacheSettings, Fill, Follower, Found},
    },
    proto::auth::CheckResponse,
};

const NOW: Timestamp = Timestamp::from_millis(5_000);
const EPOCH: Epoch = Epoch::new(7);
const REVISION: Revision = Revision::new(3);
const SOURCE: &str = "192.0.2.1";

/// The longest wait for a lookup.
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(5);

/// An observer that stores the outcomes of checks.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<Outcome>>);

impl Observer for Recorder {
    fn observe(&self, event: &CheckEvent<'_>) {
        let outcome = event.decision.outcome();
        self.0.lock().expect("no test panics here").push(outcome);
    }
}

/// A sidecar whose only keyring is on demand, with an empty cache.
struct Sidecar {
    authorizer: Authorizer,
    /// What Envoy sends with each check.
    metadata: Metadata,
    follower: Follower,
    told: Arc<Recorder>,
    clock: Clock,
    hands: ManualClock,
}

impl Sidecar {
    fn new() -> Self {
        Self::with(settings())
    }

    fn with(settings: Settings) -> Self {
        let cache = CacheSettings {
            lookup_timeout: LOOKUP_TIMEOUT,
            ..CacheSettings::default()
        };
        let (clock, hands) = Clock::manual(NOW);
        let mode = Mode::OnDemand(cache);
        let keyrings =
            Keyrings::with_modes([(testing::keyring_name(), Staleness::default(), mode)]);
        let slot = keyrings.get(&testing::keyring_name());
        let slot = slot.expect("it is configured");
        slot.confirm(clock.reading().into(), Duration::from_hours(1));
        let cache = slot.cache().cloned().expect("it is held on demand");
        let mut follower = Follower::new(slot, cache);
        follower.adopt(KeyringSettings {
            prefix: Prefix::default(),
            issued_only: true,
            peppers: vec![testing::pepper()],
            help_url: None,
        });
        assert_eq!(follower.start(EPOCH, REVISION), Ok(true));
        follower.connected();
        let told = Arc::new(Recorder::default());
        let observer = Arc::clone(&told) as Arc<dyn Observer>;
        let authorizer = Authorizer::new(Arc::new(settings), &keyrings, clock.clone(), observer);
        Self {
            authorizer,
            metadata: Metadata::default(),
            follower,
            told,
            clock,
            hands,
        }
    }

    /// Returns the answer, or the future of a later answer.
    fn check(&self, key: &str) -> Result<CheckResponse, LaterAnswer> {
        let request = Message::get("/").from(SOURCE);
        let request = request.header("x-api-key", key.to_owned());
        let request = request.joined().encode_to_vec();
        let mut answer = BytesMut::new();
        match self
            .authorizer
            .answer(Ok(&request), self.metadata, &mut answer)
        {
            None => Ok(response(answer.freeze())),
            Some(later) => {
                assert!(answer.is_empty(), "it is answered twice");
                Err(later)
            }
        }
    }

    fn waits(&self, key: &str) -> LaterAnswer {
        self.check(key).err().expect("the key was not looked up")
    }

    /// Answers the lookup of a key as the control plane does.
    fn fill(&mut self, secret: &Secret, record: Option<KeyRecord>) {
        let digest = testing::pepper().digest(&secret.presented());
        assert_eq!(self.follower.cache().next_request(), Some(digest));
        let found = record.map_or(Found::Nothing, |record| Found::Version(Box::new(record)));
        let fill = Fill {
            epoch: EPOCH,
            revision: REVISION,
            digest,
            found,
            siblings: Some(Vec::new()),
        };
        self.follower.fill(fill, self.clock.boot());
    }

    /// Answers a lookup that no check waits for.
    fn fill_unasked(&mut self, secret: &Secret, record: KeyRecord) {
        let fill = Fill {
            epoch: EPOCH,
            revision: REVISION,
            digest: testing::pepper().digest(&secret.presented()),
            found: Found::Version(Box::new(record)),
            siblings: Some(Vec::new()),
        };
        self.follower.fill(fill, self.clock.boot());
    }

    fn slot(&self) -> &Slot {
        self.follower.slot()
    }

    fn told(&self) -> Vec<Outcome> {
        self.told.0.lock().expect("no test panics here").clone()
    }
}

fn response(answer: Bytes) -> CheckResponse {
    CheckResponse::decode(answer).expect("a response")
}

fn is_allowed(response: &CheckResponse) -> bool {
    response.status.as_ref().is_some_and(|it| it.code == 0)
}

fn key() -> (Secret, KeyRecord) {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let record = testing::record_of(&secret);
    (secret, record)
}

#[tokio::test]
async fn a_check_waits_for_its_lookup_and_the_next_one_does_not() {
    let mut sidecar = Sidecar::new();
    let (secret, record) = key();
    let later = sidecar.waits(secret.expose());
    assert_eq!(sidecar.told(), []);
    sidecar.fill(&secret, Some(record));
    assert!(is_allowed(&response(later.await)));
    let next = sidecar.check(secret.expose());
    assert!(is_allowed(&next.ok().expect("it is held")));
    assert_eq!(sidecar.told(), [Outcome::Allowed, Outcome::Allowed]);
    let usage = sidecar.slot().usage();
    let counted: Vec<_> = usage.take_used();
    assert_eq!(counted.len(), 1);
    assert_eq!(usage.get(counted[0]).read().requests, 2);
}

#[tokio::test]
async fn a_key_that_nobody_has_is_unknown() {
    let mut sidecar = Sidecar::new();
    let (secret, _) = key();
    let later = sidecar.waits(secret.expose());
    sidecar.fill(&secret, None);
    assert!(!is_allowed(&response(later.await)));
    let next = sidecar.check(secret.expose());
    assert!(!is_allowed(&next.ok().expect("it is known to be unknown")));
    let unknown = Outcome::Denied(DenyReason::UnknownKey);
    assert_eq!(sidecar.told(), [unknown, unknown]);
}

#[tokio::test]
async fn keys_of_a_source_that_failed_too_often_are_not_looked_up() {
    let settings = Settings::new(SettingsParts {
        failed_credentials: Rate {
            per_second: 1,
            burst: 1,
        },
        ..parts()
    });
    let mut sidecar = Sidecar::with(settings.expect("valid settings"));
    let (held, record) = key();
    let later = sidecar.waits(held.expose());
    sidecar.fill(&held, Some(record));
    assert!(is_allowed(&response(later.await)));
    let (unknown, _) = key();
    let later = sidecar.waits(unknown.expose());
    sidecar.fill(&unknown, None);
    assert!(!is_allowed(&response(later.await)));

    let (missing, _) = key();
    let denied = sidecar.check(missing.expose());
    assert!(!is_allowed(&denied.ok().expect("it does not wait")));
    assert_eq!(sidecar.follower.cache().next_request(), None);
    let allowed = sidecar.check(held.expose());
    assert!(is_allowed(&allowed.ok().expect("it is held")));

    sidecar.hands.advance(Duration::from_secs(1));
    drop(sidecar.waits(missing.expose()));
    assert_eq!(
        sidecar.told(),
        [
            Outcome::Allowed,
            Outcome::Denied(DenyReason::UnknownKey),
            Outcome::Denied(DenyReason::TooManyFailures),
            Outcome::Allowed,
        ]
    );

    // A cached key is looked up again, even if its source has presented failed credentials.
    sidecar.hands.advance(CacheSettings::default().ttl);
    let later = sidecar.check("rlk_7Qm2Xc91TbKe_typo");
    assert!(!is_allowed(&later.ok().expect("it does not wait")));
    drop(sidecar.waits(held.expose()));
}

#[tokio::test]
async fn a_check_whose_lookup_nobody_answers_is_denied_in_time() {
    let sidecar = Sidecar::new();
    let (secret, _) = key();
    let later = sidecar.waits(secret.expose());
    assert!(!is_allowed(&response(later.await)));
    let unavailable = Outcome::Denied(DenyReason::KeyringUnavailable);
    assert_eq!(sidecar.told(), [unavailable]);
    assert_eq!(sidecar.follower.cache().stats().timeouts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_check_is_denied_before_envoy_stops_waiting() {
    for (timeout, waits) in [
        (None, LOOKUP_TIMEOUT),
        (Some(Duration::from_secs(1)), LOOKUP_TIMEOUT),
        (Some(Duration::from_millis(5)), Duration::from_millis(3)),
        (Some(Duration::from_millis(1)), Duration::ZERO),
    ] {
        let mut sidecar = Sidecar::new();
        sidecar.metadata.timeout = timeout;
        let (secret, _) = key();
        let later = sidecar.waits(secret.expose());
        let began = Instant::now();
        assert!(!is_allowed(&response(later.await)));
        assert_eq!(began.elapsed(), waits, "{timeout:?}");
        let unavailable = Outcome::Denied(DenyReason::KeyringUnavailable);
        assert_eq!(sidecar.told(), [unavailable]);
    }
}

#[test]
fn the_way_back_keeps_a_part_of_the_timeout() {
    let millis = Duration::from_millis;
    for (timeout, patience) in [
        (0, 0),
        (2, 0),
        (10, 8),
        (100, 90),
        (250, 225),
        (4_000, 3_975),
    ] {
        let metadata = Metadata {
            timeout: Some(millis(timeout)),
            ..Metadata::default()
        };
        assert_eq!(metadata.patience(), Some(millis(patience)));
    }
    assert_eq!(Metadata::default().patience(), None);
}

#[test]
fn without_a_control_plane_a_check_is_denied_at_once() {
    let sidecar = Sidecar::new();
    let (secret, _) = key();
    sidecar.follower.disconnected();
    let denied = sidecar.check(secret.expose());
    assert!(!is_allowed(&denied.ok().expect("it does not wait")));
    let unavailable = Outcome::Denied(DenyReason::KeyringUnavailable);
    assert_eq!(sidecar.told(), [unavailable]);
}

#[test]
fn without_a_control_plane_a_key_that_is_held_is_accepted_beyond_its_ttl() {
    let mut sidecar = Sidecar::new();
    let (secret, record) = key();
    sidecar.fill_unasked(&secret, record.clone());
    let allowed = |sidecar: &Sidecar| {
        let answered = sidecar.check(secret.expose());
        is_allowed(&answered.ok().expect("it does not wait"))
    };
    assert!(allowed(&sidecar));
    sidecar.follower.disconnected();
    sidecar.hands.advance(CacheSettings::default().ttl);
    assert!(allowed(&sidecar), "nobody can say more of it");
    let revoked = KeyRecord {
        state: KeyState::Revoked,
        ..record
    };
    sidecar.follower.revoke(EPOCH, Revision::new(4), &[revoked]);
    assert!(!allowed(&sidecar));
    assert_eq!(
        sidecar.told(),
        [
            Outcome::Allowed,
            Outcome::Allowed,
            Outcome::Denied(DenyReason::Revoked)
        ]
    );
}

#[test]
fn what_is_no_token_of_the_keyring_is_not_looked_up() {
    let sidecar = Sidecar::new();
    let denied = sidecar.check("rlk_7Qm2Xc91TbKe_typo");
    assert!(!is_allowed(&denied.ok().expect("it does not wait")));
    let malformed = Outcome::Denied(DenyReason::MalformedCredential);
    assert_eq!(sidecar.told(), [malformed]);
    assert_eq!(sidecar.follower.cache().next_request(), None);
}

#[tokio::test]
async fn a_check_that_waited_is_judged_by_what_holds_when_it_goes_on() {
    let mut sidecar = Sidecar::new();
    let (secret, record) = key();
    let later = sidecar.waits(secret.expose());
    sidecar.fill(&secret, Some(record.clone()));
    let revoked = KeyRecord {
        state: KeyState::Revoked,
        ..record
    };
    sidecar.follower.revoke(EPOCH, Revision::new(4), &[revoked]);
    assert!(!is_allowed(&response(later.await)));
    assert_eq!(sidecar.told(), [Outcome::Denied(DenyReason::Revoked)]);

    let mut sidecar = Sidecar::new();
    let (secret, record) = key();
    let expires_at = NOW.saturating_add(Duration::from_secs(1));
    let window = Window::new(None, Some(expires_at));
    let later = sidecar.waits(secret.expose());
    sidecar.fill(&secret, Some(KeyRecord { window, ..record }));
    sidecar.hands.advance(Duration::from_secs(1));
    assert!(!is_allowed(&response(later.await)));
    assert_eq!(sidecar.told(), [Outcome::Denied(DenyReason::Expired)]);
}
