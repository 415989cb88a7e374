//! A check that is not answered yet.

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use arc_swap::Guard;

use super::{basis::LoadedBasis, condense::Condenser, decision::LookedUp};
use crate::{
    clock::{BootTime, Reading},
    key::Timestamp,
    trace::TraceParent,
};

/// What accompanies the message of a check.
#[derive(Clone, Copy, Debug, Default)]
pub struct Metadata {
    /// The span that Envoy created for the check.
    pub parent: Option<TraceParent>,
    /// How long Envoy waits for the answer (`grpc-timeout`); none if it does not say.
    pub timeout: Option<Duration>,
}

/// A check: its message, the time of its arrival, and the state by which it is judged.
pub(super) struct Check<'a> {
    /// A serialized `CheckRequest`.
    pub(super) message: Cow<'a, [u8]>,
    pub(super) metadata: Metadata,
    /// The settings and the keyrings by which it is judged, however long it waits.
    pub(super) basis: LoadedBasis,
    pub(super) arrival: Arrival,
    pub(super) moment: Moment,
    pub(super) looked_up: LookedUp,
}

/// The time at which a check arrived.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    /// The time of the wall clock, for events.
    pub(super) started: SystemTime,
    /// The start of the measured duration.
    pub(super) began: BootTime,
}

/// The time at which a check is judged. A check that waits for a lookup is judged again, at a later
/// moment.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    /// The time that decides about the validity of versions. It never runs backwards.
    pub(super) wall: Timestamp,
    /// The time that decides about staleness.
    pub(super) read: Reading,
}

impl Metadata {
    /// Returns how long the answer may be waited for, so that it arrives before Envoy stops waiting;
    /// none without a limit. A tenth of the timeout, 2 to 25 ms, remains for the way back.
    #[must_use]
    pub(super) fn patience(&self) -> Option<Duration> {
        const LEAST: Duration = Duration::from_millis(2);
        const MOST: Duration = Duration::from_millis(25);

        let timeout = self.timeout?;
        Some(timeout.saturating_sub((timeout / 10).clamp(LEAST, MOST)))
    }
}

impl Check<'_> {
    /// Copies what a decision needs of the message, so that the check can wait, and can outlive the
    /// buffer that it was read from.
    pub(super) fn into_owned(self) -> Check<'static> {
        let mut condenser = Condenser::new(self.message.len());
        condenser.push(&self.message);
        let message = match condenser.finish() {
            Ok(kept) => kept.into(),
            // It has a group, which the condenser does not read.
            Err(_) => self.message.into_owned(),
        };
        Check {
            message: Cow::Owned(message),
            // A check that waits does not occupy one of the few places of a thread for loads.
            basis: Guard::from_inner(Guard::into_inner(self.basis)),
            ..self
        }
    }
}
