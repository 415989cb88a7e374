//! The keyrings that a sidecar holds, and how they change.
//!
//! A [`KeyringView`] is an immutable state of a keyring, which a check reads. A [`Slot`] publishes
//! the newest view: a check loads it once. A [`Mirror`] applies the messages of the control plane
//! and publishes the next view. One mirror writes to a slot; any number of checks read from it.
//! [`Keyrings`] has the slots of all keyrings, which can change while the sidecar runs. A
//! `Ledger` counts how often the keyring's versions were used; it outlives all views.
//!
//! The view of a keyring that is held [`on_demand`] contains no keys. A cache beside it contains
//! the keys that were looked up.

mod callers;
mod grants;
mod held;
mod keyrings;
mod mirror;
mod mode;
pub mod on_demand;
mod packed;
mod pattern_rule;
mod position;
mod shard;
mod slot;
mod tally;
mod usage;
mod usage_cell;
mod view;
mod wanted;

pub(crate) use callers::{Caller, CallerUse};
pub(crate) use held::HeldKey;
#[cfg(test)]
pub(crate) use held::OwnedKey;
pub(crate) use keyrings::SlotsObserver;
pub use keyrings::{Keyrings, Slots};
pub(crate) use keyrings::{MAX_KEYRINGS, ModeError};
pub use mirror::Announced;
pub use mirror::{Mirror, Restored};
pub(crate) use mirror::{SnapshotBuilder, SnapshotError};
pub use mode::Mode;
pub(crate) use pattern_rule::PatternRule;
pub(crate) use position::{DeltaError, KeyringPosition};
pub(crate) use slot::{Confirmation, Freshness, Look};
pub use slot::{Slot, Staleness};
pub(crate) use tally::Tally;
pub(crate) use usage::VersionUsage;
pub(crate) use usage_cell::UsageIndex;
pub use view::{KeyringSettings, KeyringView};
pub(crate) use wanted::Wanted;
