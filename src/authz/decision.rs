//! The decision: a pure function of a question, a keyring at a moment, and the time.
//!
//! The first that applies wins: the request is malformed; no keyring; none usable; ambiguous or missing credential;
//! not a token of the keyring; not found; revoked, retired, expired, not yet valid; source; scopes. Else it is allowed.

use std::{sync::Arc, time::Duration};

use super::{credential::Places, question::Question, reason::DenyReason, settings::Auth};
use crate::{
    clock::BootTime,
    key::{KeyRecord, KeyState, KeyringName, Revision, Standing, Timestamp},
    keyring::{Freshness, KeyringView, Slot},
};

/// What becomes of a request.
#[derive(Clone, Debug)]
pub enum Decision {
    /// It passes, with the identity of the caller.
    Allow(Grant),
    /// It passes without one: the route does not need it, and there was no credential.
    Anonymous(Anonymous),
    /// It does not pass.
    Deny(Denial),
}

/// The right to pass with an identity. Only [`decide`] makes one.
#[derive(Clone, Debug)]
pub struct Grant {
    keyring: KeyringFacts,
    record: Arc<KeyRecord>,
    places: Places,
    notice: Option<Notice>,
}

/// The right to pass without an identity. Only [`decide`] makes one.
#[derive(Clone, Debug)]
pub struct Anonymous {
    keyring: KeyringFacts,
}

/// Why a request does not pass.
#[derive(Clone, Debug)]
pub struct Denial {
    reason: DenyReason,
    keyring: Option<KeyringFacts>,
    /// Only once the key was verified: it was found, so that its holder had all of it.
    record: Option<Arc<KeyRecord>>,
    /// What the route demands, for [`DenyReason::InsufficientScope`].
    scopes: Option<String>,
}

/// What the decision was based on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyringFacts {
    /// The keyring.
    pub name: KeyringName,
    /// The revision of its view; none before the first one.
    pub revision: Option<Revision>,
    /// The time since the control plane confirmed it; none when it never has.
    pub age: Option<Duration>,
}

/// What a consumer is told that used a retiring version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// From when on the version is not accepted any more; none while nothing ends it.
    pub sunset: Option<Timestamp>,
    /// A page that helps.
    pub help_url: Option<String>,
}

/// A decision without its facts: what is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// [`Decision::Allow`]
    Allowed,
    /// [`Decision::Anonymous`]
    Anonymous,
    /// [`Decision::Deny`]
    Denied(DenyReason),
}

/// A keyring as one check sees it: its view, loaded once, and its age at the same moment.
#[derive(Clone, Copy, Debug)]
pub struct Held<'v> {
    slot: &'v Slot,
    view: Option<&'v KeyringView>,
    age: Option<Duration>,
}

impl<'v> Held<'v> {
    /// A slot with the view that was loaded from it.
    #[must_use]
    pub fn new(slot: &'v Slot, view: Option<&'v KeyringView>, now: BootTime) -> Self {
        Self {
            slot,
            view,
            age: slot.age(now),
        }
    }

    /// The view, if it may be used.
    fn usable(&self) -> Result<&'v KeyringView, DenyReason> {
        let (Some(view), Some(age)) = (self.view, self.age) else {
            return Err(DenyReason::KeyringUnavailable);
        };
        match self.slot.freshness(age) {
            Freshness::Fresh | Freshness::Warned => Ok(view),
            Freshness::Stale => Err(DenyReason::KeyringStale),
        }
    }

    fn facts(&self) -> KeyringFacts {
        KeyringFacts {
            name: self.slot.name().clone(),
            revision: self.view.map(KeyringView::revision),
            age: self.age,
        }
    }
}

/// Judges a question by the wall clock's `now`. `held` is the keyring that the question names; none when this sidecar
/// does not hold it.
#[must_use]
pub fn decide(question: &Question<'_>, held: Option<&Held<'_>>, now: Timestamp) -> Decision {
    let Some(held) = held else {
        return Denial::unread(DenyReason::UnknownKeyring).into();
    };
    match judge(question, held, now) {
        Ok(Some(verified)) => Decision::Allow(Grant {
            keyring: held.facts(),
            notice: Notice::of(&verified.record, verified.view),
            record: verified.record,
            places: verified.places,
        }),
        Ok(None) => Decision::Anonymous(Anonymous {
            keyring: held.facts(),
        }),
        Err((reason, record)) => Decision::Deny(Denial {
            reason,
            keyring: Some(held.facts()),
            record,
            scopes: (reason == DenyReason::InsufficientScope)
                .then(|| question.route.scopes.to_string()),
        }),
    }
}

/// A key that may pass.
struct Verified<'v> {
    view: &'v KeyringView,
    record: Arc<KeyRecord>,
    places: Places,
}

/// Why not, and whose key it was if that is known for certain.
type Refusal = (DenyReason, Option<Arc<KeyRecord>>);

fn judge<'v>(
    question: &Question<'_>,
    held: &Held<'v>,
    now: Timestamp,
) -> Result<Option<Verified<'v>>, Refusal> {
    let unverified = |reason| (reason, None);
    let view = held.usable().map_err(unverified)?;
    let credential = match (&question.credential, question.route.auth) {
        (Err(_), _) => return Err(unverified(DenyReason::AmbiguousCredential)),
        (Ok(Some(credential)), _) => credential,
        (Ok(None), Auth::Required) => return Err(unverified(DenyReason::MissingCredential)),
        (Ok(None), Auth::Optional) => return Ok(None),
    };
    let key = credential
        .key()
        .map_err(|_| unverified(DenyReason::MalformedCredential))?;
    let settings = view.settings();
    if settings.issued_only && key.parse(&settings.prefix).is_err() {
        return Err(unverified(DenyReason::MalformedCredential));
    }
    let record = view
        .find(&key)
        .ok_or_else(|| unverified(DenyReason::UnknownKey))?;
    match refuse(question, record, now) {
        Some(reason) => Err((reason, Some(Arc::clone(record)))),
        None => Ok(Some(Verified {
            view,
            record: Arc::clone(record),
            places: credential.places(),
        })),
    }
}

/// Why a key that was found may not pass.
fn refuse(question: &Question<'_>, record: &KeyRecord, now: Timestamp) -> Option<DenyReason> {
    match record.standing(now) {
        Standing::Revoked => Some(DenyReason::Revoked),
        Standing::Retired => Some(DenyReason::Retired),
        Standing::Expired => Some(DenyReason::Expired),
        Standing::NotYetValid => Some(DenyReason::NotYetValid),
        Standing::Accepted if !record.allowed_sources.permit(question.input.source()) => {
            Some(DenyReason::SourceNotAllowed)
        }
        Standing::Accepted if !question.route.scopes.are_held_by(&record.scopes) => {
            Some(DenyReason::InsufficientScope)
        }
        Standing::Accepted => None,
    }
}

impl Decision {
    /// What is counted.
    #[must_use]
    pub const fn outcome(&self) -> Outcome {
        match self {
            Self::Allow(_) => Outcome::Allowed,
            Self::Anonymous(_) => Outcome::Anonymous,
            Self::Deny(denial) => Outcome::Denied(denial.reason),
        }
    }

    /// What it was based on; none when no keyring was asked.
    #[must_use]
    pub const fn keyring(&self) -> Option<&KeyringFacts> {
        match self {
            Self::Allow(grant) => Some(&grant.keyring),
            Self::Anonymous(anonymous) => Some(&anonymous.keyring),
            Self::Deny(denial) => denial.keyring.as_ref(),
        }
    }

    /// The version that was used; none unless it was verified.
    #[must_use]
    pub const fn record(&self) -> Option<&Arc<KeyRecord>> {
        match self {
            Self::Allow(grant) => Some(&grant.record),
            Self::Anonymous(_) => None,
            Self::Deny(denial) => denial.record.as_ref(),
        }
    }
}

impl From<Denial> for Decision {
    fn from(denial: Denial) -> Self {
        Self::Deny(denial)
    }
}

impl Outcome {
    /// `allow` or `deny`.
    #[must_use]
    pub const fn decision(self) -> &'static str {
        match self {
            Self::Allowed | Self::Anonymous => "allow",
            Self::Denied(_) => "deny",
        }
    }

    /// The reason of a denial; `ok` or `anonymous` for an allow.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Allowed => "ok",
            Self::Anonymous => "anonymous",
            Self::Denied(reason) => reason.as_str(),
        }
    }
}

impl Grant {
    /// The keyring that holds it.
    #[must_use]
    pub const fn keyring(&self) -> &KeyringFacts {
        &self.keyring
    }

    /// The version that was used.
    #[must_use]
    pub const fn record(&self) -> &Arc<KeyRecord> {
        &self.record
    }

    /// Where the credential was.
    #[must_use]
    pub const fn places(&self) -> Places {
        self.places
    }

    /// What to tell the consumer.
    #[must_use]
    pub const fn notice(&self) -> Option<&Notice> {
        self.notice.as_ref()
    }
}

impl Anonymous {
    /// The keyring that would have been asked.
    #[must_use]
    pub const fn keyring(&self) -> &KeyringFacts {
        &self.keyring
    }
}

impl Denial {
    /// A denial before a keyring was asked.
    const fn unread(reason: DenyReason) -> Self {
        Self {
            reason,
            keyring: None,
            record: None,
            scopes: None,
        }
    }

    /// A denial for tests of what is made of one.
    #[cfg(test)]
    pub(crate) fn of(reason: DenyReason, record: Option<KeyRecord>) -> Self {
        Self {
            keyring: Some(KeyringFacts {
                name: crate::key::testing::keyring_name(),
                revision: Some(Revision::new(7)),
                age: Some(Duration::from_millis(1500)),
            }),
            record: record.map(Arc::new),
            scopes: (reason == DenyReason::InsufficientScope).then(|| "read write".to_owned()),
            ..Self::unread(reason)
        }
    }

    /// The denial of a request that cannot be understood.
    #[must_use]
    pub const fn malformed() -> Self {
        Self::unread(DenyReason::MalformedRequest)
    }

    /// The denial after a fault of ours.
    #[must_use]
    pub const fn internal() -> Self {
        Self::unread(DenyReason::InternalError)
    }

    /// The reason.
    #[must_use]
    pub const fn reason(&self) -> DenyReason {
        self.reason
    }

    /// The keyring that was asked.
    #[must_use]
    pub const fn keyring(&self) -> Option<&KeyringFacts> {
        self.keyring.as_ref()
    }

    /// The version that was used; none unless it was verified.
    #[must_use]
    pub const fn record(&self) -> Option<&Arc<KeyRecord>> {
        self.record.as_ref()
    }

    /// What the route demands, when that was missing.
    #[must_use]
    pub fn scopes(&self) -> Option<&str> {
        self.scopes.as_deref()
    }
}

impl Notice {
    fn of(record: &KeyRecord, view: &KeyringView) -> Option<Self> {
        match record.state {
            KeyState::Retiring => Some(Self {
                sunset: [record.retires_at, record.window.expires_at]
                    .into_iter()
                    .flatten()
                    .min(),
                help_url: view.settings().help_url.clone(),
            }),
            KeyState::Pending | KeyState::Active | KeyState::Retired | KeyState::Revoked => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        authz::{
            settings::{Settings, SettingsParts},
            testing::{CONFIRMED_AT, DENY_AFTER, Message, REVISION, judge, keyrings, parts},
        },
        key::{AllowedSources, KeyId, Secret, Window, testing},
    };

    /// A sidecar with one key, at a moment.
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

        fn judge(&self, message: &Message) -> Decision {
            let settings = Settings::new(self.settings.clone()).expect("valid settings");
            let keyrings = keyrings(vec![self.record.clone()], self.issued_only);
            let [joined, raw] = [message.joined(), message.raw()]
                .map(|request| judge(&settings, &keyrings, &request, self.now, self.boot).0);
            assert_eq!(joined.outcome(), raw.outcome());
            joined
        }

        fn outcome(&self) -> Outcome {
            self.judge(&self.request()).outcome()
        }
    }

    /// Everything that is wrong with a request to [`all_wrong`], in the order of the decision.
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

    /// What becomes of a request with these wrongs; none when they cannot be together.
    fn decision_with(wrongs: &[Wrong]) -> Option<Decision> {
        use Wrong::{
            Ambiguous, Expired, Format, Malformed, Missing, NoKeyring, NotYet, Retired, Revoked,
            Scope, Source, Stale, Unavailable, Unknown,
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
            message = message.header("cookie", "api_key=a b");
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
        decision_with(wrongs).map(|decision| decision.outcome())
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
    fn retiring_version_is_accepted_until_its_deadline_and_announced() {
        let mut sidecar = Sidecar::with(|record| {
            record.state = KeyState::Retiring;
            record.retires_at = Some(at(200));
            record.window.expires_at = Some(at(300));
        });
        for (now, outcome) in [
            (199, Outcome::Allowed),
            (200, Outcome::Denied(DenyReason::Retired)),
            (300, Outcome::Denied(DenyReason::Expired)),
        ] {
            sidecar.now = at(now);
            assert_eq!(sidecar.outcome(), outcome, "at {now}");
        }
        sidecar.now = at(199);
        let Decision::Allow(grant) = sidecar.judge(&sidecar.request()) else {
            panic!("not allowed");
        };
        assert_eq!(
            grant.notice().and_then(|notice| notice.sunset),
            Some(at(200))
        );
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
        let confirmed = keyrings(vec![sidecar.record.clone()], true);
        let view = confirmed
            .get(&testing::keyring_name())
            .expect("it was made")
            .load();
        let staleness = crate::keyring::Staleness {
            warn_after: DENY_AFTER,
            deny_after: DENY_AFTER,
        };
        let unconfirmed = crate::keyring::Keyrings::new([(testing::keyring_name(), staleness)]);
        let slot = unconfirmed
            .get(&testing::keyring_name())
            .expect("it was made");
        let held = Held::new(slot, view.as_deref(), sidecar.boot);
        let request = sidecar.request().raw();
        let question = Question::read(&settings, &request).expect("a question");
        let decision = decide(&question, Some(&held), sidecar.now);
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
            sidecar.judge(&message).outcome()
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
            sidecar.judge(&message).outcome()
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
            let decision = decision_with(&[wrong]).expect("one wrong is possible");
            let is_verified = wrong >= Wrong::Revoked;
            assert_eq!(decision.record().is_some(), is_verified, "{wrong:?}");
        }
    }

    #[test]
    fn a_decision_tells_what_it_was_based_on() {
        for (wrong, revision) in [
            (Wrong::Malformed, None),
            (Wrong::NoKeyring, None),
            (Wrong::Unavailable, Some(None)),
            (Wrong::Unknown, Some(Some(REVISION))),
        ] {
            let decision = decision_with(&[wrong]).expect("one wrong is possible");
            let found = decision.keyring().map(|keyring| keyring.revision);
            assert_eq!(found, revision, "{wrong:?}");
        }
    }
}
