//! The standard streams of a command.

use std::io::{self, Write as _};

use super::failure::{Exit, Failure};

/// Writes to standard output without a delay.
///
/// # Errors
///
/// When it cannot be written to.
pub(super) fn write_out(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| {
            Failure::new(Exit::Failed, error).context("cannot write to standard output")
        })
}

/// Writes to standard error. An error of the write is ignored: the exit code still reports the result of the command.
pub fn write_err(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}
