//! What a sidecar holds of its keyrings, and how it changes.
//!
//! A [`KeyringView`] is an immutable state of a keyring, and what a check sees. A [`Slot`] publishes the newest one: a
//! check loads it once. A [`Mirror`] applies what the control plane sends and publishes the next view. One mirror
//! writes to a slot, any number of checks read from it.

mod mirror;
mod slot;
mod view;

pub use mirror::{Announced, DeltaError, Mirror, Position, SnapshotBuilder, SnapshotError};
pub use slot::{Freshness, Keyrings, Slot, Staleness};
pub use view::{KeyringSettings, KeyringView};
