//! The control plane: owns keyrings and sends their changes to every sidecar.
//!
//! The way of a change: [`admin`] checks whether the caller may make it, and an operation of
//! [`crate::key`] plans it. A [`journal`] commits it to the store at the revision that the plan
//! saw, and folds it into the keyring that is [`served`]. The [`feed`] of the keyring encodes it
//! once, and the sessions of [`stream`] send it to the sidecars. The [`fleet`] notes their acks,
//! and a [`rotation`] waits for them. `calls` keeps what a call has handed out for a while. A
//! [`sink`] receives the secret of a rotation that no caller waits for. The [`catalog`] holds all
//! keyrings. The [`reconciler`] commits changes when they are due, and [`webhook`]s receive events
//! about commits. [`plane`] puts the parts together, on the [`data`] that one process owns.

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
