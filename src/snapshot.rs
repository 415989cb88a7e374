//! The snapshot file, with which a sidecar can restart while the control plane is away.
//!
//! The file is sealed. It has every keyring that the sidecar holds in full, with tombstones and peppers. A [`Journal`]
//! receives each change from the task that applies it. A [`Keeper`], on a thread of its own, writes to the disk: first the
//! whole state, then each change as a frame at the end. [`place`] is the path of the file, [`lock`] the right to use it, and
//! [`origin`] its identity. [`seal`] encrypts and authenticates it; [`mod@write`] and [`mod@read`] are its content. At a
//! start, [`begin`] loads the state, and [`pulse`] determines its age. At an orderly stop, a [`closer`] ends the writing, and
//! erases the file if that is configured.

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
