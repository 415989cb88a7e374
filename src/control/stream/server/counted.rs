//! A stream that the fleet counts.

use std::sync::Arc;

use crate::control::fleet::{Fleet, OpenStream, Parting};

/// A stream of a sidecar, counted by the fleet until this is dropped. It is lost then, unless it [ended](Self::end) in
/// another way. Whatever becomes of a call, a client that leaves or a task that is dropped, its stream is counted no longer.
#[derive(Debug)]
pub(super) struct Counted {
    fleet: Arc<Fleet>,
    stream: OpenStream,
    parting: Parting,
}

impl Counted {
    /// The stream that [`Fleet::connected`] has just counted.
    pub(super) const fn new(fleet: Arc<Fleet>, stream: OpenStream) -> Self {
        Self {
            fleet,
            stream,
            parting: Parting::Lost,
        }
    }

    /// The stream has ended like this.
    pub(super) fn end(mut self, parting: Parting) {
        self.parting = parting;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.fleet.disconnected(&self.stream, self.parting);
    }
}
