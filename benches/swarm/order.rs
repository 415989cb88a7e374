//! What the sidecars are to do.

/// What the sidecars are to do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Order {
    /// Counts the cuts: a sidecar breaks its stream when it grows.
    pub(crate) cuts: u64,
    /// Whether they come back with jitter, as real ones do.
    pub(crate) jitter: bool,
    /// Whether they come back with nothing, as after a restart without a snapshot file.
    pub(crate) forget: bool,
    /// Whether they are to say Goodbye.
    pub(crate) stop: bool,
}
