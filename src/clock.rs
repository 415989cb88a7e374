//! The clocks: the one place where time is read.
//!
//! Validity is judged by the wall clock, staleness and durations by a clock that only runs forward and counts the time
//! in which the machine was suspended.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rustix::time::{ClockId, clock_gettime};

use crate::key::Timestamp;

/// Reads both clocks; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Clock(Source);

/// Time since the machine's boot (`CLOCK_BOOTTIME`): runs forward only and counts suspend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

/// The hands of a [`Clock`] that tests turn.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Mutex<Hands>>);

#[derive(Clone, Debug, Default)]
enum Source {
    #[default]
    System,
    Manual(ManualClock),
}

#[derive(Clone, Copy, Debug)]
struct Hands {
    wall: SystemTime,
    boot: BootTime,
}

impl Clock {
    /// The machine's clocks.
    #[must_use]
    pub const fn system() -> Self {
        Self(Source::System)
    }

    /// Clocks that stand at `wall` until they are turned.
    #[must_use]
    pub fn manual(wall: Timestamp) -> (Self, ManualClock) {
        let boot = BootTime(Duration::from_secs(1));
        let wall = wall.into();
        let hands = ManualClock(Arc::new(Mutex::new(Hands { wall, boot })));
        (Self(Source::Manual(hands.clone())), hands)
    }

    /// The wall clock in whole milliseconds, by which validity is judged.
    #[must_use]
    pub fn wall(&self) -> Timestamp {
        self.system_time().into()
    }

    /// The wall clock as finely as it runs, for the start of a span: a check takes microseconds.
    #[must_use]
    pub fn system_time(&self) -> SystemTime {
        match &self.0 {
            Source::System => system_time(),
            Source::Manual(hands) => hands.read().wall,
        }
    }

    /// The clock that runs forward only.
    #[must_use]
    pub fn boot(&self) -> BootTime {
        match &self.0 {
            Source::System => {
                let now = clock_gettime(ClockId::Boottime);
                let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
                let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
                BootTime(Duration::new(seconds, nanos))
            }
            Source::Manual(hands) => hands.read().boot,
        }
    }
}

impl BootTime {
    /// The time since the boot in whole milliseconds.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// The point `millis` milliseconds after the boot.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// The time since `earlier`; zero when that lies ahead.
    #[must_use]
    pub const fn saturating_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// The point `duration` earlier, not before the boot.
    #[must_use]
    pub const fn saturating_sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(duration))
    }

    /// The point `duration` later.
    #[must_use]
    pub const fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

impl ManualClock {
    /// Lets `duration` pass on both clocks.
    pub fn advance(&self, duration: Duration) {
        let mut hands = self.lock();
        // Held where a timestamp is held; no test goes beyond.
        let end = SystemTime::from(Timestamp::from_millis(i64::MAX));
        hands.wall = hands
            .wall
            .checked_add(duration)
            .map_or(end, |wall| wall.min(end));
        hands.boot = hands.boot.saturating_add(duration);
    }

    /// Steps the wall clock alone.
    pub fn set_wall(&self, wall: Timestamp) {
        self.lock().wall = wall.into();
    }

    fn read(&self) -> Hands {
        *self.lock()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Hands> {
        self.0.lock().expect("no holder of the hands panics")
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the clock's home")]
fn system_time() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_clocks_run() {
        let clock = Clock::system();
        let (wall, boot) = (clock.wall(), clock.boot());
        assert!(wall > Timestamp::from_millis(1_700_000_000_000));
        assert!(clock.boot() >= boot);
    }

    #[test]
    fn a_step_of_the_wall_clock_leaves_the_other_alone() {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(5_000));
        let boot = clock.boot();
        hands.set_wall(Timestamp::from_millis(1_000));
        assert_eq!(clock.boot(), boot);
        hands.advance(Duration::from_secs(2));
        assert_eq!(clock.wall(), Timestamp::from_millis(3_000));
        assert_eq!(clock.boot().saturating_since(boot), Duration::from_secs(2));
    }

    #[test]
    fn what_is_below_a_millisecond_is_kept() {
        let wall = Timestamp::from_millis(5_000);
        let (clock, hands) = Clock::manual(wall);
        for _ in 0..3 {
            hands.advance(Duration::from_micros(333));
        }
        assert_eq!(clock.wall(), wall);
        let elapsed = clock.system_time().duration_since(wall.into());
        assert_eq!(elapsed.ok(), Some(Duration::from_micros(999)));
        hands.advance(Duration::from_micros(1));
        assert_eq!(clock.wall(), Timestamp::from_millis(5_001));
    }
}
