//! A stream that the fleet counts.

use std::sync::Arc;

use crate::control::fleet::{Fleet, OpenStream, Parting};

/// A stream of a sidecar that the fleet counts until this is dropped. The sidecar is then lost,
/// unless the stream [ended](Self::end) in another way. However a call ends, through a client that
/// disconnects or a task that is dropped, its stream is no longer counted.
#[derive(Debug)]
pub(super) struct Counted {
    fleet: Arc<Fleet>,
    stream: OpenStream,
    parting: Parting,
}

impl Counted {
    /// Wraps the stream that [`Fleet::connected`] has just counted.
    pub(super) const fn new(fleet: Arc<Fleet>, stream: OpenStream) -> Self {
        Self {
            fleet,
            stream,
            parting: Parting::Lost,
        }
    }

    /// Ends the stream with `parting`.
    pub(super) fn end(mut self, parting: Parting) {
        self.parting = parting;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.fleet.disconnected(&self.stream, self.parting);
    }
}
