//! The gRPC service `envoy.service.auth.v3.Authorization`.
//!
//! Envoy treats a gRPC error as a failure, not as a denial, and can be configured to let the
//! request pass after a failure. So every check is answered: a panic becomes a denial.
//!
//! A check is answered at once, from the keyrings in memory. If the key of a keyring on demand has
//! to be looked up, the check is judged again when the lookup is answered, or when `lookup_timeout`
//! is over.

use std::sync::Arc;

use bytes::BytesMut;

use super::{
    all_settings::AllSettings,
    basis::LoadedBasis,
    check::Metadata,
    event::Observer,
    judge::Judge,
    later::{LaterAnswer, answer_later},
    request::RequestError,
};
use crate::{
    clock::{Clock, LatestWall},
    keyring::Keyrings,
};

/// Answers checks from the keyrings of this sidecar.
#[derive(Clone, Debug)]
pub struct Authorizer(Judge);

impl Authorizer {
    /// Creates a service that answers from `keyrings` and reports every check to `observer`.
    #[must_use]
    pub fn new(
        settings: impl Into<AllSettings>,
        keyrings: &Keyrings,
        clock: Clock,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self(Judge::new(settings.into(), keyrings, clock, observer))
    }

    /// Replaces the latest time by which the validity of versions is judged. `latest` is shared
    /// with other parts of the process.
    #[must_use]
    pub(crate) fn judging_by(self, latest: LatestWall) -> Self {
        Self(self.0.judging_by(latest))
    }

    /// Returns a service that answers from the same keyrings by the settings of the profile at this
    /// position. Both charge the same budgets of failed credentials, and report to the same observer.
    #[must_use]
    pub(crate) fn of_profile(&self, profile: usize) -> Self {
        Self(self.0.of_profile(profile))
    }

    /// Returns the settings of the checks that begin now.
    #[must_use]
    pub(crate) fn settings(&self) -> AllSettings {
        self.0.load().settings.clone()
    }

    /// Returns the profile whose settings apply; none for those of Envoy.
    #[must_use]
    pub(super) const fn profile(&self) -> Option<usize> {
        self.0.profile()
    }

    /// Changes the settings together with the next change of the keyrings, so that a check sees
    /// both or neither.
    pub(crate) fn settle(&self, settings: AllSettings) {
        self.0.settle(settings);
    }

    /// Answers a serialized `CheckRequest`: appends the serialized `CheckResponse` to `answer`. If
    /// the key has to be looked up, `answer` stays unchanged, and the returned future yields the
    /// response; it needs a runtime with timers. A message that could not be read is denied.
    #[must_use = "a check whose key is looked up is answered later"]
    pub fn answer(
        &self,
        message: Result<&[u8], RequestError>,
        metadata: Metadata,
        answer: &mut BytesMut,
    ) -> Option<LaterAnswer> {
        self.answer_by(self.load(), message, metadata, answer)
    }

    /// Returns the basis of a check that begins now.
    pub(super) fn load(&self) -> LoadedBasis {
        self.0.load()
    }

    /// Answers a check by `basis`, as [`Authorizer::answer`] does.
    #[must_use = "a check whose key is looked up is answered later"]
    pub(super) fn answer_by(
        &self,
        basis: LoadedBasis,
        message: Result<&[u8], RequestError>,
        metadata: Metadata,
        answer: &mut BytesMut,
    ) -> Option<LaterAnswer> {
        let Self(judge) = self;
        let mut check = judge.begin_by(basis, message.unwrap_or_default(), metadata);
        if let Err(error) = message {
            judge.deny_unread(&check, error.into(), answer);
            return None;
        }
        let missing = judge.answer(&check, answer)?;
        if let Ok(waiting) = missing.look_up(check.moment) {
            return Some(answer_later(judge.clone(), check.into_owned(), waiting));
        }
        check.looked_up.failed();
        if judge.answer(&check, answer).is_some() {
            // Nothing is missing after a failed lookup. An empty response would allow.
            judge.deny_internal(&check, answer);
        }
        None
    }
}
