//! The file that lets a sidecar restart without a control plane.
//!
//! It holds every keyring that the sidecar holds in full, tombstones and peppers included, and is sealed. A [`Journal`] takes
//! what was applied, from the task that applies it; a [`Keeper`], on a thread of its own, brings that to the disk: the whole
//! state at first, then what comes, each write a frame at the end. [`place`] is where the file lies, and who may use it.
//! [`seal`] makes it so that nobody can read or alter it; [`mod@write`] and [`mod@read`] are what it says. At a start, [`restore`]
//! takes the state back, and [`age`] tells how old it is.

pub mod begin;
pub mod disk;
pub mod error;
pub mod journal;
pub mod keeper;
pub mod key;
pub mod place;
pub mod pulse;
pub mod read;
pub mod recorder;
pub mod seal;
#[cfg(test)]
mod testing;
pub mod write;

pub use error::{ReadError, RefusedError};
pub use key::{KeyFileError, SnapshotKey};
