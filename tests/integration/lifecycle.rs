//! The control path with the real binary: how keys come, change and go, and what outlives which process.

mod admin_port;
mod automation;
mod clocks;
mod command_line;
mod counting;
mod deployment;
mod dev;
mod events;
mod exactness;
mod explain;
mod life;
mod metrics;
mod outage;
mod overlap;
mod policy;
mod revocation;
mod roles;
mod rotation;
mod shutdown;
mod spans;
mod status;
mod store;
mod traffic;
mod usage;
mod webhook;
mod writers;
