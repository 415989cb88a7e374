//! The accept loop of every listener.

use std::{io, time::Duration};

use tokio::time::Instant;

use crate::seldom::Seldom;

/// Accepts the connections of one listener, logs what it cannot accept, and waits while the system has no room for a
/// connection.
#[derive(Debug)]
pub(crate) struct Acceptor {
    /// The name of the listener in the log.
    listener: &'static str,
    failed: u64,
    told: Seldom,
    paused_until: Option<Instant>,
}

/// The pause when the system has no file descriptor or no memory for a connection: a retry at once would only use up the
/// processor.
const PAUSE: Duration = Duration::from_millis(100);
/// Such a shortage can last for hours: a line for each pause would only fill the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

impl Acceptor {
    /// An acceptor for the listener that the log calls `listener`.
    #[must_use]
    pub(crate) const fn new(listener: &'static str) -> Self {
        Self {
            listener,
            failed: 0,
            told: Seldom::new(LOG_INTERVAL),
            paused_until: None,
        }
    }

    /// Waits for the next connection that `accept` returns. Cancellation safe if `accept` is.
    pub(crate) async fn next<T, F>(&mut self, accept: impl Fn() -> F) -> T
    where
        F: Future<Output = io::Result<T>>,
    {
        loop {
            if let Some(until) = self.paused_until {
                tokio::time::sleep_until(until).await;
                self.paused_until = None;
            }
            match accept().await {
                Ok(connection) => return connection,
                Err(error) => self.failed(&error),
            }
        }
    }

    fn failed(&mut self, error: &io::Error) {
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
            self.paused_until = Some(Instant::now() + PAUSE);
        }
    }
}

/// Whether the client closed the connection before it was accepted, which says nothing about the next one.
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
    use std::{cell::RefCell, future};

    use rustix::io::Errno;

    use super::*;

    /// The time until a listener that fails with `errors` has a connection.
    async fn wait_after(errors: &[Errno]) -> Duration {
        let errors = RefCell::new(errors.iter());
        let began = Instant::now();
        Acceptor::new("test")
            .next(|| {
                let error = errors.borrow_mut().next();
                future::ready(error.map_or(Ok(()), |errno| Err((*errno).into())))
            })
            .await;
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_listener_without_file_descriptors_waits() {
        let errors = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
        assert_eq!(wait_after(&errors).await, 4 * PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_too_early_delays_nobody() {
        let errors = [Errno::CONNABORTED, Errno::CONNRESET];
        assert_eq!(wait_after(&errors).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_survives_cancellation() {
        let mut acceptor = Acceptor::new("test");
        let fails = || future::ready(Err::<(), _>(Errno::MFILE.into()));
        let cut = tokio::time::timeout(PAUSE / 2, acceptor.next(fails)).await;
        assert!(cut.is_err(), "it has no connection");
        let began = Instant::now();
        acceptor.next(|| future::ready(Ok(()))).await;
        assert_eq!(began.elapsed(), PAUSE / 2);
    }
}
