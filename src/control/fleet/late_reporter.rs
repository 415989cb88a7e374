//! Sidecars whose reports of uses are late.

use crate::{
    key::Timestamp,
    serving::{Presence, Run, RunKey},
};

/// A sidecar that may serve and whose reports lag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LateReporter {
    /// The run.
    pub(crate) key: RunKey,
    /// Its cluster.
    pub(crate) cluster: String,
    /// Whether it is connected, lost or stopped.
    pub(crate) presence: Presence,
    /// It has reported every use before this moment; none when it has reported nothing.
    pub(crate) complete_until: Option<Timestamp>,
    /// When it was last heard of.
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
