//! Runs a call that waits for sidecars until it ends, is overdue, or is interrupted.

use std::time::Duration;

use super::failure::{Exit, Failure};

use crate::duration::written;

/// The reason why a call did not end normally.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// The call failed.
    Failed(Failure),
    /// Ctrl-C. The call was dropped, which the control plane notices.
    Interrupted,
}

/// The limit of a call whose wait the control plane decides: it waits until the last lost sidecar can no longer serve, which
/// is a month at most. If the control plane is gone, the connection reports it.
const DEFAULT_TIMEOUT: Duration = Duration::from_hours(62 * 24);
/// The additional time for commits and the network, after which the command expects no answer any more.
const GRACE: Duration = Duration::from_secs(30);

/// How long a command waits for the answer of a control plane that waits `timeout` for sidecars.
#[must_use]
pub(crate) fn patience(timeout: Option<Duration>) -> Duration {
    timeout.unwrap_or(DEFAULT_TIMEOUT).saturating_add(GRACE)
}

/// Runs `call` until it ends, is overdue, or is interrupted. A result that is ready has priority over a signal.
///
/// # Errors
///
/// When the call fails, is overdue, or Ctrl-C is pressed.
pub(crate) async fn watch(
    patience: Duration,
    call: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Stopped> {
    tokio::select! {
        biased;
        outcome = tokio::time::timeout(patience, call) => match outcome {
            Ok(outcome) => outcome.map_err(Stopped::Failed),
            Err(_elapsed) => Err(Stopped::Failed(overdue(patience))),
        },
        signal = tokio::signal::ctrl_c() => Err(match signal {
            Ok(()) => Stopped::Interrupted,
            Err(error) => Stopped::Failed(
                Failure::new(Exit::Failed, error).context("cannot listen for Ctrl-C"),
            ),
        }),
    }
}

fn overdue(patience: Duration) -> Failure {
    Failure::unanswered(
        Exit::TimedOut,
        anyhow::anyhow!(
            "the control plane did not answer within {}",
            written(patience)
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_outwaits_the_control_plane() {
        assert!(patience(None) > Duration::from_hours(60 * 24));
        assert_eq!(
            patience(Some(Duration::from_secs(5))),
            Duration::from_secs(35)
        );
    }

    #[tokio::test]
    async fn an_overdue_call_times_out() {
        match watch(Duration::ZERO, std::future::pending()).await {
            Err(Stopped::Failed(failure)) => {
                assert_eq!(failure.exit(), Exit::TimedOut);
                let report = failure.report(false);
                assert!(report.contains("did not answer within 0s"), "{report}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_call_that_ends_is_not_held_up() {
        assert!(watch(GRACE, async { Ok(()) }).await.is_ok());
        let failed = watch(GRACE, async { Err(Failure::failed("no")) }).await;
        assert!(matches!(failed, Err(Stopped::Failed(failure)) if failure.exit() == Exit::Failed));
    }
}
