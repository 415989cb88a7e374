//! What a sidecar holds of its keyrings, and how it changes.
//!
//! A [`KeyringView`] is an immutable state of a keyring, and what a check sees. A [`Slot`] publishes the newest one: a
//! check loads it once. A [`Mirror`] applies what the control plane sends and publishes the next view. One mirror
//! writes to a slot, any number of checks read from it. A [`Ledger`] counts how often its key versions were used; it
//! outlives all views.
//!
//! A keyring that is held [`on_demand`] has a view without keys, and a cache of those that were looked up beside it.

mod callers;
mod grants;
mod held;
mod mirror;
pub mod on_demand;
mod packed;
mod position;
mod shard;
mod slot;
mod usage;
mod usage_cell;
mod view;

pub(crate) use callers::{Caller, CallerUse};
pub(crate) use held::HeldKey;
#[cfg(test)]
pub(crate) use held::OwnedKey;
pub use mirror::Announced;
pub use mirror::{Mirror, Restored};
pub(crate) use mirror::{SnapshotBuilder, SnapshotError};
pub(crate) use position::{DeltaError, Position};
pub use slot::Keyrings;
pub(crate) use slot::{Confirmation, Freshness, Look};
pub use slot::{Mode, Slot, Staleness};
pub(crate) use usage::VersionUsage;
pub(crate) use usage_cell::UsageIndex;
pub use view::{KeyringSettings, KeyringView};
