//! What becomes of a connection that a listener cannot accept.

use std::{io, time::Duration};

use crate::seldom::Seldom;

/// Tells of what a listener cannot accept, and holds it back while there is room for nothing.
#[derive(Debug)]
pub(crate) struct Unaccepted {
    /// Names it in the log.
    listener: &'static str,
    failed: u64,
    told: Seldom,
}

/// The pause when there is no file descriptor for a connection, or no memory: trying at once would only burn the processor
/// until there is.
const PAUSE: Duration = Duration::from_millis(100);
/// It may last for hours: a line for each pause would only fill the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

impl Unaccepted {
    /// At a listener of this name.
    #[must_use]
    pub(crate) const fn at(listener: &'static str) -> Self {
        Self {
            listener,
            failed: 0,
            told: Seldom::new(LOG_INTERVAL),
        }
    }

    /// Takes note of a failure; the listener may be asked again when this is over. Cancellation safe.
    pub(crate) async fn note(&mut self, error: &io::Error) {
        self.failed = self.failed.saturating_add(1);
        if self.told.is_due() {
            tracing::warn!(
                listener = self.listener,
                failed = self.failed,
                error = error as &dyn std::error::Error,
                "cannot accept a connection"
            );
        }
        if !is_gone(error) {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether the client has left before it was accepted, which says nothing of the next one.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
    )
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_listener_without_file_descriptors_is_held_back() {
        let mut unaccepted = Unaccepted::at("test");
        let began = Instant::now();
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS] {
            unaccepted.note(&errno.into()).await;
        }
        assert_eq!(began.elapsed(), 4 * PAUSE);
        assert_eq!(unaccepted.failed, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_too_early_holds_nobody_up() {
        let mut unaccepted = Unaccepted::at("test");
        let began = Instant::now();
        for errno in [Errno::CONNABORTED, Errno::CONNRESET] {
            unaccepted.note(&errno.into()).await;
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
