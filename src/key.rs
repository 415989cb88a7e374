//! The domain: tokens, digests, keys and their versions. Pure: no clock, no network, no store.
//!
//! A consumer presents a [`token`]. Only its keyed [`digest`] is ever stored or compared. A
//! [`Keyring`] holds consumers and their [`Key`]s; a key has [`KeyVersion`]s, whose states and
//! transitions are in [`version`]. The state of a keyring follows from its log of [`Change`]s: an
//! [`operation`] returns changes, [`Keyring::apply`] folds them into the state, and [`rotation`]
//! plans the changes that are due by the [`policy`], the [`evidence`] of use and the time. Sidecars
//! receive each version as a [`KeyRecord`].
//!
//! Every function that depends on time has a parameter `now`.

mod base62;
pub(crate) mod change;
pub(crate) mod consumer;
pub(crate) mod digest;
pub(crate) mod evidence;
pub(crate) mod id;
pub(crate) mod idempotency;
pub(crate) mod keyring;
mod keyring_pattern;
pub(crate) mod lifetime;
pub(crate) mod note;
pub mod operation;
mod paged;
pub(crate) mod permission;
pub(crate) mod policy;
pub(crate) mod random;
pub(crate) mod record;
pub(crate) mod rotation;
mod shared;
pub(crate) mod sink_name;
pub(crate) mod time;
pub(crate) mod token;
pub mod version;
mod versions;
pub(crate) mod webhook;
pub(crate) mod wrapping;

#[cfg(test)]
pub(crate) mod history;
#[cfg(test)]
pub(crate) mod testing;

pub use change::Change;
pub(crate) use consumer::{Consumer, Key};
pub use digest::Pepper;
pub use digest::{KeyDigest, MasterPepper, PepperCheck, PepperId};
#[cfg(test)]
pub(crate) use evidence::Idleness;
pub(crate) use evidence::{Coverage, Evidence, Use};
pub use id::KeyId;
pub use id::{ConsumerId, Epoch, RotationId, VersionNumber, VersionRef};
pub use id::{KeyringName, Revision};
pub(crate) use idempotency::IdempotencyKey;
pub(crate) use keyring::{ApplyError, Keyring, KeyringHead, Touched};
pub use keyring_pattern::{KeyringPattern, ParsePatternError};
pub(crate) use lifetime::Lifetime;
pub(crate) use operation::OperationRefusal;
pub(crate) use paged::PagedMap;
pub use permission::{AllowedSources, Scope, Scopes};
pub(crate) use permission::{parse_block, permit_source};
pub(crate) use policy::OnDeadline;
pub use policy::{PolicyOverrides, RotationPolicy};
pub use random::RandomError;
pub(crate) use random::fill_random;
pub use record::KeyRecord;
pub(crate) use record::Standing;
pub use sink_name::SinkName;
pub use time::Timestamp;
pub use time::Window;
pub use token::PresentedKey;
pub use token::{Prefix, Secret};
pub use version::KeyState;
pub(crate) use version::{KeyVersion, VersionState};
pub use webhook::EventKind;
pub use webhook::Webhook;
pub use webhook::WebhookId;
pub use wrapping::Wrapping;
