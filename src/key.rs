//! The domain: tokens, digests, keys and their versions. Pure: no clock, no network, no store.
//!
//! A [`token`] is what a consumer presents. Its keyed [`digest`] is all that is ever stored or compared. A [`Keyring`]
//! holds consumers and their [`Key`]s; a key has [`KeyVersion`]s, whose states and transitions are in [`version`]. A
//! keyring is what its log of [`Change`]s says: an [`operation`] returns changes, [`Keyring::apply`] folds them, and
//! [`rotation`] plans those that the [`policy`], the [`evidence`] of use and the time make due. A [`KeyRecord`] is what
//! sidecars are told of a version.
//!
//! Every function that depends on time takes `now`.

pub mod change;
pub mod consumer;
pub mod digest;
pub mod evidence;
pub mod id;
pub mod idempotency;
pub mod keyring;
pub mod lifetime;
pub mod note;
pub mod operation;
mod paged;
pub mod permission;
pub mod policy;
pub mod record;
pub mod rotation;
mod shared;
pub mod time;
pub mod token;
pub mod version;
mod versions;
pub mod webhook;

#[cfg(test)]
pub(crate) mod history;
#[cfg(test)]
pub(crate) mod testing;

pub use change::Change;
pub use consumer::{Consumer, Key};
pub use digest::{KeyDigest, MasterPepper, Pepper, PepperCheck, PepperId};
pub use evidence::{Coverage, Evidence, Idleness, Use};
pub use id::{
    ConsumerId, Epoch, KeyId, KeyringName, Revision, RotationId, VersionNumber, VersionRef,
};
pub use idempotency::IdempotencyKey;
pub use keyring::{ApplyError, Keyring, KeyringHead, Touched};
pub use lifetime::Lifetime;
pub use note::Note;
pub use operation::Refusal;
pub use paged::{PagedMap, PagedSet};
pub(crate) use permission::permit_source;
pub use permission::{AllowedSources, Scope, Scopes};
pub use policy::{OnDeadline, PolicyOverrides, RotationPolicy, SinkName};
pub use record::{KeyRecord, Standing};
pub use time::{Timestamp, Window};
pub(crate) use token::fill_random;
pub use token::{Prefix, PresentedKey, RandomError, Secret};
pub use version::{KeyState, KeyVersion, VersionState};
pub use versions::Versions;
pub use webhook::{EventKind, Webhook, WebhookId};
