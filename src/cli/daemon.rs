//! The common parts of the daemons: the log, signals, and errors of the start.

use std::{error::Error, time::Duration};

use super::{Exit, Failure};
use crate::{
    config::{ConfigError, LogSettings},
    shutdown::{Shutdown, Signals},
    telemetry::logs::{self, Log},
};

/// The longest time for tasks to end. Checks take milliseconds, and Kubernetes kills a process after 30 seconds.
pub(super) const DRAIN: Duration = Duration::from_secs(10);
/// The longest time to send the last spans.
pub(super) const FLUSH: Duration = Duration::from_secs(3);

/// Sets up the log. The caller keeps it until the process ends.
///
/// # Errors
///
/// When the log is already set up.
pub(super) fn log(settings: LogSettings) -> Result<Log, Failure> {
    logs::init(settings).map_err(Failure::from_error)
}

/// Starts to listen for SIGTERM and SIGINT.
///
/// # Errors
///
/// When the system refuses.
pub(super) fn signals() -> Result<Signals, Failure> {
    Signals::listen().map_err(Failure::from_error)
}

/// The failure of a daemon that could not start. The parts that were already started are told to stop.
pub(super) fn stopped(shutdown: &Shutdown, error: impl Error + Send + Sync + 'static) -> Failure {
    shutdown.abandon();
    Failure::from_error(error)
}

/// The failure of a configuration file that is not valid.
#[must_use]
pub(super) fn misconfigured(error: ConfigError) -> Failure {
    Failure::new(Exit::Usage, error)
}
