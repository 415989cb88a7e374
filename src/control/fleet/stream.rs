//! A stream of a sidecar, as the fleet knows it.

use crate::serving::{Farewell, RunKey};

/// An open stream of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenStream {
    pub(crate) run: RunKey,
    /// The number of the stream, counted from 1 within the run.
    pub(crate) number: u64,
    /// An operator had forgotten the run: it has to load its keyrings anew.
    pub(crate) was_forgotten: bool,
}

/// The way in which a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parting {
    /// The stream broke; the sidecar may connect again.
    Lost,
    /// The sidecar sent a Goodbye: its process answers no check any more.
    Goodbye(Farewell),
}
