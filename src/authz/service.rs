//! The gRPC service `envoy.service.auth.v3.Authorization`.
//!
//! Envoy takes a gRPC error for a failure, not for a denial, and may be told to let requests pass then. So a check is
//! always answered: whatever panics on its way becomes a denial.
//!
//! A check is answered at once, from what is held. Where a key of a keyring that is held on demand has to be looked up, the
//! check is judged anew when the lookup was answered, or its time is over.

use std::{
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::SystemTime,
};

use bytes::{Bytes, BytesMut};

use super::{
    decision::{Decision, Denial, Held, LookedUp, Verdict, decide},
    event::{CheckEvent, Observer},
    failures::FailureBudgets,
    later::LaterAnswer,
    question::{MalformedRequest, Question},
    request::CheckInput,
    response,
    settings::Settings,
};
use crate::{
    clock::{BootTime, Clock, LatestWall, Reading},
    key::{KeyDigest, KeyState, Timestamp},
    keyring::{Caller, Keyrings, Slot, on_demand::KeyCache},
    trace::TraceParent,
};

/// Answers checks from the keyrings that this sidecar holds.
#[derive(Clone, Debug)]
pub struct Authorizer {
    settings: Arc<Settings>,
    /// Sorted by name, to be found by a name that is text only.
    slots: Arc<[Arc<Slot>]>,
    clock: Clock,
    failures: Arc<FailureBudgets>,
    /// The latest time by which a check was judged.
    latest: LatestWall,
    observer: Arc<dyn Observer>,
}

/// When a check came, and when it is judged.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    started: SystemTime,
    began: BootTime,
    /// What windows are judged by.
    wall: Timestamp,
    /// What staleness is judged by.
    read: Reading,
}

/// What a check waits for.
pub(super) struct Missing {
    pub(super) cache: Arc<KeyCache>,
    pub(super) digest: KeyDigest,
}

impl Authorizer {
    /// A service over `keyrings` that tells `observer` of every check.
    #[must_use]
    pub fn new(
        settings: Arc<Settings>,
        keyrings: &Keyrings,
        clock: Clock,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let mut slots: Vec<Arc<Slot>> = keyrings.iter().cloned().collect();
        slots.sort_unstable_by(|one, other| one.name().cmp(other.name()));
        Self {
            failures: Arc::new(FailureBudgets::new(settings.failed_credentials())),
            settings,
            slots: slots.into(),
            clock,
            latest: LatestWall::default(),
            observer,
        }
    }

    /// Judges by `latest`, which others know, too.
    #[must_use]
    pub(crate) fn judging_by(self, latest: LatestWall) -> Self {
        Self { latest, ..self }
    }

    /// Appends the serialized `CheckResponse` to `answer` for a serialized `CheckRequest`; or leaves it as it is, and
    /// returns what to wait for, on a runtime with timers. `parent` is the span that Envoy made for the check.
    #[must_use = "a check whose key is looked up is answered later"]
    pub fn answer(
        &self,
        message: &[u8],
        parent: Option<TraceParent>,
        answer: &mut BytesMut,
    ) -> Option<LaterAnswer> {
        let moment = self.now();
        let mut looked_up = LookedUp::default();
        let missing = self.answer_by(parent, moment, answer, |answer| {
            self.judge(message, parent, moment, &looked_up, answer)
        })?;
        if let Ok(waiting) = missing.cache.look_up(missing.digest, moment.read.boot) {
            let message = Bytes::copy_from_slice(message);
            return Some(self.clone().answer_later(message, parent, moment, waiting));
        }
        looked_up.failed();
        self.answer_by(parent, moment, answer, |answer| {
            self.judge(message, parent, moment, &looked_up, answer)
        });
        None
    }

    /// Answers by `judge`, or with a denial when it panics.
    pub(super) fn answer_by(
        &self,
        parent: Option<TraceParent>,
        moment: Moment,
        answer: &mut BytesMut,
        judge: impl FnOnce(&mut BytesMut) -> Option<Missing>,
    ) -> Option<Missing> {
        let begin = answer.len();
        guarded(|| judge(answer)).unwrap_or_else(|| {
            answer.truncate(begin);
            self.refuse(Denial::internal(), None, parent, moment, answer);
            None
        })
    }

    pub(super) fn now(&self) -> Moment {
        let started = self.clock.system_time();
        let read = Reading {
            boot: self.clock.boot(),
            wall: started.into(),
        };
        Moment {
            started,
            began: read.boot,
            wall: self.latest.not_before(read.wall),
            read,
        }
    }

    pub(super) fn judge(
        &self,
        message: &[u8],
        parent: Option<TraceParent>,
        moment: Moment,
        looked_up: &LookedUp,
        answer: &mut BytesMut,
    ) -> Option<Missing> {
        let question = match Question::read(&self.settings, message) {
            Ok(question) => question,
            Err(error) => {
                self.refuse(Denial::malformed(), Some(error), parent, moment, answer);
                return None;
            }
        };
        let input = question.input();
        let parent = parent.or_else(|| {
            input
                .values("traceparent")
                .next()
                .and_then(TraceParent::parse)
        });
        let slot = question.keyring().and_then(|name| self.slot(name));
        let look = slot.map(|slot| slot.look(moment.read));
        let held = look.as_ref().map(|look| Held::new(look, looked_up));
        let verdict = decide(&question, held.as_ref(), moment.wall);
        let verdict = self.within_budget(verdict, held.as_ref(), input.source(), moment.read.boot);
        let decision = match verdict {
            Verdict::Decided(decision) => decision,
            Verdict::LookUp(digest) => {
                let cache = slot.and_then(Slot::cache).cloned();
                let cache = cache.expect("a key is looked up of a keyring that is held on demand");
                return Some(Missing { cache, digest });
            }
        };
        if let Some(slot) = slot {
            count(slot, &decision, input, moment.wall);
        }
        response::respond(&self.settings, input, &decision, parent.as_ref(), answer);
        self.tell(&decision, None, parent, moment);
        None
    }

    /// The verdict, or a denial when `source` has presented too many credentials that failed. One that is held passes all
    /// the same; only of those that are not held nobody asks the control plane any more.
    fn within_budget<'v>(
        &self,
        verdict: Verdict<'v>,
        held: Option<&Held<'v>>,
        source: Option<IpAddr>,
        now: BootTime,
    ) -> Verdict<'v> {
        let (Some(held), Some(source)) = (held, source) else {
            return verdict;
        };
        let is_too_many = match &verdict {
            Verdict::Decided(Decision::Deny(denial)) => {
                denial.reason().is_failed_credential() && !self.failures.take(source, now)
            }
            Verdict::Decided(Decision::Allow(_) | Decision::Anonymous(_)) => false,
            Verdict::LookUp(digest) => !held.holds(digest) && self.failures.is_spent(source, now),
        };
        if is_too_many {
            Verdict::Decided(Denial::too_many_failures(held).into())
        } else {
            verdict
        }
    }

    pub(super) fn refuse(
        &self,
        denial: Denial<'_>,
        malformed: Option<MalformedRequest>,
        parent: Option<TraceParent>,
        moment: Moment,
        answer: &mut BytesMut,
    ) {
        response::deny(&self.settings, &denial, parent.as_ref(), answer);
        self.tell(&denial.into(), malformed, parent, moment);
    }

    /// Tells the observer. One that fails leaves a gap in what is told, and the answer as it is.
    fn tell(
        &self,
        decision: &Decision<'_>,
        malformed: Option<MalformedRequest>,
        parent: Option<TraceParent>,
        moment: Moment,
    ) {
        let event = CheckEvent {
            decision,
            malformed,
            parent,
            started: moment.started,
            duration: self.clock.boot().saturating_since(moment.began),
        };
        let _observed = guarded(|| self.observer.observe(&event));
    }

    fn slot(&self, name: &str) -> Option<&Slot> {
        self.slots
            .binary_search_by(|slot| slot.name().as_str().cmp(name))
            .ok()
            .map(|at| self.slots[at].as_ref())
    }
}

impl Moment {
    /// This one, of a check that began earlier.
    pub(super) fn of(self, began: Self) -> Self {
        Self {
            started: began.started,
            began: began.began,
            ..self
        }
    }

    /// When the check is judged.
    pub(super) const fn judged_at(&self) -> BootTime {
        self.read.boot
    }
}

/// Counts the use of the version that was verified, whatever became of the check. Before the answer is made, so that
/// whoever has an answer has been counted.
fn count(slot: &Slot, decision: &Decision<'_>, input: &CheckInput<'_>, now: Timestamp) {
    let Some(key) = decision.key() else {
        return;
    };
    let denied = match decision {
        Decision::Allow(_) | Decision::Anonymous(_) => false,
        Decision::Deny(_) => true,
    };
    let usage = slot.usage().of(key);
    match key.state() {
        KeyState::Pending | KeyState::Active => {}
        KeyState::Retiring | KeyState::Retired | KeyState::Revoked => {
            let user_agent = input.values("user-agent").next().unwrap_or_default();
            let caller = Caller::new(input.source(), user_agent, input.host(), input.path());
            slot.usage().get(usage).note_caller(&caller, now);
        }
    }
    // Last, so that a report which has the request has its caller, too.
    slot.usage().count(usage, now, denied);
}

/// What `work` returns; none when it panics. Nothing that a check writes to outlives it, except counters.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

#[cfg(test)]
mod tests {
    use std::{sync::Mutex, time::Duration};

    use prost::Message as _;

    use super::*;
    use crate::{
        authz::{
            DenyReason, Outcome, SettingsParts,
            testing::{Message, REVISION, keyrings, parts, settings, written},
        },
        budget::Rate,
        key::{AllowedSources, KeyId, KeyRecord, Secret, Use, Window, testing},
        keyring::CallerUse,
        proto::auth::{CheckRequest, CheckResponse, check_response::HttpResponse},
    };

    const OF_ENVOY: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const OF_CALLER: &str = "00-1bf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    const NOW: Timestamp = Timestamp::from_millis(5_000);
    const SOURCE: &str = "192.0.2.1";

    /// Keeps what it is told.
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

    fn authorizer(observer: Arc<dyn Observer>) -> (Authorizer, Secret) {
        let secret = testing::secret(KeyId::generate().expect("the random source works"));
        let keyrings = keyrings(vec![testing::record_of(&secret)], true);
        let (clock, _) = Clock::manual(NOW);
        let settings = Arc::new(settings());
        (
            Authorizer::new(settings, &keyrings, clock, observer),
            secret,
        )
    }

    fn told(recorder: &Recorder) -> Vec<(Outcome, Option<TraceParent>)> {
        recorder.0.lock().expect("no test panics here").clone()
    }

    fn answer(authorizer: &Authorizer, request: &CheckRequest) -> CheckResponse {
        written(|answer| {
            let later = authorizer.answer(&request.encode_to_vec(), None, answer);
            assert!(later.is_none(), "the keyring is held in full");
        })
    }

    fn code(response: &CheckResponse) -> Option<i32> {
        response.status.as_ref().map(|status| status.code)
    }

    #[test]
    fn a_check_is_answered_and_told_of() {
        let recorder = Arc::new(Recorder::default());
        let (authorizer, secret) = authorizer(recorder.clone());
        let message = Message::get("/").header("traceparent", OF_CALLER);
        let message = message.header("x-api-key", secret.expose().to_owned());
        assert_eq!(code(&answer(&authorizer, &message.joined())), Some(0));

        let of_envoy = TraceParent::parse(OF_ENVOY.as_bytes());
        let message = message.raw().encode_to_vec();
        written(|answer| assert!(authorizer.answer(&message, of_envoy, answer).is_none()));

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
    fn a_panic_becomes_a_denial_that_is_told_of() {
        let recorder = Arc::new(Recorder::default());
        let (authorizer, _) = authorizer(recorder.clone());
        let answer = written(|answer| {
            let moment = authorizer.now();
            authorizer.answer_by(None, moment, answer, |answer| {
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
        let (authorizer, secret) = authorizer(Arc::new(Failing));
        let message = Message::get("/").header("x-api-key", secret.expose().to_owned());
        assert_eq!(code(&answer(&authorizer, &message.joined())), Some(0));
        assert_eq!(
            code(&answer(&authorizer, &Message::get("/").joined())),
            Some(16)
        );
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
        let authorizer = Authorizer::new(settings, &keyrings, clock, recorder.clone());
        let unknown = testing::secret(KeyId::generate().expect("the random source works"));
        let check = |source: &'static str, key: &str| {
            let message = Message::get("/").from(source);
            let message = message.header("x-api-key", key.to_owned());
            answer(&authorizer, &message.joined());
        };
        check(SOURCE, unknown.expose());
        check(SOURCE, "typo");
        check(SOURCE, unknown.expose());
        check(SOURCE, "typo");
        check(SOURCE, secret.expose());
        // Nobody is charged who is not known.
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

    /// What was counted of the one version of the keyring.
    fn counted(authorizer: &Authorizer) -> Vec<Use> {
        let slot = authorizer.slot("payments").expect("it is held");
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
        let authorizer = Authorizer::new(Arc::new(settings()), &keyrings, clock, observer);
        let message = Message::get("/").header("x-api-key", secret.expose().to_owned());
        let now = || code(&answer(&authorizer, &message.joined()));
        assert_eq!(now(), Some(0));
        hands.set_wall(NOW.saturating_add(life));
        assert_eq!(now(), Some(16));
        hands.set_wall(NOW);
        assert_eq!(now(), Some(16), "it was revived");
    }

    fn authorizer_of(record: KeyRecord, observer: Arc<dyn Observer>) -> Authorizer {
        let keyrings = keyrings(vec![record], true);
        let (clock, _) = Clock::manual(NOW);
        Authorizer::new(Arc::new(settings()), &keyrings, clock, observer)
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
            let authorizer = authorizer_of(record.clone(), Arc::new(Failing));
            let answer = answer(&authorizer, &message.joined());
            assert_eq!(code(&answer) != Some(0), denied == 1);
            let expected = Use {
                requests: 1,
                denied,
                first_used: Some(NOW),
                last_used: Some(NOW),
            };
            assert_eq!(counted(&authorizer), [expected], "{:?}", record.state);
        }
    }

    #[test]
    fn a_key_that_was_not_verified_is_not_counted() {
        let (authorizer, secret) = authorizer(Arc::new(Recorder::default()));
        let other = testing::secret(KeyId::generate().expect("the random source works"));
        let key = |message: Message, secret: &Secret| {
            message.header("x-api-key", secret.expose().to_owned())
        };
        let elsewhere = Message::get("/").extension("relatch.keyring", "empty");
        for message in [
            Message::get("/"),
            Message::get("/").header("x-api-key", "K"),
            key(Message::get("/"), &other),
            key(elsewhere, &secret),
            key(key(Message::get("/"), &secret), &other),
        ] {
            assert_ne!(code(&answer(&authorizer, &message.raw())), Some(0));
            assert_eq!(counted(&authorizer), []);
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
            let authorizer = authorizer_of(record, Arc::new(Recorder::default()));
            let _answer = answer(&authorizer, &message.joined());
            let slot = authorizer.slot("payments").expect("it is held");
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
    fn every_keyring_is_found_by_its_name_and_no_other() {
        let (authorizer, _) = authorizer(Arc::new(Recorder::default()));
        for name in ["payments", "empty"] {
            let slot = authorizer.slot(name).expect("it is held");
            assert_eq!(slot.name().as_str(), name);
        }
        for name in ["", "payment", "Payments", "zzz"] {
            assert!(authorizer.slot(name).is_none(), "{name:?} was found");
        }
        let payments = authorizer.slot("payments").expect("it is held").load();
        let revision = payments.as_ref().map(|view| view.revision());
        assert_eq!(revision, Some(REVISION));
    }
}
