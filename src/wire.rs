//! The parts that both ends of the stream between a control plane and its sidecars share: [`item`],
//! the encoding of a key version, [`change`] and [`settings`], the [`token`] of a sidecar without a
//! certificate, and the [`backoff`] between two attempts.

pub mod backoff;
pub(crate) mod change;
pub mod item;
pub mod settings;
#[cfg(test)]
pub(crate) mod testing;
pub mod token;
