//! A check that is not answered yet.

use std::{borrow::Cow, time::SystemTime};

use super::decision::LookedUp;
use crate::{
    clock::{BootTime, Reading},
    key::Timestamp,
    trace::TraceParent,
};

/// A check: its message, the time of its arrival, and the state by which it is judged.
pub(super) struct Check<'a> {
    /// A serialized `CheckRequest`.
    pub(super) message: Cow<'a, [u8]>,
    /// The span that Envoy created for the check.
    pub(super) parent: Option<TraceParent>,
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

impl Check<'_> {
    /// Copies the message, so that the check can outlive the buffer that it was read from.
    pub(super) fn into_owned(self) -> Check<'static> {
        Check {
            message: Cow::Owned(self.message.into_owned()),
            ..self
        }
    }
}
