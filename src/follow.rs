//! How a sidecar follows its keyrings.
//!
//! [`client`] keeps one stream to a control plane open and passes what comes to [`receiver`], which applies it to the mirrors
//! and caches of [`crate::keyring`] and answers; [`reporter`] reports how the keys are used.

pub(crate) mod client;
#[cfg(test)]
mod convergence;
#[cfg(test)]
mod fills;
pub mod receiver;
pub(crate) mod reporter;
