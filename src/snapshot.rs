//! The file that lets a sidecar restart without a control plane.
//!
//! It holds every keyring that the sidecar holds in full, tombstones and peppers included, and is sealed. A [`Journal`] takes
//! what was applied, from the task that applies it; a [`Keeper`], on a thread of its own, brings that to the disk: the whole
//! state at first, then what comes, each write a frame at the end. [`place`] is where the file lies, [`lock`] who may use it,
//! and [`origin`] which file it is. [`seal`] makes it so that nobody can read or alter it; [`mod@write`] and [`mod@read`] are what
//! it says. At a start, [`begin`] takes the state back, and [`pulse`] tells how old it is. At an orderly stop, a [`closer`]
//! removes it, where that is configured.

pub(crate) mod closer;
pub(crate) mod disk;
pub(crate) mod durable;
pub(crate) mod error;
pub(crate) mod journal;
pub(crate) mod keeper;
pub(crate) mod key;
pub(crate) mod lock;
pub mod origin;
pub(crate) mod place;
pub mod pulse;
pub mod read;
pub(crate) mod recorder;
pub mod seal;
#[cfg(test)]
mod testing;
pub mod write;

pub(crate) use error::ReadError;
pub use key::{KeyFileError, SnapshotKey};
