//! The control plane's end of the streams of sidecars: [`server`] accepts them, and a [`session`]
//! for each decides which message comes next.

mod not_served;
pub mod server;
pub mod session;
