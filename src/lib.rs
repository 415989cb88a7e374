//! relatch rotates API keys across a service mesh with no failed request.

pub mod clock;
pub mod key;
pub mod keyring;
pub mod proto;
pub mod store;
