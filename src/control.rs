//! The control plane: owns keyrings and brings their changes to every sidecar.
//!
//! The way of a change: [`admin`] checks who asks for what; an operation of [`crate::key`] plans it; a [`journal`]
//! commits it to the store at the revision that the plan saw, and folds it into the keyring that is [`served`]; its
//! [`feed`] encodes it once; the sessions of [`stream`] bring it to the sidecars, whose acks the [`fleet`]
//! notes; a [`rotation`] waits for them. What a call has handed out, `calls` keeps for a while. A [`sink`] takes the secret of a rotation that no caller waits for. The
//! [`catalog`] holds all keyrings together, the [`reconciler`] commits what time makes due, [`webhook`]s are told of what
//! was committed, and [`plane`] puts the parts together, on the [`data`] that one process owns.

pub(crate) mod admin;
pub(crate) mod bearers;
pub(crate) mod bells;
pub(crate) mod calls;
pub mod catalog;
pub mod data;
pub(crate) mod feed;
pub mod fleet;
pub mod journal;
pub(crate) mod keeper;
mod key_collector;
pub mod metrics;
pub mod pace;
pub mod plane;
mod port;
pub(crate) mod reads;
pub(crate) mod reconciler;
pub(crate) mod rotation;
pub(crate) mod saved;
pub(crate) mod schedule;
pub mod secrets;
pub mod served;
pub mod sink;
pub(crate) mod spans;
pub(crate) mod steps;
pub mod stream;
pub mod token;
pub mod usage;
pub mod webhook;
