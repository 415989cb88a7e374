//! Judges checks from the keyrings in memory, without waiting.

use std::{
    borrow::Cow,
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;

use super::{
    all_settings::AllSettings,
    basis::{Basis, CurrentBasis, LoadedBasis},
    check::{Arrival, Check, Metadata, Moment},
    decision::{Decision, Denial, HeldKeyring, LookedUp, Verdict, decide},
    event::{CheckEvent, Observer},
    failures::FailureBudgets,
    question::{Question, QuestionError},
    request::CheckInput,
    response::{self, About, Form},
};
use crate::{
    clock::{BootTime, Clock, LatestWall, Reading},
    key::{KeyDigest, KeyState, Timestamp},
    keyring::{
        Caller, Keyrings, Slot,
        on_demand::{KeyCache, LookupRefusal, Waiting},
    },
    trace::TraceParent,
};

/// The shared state by which checks are judged.
#[derive(Clone, Debug)]
pub(super) struct Judge {
    basis: Arc<CurrentBasis>,
    /// The profile whose settings apply; none for those of Envoy.
    profile: Option<usize>,
    clock: Clock,
    /// The latest wall-clock time by which validity was judged.
    latest: LatestWall,
    observer: Arc<dyn Observer>,
}

/// A version that a check needs before it can be judged, and that the sidecar has to look up by its
/// digest.
pub(super) struct Missing {
    cache: Arc<KeyCache>,
    digest: KeyDigest,
}

impl Missing {
    /// Starts a lookup at the control plane, or joins one for the same digest.
    ///
    /// # Errors
    ///
    /// When the check must not wait; see [`LookupRefusal`].
    pub(super) fn look_up(self, moment: Moment) -> Result<Waiting, LookupRefusal> {
        self.cache.look_up(self.digest, moment.read.boot)
    }
}

impl Judge {
    pub(super) fn new(
        settings: impl Into<AllSettings>,
        keyrings: &Keyrings,
        clock: Clock,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self {
            basis: CurrentBasis::of(settings.into(), keyrings),
            profile: None,
            clock,
            latest: LatestWall::default(),
            observer,
        }
    }

    /// Replaces the latest time by which validity is judged. `latest` is shared with other parts of
    /// the process.
    pub(super) fn judging_by(self, latest: LatestWall) -> Self {
        Self { latest, ..self }
    }

    /// Returns a judge of the same keyrings by the settings of a profile. Both charge the same budgets
    /// of failed credentials.
    pub(super) fn of_profile(&self, profile: usize) -> Self {
        Self {
            profile: Some(profile),
            ..self.clone()
        }
    }

    /// Returns the basis of a check that begins now.
    pub(super) fn load(&self) -> LoadedBasis {
        self.basis.load()
    }

    /// Returns the profile whose settings apply; none for those of Envoy.
    pub(super) const fn profile(&self) -> Option<usize> {
        self.profile
    }

    /// Changes the settings together with the next change of the keyrings.
    pub(super) fn settle(&self, settings: AllSettings) {
        self.basis.settle(settings);
    }

    /// Creates a check that arrives now.
    #[cfg(test)]
    pub(super) fn begin<'a>(&self, message: &'a [u8], metadata: Metadata) -> Check<'a> {
        self.begin_by(self.load(), message, metadata)
    }

    /// Creates a check that arrives now, and that is judged by `basis`.
    pub(super) fn begin_by<'a>(
        &self,
        basis: LoadedBasis,
        message: &'a [u8],
        metadata: Metadata,
    ) -> Check<'a> {
        let started = self.clock.system_time();
        let moment = self.moment(started.into());
        let arrival = Arrival {
            started,
            began: moment.read.boot,
        };
        Check {
            message: Cow::Borrowed(message),
            metadata,
            basis,
            arrival,
            moment,
            looked_up: LookedUp::default(),
        }
    }

    /// Returns the current moment, at which a check is judged again.
    pub(super) fn now(&self) -> Moment {
        self.moment(self.clock.system_time().into())
    }

    fn moment(&self, wall: Timestamp) -> Moment {
        let read = Reading {
            boot: self.clock.boot(),
            wall,
        };
        Moment {
            wall: self.latest.not_before(wall),
            read,
        }
    }

    /// Appends the serialized `CheckResponse` to `answer`. If a version is missing, `answer` stays
    /// unchanged, and the missing version is returned. A panic becomes a denial.
    pub(super) fn answer(&self, check: &Check<'_>, answer: &mut BytesMut) -> Option<Missing> {
        self.answer_by(check, answer, |answer| self.judge(check, answer))
    }

    fn answer_by(
        &self,
        check: &Check<'_>,
        answer: &mut BytesMut,
        judge: impl FnOnce(&mut BytesMut) -> Option<Missing>,
    ) -> Option<Missing> {
        let begin = answer.len();
        guarded(|| judge(answer)).unwrap_or_else(|| {
            answer.truncate(begin);
            self.deny_internal(check, answer);
            None
        })
    }

    /// Denies a check that could not be judged, after a panic or a broken invariant.
    pub(super) fn deny_internal(&self, check: &Check<'_>, answer: &mut BytesMut) {
        self.refuse(check, Denial::internal(), None, answer);
    }

    /// Denies a check whose request cannot be read.
    pub(super) fn deny_unread(
        &self,
        check: &Check<'_>,
        error: QuestionError,
        answer: &mut BytesMut,
    ) {
        self.refuse(check, Denial::unread(error.reason()), Some(error), answer);
    }

    fn judge(&self, check: &Check<'_>, answer: &mut BytesMut) -> Option<Missing> {
        let basis: &Basis = &check.basis;
        let settings = basis.settings.of(self.profile);
        let question = match Question::read(settings, &check.message) {
            Ok(question) => question,
            Err(error) => {
                self.deny_unread(check, error, answer);
                return None;
            }
        };
        let (input, client, moment) = (question.input(), question.client(), check.moment);
        let slot = question.keyring().and_then(|name| basis.slot(name));
        let look = slot.map(|slot| slot.look(moment.read));
        let held = look
            .as_ref()
            .map(|look| HeldKeyring::new(look, &check.looked_up));
        let verdict = decide(&question, held.as_ref(), moment.wall);
        let charged = client.charged();
        let failures = basis.failures.of(question.route().enforcement);
        let verdict = failures.within(verdict, held.as_ref(), charged, moment.read.boot);
        let decision = match verdict {
            Verdict::Decided(decision) => decision.enforced(&question),
            Verdict::LookUp(digest) => {
                let cache = slot.and_then(Slot::cache).cloned();
                let cache = cache.expect("a key is looked up of a keyring that is held on demand");
                return Some(Missing { cache, digest });
            }
        };
        if let Some(slot) = slot {
            count(slot, &decision, &question, moment.wall);
        }
        let parent = check.metadata.parent.or_else(|| parent_of(input));
        response::respond(settings, &question, &decision, parent.as_ref(), answer);
        let event = CheckEvent {
            decision: &decision,
            dialect: settings.dialect(),
            slot,
            client: Some(client),
            error: question.error(),
            parent,
            started: check.arrival.started,
            duration: self.duration(check),
        };
        self.report(&event);
        None
    }

    /// Denies a check without a keyring.
    fn refuse(
        &self,
        check: &Check<'_>,
        denial: Denial<'_>,
        error: Option<QuestionError>,
        answer: &mut BytesMut,
    ) {
        let settings = check.basis.settings.of(self.profile);
        let form = Form::of_message(settings, &check.message);
        let parent = check.metadata.parent;
        let about = About::unread(settings, parent.as_ref());
        response::deny(settings, &denial, form, &about, answer);
        self.report(&CheckEvent {
            decision: &denial.into(),
            dialect: settings.dialect(),
            slot: None,
            client: None,
            error,
            parent,
            started: check.arrival.started,
            duration: self.duration(check),
        });
    }

    /// Reports a check to the observer. If the observer panics, its report is lost, and the answer
    /// does not change.
    fn report(&self, event: &CheckEvent<'_>) {
        let _observed = guarded(|| self.observer.observe(event));
    }

    fn duration(&self, check: &Check<'_>) -> Duration {
        self.clock.boot().saturating_since(check.arrival.began)
    }
}

impl FailureBudgets {
    /// Returns the verdict, or a denial if `source` has presented too many failed credentials. A
    /// key in memory still passes. Other keys of this source are not looked up while its budget is
    /// spent.
    fn within<'v>(
        &self,
        verdict: Verdict<'v>,
        held: Option<&HeldKeyring<'v>>,
        source: Option<IpAddr>,
        now: BootTime,
    ) -> Verdict<'v> {
        let (Some(held), Some(source)) = (held, source) else {
            return verdict;
        };
        let is_too_many = match &verdict {
            Verdict::Decided(Decision::Deny(denial)) => {
                denial.reason().is_failed_credential() && !self.take(source, now)
            }
            Verdict::Decided(
                Decision::Allow(_)
                | Decision::Anonymous(_)
                | Decision::Preflight(_)
                | Decision::WouldDeny(_),
            ) => false,
            Verdict::LookUp(digest) => !held.holds(digest) && self.is_spent(source, now),
        };
        if is_too_many {
            Verdict::Decided(Denial::too_many_failures(held).into())
        } else {
            verdict
        }
    }
}

/// Returns the span of the caller, from the request's headers.
fn parent_of(input: &CheckInput<'_>) -> Option<TraceParent> {
    TraceParent::parse(input.values("traceparent").next()?)
}

/// Counts the use of the version that was found, whether the check is allowed or denied. This
/// happens before the answer is written, so that every answered check is counted.
fn count(slot: &Slot, decision: &Decision<'_>, question: &Question<'_>, now: Timestamp) {
    let Some(key) = decision.key() else {
        return;
    };
    let denied = decision.outcome().denial().is_some();
    let usage = slot.usage().of(key);
    match key.state() {
        KeyState::Pending | KeyState::Active => {}
        KeyState::Retiring | KeyState::Retired | KeyState::Revoked => {
            let (input, client) = (question.input(), question.client());
            let user_agent = input.values("user-agent").next().unwrap_or_default();
            let caller = Caller::new(client.address(), user_agent, input.host(), input.path());
            slot.usage().get(usage).note_caller(&caller, now);
        }
    }
    // Count last, so that a report that includes this request also includes its caller.
    slot.usage().count(usage, now, denied);
}

/// Runs `work`; none if it panics. A check changes no state that outlives it except counters.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

#[cfg(test)]
mod tests;
