//! The wait before the next attempt to connect.

use std::time::Duration;

/// Doubles the range of the wait with every failure and draws from the whole range, so that
/// sidecars that lost the same control plane do not reconnect at the same moment.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The range of the first wait: 100 ms.
    pub const FIRST: Duration = Duration::from_millis(100);
    /// The largest range: a sidecar finds a control plane that is back within half a minute.
    pub(crate) const MAX: Duration = Duration::from_secs(30);
    /// The range of the wait after an end that is not a failure, while the control plane continues.
    /// Sidecars whose certificates were issued together lose them in the same second: a thousand
    /// handshakes, at about a millisecond of processor time each, need a second. The sidecars that
    /// wait answer checks meanwhile.
    pub(crate) const PLANNED: Duration = Duration::from_secs(1);

    /// Returns the wait after one more failure, uniform in `(0, range]`; `random` is uniform.
    #[must_use]
    pub fn next(&mut self, random: u32) -> Duration {
        let range = Self::FIRST
            .saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX))
            .min(Self::MAX);
        self.failures = self.failures.saturating_add(1);
        drawn(range, random)
    }

    /// Resets the count of failures.
    pub(crate) const fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Returns a wait from the whole of `(0, range]`; `random` is uniform.
#[must_use]
pub fn drawn(range: Duration, random: u32) -> Duration {
    range.mul_f64((f64::from(random) + 1.0) / (f64::from(u32::MAX) + 1.0))
}

/// Returns a uniform random number. If the random source fails, it returns the middle of the range,
/// so that the next attempt is still made.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the home of jitter")]
pub fn random() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_doubles_up_to_its_bound() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..12).map(|_| backoff.next(u32::MAX)).collect();
        let expected = [
            100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000, 30_000,
        ];
        assert_eq!(waits, expected.map(Duration::from_millis));
    }

    #[test]
    fn the_wait_is_drawn_from_the_whole_range() {
        let mut backoff = Backoff::default();
        assert!(backoff.next(0) < Duration::from_millis(1));
        assert_eq!(backoff.next(u32::MAX / 2), Duration::from_millis(100));
    }

    #[test]
    fn a_reset_ends_the_series() {
        let mut backoff = Backoff::default();
        let _ = (backoff.next(0), backoff.next(0));
        assert_eq!(backoff.next(u32::MAX), Duration::from_millis(400));
        backoff.reset();
        assert_eq!(backoff.next(u32::MAX), Backoff::FIRST);
    }

    #[test]
    fn many_failures_do_not_overflow() {
        let mut backoff = Backoff { failures: u32::MAX };
        assert_eq!(backoff.next(u32::MAX), Backoff::MAX);
    }
}
