//! How long what arrives waits for its worker, told by how late a timer of the worker is served.
//!
//! A worker takes what has arrived from one connection after the other. When more comes than it can answer, or the system
//! gives it no processor, everything waits: data and timers alike.

use std::{convert::Infallible, time::Duration};

use prometheus_client::metrics::histogram::Histogram;
use tokio::time::Instant;

use crate::seldom::Seldom;

/// Measures a worker from within.
#[derive(Debug)]
pub(super) struct DelayProbe {
    worker: usize,
    delays: Histogram,
    told: Seldom,
}

/// Often enough to see a second in which checks wait, and nothing beside the rest: ten timers a second.
const EVERY: Duration = Duration::from_millis(100);
/// Half of the time after which an Envoy gives a check up where nobody has told it otherwise.
const LATE: Duration = Duration::from_millis(100);
/// It lasts, once it has begun: a line for each measurement would only fill the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

impl DelayProbe {
    /// For worker number `worker`; `delays` takes seconds.
    pub(super) const fn new(worker: usize, delays: Histogram) -> Self {
        Self {
            worker,
            delays,
            told: Seldom::new(LOG_INTERVAL),
        }
    }

    /// Measures for as long as it is polled.
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
        // In time, twice.
        tokio::time::sleep(2 * EVERY + Duration::from_millis(10)).await;
        // Whatever the worker does now keeps it from its timers.
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
