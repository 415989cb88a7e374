//! Sidecars whose reports of uses are late.

use crate::{
    key::Timestamp,
    serving::{Presence, Run, RunKey},
};

/// A sidecar that may serve and whose reports are late.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LateReporter {
    pub(crate) key: RunKey,
    pub(crate) cluster: String,
    /// Whether it is connected, lost or stopped.
    pub(crate) presence: Presence,
    /// The sidecar has reported every use before this time; none if it has reported nothing.
    pub(crate) complete_until: Option<Timestamp>,
    /// The time of the last contact with the sidecar.
    pub(crate) last_seen: Timestamp,
}

impl LateReporter {
    pub(super) fn of(key: &RunKey, run: &Run) -> Self {
        Self {
            key: key.clone(),
            cluster: run.about.cluster.clone(),
            presence: run.presence(),
            complete_until: run.complete_until,
            last_seen: run.last_seen,
        }
    }
}
