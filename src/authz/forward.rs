//! Checks of proxies that ask over HTTP: Traefik's `forwardAuth`, Caddy's `forward_auth` and the
//! `auth_request` of nginx.
//!
//! Such a proxy sends a request of its own with the headers of the original request, and passes the
//! original request on after a status of 2xx. [`original`] reads the original request and writes it
//! as Envoy would, so that a check over HTTP is judged, counted and reported as every other one;
//! [`answer`] translates the response.
//!
//! The profile decides about the keyring and the scopes, and nothing in the request does. Both are
//! always set, so that no rule for hosts and paths applies, and a credential is never optional.

mod answer;
mod original;

use bytes::BytesMut;
use http::{HeaderMap, Response};

use super::{
    all_settings::AllSettings, check::Metadata, later::LaterAnswer, request::RequestError,
    service::Authorizer, settings::Settings,
};
use crate::key::{KeyringName, Scopes};
use original::Original;

/// Answers the checks of a proxy that asks over HTTP.
#[derive(Clone, Debug)]
pub(crate) struct ForwardAuth {
    authorizer: Authorizer,
    keyring: KeyringName,
    /// The scopes that a key must have, separated by spaces.
    scopes: String,
}

/// A check that was asked.
pub(crate) struct Asked {
    /// The serialized `CheckResponse`; empty if it is known later.
    pub(crate) answer: BytesMut,
    /// The future that yields the response, if the key has to be looked up.
    pub(crate) later: Option<LaterAnswer>,
    /// The settings by which it is judged.
    pub(crate) settings: AllSettings,
}

/// The initial size of the buffer for a message, in bytes: the original request with its headers.
const MESSAGE: usize = 2 << 10;
/// The initial size of the buffer for an answer, in bytes.
const ANSWER: usize = 512;

impl ForwardAuth {
    /// Creates a service that requires a key of `keyring` with `scopes`. The settings of
    /// `authorizer` have the dialect of the proxy.
    #[must_use]
    pub(crate) fn new(authorizer: Authorizer, keyring: KeyringName, scopes: &Scopes) -> Self {
        Self {
            authorizer,
            keyring,
            scopes: scopes.to_string(),
        }
    }

    /// Asks about the original request that `headers` describe.
    #[must_use]
    pub(crate) fn ask(&self, headers: &HeaderMap) -> Asked {
        let basis = self.authorizer.load();
        let settings = basis.settings.clone();
        let mut message = BytesMut::with_capacity(MESSAGE);
        let mut answer = BytesMut::with_capacity(ANSWER);
        let written = self.write_question(self.of(&settings), headers, &mut message);
        let message = written.map(|()| &*message);
        let metadata = Metadata::default();
        let later = self
            .authorizer
            .answer_by(basis, message, metadata, &mut answer);
        Asked {
            answer,
            later,
            settings,
        }
    }

    /// Counts a request whose head is larger than the connection reads.
    pub(crate) fn refuse_too_large(&self) {
        let mut answer = BytesMut::new();
        let refused = Err(RequestError::TooLong);
        let later = self
            .authorizer
            .answer(refused, Metadata::default(), &mut answer);
        debug_assert!(later.is_none(), "what is not read has no key");
    }

    /// Translates the serialized `CheckResponse` to the check with `headers`, which is judged by
    /// `settings`. A response that is not clearly an allow is a denial.
    #[must_use]
    pub(crate) fn respond(
        &self,
        settings: &AllSettings,
        headers: &HeaderMap,
        answer: &[u8],
    ) -> Response<String> {
        answer::respond(self.of(settings), headers, answer)
    }

    /// Returns the settings of this profile.
    fn of<'s>(&self, settings: &'s AllSettings) -> &'s Settings {
        settings.of(self.authorizer.profile())
    }

    /// Writes the original request as a serialized `CheckRequest`.
    fn write_question(
        &self,
        settings: &Settings,
        headers: &HeaderMap,
        message: &mut BytesMut,
    ) -> Result<(), RequestError> {
        let mut shared = settings.shared_headers();
        if shared.any(|name| headers.get_all(name).iter().count() > 1) {
            return Err(RequestError::RepeatedHeader);
        }
        let original = Original::read(settings.dialect(), headers)?;
        original.write(self.keyring.as_str(), &self.scopes, headers, message);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
