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
mod shard;
mod slot;
mod usage;
mod view;

pub use callers::{Caller, CallerUse, MAX_CALLERS};
pub use held::{HeldKey, OwnedKey};
pub use mirror::{
    Announced, DeltaError, Mirror, Position, Restored, SnapshotBuilder, SnapshotError,
};
pub use slot::{Confirmation, Freshness, Keyrings, Look, Mode, Slot, Staleness};
pub use usage::{Ledger, UsageIndex, VersionUsage};
pub use view::{KeyringSettings, KeyringView};
