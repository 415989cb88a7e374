//! The clocks: the one place where time is read.
//!
//! Validity is judged by the wall clock, staleness and durations by a clock that only runs forward and counts the time
//! in which the machine was suspended.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use crate::key::Timestamp;

mod steps;

pub(crate) use steps::Steps;

/// Reads both clocks; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Clock(Source);

/// Time since the machine's boot (`CLOCK_BOOTTIME`): runs forward only and counts suspend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

/// What both clocks said, one right after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The clock that runs forward only.
    pub(crate) boot: BootTime,
    /// The wall clock, in whole milliseconds.
    pub(crate) wall: Timestamp,
}

/// One boot of the machine's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BootId(Arc<str>);

/// Which clock [`BootTime`]s are read from: those of the same clock can be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootClock {
    /// The boot that it counts from.
    pub(crate) boot_id: BootId,
    /// The inode of `/proc/self/ns/time`: each time namespace has an offset of its own. See `time_namespaces(7)`.
    pub(crate) time_namespace: u64,
}

/// The latest time of a wall clock; cheap to clone. By it windows are judged, so that a clock which is set back brings no
/// expired key back to life.
#[derive(Clone, Debug, Default)]
pub(crate) struct LatestWall(Arc<Latest>);

#[derive(Debug, Default)]
struct Latest {
    /// In milliseconds since the Unix epoch.
    millis: AtomicI64,
    /// What the control plane's wall clock was, and when, by ours that runs forward only.
    told: Mutex<Option<(Timestamp, BootTime)>>,
}

/// The hands of a [`Clock`] that tests turn.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Manual>);

#[derive(Debug)]
struct Manual {
    hands: Mutex<Hands>,
    /// Counts the steps of the wall clock.
    steps: watch::Sender<u64>,
}

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
    /// How often the machine has booted.
    boots: u32,
    time_namespace: u64,
}

/// Where Linux tells which boot this is. See `random(4)`.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Where Linux tells in which time namespace this process is.
const TIME_NAMESPACE: &str = "/proc/self/ns/time";
/// The longest that is believed to be one: a UUID has 36 characters.
const MAX_BOOT_ID: usize = 64;

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
        let hands = Hands {
            wall,
            boot,
            boots: 1,
            time_namespace: 1,
        };
        let hands = ManualClock(Arc::new(Manual {
            hands: Mutex::new(hands),
            steps: watch::Sender::new(0),
        }));
        (Self(Source::Manual(hands.clone())), hands)
    }

    /// The wall clock in whole milliseconds, by which validity is judged.
    #[must_use]
    pub fn wall(&self) -> Timestamp {
        self.system_time().into()
    }

    /// The wall clock as finely as it runs, for the start of a span: a check takes microseconds.
    #[must_use]
    pub(crate) fn system_time(&self) -> SystemTime {
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

    /// Both clocks.
    #[must_use]
    pub fn reading(&self) -> Reading {
        Reading {
            boot: self.boot(),
            wall: self.wall(),
        }
    }

    /// The steps of the wall clock from now on, on a runtime with I/O.
    #[must_use]
    pub(crate) fn steps(&self) -> Steps {
        match &self.0 {
            Source::System => Steps::system(),
            Source::Manual(hands) => Steps::manual(hands.0.steps.subscribe()),
        }
    }

    /// Which clock [`Clock::boot`] reads; none when the system does not tell.
    #[must_use]
    pub(crate) fn boot_clock(&self) -> Option<BootClock> {
        match &self.0 {
            Source::System => Some(BootClock {
                boot_id: BootId::new(fs::read_to_string(BOOT_ID).ok()?.trim())?,
                time_namespace: fs::metadata(TIME_NAMESPACE).ok()?.ino(),
            }),
            Source::Manual(hands) => {
                let Hands {
                    boots,
                    time_namespace,
                    ..
                } = hands.read();
                Some(BootClock {
                    boot_id: BootId::new(&format!("boot-{boots}"))?,
                    time_namespace,
                })
            }
        }
    }
}

impl BootId {
    /// Of its text; none when that is empty, or too long to be one.
    #[must_use]
    pub(crate) fn new(text: &str) -> Option<Self> {
        matches!(text.len(), 1..=MAX_BOOT_ID).then(|| Self(text.into()))
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl LatestWall {
    /// How far a clock may be ahead of the control plane's and still be remembered: as much as machines differ that follow
    /// a time server, with room for a slow answer.
    pub(crate) const TOLERANCE: Duration = Duration::from_mins(1);

    /// The time to judge by when the wall clock says `now`: it never goes back.
    #[must_use]
    pub(crate) fn not_before(&self, now: Timestamp) -> Timestamp {
        let latest = self.0.millis.load(Ordering::Relaxed);
        if now.as_millis() > latest {
            self.0.millis.fetch_max(now.as_millis(), Ordering::Relaxed);
        }
        now.max(Timestamp::from_millis(latest))
    }

    /// The control plane's wall clock said `wall` at `now`.
    pub(crate) fn told(&self, wall: Timestamp, now: BootTime) {
        *self.lock() = Some((wall, now));
    }

    /// What is to be remembered beyond the end of the process: the latest time, but hardly later than the control plane says
    /// that it is. So a clock that is ahead by mistake is forgotten with the process, once somebody has set it right; while
    /// nobody tells the time, our own clock is believed.
    #[must_use]
    pub(crate) fn to_remember(&self, wall: Timestamp, now: BootTime) -> Timestamp {
        let latest = self.not_before(wall);
        match *self.lock() {
            None => latest,
            Some((told, at)) => {
                let is_now = told.saturating_add(now.saturating_since(at));
                latest.min(is_now.saturating_add(Self::TOLERANCE))
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Timestamp, BootTime)>> {
        self.0.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BootTime {
    /// The time since the boot in whole milliseconds.
    #[must_use]
    pub(crate) fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// The time since the boot in nanoseconds.
    #[must_use]
    pub fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
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
    pub(crate) const fn saturating_sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(duration))
    }

    /// The point `duration` later.
    #[must_use]
    pub(crate) const fn saturating_add(self, duration: Duration) -> Self {
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
        self.0.steps.send_modify(|steps| *steps += 1);
    }

    /// Boots the machine anew: the clock that runs forward only starts from the beginning.
    #[cfg(test)]
    pub(crate) fn reboot(&self) {
        let mut hands = self.lock();
        hands.boots += 1;
        hands.boot = BootTime::default();
    }

    /// Moves the process to another time namespace, whose clock that runs forward only says the same.
    #[cfg(test)]
    pub(crate) fn enter_time_namespace(&self) {
        self.lock().time_namespace += 1;
    }

    fn read(&self) -> Hands {
        *self.lock()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Hands> {
        self.0.hands.lock().expect("no holder of the hands panics")
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
    fn the_system_tells_which_clock_it_is() {
        let clock = Clock::system();
        assert!(clock.boot_clock().is_some());
        assert_eq!(clock.boot_clock(), clock.boot_clock());
        let (clock, hands) = Clock::manual(Timestamp::from_millis(5_000));
        let first = clock.boot_clock();
        hands.enter_time_namespace();
        let second = clock.boot_clock();
        assert_ne!(second, first);
        hands.reboot();
        assert_ne!(clock.boot_clock(), second);
        assert_eq!(clock.boot(), BootTime::default());
    }

    #[test]
    fn the_latest_time_never_goes_back() {
        let latest = LatestWall::default();
        let at = Timestamp::from_millis;
        assert_eq!(latest.not_before(at(5_000)), at(5_000));
        assert_eq!(latest.clone().not_before(at(4_000)), at(5_000));
        assert_eq!(latest.not_before(at(5_001)), at(5_001));
    }

    #[test]
    fn no_time_is_remembered_that_is_far_beyond_what_the_control_plane_says() {
        let latest = LatestWall::default();
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1_000);
        let boot = |seconds: u64| BootTime::from_millis(seconds * 1_000);
        assert_eq!(latest.to_remember(at(900_000), boot(1)), at(900_000));
        latest.told(at(500_000), boot(10));
        assert_eq!(latest.to_remember(at(900_000), boot(10)), at(500_060));
        assert_eq!(latest.to_remember(at(500_000), boot(40)), at(500_090));
        // Windows are judged by it all the same.
        assert_eq!(latest.not_before(at(500_000)), at(900_000));
        let honest = LatestWall::default();
        honest.told(at(500_000), boot(10));
        assert_eq!(honest.to_remember(at(500_003), boot(10)), at(500_003));
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
