//! What the daemons have in common: logs, signals, and how their end is told.

use std::{error::Error, time::Duration};

use super::{Exit, Failure};
use crate::{
    config::{ConfigError, LogSettings},
    shutdown::{Shutdown, Signals},
    telemetry::{lines::LinesGuard, logs},
};

/// How long tasks may take to end. Envoy finishes its checks in milliseconds; Kubernetes kills after 30 seconds.
pub(super) const DRAIN: Duration = Duration::from_secs(10);
/// How long the last spans may take.
pub(super) const FLUSH: Duration = Duration::from_secs(3);

/// Begins to log. Hold the guard until the process ends.
///
/// # Errors
///
/// When something logs already.
pub(super) fn log(settings: LogSettings) -> Result<LinesGuard, Failure> {
    logs::init(settings).map_err(Failure::from_error)
}

/// Begins to listen for SIGTERM and SIGINT.
///
/// # Errors
///
/// When the system does not let us.
pub(super) fn signals() -> Result<Signals, Failure> {
    Signals::listen().map_err(Failure::from_error)
}

/// A daemon could not be started; what was started of it is told to stop.
pub(super) fn stopped(shutdown: &Shutdown, error: impl Error + Send + Sync + 'static) -> Failure {
    shutdown.trigger();
    Failure::from_error(error)
}

/// A configuration file is not right.
#[must_use]
pub(super) fn misconfigured(error: ConfigError) -> Failure {
    Failure::new(Exit::Usage, error)
}
