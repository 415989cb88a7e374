//! relatch rotates API keys across a service mesh with no failed request.

pub mod authz;
pub mod clock;
pub mod config;
pub mod control;
pub mod discovery;
pub mod http;
pub mod key;
pub mod keyring;
pub mod proto;
pub mod readiness;
pub mod shutdown;
pub mod store;
pub mod telemetry;
