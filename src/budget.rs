//! A limit on the rate of events: a token bucket.

use std::time::Duration;

use crate::clock::BootTime;

/// The limits of a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// The events per second in the long run, 1 to [`Rate::MAX`].
    pub(crate) per_second: u32,
    /// The events at once, 1 to [`Rate::MAX`].
    pub(crate) burst: u32,
}

/// A token bucket: every event uses a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    rate: Rate,
    /// The tokens in thousandths, so that the tokens of a millisecond are a whole number.
    tokens: u64,
    filled_at: BootTime,
}

const THOUSANDTHS: u64 = 1_000;

impl Rate {
    /// The maximum of both values. A higher one would limit nothing: a sidecar is not asked that
    /// often, and a control plane does not answer that often.
    pub(crate) const MAX: u32 = 100_000;
}

impl Budget {
    /// Creates a full budget.
    #[must_use]
    pub(crate) fn new(rate: Rate) -> Self {
        Self {
            rate,
            tokens: capacity(rate),
            filled_at: BootTime::default(),
        }
    }

    /// Uses a token; returns false if there is none.
    pub(crate) fn take(&mut self, now: BootTime) -> bool {
        self.fill(now);
        let left = self.tokens.checked_sub(THOUSANDTHS);
        self.tokens = left.unwrap_or(self.tokens);
        left.is_some()
    }

    /// Whether there is no token.
    pub(crate) fn is_spent(&mut self, now: BootTime) -> bool {
        self.fill(now);
        self.tokens < THOUSANDTHS
    }

    /// Returns a token to the budget.
    pub(crate) fn refund(&mut self) {
        self.tokens = (self.tokens + THOUSANDTHS).min(capacity(self.rate));
    }

    fn fill(&mut self, now: BootTime) {
        let millis = now.saturating_since(self.filled_at).as_millis();
        if millis == 0 {
            return;
        }
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        let added = millis.saturating_mul(u64::from(self.rate.per_second));
        self.tokens = self.tokens.saturating_add(added).min(capacity(self.rate));
        // A fraction of a millisecond counts the next time.
        self.filled_at = self.filled_at.saturating_add(Duration::from_millis(millis));
    }
}

fn capacity(rate: Rate) -> u64 {
    u64::from(rate.burst) * THOUSANDTHS
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate {
        per_second: 10,
        burst: 3,
    };

    fn at(millis: u64) -> BootTime {
        BootTime::from_millis(millis)
    }

    fn taken(budget: &mut Budget, now: BootTime) -> usize {
        std::iter::repeat_with(|| budget.take(now))
            .take(100)
            .filter(|taken| *taken)
            .count()
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let mut budget = Budget::new(RATE);
        assert!(!budget.is_spent(at(1_000)));
        assert_eq!(taken(&mut budget, at(1_000)), 3);
        assert!(budget.is_spent(at(1_099)));
        assert_eq!(taken(&mut budget, at(1_099)), 0);
        assert!(!budget.is_spent(at(1_100)));
        assert_eq!(taken(&mut budget, at(1_100)), 1);
        assert_eq!(taken(&mut budget, at(1_300)), 2);
        assert_eq!(taken(&mut budget, at(9_000)), 3);
    }

    #[test]
    fn small_steps_fill_as_much_as_a_large_one() {
        let mut budget = Budget::new(RATE);
        assert_eq!(taken(&mut budget, at(1_000)), 3);
        let steps = (1_001..=1_300).map(|millis| taken(&mut budget, at(millis)));
        assert_eq!(steps.sum::<usize>(), 3);
    }

    #[test]
    fn a_refund_fills_no_more_than_the_burst() {
        let mut budget = Budget::new(RATE);
        assert_eq!(taken(&mut budget, at(1_000)), 3);
        budget.refund();
        assert_eq!(taken(&mut budget, at(1_000)), 1);
        for _ in 0..10 {
            budget.refund();
        }
        assert_eq!(taken(&mut budget, at(1_000)), 3);
    }
}
