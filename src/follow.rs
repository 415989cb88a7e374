//! The part of a sidecar that keeps its keyrings up to date.
//!
//! [`client`] keeps one stream to a control plane open and passes each message to [`receiver`],
//! which applies it to the mirrors and caches of [`crate::keyring`] and returns the answers.
//! [`reporter`] reports the use of the keys.

pub(crate) mod client;
#[cfg(test)]
mod convergence;
#[cfg(test)]
mod fills;
pub mod receiver;
pub(crate) mod reporter;
