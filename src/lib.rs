//! relatch
pub mod clock;
pub mod key;
pub mod keyring;
pub mod proto;
