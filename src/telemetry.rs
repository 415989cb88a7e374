//! Metrics, spans and logs.
//!
//! [`check`] reports each check as [`metrics`], a span and a log line; [`export`] sends the spans. [`logs`] go through
//! [`lines`]. [`process`] measures the process. [`seldom`] limits log lines about events that repeat.

mod cache;
pub mod check;
pub(crate) mod enforcement;
pub(crate) mod export;
mod json;
pub(crate) mod lines;
pub(crate) mod logs;
pub mod metrics;
pub(crate) mod process;
pub(crate) mod snapshot;
