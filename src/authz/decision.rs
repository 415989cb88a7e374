//! The decision: a pure function of a question, a keyring at a moment, and the time.
//!
//! The first that applies wins: the request is malformed; no keyring; none usable; ambiguous or missing credential;
//! not a token of the keyring; not found; revoked, retired, expired, not yet valid; source; scopes. Else it is allowed.

use std::{cell::OnceCell, sync::Arc, time::Duration};

use super::{
    credential::Places, question::Question, reason::DenyReason, route::RequiredScopes,
    settings::Auth,
};
use crate::{
    key::{KeyDigest, KeyState, KeyringName, PresentedKey, Revision, Standing, Timestamp},
    keyring::{
        HeldKey, KeyringView, Look,
        on_demand::{CachedKey, Finding},
    },
};

/// What comes of judging a question.
#[derive(Clone, Debug)]
pub(crate) enum Verdict<'v> {
    /// What becomes of the request.
    Decided(Decision<'v>),
    /// The keyring is held on demand, and the key with this digest has to be looked up first, or again.
    LookUp(KeyDigest),
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub(crate) enum Decision<'v> {
    /// It passes, with the identity of the caller.
    Allow(Grant<'v>),
    /// It passes without one: the route does not need it, and there was no credential.
    Anonymous(Anonymous<'v>),
    /// It does not pass.
    Deny(Denial<'v>),
}

/// The right to pass with an identity. Only [`decide`] makes one.
#[derive(Clone, Debug)]
pub(crate) struct Grant<'v> {
    keyring: KeyringFacts<'v>,
    key: HeldKey<'v>,
    places: Places,
    notice: Option<Notice<'v>>,
}

/// The right to pass without an identity. Only [`decide`] makes one.
#[derive(Clone, Debug)]
pub(crate) struct Anonymous<'v> {
    keyring: KeyringFacts<'v>,
}

/// Why a request does not pass.
#[derive(Clone, Debug)]
pub(crate) struct Denial<'v> {
    reason: DenyReason,
    keyring: Option<KeyringFacts<'v>>,
    /// Only once the key was verified: it was found, so that its holder had all of it.
    key: Option<HeldKey<'v>>,
    /// What the route demands, for [`DenyReason::InsufficientScope`].
    scopes: Option<RequiredScopes<'v>>,
}

/// What the decision was based on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyringFacts<'v> {
    /// The keyring.
    pub(crate) name: &'v KeyringName,
    /// The revision of its view; none before the first one.
    pub(crate) revision: Option<Revision>,
    /// The time since the control plane confirmed it; none when it never has.
    pub(crate) age: Option<Duration>,
}

/// What a consumer is told that used a retiring version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Notice<'v> {
    /// Since when the version should not be used any more; none where the control plane does not say.
    pub(crate) since: Option<Timestamp>,
    /// The announced end of the version: its deadline, or its expiry if that is earlier.
    pub(crate) sunset: Option<Timestamp>,
    /// A page that helps.
    pub(crate) help_url: Option<&'v str>,
}

/// A decision without its facts: what is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// [`Decision::Allow`]
    Allowed,
    /// [`Decision::Anonymous`]
    Anonymous,
    /// [`Decision::Deny`]
    Denied(DenyReason),
}

/// A keyring as one check sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held<'v> {
    look: &'v Look<'v>,
    looked_up: &'v LookedUp,
}

/// What a check has of a keyring that is held on demand, for as long as its decision borrows it.
#[derive(Debug, Default)]
pub(crate) struct LookedUp {
    /// The version of the key.
    version: OnceCell<Arc<CachedKey>>,
    /// Digests that nobody has.
    unknown: Vec<KeyDigest>,
    /// The check does not wait for a lookup (any more).
    has_failed: bool,
}

impl<'v> Held<'v> {
    /// What a check saw of a keyring, and what it has looked up.
    #[must_use]
    pub(crate) const fn new(look: &'v Look<'v>, looked_up: &'v LookedUp) -> Self {
        Self { look, looked_up }
    }

    /// The view, if it may be used.
    fn usable(&self) -> Result<&'v KeyringView, DenyReason> {
        let (Some(view), Some(_)) = (self.look.view(), self.look.age()) else {
            return Err(DenyReason::KeyringUnavailable);
        };
        if self.look.is_stale() {
            Err(DenyReason::KeyringStale)
        } else {
            Ok(view)
        }
    }

    /// The version whose secret a presented key is.
    fn find(
        &self,
        view: &'v KeyringView,
        presented: &PresentedKey<'_>,
    ) -> Result<HeldKey<'v>, Unfound> {
        let Some(cache) = self.look.slot().cache() else {
            return view.find(presented).ok_or(Unfound::Unknown);
        };
        let LookedUp {
            version,
            unknown,
            has_failed,
        } = self.looked_up;
        if let Some(cached) = version.get() {
            return Ok(cached.key().held());
        }
        let now = self.look.now().boot;
        match cache.find(&view.settings().peppers, presented, unknown, now) {
            Finding::Held(cached) => Ok(version.get_or_init(|| cached).key().held()),
            Finding::Ended(cached, _) if *has_failed => {
                Ok(version.get_or_init(|| cached).key().held())
            }
            Finding::Unknown => Err(Unfound::Unknown),
            Finding::Missing(_) if *has_failed => Err(Unfound::Unavailable),
            Finding::Ended(_, digest) | Finding::Missing(digest) => Err(Unfound::Missing(digest)),
        }
    }

    /// Whether a keyring that is held on demand holds a version under a digest, also one that is to be looked up again.
    pub(super) fn holds(&self, digest: &KeyDigest) -> bool {
        let cache = self.look.slot().cache();
        cache.is_some_and(|cache| cache.holds(digest))
    }

    fn facts(&self) -> KeyringFacts<'v> {
        KeyringFacts {
            name: self.look.slot().name(),
            revision: self.look.view().map(KeyringView::revision),
            age: self.look.age(),
        }
    }
}

/// Judges a question by the wall clock's `now`. `held` is the keyring that the question names; none when this sidecar
/// does not hold it.
#[must_use]
pub(crate) fn decide<'v>(
    question: &Question<'v>,
    held: Option<&Held<'v>>,
    now: Timestamp,
) -> Verdict<'v> {
    let Some(held) = held else {
        return Verdict::Decided(Denial::unread(DenyReason::UnknownKeyring).into());
    };
    Verdict::Decided(match judge(question, held, now) {
        Ok(Some(verified)) => Decision::Allow(Grant {
            keyring: held.facts(),
            notice: Notice::of(&verified.key, verified.view),
            key: verified.key,
            places: verified.places,
        }),
        Ok(None) => Decision::Anonymous(Anonymous {
            keyring: held.facts(),
        }),
        Err(Refusal::Denied(reason, key)) => Decision::Deny(Denial {
            reason,
            keyring: Some(held.facts()),
            key,
            scopes: (reason == DenyReason::InsufficientScope).then_some(question.route.scopes),
        }),
        Err(Refusal::Missing(digest)) => return Verdict::LookUp(digest),
    })
}

/// A key that may pass.
struct Verified<'v> {
    view: &'v KeyringView,
    key: HeldKey<'v>,
    places: Places,
}

/// Why not (yet).
enum Refusal<'v> {
    /// And whose key it was if that is known for certain.
    Denied(DenyReason, Option<HeldKey<'v>>),
    /// The key has to be looked up.
    Missing(KeyDigest),
}

/// There is no version to judge.
enum Unfound {
    Unknown,
    Unavailable,
    Missing(KeyDigest),
}

fn judge<'v>(
    question: &Question<'_>,
    held: &Held<'v>,
    now: Timestamp,
) -> Result<Option<Verified<'v>>, Refusal<'v>> {
    let unverified = |reason| Refusal::Denied(reason, None);
    let view = held.usable().map_err(unverified)?;
    let credential = match (&question.credential, question.route.auth) {
        (Err(_), _) => return Err(unverified(DenyReason::AmbiguousCredential)),
        (Ok(Some(credential)), _) => credential,
        (Ok(None), Auth::Required) => return Err(unverified(DenyReason::MissingCredential)),
        (Ok(None), Auth::Optional) => return Ok(None),
    };
    let presented = credential
        .key()
        .map_err(|_| unverified(DenyReason::MalformedCredential))?;
    let settings = view.settings();
    if settings.issued_only && presented.parse(&settings.prefix).is_err() {
        return Err(unverified(DenyReason::MalformedCredential));
    }
    let key = held
        .find(view, &presented)
        .map_err(|unfound| match unfound {
            Unfound::Unknown => unverified(DenyReason::UnknownKey),
            Unfound::Unavailable => unverified(DenyReason::KeyringUnavailable),
            Unfound::Missing(digest) => Refusal::Missing(digest),
        })?;
    match refuse(question, &key, now) {
        Some(reason) => Err(Refusal::Denied(reason, Some(key))),
        None => Ok(Some(Verified {
            view,
            key,
            places: credential.places(),
        })),
    }
}

/// Why a key that was found may not pass.
fn refuse(question: &Question<'_>, key: &HeldKey<'_>, now: Timestamp) -> Option<DenyReason> {
    match key.standing(now) {
        Standing::Revoked => Some(DenyReason::Revoked),
        Standing::Retired => Some(DenyReason::Retired),
        Standing::Expired => Some(DenyReason::Expired),
        Standing::NotYetValid => Some(DenyReason::NotYetValid),
        Standing::Accepted if !key.permits(question.input.source()) => {
            Some(DenyReason::SourceNotAllowed)
        }
        Standing::Accepted if !question.route.scopes.are_held_by(key.scopes()) => {
            Some(DenyReason::InsufficientScope)
        }
        Standing::Accepted => None,
    }
}

impl LookedUp {
    /// Takes the version of the key. The check judges it in the place of whatever else is held.
    pub(crate) fn found(&mut self, cached: Arc<CachedKey>) {
        self.version = OnceCell::from(cached);
    }

    /// Notes that nobody has a digest.
    pub(crate) fn found_none(&mut self, digest: KeyDigest) {
        self.unknown.push(digest);
    }

    /// Notes that the check does not wait for a lookup (any more).
    pub(crate) const fn failed(&mut self) {
        self.has_failed = true;
    }
}

impl<'v> Decision<'v> {
    /// What is counted.
    #[must_use]
    pub(crate) const fn outcome(&self) -> Outcome {
        match self {
            Self::Allow(_) => Outcome::Allowed,
            Self::Anonymous(_) => Outcome::Anonymous,
            Self::Deny(denial) => Outcome::Denied(denial.reason),
        }
    }

    /// What it was based on; none when no keyring was asked.
    #[must_use]
    pub(crate) const fn keyring(&self) -> Option<&KeyringFacts<'v>> {
        match self {
            Self::Allow(grant) => Some(&grant.keyring),
            Self::Anonymous(anonymous) => Some(&anonymous.keyring),
            Self::Deny(denial) => denial.keyring.as_ref(),
        }
    }

    /// The version that was used; none unless it was verified.
    #[must_use]
    pub(crate) const fn key(&self) -> Option<&HeldKey<'v>> {
        match self {
            Self::Allow(grant) => Some(&grant.key),
            Self::Anonymous(_) => None,
            Self::Deny(denial) => denial.key.as_ref(),
        }
    }
}

impl<'v> From<Denial<'v>> for Decision<'v> {
    fn from(denial: Denial<'v>) -> Self {
        Self::Deny(denial)
    }
}

impl Outcome {
    /// `allow` or `deny`.
    #[must_use]
    pub(crate) const fn decision(self) -> &'static str {
        match self {
            Self::Allowed | Self::Anonymous => "allow",
            Self::Denied(_) => "deny",
        }
    }

    /// The reason of a denial; `ok` or `anonymous` for an allow.
    #[must_use]
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::Allowed => "ok",
            Self::Anonymous => "anonymous",
            Self::Denied(reason) => reason.as_str(),
        }
    }
}

impl<'v> Grant<'v> {
    /// The keyring that holds it.
    #[must_use]
    pub(crate) const fn keyring(&self) -> &KeyringFacts<'v> {
        &self.keyring
    }

    /// The version that was used.
    #[must_use]
    pub(crate) const fn key(&self) -> &HeldKey<'v> {
        &self.key
    }

    /// Where the credential was.
    #[must_use]
    pub(crate) const fn places(&self) -> Places {
        self.places
    }

    /// What to tell the consumer.
    #[must_use]
    pub(crate) const fn notice(&self) -> Option<&Notice<'v>> {
        self.notice.as_ref()
    }
}

impl<'v> Anonymous<'v> {
    /// The keyring that would have been asked.
    #[must_use]
    pub(crate) const fn keyring(&self) -> &KeyringFacts<'v> {
        &self.keyring
    }
}

impl<'v> Denial<'v> {
    /// A denial before a keyring was asked.
    const fn unread(reason: DenyReason) -> Self {
        Self {
            reason,
            keyring: None,
            key: None,
            scopes: None,
        }
    }

    /// A denial for tests of what is made of one.
    #[cfg(test)]
    pub(crate) fn of(reason: DenyReason, key: Option<HeldKey<'v>>) -> Self {
        Self {
            keyring: Some(KeyringFacts {
                name: super::testing::keyring_name(),
                revision: Some(Revision::new(7)),
                age: Some(Duration::from_millis(1500)),
            }),
            key,
            scopes: (reason == DenyReason::InsufficientScope)
                .then(|| RequiredScopes::of_route("read write")),
            ..Self::unread(reason)
        }
    }

    /// The denial of a request that cannot be understood.
    #[must_use]
    pub(crate) const fn malformed() -> Self {
        Self::unread(DenyReason::MalformedRequest)
    }

    /// The denial after a fault of ours.
    #[must_use]
    pub(crate) const fn internal() -> Self {
        Self::unread(DenyReason::InternalError)
    }

    /// The denial of a credential whose source has presented too many that failed, in place of this one or of a lookup.
    #[must_use]
    pub(super) fn too_many_failures(held: &Held<'v>) -> Self {
        Self {
            keyring: Some(held.facts()),
            ..Self::unread(DenyReason::TooManyFailures)
        }
    }

    /// The reason.
    #[must_use]
    pub(crate) const fn reason(&self) -> DenyReason {
        self.reason
    }

    /// The keyring that was asked.
    #[must_use]
    pub(crate) const fn keyring(&self) -> Option<&KeyringFacts<'v>> {
        self.keyring.as_ref()
    }

    /// The version that was used; none unless it was verified.
    #[must_use]
    pub(crate) const fn key(&self) -> Option<&HeldKey<'v>> {
        self.key.as_ref()
    }

    /// What the route demands, when that was missing.
    #[must_use]
    pub(crate) const fn scopes(&self) -> Option<&RequiredScopes<'v>> {
        self.scopes.as_ref()
    }
}

impl<'v> Notice<'v> {
    fn of(key: &HeldKey<'v>, view: &'v KeyringView) -> Option<Self> {
        match key.state() {
            KeyState::Retiring => Some(Self {
                since: key.retiring_since(),
                sunset: [key.retires_at(), key.window().expires_at]
                    .into_iter()
                    .flatten()
                    .min(),
                help_url: view.settings().help_url.as_deref(),
            }),
            KeyState::Pending | KeyState::Active | KeyState::Retired | KeyState::Revoked => None,
        }
    }
}

#[cfg(test)]
mod tests;
