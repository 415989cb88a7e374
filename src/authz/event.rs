//! The event that reports a check. Metrics, spans and logs are created from it.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use super::{
    client_address::ClientAddress, decision::Decision, question::QuestionError, settings::Dialect,
};
use crate::{keyring::Slot, trace::TraceParent};

/// One check, after it was answered. Apart from the trace context and the address of the client, it
/// holds nothing that the client sent.
#[derive(Clone, Copy, Debug)]
pub struct CheckEvent<'a> {
    pub(crate) decision: &'a Decision<'a>,
    /// The keyring of the check; none if it was answered without a keyring.
    pub(crate) slot: Option<&'a Slot>,
    /// The address of the client; none if the request could not be read.
    pub(crate) client: Option<ClientAddress<'a>>,
    /// The reason why the request could not be read; none if it could.
    pub(crate) error: Option<QuestionError>,
    /// The protocol in which the proxy asked.
    pub(crate) dialect: Dialect,
    /// The parent span: the one that Envoy created for the check, or else, if the request could be
    /// read, the one in its headers.
    pub(crate) parent: Option<TraceParent>,
    /// The arrival of the check, by the wall clock.
    pub(crate) started: SystemTime,
    /// The time from the arrival to the answer, with the wait for a lookup.
    pub(crate) duration: Duration,
}

/// Receives an event for every check. It runs on the data path and must not wait.
pub trait Observer: fmt::Debug + Send + Sync {
    /// Receives the event of a check that was answered.
    fn observe(&self, event: &CheckEvent<'_>);
}
