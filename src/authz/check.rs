//! A check that is under way.

use std::{borrow::Cow, time::SystemTime};

use super::decision::LookedUp;
use crate::{
    clock::{BootTime, Reading},
    key::Timestamp,
    trace::TraceParent,
};

/// What was asked, when it arrived, and what it is judged by.
pub(super) struct Check<'a> {
    /// A serialized `CheckRequest`.
    pub(super) message: Cow<'a, [u8]>,
    /// The span that Envoy made for the check.
    pub(super) parent: Option<TraceParent>,
    pub(super) arrival: Arrival,
    pub(super) moment: Moment,
    pub(super) looked_up: LookedUp,
}

/// When a check arrived.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    /// For people and spans.
    pub(super) started: SystemTime,
    /// What its duration is measured from.
    pub(super) began: BootTime,
}

/// When a check is judged. One that waits for a lookup is judged again, at a later moment.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    /// What windows are judged by.
    pub(super) wall: Timestamp,
    /// What staleness is judged by.
    pub(super) read: Reading,
}

impl Check<'_> {
    /// The same check, with a message of its own.
    pub(super) fn into_owned(self) -> Check<'static> {
        Check {
            message: Cow::Owned(self.message.into_owned()),
            ..self
        }
    }
}
