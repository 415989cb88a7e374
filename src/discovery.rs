//! How keyrings reach sidecars.
//!
//! On the sidecar's side [`client`] keeps one stream to a control plane open and hands what comes to [`receiver`], which
//! applies it to the mirrors and caches of [`crate::keyring`] and answers; [`reporter`] tells how the keys are used. On the
//! control plane's side [`server`] accepts streams, and a [`session`] per stream decides what to send next. Both ends share
//! [`item`], the form in which a key version travels, [`change`] and [`settings`], and the [`token`] of a sidecar without a certificate.

pub mod backoff;
pub mod change;
pub mod client;
#[cfg(test)]
mod convergence;
#[cfg(test)]
mod fills;
pub mod item;
pub mod receiver;
pub mod reporter;
pub mod server;
pub mod session;
pub mod settings;
#[cfg(test)]
pub(crate) mod testing;
pub mod token;
