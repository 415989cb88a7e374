//! What the process tells of itself and of its work.
//!
//! [`check`] makes [`metrics`], spans and a log line of each check; [`export`] sends the spans. [`logs`] go through
//! [`lines`]. [`process`] measures the process. [`seldom`] keeps what happens often from filling the log.

mod cache;
pub mod check;
pub(crate) mod export;
mod json;
pub(crate) mod lines;
pub(crate) mod logs;
pub mod metrics;
pub(crate) mod process;
pub(crate) mod snapshot;
