//! The question of a check, read once from the message: the first step of a decision.

use super::{
    client_address::ClientAddress,
    credential::{Credential, CredentialError},
    reason::DenyReason,
    removal::Removal,
    request::{CheckInput, RequestError},
    route::{Route, RouteError},
    settings::{Settings, is_token},
};
use crate::key::wrapping::Wrapping;

/// A request that `decide` can judge.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    pub(super) input: CheckInput<'a>,
    pub(super) client: ClientAddress<'a>,
    pub(super) route: Route<'a>,
    pub(super) credential: Result<Option<Credential<'a>>, NoCredential>,
}

/// The reason why a request has credentials, but none to judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoCredential {
    /// There is more than one.
    Ambiguous,
    /// It is not printable ASCII, perhaps because of a text that surrounds the key.
    Malformed(Option<Wrapping>),
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
    /// A credential cannot be read.
    #[error(transparent)]
    Credential(CredentialError),
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
            Self::Request(_) | Self::HeaderName | Self::Credential(_) | Self::Route(_) => {
                DenyReason::MalformedRequest
            }
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
        let is_unremovable = |name: &[u8]| settings.is_spoofed(name) && !is_token(name);
        if input.headers().any(|header| is_unremovable(header.name)) {
            return Err(QuestionError::HeaderName);
        }
        let credential = match Credential::collect(settings, &input) {
            Ok(credential) => Ok(credential),
            Err(CredentialError::Ambiguous) => Err(NoCredential::Ambiguous),
            Err(CredentialError::Malformed(wrapping)) => Err(NoCredential::Malformed(wrapping)),
            Err(error @ CredentialError::Inseparable) => {
                return Err(QuestionError::Credential(error));
            }
        };
        Ok(Self {
            route: Route::choose(settings, &input)?,
            client: settings.client_address().find(&input),
            input,
            credential,
        })
    }

    /// Returns how the credential is removed from the request; none if there is no credential to
    /// judge.
    #[must_use]
    pub(super) fn removal(&self) -> Option<&Removal> {
        Some(self.credential.as_ref().ok()?.as_ref()?.removal())
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
