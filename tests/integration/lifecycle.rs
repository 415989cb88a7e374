//! The control path with the real binary: how keys come, change and go, and what outlives which process.

mod admin_port;
//command_line
mod deployment;
//dev
mod outage;
mod revocation;
mod roles;
mod rotation;
mod shutdown;
//store
mod writers;
