//! Waits for a condition by polling.

use std::{thread, time::Duration};

use ::relatch::clock::Clock;
use anyhow::{Result, ensure};

/// The interval of polling: short in comparison with everything that is timed so, long in comparison with one poll.
const PAUSE: Duration = Duration::from_millis(5);

/// Polls until there is an answer.
///
/// # Errors
///
/// When a poll fails, or when there is no answer within `timeout`.
pub(crate) fn until<T>(
    what: &str,
    timeout: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let clock = Clock::system();
    let began = clock.boot();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        let waited = clock.boot().saturating_since(began);
        ensure!(waited < timeout, "{what}: not within {timeout:?}");
        thread::sleep(PAUSE);
    }
}
