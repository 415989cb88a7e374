//! The gRPC connections of Envoy.
//!
//! A [`connection`], whose share of the worker is [`advertised`], accepts [`call`]s. The
//! [`message`] of each call goes to a [`handler`], which answers with a [`reply`]. Other methods
//! than `Check` are [`relay`]ed to tonic.

mod advertised;
pub(super) mod call;
pub(super) mod connection;
pub(super) mod handler;
mod keepalive;
mod message;
mod relay;
mod reply;
