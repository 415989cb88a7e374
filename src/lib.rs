//! relatch rotates API keys across a service mesh with no failed request.
//!
//! # The map
//!
//! The way of a request, in a sidecar: `sidecar/grpc/connection` receives Envoy's calls, `sidecar/grpc/call` assembles the message
//! of each, and `sidecar/grpc/handler` passes it to `authz/service` and `authz/judge`. `authz/request` reads the message,
//! `authz/question` collects the credentials with `authz/credential` and chooses the keyring with `authz/route`.
//! `key/digest` hashes the key, `keyring/view` finds its record, `authz/decision` decides, `authz/response` answers, and
//! `telemetry/check` reports the decision.
//!
//! The way of a key, from an operator to every sidecar: `cli` calls `control/admin`,
//! `key/operation` plans a change, `key/keyring` folds it into the state, `control/feed` encodes
//! it, and `control/journal` commits it to the `store` before any sidecar sees it.
//! `control/stream/session` sends it, `follow/client` and `follow/receiver` receive it,
//! `keyring/mirror` applies it and publishes the next view, and `control/fleet` records the ack for
//! which `control/rotation` waits. `snapshot/recorder` and `snapshot/keeper` write it to the
//! sidecar's disk, and `sidecar/begin` loads it at a start.
//!
//! [`key`] is the domain and pure. [`authz`], [`keyring`] and the connections of [`sidecar`] are
//! the data path; [`control`] and [`follow`] are the two ends of the control path, and [`wire`]
//! contains the parts that both ends share. [`tls`] protects their connections outside this
//! machine. [`sidecar`] and [`control::plane`] assemble the daemons.

pub(crate) mod accept;
pub(crate) mod admission;
pub mod authz;
pub(crate) mod budget;
mod causes;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod core_dumps;
mod draft;
mod duration;
pub mod follow;
pub(crate) mod http;
pub mod key;
pub mod keyring;
pub(crate) mod node_name;
pub mod outbound;
mod parse;
mod preflight;
mod printable;
pub mod proto;
pub(crate) mod readiness;
#[cfg(test)]
#[path = "../tests/integration/support/reserved.rs"]
mod reserved;
pub(crate) mod secret_file;
pub(crate) mod seldom;
pub mod serving;
pub mod shutdown;
pub mod sidecar;
pub mod snapshot;
pub mod store;
pub mod telemetry;
pub(crate) mod tls;
pub(crate) mod trace;
pub mod wire;
