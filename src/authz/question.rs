//! The question of a check, read once from the message: the first step of a decision.

use super::{
    credential::{Credential, CredentialError},
    request::{CheckInput, RequestError},
    route::{Route, RouteError},
    settings::{Settings, is_token},
};

/// A request that `decide` can judge.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    pub(super) input: CheckInput<'a>,
    pub(super) route: Route<'a>,
    pub(super) credential: Result<Option<Credential<'a>>, Ambiguous>,
}

/// The request has more than one credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ambiguous;

/// The reason why a request cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MalformedRequest {
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

impl<'a> Question<'a> {
    /// Reads a serialized `CheckRequest`.
    ///
    /// # Errors
    ///
    /// When the request cannot be understood, or can be understood in two ways. More than one
    /// credential is not an error: `decide` denies it.
    pub(crate) fn read(
        settings: &'a Settings,
        message: &'a [u8],
    ) -> Result<Self, MalformedRequest> {
        let input = CheckInput::read(message)?;
        let is_unremovable = |name: &[u8]| settings.is_spoofed(name) && !is_token(name);
        if input.headers().any(|header| is_unremovable(header.name)) {
            return Err(MalformedRequest::HeaderName);
        }
        let credential = match Credential::collect(settings, &input) {
            Ok(credential) => Ok(credential),
            Err(CredentialError::Ambiguous) => Err(Ambiguous),
            Err(error @ CredentialError::Malformed) => {
                return Err(MalformedRequest::Credential(error));
            }
        };
        Ok(Self {
            route: Route::choose(settings, &input)?,
            input,
            credential,
        })
    }

    /// Returns the name of the keyring that protects the request; none if neither the Envoy route
    /// nor the settings choose one.
    #[must_use]
    pub(crate) const fn keyring(&self) -> Option<&'a str> {
        self.route.keyring
    }

    /// Returns the request that is to be judged.
    #[must_use]
    pub(crate) const fn input(&self) -> &CheckInput<'a> {
        &self.input
    }
}
