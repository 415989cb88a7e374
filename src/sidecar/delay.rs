//! The scheduling delay of a worker: how long arrived data waits, measured as the lateness of a
//! timer on the same worker.
//!
//! A worker reads arrived data from one connection after the other. If more arrives than it can
//! answer, or the system gives it no processor time, data and timers wait equally.

use std::{convert::Infallible, time::Duration};

use prometheus_client::metrics::histogram::Histogram;
use tokio::time::Instant;

use crate::seldom::Seldom;

/// Measures the delay of a worker, as a task on that worker.
#[derive(Debug)]
pub(super) struct DelayProbe {
    worker: usize,
    delays: Histogram,
    told: Seldom,
}

/// The interval of the measurements. Ten timers a second are enough to notice a second in which
/// checks wait, and cost almost nothing.
const EVERY: Duration = Duration::from_millis(100);
/// The delay from which a warning is logged: half of the time after which Envoy cancels a check by
/// default.
const LATE: Duration = Duration::from_millis(100);
/// The minimum time between two warnings. A delay usually lasts: a line for each measurement would
/// only fill the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

impl DelayProbe {
    /// Creates a probe for worker number `worker`. It observes in `delays`, in seconds.
    pub(super) const fn new(worker: usize, delays: Histogram) -> Self {
        Self {
            worker,
            delays,
            told: Seldom::new(LOG_INTERVAL),
        }
    }

    /// Measures while it is polled.
    pub(super) async fn run(mut self) -> Infallible {
        loop {
            let due = Instant::now() + EVERY;
            tokio::time::sleep_until(due).await;
            self.note(due.elapsed());
        }
    }

    fn note(&mut self, delay: Duration) {
        self.delays.observe(delay.as_secs_f64());
        if delay >= LATE && self.told.is_due() {
            tracing::warn!(
                worker = self.worker,
                delay_ms = delay.as_millis(),
                "checks wait for their worker: it receives more than it can answer, or has too little processor time"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_is_busy_is_found_out() {
        let delays = Histogram::new([0.05, 0.5]);
        let probe = DelayProbe::new(0, delays.clone());
        let task = tokio::spawn(probe.run());
        // Two timers are served in time.
        tokio::time::sleep(2 * EVERY + Duration::from_millis(10)).await;
        // The worker is busy and serves no timer.
        tokio::time::advance(EVERY + Duration::from_millis(200)).await;
        tokio::task::yield_now().await;
        task.abort();
        let text = encoded(delays);
        for line in [
            "delay_bucket{le=\"0.05\"} 2",
            "delay_bucket{le=\"0.5\"} 3",
            "delay_count 3",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in {text}");
        }
    }

    fn encoded(delays: Histogram) -> String {
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register("delay", "", delays);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text is writable");
        text
    }
}
