//! The orders of the swarm for its sidecars.

/// The orders for the sidecars.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Order {
    /// The number of cuts: a sidecar breaks its stream when it grows.
    pub(crate) cuts: u64,
    /// Whether the sidecars connect again with jitter, as real ones do.
    pub(crate) jitter: bool,
    /// Whether the sidecars connect again without a state, as after a restart without a snapshot file.
    pub(crate) forget: bool,
    /// Whether the sidecars have to stop with a Goodbye.
    pub(crate) stop: bool,
}
