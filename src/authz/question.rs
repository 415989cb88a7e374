//! What a check asks, read from the message once: the first step of a decision.

use super::{
    credential::{Credential, CredentialError},
    request::{CheckInput, RequestError},
    route::{Route, RouteError},
    settings::{Settings, is_token},
};

/// A request that can be judged.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    pub(super) input: CheckInput<'a>,
    pub(super) route: Route<'a>,
    pub(super) credential: Result<Option<Credential<'a>>, Ambiguous>,
}

/// There is more than one credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ambiguous;

/// A request that cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MalformedRequest {
    /// The message is no request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A header would have to be removed, and has a name that cannot be written down.
    #[error("a header that must not reach the upstream has a name that is no token")]
    HeaderName,
    /// A credential cannot be read.
    #[error(transparent)]
    Credential(CredentialError),
    /// The route cannot be told.
    #[error(transparent)]
    Route(#[from] RouteError),
}

impl<'a> Question<'a> {
    /// Reads a serialized `CheckRequest`.
    ///
    /// # Errors
    ///
    /// When it cannot be understood, or could be understood in two ways.
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

    /// The name of the keyring that protects the request; none when nothing chooses one.
    #[must_use]
    pub(crate) const fn keyring(&self) -> Option<&'a str> {
        self.route.keyring
    }

    /// The request itself.
    #[must_use]
    pub(crate) const fn input(&self) -> &CheckInput<'a> {
        &self.input
    }
}
