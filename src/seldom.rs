//! Messages that would fill the log if each one were logged.

use std::time::Duration;

use tokio::time::Instant;

/// Limits how often a repeated message is logged.
#[derive(Debug)]
pub(crate) struct Seldom {
    every: Duration,
    told: Option<Instant>,
}

impl Seldom {
    /// Creates a limit of one message at once, and then one per `every`.
    #[must_use]
    pub(crate) const fn new(every: Duration) -> Self {
        Self { every, told: None }
    }

    /// Whether the message is due now. If it is, the next one is due after the interval.
    pub(crate) fn is_due(&mut self) -> bool {
        let is_due = self.told.is_none_or(|told| told.elapsed() >= self.every);
        if is_due {
            self.told = Some(Instant::now());
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_told_at_once_and_then_once_in_its_time() {
        let mut seldom = Seldom::new(Duration::from_secs(10));
        let mut told = Vec::new();
        for second in 0..25 {
            if seldom.is_due() {
                told.push(second);
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(told, [0, 10, 20]);
    }
}
