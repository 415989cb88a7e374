//! What the process tells of itself and of its work.
//!
//! [`check`] makes [`metrics`], spans and a log line of each check; [`export`] sends the spans. [`logs`] go through
//! [`lines`]. [`process`] measures the process. [`seldom`] keeps what happens often from filling the log.

mod cache;
pub mod check;
pub mod export;
mod json;
pub mod lines;
pub mod logs;
pub mod metrics;
pub mod process;
pub mod snapshot;
