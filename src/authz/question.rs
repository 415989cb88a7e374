//! The question of a check, read once from the message: the first step of a decision.

use super::{
    client_address::ClientAddress,
    credential::{Credential, NoCredential, Search},
    preflight::is_preflight,
    reason::DenyReason,
    removal::{Inseparable, Removal},
    request::{CheckInput, RequestError},
    route::{Route, RouteError},
    settings::{Enforcement, Preflight, Settings, is_token},
};
use crate::key::wrapping::Wrapping;

/// A request that `decide` can judge.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    pub(super) input: CheckInput<'a>,
    pub(super) client: ClientAddress<'a>,
    pub(super) route: Route<'a>,
    pub(super) credential: Result<Option<Credential<'a>>, NoCredential>,
    /// How credentials are removed from the request.
    removal: Result<Removal, Inseparable>,
    /// Why the request is denied whatever its credential is, if its denial may be observed only.
    pub(super) error: Option<QuestionError>,
}

/// The reason why a request cannot be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuestionError {
    /// The message is not a valid request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A header that relatch must remove has a name that is not a token, so that the response
    /// cannot name it.
    #[error("a header that must not reach the upstream has a name that is not a token")]
    HeaderName,
    /// A header is another spelling of one that must not reach the upstream, and the proxy removes
    /// only the headers that it lists.
    #[error(
        "a header is another spelling of an identity header or of a header for a key, which the proxy cannot remove"
    )]
    Spelling,
    /// A credential cannot be removed.
    #[error(transparent)]
    Removal(#[from] Inseparable),
    /// The route cannot be determined.
    #[error(transparent)]
    Route(#[from] RouteError),
}

impl QuestionError {
    /// Returns the reason of the denial.
    #[must_use]
    pub(crate) const fn reason(self) -> DenyReason {
        match self {
            Self::Request(error) if error.is_size() => DenyReason::RequestTooLarge,
            Self::Request(_)
            | Self::HeaderName
            | Self::Spelling
            | Self::Removal(_)
            | Self::Route(_) => DenyReason::MalformedRequest,
        }
    }
}

impl<'a> Question<'a> {
    /// Reads a serialized `CheckRequest`.
    ///
    /// # Errors
    ///
    /// When the request cannot be understood, or can be understood in two ways. More than one
    /// credential is not an error: `decide` denies it.
    pub(crate) fn read(settings: &'a Settings, message: &'a [u8]) -> Result<Self, QuestionError> {
        let input = CheckInput::read(message)?;
        let route = Route::choose(settings, &input)?;
        let mut error = route.error.map(QuestionError::Route);
        let removed = route.removed_places();
        let spoofed = input
            .headers()
            .filter(|header| settings.is_spoofed(header.name, removed));
        for header in spoofed {
            if !is_token(header.name) {
                return Err(QuestionError::HeaderName);
            }
            if !settings.can_remove(header.name) {
                return Err(QuestionError::Spelling);
            }
        }
        let Search {
            credential,
            found,
            is_hidden,
        } = Search::new(settings, route.places, &input);
        let removal = if is_hidden {
            Err(Inseparable)
        } else {
            Removal::plan(settings, &input, found)
        };
        let has_reason = matches!(credential, Err(NoCredential::Malformed(_))) || is_hidden;
        if let Err(inseparable) = &removal
            && !has_reason
        {
            if route.enforcement.removes_credential() {
                return Err((*inseparable).into());
            }
            error.get_or_insert_with(|| (*inseparable).into());
        }
        Ok(Self {
            client: settings.client_address().find(&input),
            input,
            route,
            credential,
            removal,
            error,
        })
    }

    /// Returns how credentials are removed from the request; none if they cannot be removed.
    #[must_use]
    pub(super) fn removal(&self) -> Option<&Removal> {
        self.removal.as_ref().ok()
    }

    /// Returns whether it is a CORS preflight that passes without a key.
    #[must_use]
    pub(super) fn is_free_preflight(&self) -> bool {
        match self.route.preflight {
            Preflight::Allow => self.removal.is_ok() && is_preflight(&self.input),
            Preflight::Deny => false,
        }
    }

    /// Returns whether the request passes although it is denied.
    #[must_use]
    pub(super) fn passes_unenforced(&self) -> bool {
        match self.route.enforcement {
            Enforcement::Enforced => false,
            Enforcement::Observed { removes_credential } => {
                !removes_credential || self.removal.is_ok()
            }
        }
    }

    /// Returns the text that surrounds the key in its place, if any does.
    #[must_use]
    pub(super) fn wrapping(&self) -> Option<Wrapping> {
        match &self.credential {
            Ok(credential) => credential.as_ref()?.wrapping(),
            Err(NoCredential::Malformed(wrapping)) => *wrapping,
            Err(NoCredential::Ambiguous) => None,
        }
    }

    /// Returns the route of the request.
    #[must_use]
    pub(super) const fn route(&self) -> &Route<'a> {
        &self.route
    }

    /// Returns why the request is denied whatever its credential is, if its denial may be observed
    /// only.
    #[must_use]
    pub(super) const fn error(&self) -> Option<QuestionError> {
        self.error
    }

    /// Returns the name of the keyring that protects the request; none if neither the Envoy route
    /// nor the settings choose one.
    #[must_use]
    pub(crate) const fn keyring(&self) -> Option<&'a str> {
        self.route.keyring
    }

    /// Returns the address of the client.
    #[must_use]
    pub(crate) const fn client(&self) -> ClientAddress<'a> {
        self.client
    }

    /// Returns the request that is to be judged.
    #[must_use]
    pub(crate) const fn input(&self) -> &CheckInput<'a> {
        &self.input
    }
}
