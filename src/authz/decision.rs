//! The decision: a pure function of a question, a keyring at a moment, and the time.
//!
//! The first of these reasons that applies denies the request: it is malformed; it has no keyring;
//! the keyring is not usable; the credential is ambiguous or missing; it is not printable ASCII, too
//! long for a key, or not a token of a keyring that accepts only issued keys; it is not found; it is revoked, retired,
//! expired or not yet valid; its source is not allowed; its scopes are not sufficient. If none
//! applies, the request is allowed.
//!
//! Two requests pass without a key to judge: one without a credential where the route does not
//! require one, and a CORS preflight where the route lets it pass. In a trial, every request passes
//! that could be read, and its denial is only reported.

use std::{cell::OnceCell, sync::Arc, time::Duration};

use super::{
    credential::NoCredential, question::Question, reason::DenyReason, route::RequiredScopes,
    settings::Auth,
};
use crate::{
    key::{
        KeyDigest, KeyState, KeyringName, PresentedKey, Revision, Standing, Timestamp,
        wrapping::Wrapping,
    },
    keyring::{
        HeldKey, KeyringView, Look,
        on_demand::{CachedKey, Finding},
    },
};

/// The result of [`decide`].
#[derive(Clone, Debug)]
pub(crate) enum Verdict<'v> {
    Decided(Decision<'v>),
    /// The keyring is on demand, and the key with this digest must be looked up first, or again.
    LookUp(KeyDigest),
}

/// The answer to a check, with the facts that it is based on.
#[derive(Clone, Debug)]
pub(crate) enum Decision<'v> {
    /// The request passes, with the identity of the caller.
    Allow(Grant<'v>),
    /// The request passes without an identity: it has no credential, and the route does not require
    /// one.
    Anonymous(Anonymous<'v>),
    /// The request passes without an identity: it is a CORS preflight.
    Preflight(Anonymous<'v>),
    /// The request passes without an identity, because the denial is not enforced.
    WouldDeny(Unenforced<'v>),
    /// The request does not pass.
    Deny(Denial<'v>),
}

/// The right to pass with an identity. Only [`decide`] creates one.
#[derive(Clone, Debug)]
pub(crate) struct Grant<'v> {
    keyring: KeyringFacts<'v>,
    key: HeldKey<'v>,
    notice: Option<Notice<'v>>,
}

/// The right to pass without an identity. Only [`decide`] creates one.
#[derive(Clone, Debug)]
pub(crate) struct Anonymous<'v> {
    keyring: KeyringFacts<'v>,
}

/// The right to pass despite a denial. Only [`Decision::enforced`] creates one.
#[derive(Clone, Debug)]
pub(crate) struct Unenforced<'v> {
    denial: Denial<'v>,
}

/// The reason why a request does not pass, with the facts that it is based on.
#[derive(Clone, Debug)]
pub(crate) struct Denial<'v> {
    reason: DenyReason,
    keyring: Option<KeyringFacts<'v>>,
    /// The version that was found: the request presented its whole secret. None if no version was
    /// found.
    key: Option<HeldKey<'v>>,
    /// The scopes that the route requires, for [`DenyReason::InsufficientScope`].
    scopes: Option<RequiredScopes<'v>>,
    /// The text that surrounds the key, for [`DenyReason::MalformedCredential`].
    wrapping: Option<Wrapping>,
}

/// The state of the keyring that a decision is based on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyringFacts<'v> {
    pub(crate) name: &'v KeyringName,
    /// The revision of the loaded view; none before the first view.
    pub(crate) revision: Option<Revision>,
    /// The age of the keyring: the time since the control plane confirmed it; none if it never has.
    pub(crate) age: Option<Duration>,
}

/// The facts about a retiring version that are announced to the consumer that used it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Notice<'v> {
    /// The beginning of the overlap; none if the control plane does not report it.
    pub(crate) since: Option<Timestamp>,
    /// The announced end of the version: its deadline, or its expiry if that is earlier. None if
    /// the version has neither.
    pub(crate) sunset: Option<Timestamp>,
    /// The help page of the keyring; none if the keyring has none.
    pub(crate) help_url: Option<&'v str>,
}

/// A decision without its facts, for counters and labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// [`Decision::Allow`]
    Allowed,
    /// [`Decision::Anonymous`]
    Anonymous,
    /// [`Decision::Preflight`]
    Preflight,
    /// [`Decision::WouldDeny`]
    WouldDeny(DenyReason),
    /// [`Decision::Deny`]
    Denied(DenyReason),
}

/// A keyring as one check sees it: one load of its view, and the results of the check's own
/// lookups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeldKeyring<'v> {
    look: &'v Look<'v>,
    looked_up: &'v LookedUp,
}

/// The results of the lookups that a check has waited for, in a keyring on demand. The decision
/// borrows from it.
#[derive(Debug, Default)]
pub(crate) struct LookedUp {
    /// The version of the key.
    version: OnceCell<Arc<CachedKey>>,
    /// Digests that the control plane does not know.
    unknown: Vec<KeyDigest>,
    /// Whether a lookup failed or was refused: the check does not wait for another one.
    has_failed: bool,
}

impl<'v> HeldKeyring<'v> {
    /// Combines one look at a keyring with the results of the check's lookups.
    #[must_use]
    pub(crate) const fn new(look: &'v Look<'v>, looked_up: &'v LookedUp) -> Self {
        Self { look, looked_up }
    }

    /// Returns the view, or the reason why it cannot be used.
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

    /// Finds the version whose secret is the presented key.
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

    /// Returns whether a keyring on demand has a version with this digest in its cache, even one
    /// that is due for another lookup.
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

/// Judges a question. `held` is the keyring that the question names; none if this sidecar does not
/// have it. `now` is the time of the wall clock that decides about validity.
#[must_use]
pub(crate) fn decide<'v>(
    question: &Question<'v>,
    held: Option<&HeldKeyring<'v>>,
    now: Timestamp,
) -> Verdict<'v> {
    if let Some(error) = question.error() {
        return Verdict::Decided(Denial::unread(error.reason()).into());
    }
    let Some(held) = held else {
        return Verdict::Decided(Denial::unread(DenyReason::UnknownKeyring).into());
    };
    if question.is_free_preflight() {
        return Verdict::Decided(Decision::Preflight(Anonymous {
            keyring: held.facts(),
        }));
    }
    Verdict::Decided(match judge(question, held, now) {
        Ok(Some(verified)) => Decision::Allow(Grant {
            keyring: held.facts(),
            notice: Notice::of(&verified.key, verified.view),
            key: verified.key,
        }),
        Ok(None) => Decision::Anonymous(Anonymous {
            keyring: held.facts(),
        }),
        Err(Refusal::Denied(reason, key)) => Decision::Deny(Denial {
            reason,
            keyring: Some(held.facts()),
            key,
            scopes: (reason == DenyReason::InsufficientScope).then_some(question.route.scopes),
            wrapping: (reason == DenyReason::MalformedCredential)
                .then(|| question.wrapping())
                .flatten(),
        }),
        Err(Refusal::Missing(digest)) => return Verdict::LookUp(digest),
    })
}

/// A key that may pass.
struct Verified<'v> {
    view: &'v KeyringView,
    key: HeldKey<'v>,
}

/// The reason why a request does not pass, or not yet.
enum Refusal<'v> {
    /// The reason, and the version if one was found.
    Denied(DenyReason, Option<HeldKey<'v>>),
    /// The key has to be looked up.
    Missing(KeyDigest),
}

/// The reason why there is no version to judge.
enum Unfound {
    /// The keyring has no such key.
    Unknown,
    /// The key had to be looked up, and the lookup failed or was refused.
    Unavailable,
    /// The key with this digest has to be looked up.
    Missing(KeyDigest),
}

fn judge<'v>(
    question: &Question<'_>,
    held: &HeldKeyring<'v>,
    now: Timestamp,
) -> Result<Option<Verified<'v>>, Refusal<'v>> {
    let unverified = |reason| Refusal::Denied(reason, None);
    let view = held.usable().map_err(unverified)?;
    let credential = match (&question.credential, question.route.auth) {
        (Err(NoCredential::Ambiguous), _) => {
            return Err(unverified(DenyReason::AmbiguousCredential));
        }
        (Err(NoCredential::Malformed(_)), _) => {
            return Err(unverified(DenyReason::MalformedCredential));
        }
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
            Unfound::Unknown if credential.wrapping().is_some() => {
                unverified(DenyReason::MalformedCredential)
            }
            Unfound::Unknown => unverified(DenyReason::UnknownKey),
            Unfound::Unavailable => unverified(DenyReason::KeyringUnavailable),
            Unfound::Missing(digest) => Refusal::Missing(digest),
        })?;
    match refuse(question, &key, now) {
        Some(reason) => Err(Refusal::Denied(reason, Some(key))),
        None => Ok(Some(Verified { view, key })),
    }
}

/// Returns the reason why a key that was found does not pass; none if it passes.
fn refuse(question: &Question<'_>, key: &HeldKey<'_>, now: Timestamp) -> Option<DenyReason> {
    match key.standing(now) {
        Standing::Revoked => Some(DenyReason::Revoked),
        Standing::Retired => Some(DenyReason::Retired),
        Standing::Expired => Some(DenyReason::Expired),
        Standing::NotYetValid => Some(DenyReason::NotYetValid),
        Standing::Accepted if !key.permits(question.client.address()) => {
            Some(DenyReason::SourceNotAllowed)
        }
        Standing::Accepted if !question.route.scopes.are_held_by(key.scopes()) => {
            Some(DenyReason::InsufficientScope)
        }
        Standing::Accepted => None,
    }
}

impl LookedUp {
    /// Stores the version of the key. The check then judges this version, whatever the cache holds.
    pub(crate) fn found(&mut self, cached: Arc<CachedKey>) {
        self.version = OnceCell::from(cached);
    }

    /// Notes that the control plane does not know a digest.
    pub(crate) fn found_none(&mut self, digest: KeyDigest) {
        self.unknown.push(digest);
    }

    /// Notes that a lookup failed or was refused: the check does not wait for another one.
    pub(crate) const fn failed(&mut self) {
        self.has_failed = true;
    }
}

impl<'v> Decision<'v> {
    /// Returns the decision as it is enforced: where the request passes in a trial, a denial becomes
    /// [`Decision::WouldDeny`].
    #[must_use]
    pub(crate) fn enforced(self, question: &Question<'_>) -> Self {
        match self {
            Self::Deny(denial) if question.passes_unenforced() => {
                Self::WouldDeny(Unenforced { denial })
            }
            Self::Allow(_)
            | Self::Anonymous(_)
            | Self::Preflight(_)
            | Self::WouldDeny(_)
            | Self::Deny(_) => self,
        }
    }

    #[must_use]
    pub(crate) const fn outcome(&self) -> Outcome {
        match self {
            Self::Allow(_) => Outcome::Allowed,
            Self::Anonymous(_) => Outcome::Anonymous,
            Self::Preflight(_) => Outcome::Preflight,
            Self::WouldDeny(unenforced) => Outcome::WouldDeny(unenforced.denial.reason),
            Self::Deny(denial) => Outcome::Denied(denial.reason),
        }
    }

    /// Returns the state of the keyring; none if the request was denied before a keyring was
    /// chosen.
    #[must_use]
    pub(crate) const fn keyring(&self) -> Option<&KeyringFacts<'v>> {
        match self {
            Self::Allow(grant) => Some(&grant.keyring),
            Self::Anonymous(anonymous) | Self::Preflight(anonymous) => Some(&anonymous.keyring),
            Self::WouldDeny(Unenforced { denial }) | Self::Deny(denial) => denial.keyring.as_ref(),
        }
    }

    /// Returns the version whose secret the request presented; none if no version was found.
    #[must_use]
    pub(crate) const fn key(&self) -> Option<&HeldKey<'v>> {
        match self {
            Self::Allow(grant) => Some(&grant.key),
            Self::Anonymous(_) | Self::Preflight(_) => None,
            Self::WouldDeny(Unenforced { denial }) | Self::Deny(denial) => denial.key.as_ref(),
        }
    }
}

impl<'v> From<Denial<'v>> for Decision<'v> {
    fn from(denial: Denial<'v>) -> Self {
        Self::Deny(denial)
    }
}

impl Outcome {
    /// Returns `allow`, `deny`, or `would_deny` for a denial that is not enforced.
    #[must_use]
    pub(crate) const fn decision(self) -> &'static str {
        match self {
            Self::Allowed | Self::Anonymous | Self::Preflight => "allow",
            Self::WouldDeny(_) => "would_deny",
            Self::Denied(_) => "deny",
        }
    }

    /// Returns the reason of a denial; `ok`, `anonymous` or `preflight` if there is none.
    #[must_use]
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::Allowed => "ok",
            Self::Anonymous => "anonymous",
            Self::Preflight => "preflight",
            Self::WouldDeny(reason) | Self::Denied(reason) => reason.as_str(),
        }
    }

    /// Returns the reason of a denial, whether it is enforced or not.
    #[must_use]
    pub(crate) const fn denial(self) -> Option<DenyReason> {
        match self {
            Self::WouldDeny(reason) | Self::Denied(reason) => Some(reason),
            Self::Allowed | Self::Anonymous | Self::Preflight => None,
        }
    }
}

impl<'v> Grant<'v> {
    /// Returns the keyring that has the key.
    #[must_use]
    pub(crate) const fn keyring(&self) -> &KeyringFacts<'v> {
        &self.keyring
    }

    /// Returns the version that was used.
    #[must_use]
    pub(crate) const fn key(&self) -> &HeldKey<'v> {
        &self.key
    }

    /// Returns the notice for the consumer; none unless the version is retiring.
    #[must_use]
    pub(crate) const fn notice(&self) -> Option<&Notice<'v>> {
        self.notice.as_ref()
    }
}

impl<'v> Anonymous<'v> {
    /// Returns the keyring of the route. No key was looked for in it.
    #[must_use]
    pub(crate) const fn keyring(&self) -> &KeyringFacts<'v> {
        &self.keyring
    }
}

impl<'v> Unenforced<'v> {
    /// Returns the denial that is not enforced.
    #[must_use]
    pub(crate) const fn denial(&self) -> &Denial<'v> {
        &self.denial
    }
}

impl<'v> Denial<'v> {
    /// Creates a denial without a keyring.
    #[must_use]
    pub(crate) const fn unread(reason: DenyReason) -> Self {
        Self {
            reason,
            keyring: None,
            key: None,
            scopes: None,
            wrapping: None,
        }
    }

    /// Creates a denial for tests of responses, metrics, spans and logs.
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

    /// Creates the denial after a fault of relatch: a panic or a broken invariant.
    #[must_use]
    pub(crate) const fn internal() -> Self {
        Self::unread(DenyReason::InternalError)
    }

    /// Creates the denial of a request whose source has presented too many failed credentials. It
    /// replaces the denial of another failed credential, or a lookup.
    #[must_use]
    pub(super) fn too_many_failures(held: &HeldKeyring<'v>) -> Self {
        Self {
            keyring: Some(held.facts()),
            ..Self::unread(DenyReason::TooManyFailures)
        }
    }

    #[must_use]
    pub(crate) const fn reason(&self) -> DenyReason {
        self.reason
    }

    /// Returns the text that surrounds the key, if that is why it is malformed.
    #[must_use]
    pub(crate) const fn wrapping(&self) -> Option<Wrapping> {
        self.wrapping
    }

    /// Returns the keyring that denied the request; none if the request was denied before a keyring
    /// was chosen.
    #[must_use]
    pub(crate) const fn keyring(&self) -> Option<&KeyringFacts<'v>> {
        self.keyring.as_ref()
    }

    /// Returns the version whose secret the request presented; none if no version was found.
    #[must_use]
    pub(crate) const fn key(&self) -> Option<&HeldKey<'v>> {
        self.key.as_ref()
    }

    /// Returns the scopes that the route requires, for [`DenyReason::InsufficientScope`].
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
