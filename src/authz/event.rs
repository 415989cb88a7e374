//! What a check leaves behind: one event, from which metrics, spans and logs are made.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use super::{decision::Decision, question::MalformedRequest};
use crate::trace::TraceParent;

/// One check, after it was answered. Holds nothing of the request.
#[derive(Clone, Copy, Debug)]
pub struct CheckEvent<'a> {
    /// What became of it.
    pub(crate) decision: &'a Decision<'a>,
    /// What could not be understood.
    pub(crate) malformed: Option<MalformedRequest>,
    /// The span that the check belongs to.
    pub(crate) parent: Option<TraceParent>,
    /// When it began, by the wall clock.
    pub(crate) started: SystemTime,
    /// How long it took.
    pub(crate) duration: Duration,
}

/// Is told of every check, on the data path: it must not wait.
pub trait Observer: fmt::Debug + Send + Sync {
    /// A check was answered.
    fn observe(&self, event: &CheckEvent<'_>);
}
