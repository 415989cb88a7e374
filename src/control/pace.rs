//! The time by which planned ends come: the wall clock, unless it has just jumped ahead.
//!
//! A wall clock that is set ahead by mistake would end overlaps too early. A jump ahead is
//! therefore trusted only after it has lasted for an hour; until then time continues at its usual
//! pace. A clock that is set back is trusted at once: planned ends then come later, never earlier.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::{
    clock::{BootTime, Clock},
    key::Timestamp,
};

/// Follows a wall clock, and follows its jumps ahead only after [`Pace::TRUST_AFTER`].
#[derive(Debug)]
pub struct Pace {
    clock: Clock,
    steady: Mutex<Steady>,
}

/// The readings of both clocks when the wall clock was last trusted.
#[derive(Clone, Copy, Debug)]
struct Steady {
    wall: Timestamp,
    boot: BootTime,
    /// The time since which the wall clock is ahead of the expected time.
    ahead_since: Option<BootTime>,
}

impl Pace {
    /// How long a jump ahead has to last: long enough for people to see the alarm and set the clock
    /// right.
    pub(crate) const TRUST_AFTER: Duration = Duration::from_hours(1);
    /// The least jump ahead: a clock that is slewed, or read late, is ahead by less.
    const TOLERANCE: Duration = Duration::from_secs(10);

    /// Returns a pace that trusts `clock` as it stands.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        let steady = Steady {
            wall: clock.wall(),
            boot: clock.boot(),
            ahead_since: None,
        };
        Self {
            clock,
            steady: Mutex::new(steady),
        }
    }

    /// Returns the time by which planned ends come. It must be called more often than a clock is
    /// slewed by the tolerance.
    #[must_use]
    pub(crate) fn now(&self) -> Timestamp {
        let (wall, boot) = (self.clock.wall(), self.clock.boot());
        let mut steady = self.steady.lock().unwrap_or_else(PoisonError::into_inner);
        let expected = steady
            .wall
            .saturating_add(boot.saturating_since(steady.boot));
        let is_ahead = wall.saturating_since(expected) > Self::TOLERANCE;
        let stood = |since| boot.saturating_since(since) >= Self::TRUST_AFTER;
        match steady.ahead_since {
            None if is_ahead => {
                steady.ahead_since = Some(boot);
                tracing::error!(
                    by_ms = wall.saturating_since(expected).as_millis(),
                    "the wall clock jumped ahead; for an hour, no version retires by the new time: check the clock of this machine"
                );
                expected
            }
            Some(since) if is_ahead && !stood(since) => expected,
            Some(_) | None => {
                *steady = Steady {
                    wall,
                    boot,
                    ahead_since: None,
                };
                wall
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    #[test]
    fn time_goes_on_at_its_pace_while_the_clock_is_ahead() {
        let start = Timestamp::from_millis(1_000_000_000);
        let (clock, hands) = Clock::manual(start);
        let pace = Pace::new(clock);
        hands.advance(DAY);
        assert_eq!(pace.now(), start.saturating_add(DAY));
        hands.set_wall(start.saturating_add(400 * DAY));
        assert_eq!(pace.now(), start.saturating_add(DAY));
        hands.advance(Duration::from_mins(59));
        let hour_later = start.saturating_add(DAY + Duration::from_mins(59));
        assert_eq!(pace.now(), hour_later);
        hands.advance(Duration::from_mins(1));
        let believed = start.saturating_add(400 * DAY + Duration::from_hours(1));
        assert_eq!(pace.now(), believed);
    }

    #[test]
    fn a_clock_that_is_set_right_again_is_believed_at_once() {
        let start = Timestamp::from_millis(1_000_000_000);
        let (clock, hands) = Clock::manual(start);
        let pace = Pace::new(clock);
        hands.set_wall(start.saturating_add(DAY));
        assert_eq!(pace.now(), start);
        hands.set_wall(start);
        assert_eq!(pace.now(), start);
        hands.set_wall(start.saturating_add(DAY));
        hands.advance(Duration::from_mins(59));
        assert_eq!(pace.now(), start.saturating_add(Duration::from_mins(59)));
    }

    #[test]
    fn a_clock_that_is_set_back_is_followed() {
        let start = Timestamp::from_millis(1_000_000_000);
        let (clock, hands) = Clock::manual(start);
        let pace = Pace::new(clock);
        let back = start.saturating_sub(DAY);
        hands.set_wall(back);
        assert_eq!(pace.now(), back);
        hands.advance(DAY);
        assert_eq!(pace.now(), start);
    }
}
