//! A stream of a sidecar, as the fleet knows it.

use crate::serving::{Farewell, RunKey};

/// An open stream of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenStream {
    /// The run.
    pub(crate) run: RunKey,
    /// Counted from 1 within the run.
    pub(crate) number: u64,
    /// Somebody had forgotten the run: it has to begin anew.
    pub(crate) was_forgotten: bool,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parting {
    /// It broke; the sidecar may come back.
    Lost,
    /// With a Goodbye: the process answers no check any more.
    Goodbye(Farewell),
}
