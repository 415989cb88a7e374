//! Steps of the wall clock, reported when they happen.

use std::io;

use rustix::{
    io::Errno,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};
use tokio::{net::unix::pipe, sync::watch};

/// Waits for steps of the wall clock. It steps when somebody sets it, and when the machine resumes
/// from suspend. A clock that is slewed does not step.
#[derive(Debug)]
pub(crate) struct Steps(Source);

#[derive(Debug)]
enum Source {
    /// A timer for the end of time. A step of its clock cancels it: see `TFD_TIMER_CANCEL_ON_SET`
    /// in `timerfd_create(2)`. The descriptor is not a pipe, but waiting and reading work in the
    /// same way. Of the runtime's types, this one has no other requirements for a descriptor, and
    /// registers it without unsafe code.
    System(pipe::Receiver),
    Manual(watch::Receiver<u64>),
    /// The system does not report steps.
    Untold,
}

impl Steps {
    pub(super) fn system() -> Self {
        Self(match timer() {
            Ok(timer) => Source::System(timer),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the system does not report steps of the wall clock; this sidecar detects them at its next beat"
                );
                Source::Untold
            }
        })
    }

    pub(super) const fn manual(steps: watch::Receiver<u64>) -> Self {
        Self(Source::Manual(steps))
    }

    /// Waits for the next step. Cancel safe: a step is not lost.
    pub(crate) async fn next(&mut self) {
        loop {
            match &mut self.0 {
                Source::System(timer) => match stepped(timer).await {
                    Ok(true) => return,
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "the system stopped reporting steps of the wall clock; this sidecar detects them at its next beat"
                        );
                        self.0 = Source::Untold;
                    }
                },
                Source::Manual(steps) => match steps.changed().await {
                    Ok(()) => return,
                    Err(_) => self.0 = Source::Untold,
                },
                Source::Untold => std::future::pending().await,
            }
        }
    }
}

fn timer() -> io::Result<pipe::Receiver> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
    let never = Itimerspec {
        it_interval: Timespec::default(),
        it_value: Timespec {
            tv_sec: i64::MAX,
            tv_nsec: 0,
        },
    };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    timerfd_settime(&timer, flags, &never)?;
    pipe::Receiver::from_owned_fd_unchecked(timer)
}

/// Waits until the timer is readable, and returns whether it was a step. The kernel arms a
/// cancelled timer again when it is read.
async fn stepped(timer: &pipe::Receiver) -> io::Result<bool> {
    timer.readable().await?;
    let mut expirations = [0; 8];
    match timer.try_read(&mut expirations) {
        Err(error) if error.raw_os_error() == Some(Errno::CANCELED.raw_os_error()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other(
            "the timer for the end of time has expired",
        )),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use crate::{clock::Clock, key::Timestamp};

    use super::{Source, Steps};

    fn has_stepped(steps: &mut Steps) -> bool {
        steps.next().now_or_never().is_some()
    }

    #[tokio::test]
    async fn a_step_is_reported_once_and_time_that_passes_is_none() {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(5_000));
        hands.set_wall(Timestamp::from_millis(4_000));
        let mut steps = clock.steps();
        assert!(!has_stepped(&mut steps), "it was before");
        hands.advance(std::time::Duration::from_hours(1));
        assert!(!has_stepped(&mut steps));
        for wall in [9_000, 1_000] {
            hands.set_wall(Timestamp::from_millis(wall));
            assert!(has_stepped(&mut steps));
            assert!(!has_stepped(&mut steps));
        }
    }

    /// A test cannot set the clock of the machine. This test shows that the timer is armed, and
    /// reports no step.
    #[tokio::test]
    async fn the_system_reports_no_step_where_there_is_none() {
        let mut steps = Clock::system().steps();
        assert!(matches!(steps.0, Source::System(_)), "{steps:?}");
        assert!(!has_stepped(&mut steps));
        tokio::task::yield_now().await;
        assert!(!has_stepped(&mut steps));
        assert!(matches!(steps.0, Source::System(_)), "{steps:?}");
    }
}
