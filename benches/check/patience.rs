//! Waiting for something that comes true by itself.

use std::{thread, time::Duration};

use ::relatch::clock::Clock;
use anyhow::{Result, ensure};

/// Short beside everything that is timed by waiting for it, long beside a look.
const PAUSE: Duration = Duration::from_millis(5);

/// Looks again and again until there is an answer.
///
/// # Errors
///
/// When a look fails, or there is none within `timeout`.
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
