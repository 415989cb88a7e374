//! relatch
pub mod clock;
pub mod key;
pub mod proto;
