//! The clocks. All other code reads the time through this module.
//!
//! The wall clock decides on validity. A clock that only runs forward decides on staleness and
//! measures durations. It also counts the time in which the machine is suspended.

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

/// The time since the boot of the machine (`CLOCK_BOOTTIME`). It only runs forward, and also counts
/// while the machine is suspended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

/// The times of both clocks, read one immediately after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The time since the boot.
    pub(crate) boot: BootTime,
    /// The wall clock, in whole milliseconds.
    pub(crate) wall: Timestamp,
}

/// The id of one boot of the machine, 1 to 64 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BootId(Arc<str>);

/// The clock that [`BootTime`]s are read from. Only times of the same clock can be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootClock {
    /// The boot that it counts from.
    pub(crate) boot_id: BootId,
    /// The inode of `/proc/self/ns/time`, because each time namespace has its own offset. See
    /// `time_namespaces(7)`.
    pub(crate) time_namespace: u64,
}

/// The latest time of a wall clock; cheap to clone. It decides whether a window holds, so that an
/// expired key does not become valid again when the clock is set back.
#[derive(Clone, Debug, Default)]
pub(crate) struct LatestWall(Arc<Latest>);

#[derive(Debug, Default)]
struct Latest {
    /// The latest time, in milliseconds since the Unix epoch.
    millis: AtomicI64,
    /// A time of the control plane's wall clock, and when it showed that time, by our time since
    /// the boot.
    told: Mutex<Option<(Timestamp, BootTime)>>,
}

/// The control of a [`Clock`] in tests.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Manual>);

#[derive(Debug)]
struct Manual {
    hands: Mutex<Hands>,
    /// The number of steps of the wall clock.
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
    /// The number of boots of the machine.
    boots: u32,
    time_namespace: u64,
}

/// The file in which Linux reports the id of the present boot. See `random(4)`.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The file whose inode identifies the time namespace of this process.
const TIME_NAMESPACE: &str = "/proc/self/ns/time";
/// The maximum length of a boot id, in bytes. Linux uses a UUID of 36 characters.
const MAX_BOOT_ID: usize = 64;

impl Clock {
    /// Creates a reader of the machine's clocks.
    #[must_use]
    pub const fn system() -> Self {
        Self(Source::System)
    }

    /// Creates clocks for tests, with their control. The wall clock stands at `wall`, and both
    /// clocks only move when the control moves them.
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

    /// Returns the wall clock in whole milliseconds, for decisions on validity.
    #[must_use]
    pub fn wall(&self) -> Timestamp {
        self.system_time().into()
    }

    /// Returns the wall clock in its full resolution, for the start of a span: a check lasts only
    /// microseconds.
    #[must_use]
    pub(crate) fn system_time(&self) -> SystemTime {
        match &self.0 {
            Source::System => system_time(),
            Source::Manual(hands) => hands.read().wall,
        }
    }

    /// Returns the time since the boot of the machine.
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

    /// Returns the times of both clocks.
    #[must_use]
    pub fn reading(&self) -> Reading {
        Reading {
            boot: self.boot(),
            wall: self.wall(),
        }
    }

    /// Returns the steps of the wall clock from now on. Needs a runtime with I/O.
    #[must_use]
    pub(crate) fn steps(&self) -> Steps {
        match &self.0 {
            Source::System => Steps::system(),
            Source::Manual(hands) => Steps::manual(hands.0.steps.subscribe()),
        }
    }

    /// Returns the clock that [`Clock::boot`] reads; none if the system does not report it.
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
    /// Creates a boot id from its text; none if the text is empty or longer than 64 bytes.
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
    /// The maximum by which the remembered time may be ahead of the control plane's clock. It
    /// covers the difference between machines that follow a time server, and a slow answer.
    pub(crate) const TOLERANCE: Duration = Duration::from_mins(1);

    /// Returns the time for decisions on validity when the wall clock shows `now`. It never goes
    /// back.
    #[must_use]
    pub(crate) fn not_before(&self, now: Timestamp) -> Timestamp {
        let latest = self.0.millis.load(Ordering::Relaxed);
        if now.as_millis() > latest {
            self.0.millis.fetch_max(now.as_millis(), Ordering::Relaxed);
        }
        now.max(Timestamp::from_millis(latest))
    }

    /// Records that the control plane's wall clock showed `wall` at `now`.
    pub(crate) fn told(&self, wall: Timestamp, now: BootTime) {
        *self.lock() = Some((wall, now));
    }

    /// Returns the time to remember after the end of the process: the latest time, but at most
    /// [`LatestWall::TOLERANCE`] after the control plane's clock. If our clock is ahead by mistake
    /// and is then corrected, the wrong time is forgotten with the process. As long as the control
    /// plane has not reported its time, our own clock is trusted.
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
    /// Returns the time since the boot in whole milliseconds.
    #[must_use]
    pub(crate) fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns the time since the boot in nanoseconds.
    #[must_use]
    pub fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Returns the time `millis` milliseconds after the boot.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// Returns the time since `earlier`; zero if `earlier` is later than this time.
    #[must_use]
    pub const fn saturating_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Returns the time `duration` earlier, at least the boot.
    #[must_use]
    pub(crate) const fn saturating_sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(duration))
    }

    /// Returns the time `duration` later.
    #[must_use]
    pub(crate) const fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

impl ManualClock {
    /// Moves both clocks forward by `duration`.
    pub fn advance(&self, duration: Duration) {
        let mut hands = self.lock();
        // Limited as a timestamp is; no test exceeds it.
        let end = SystemTime::from(Timestamp::from_millis(i64::MAX));
        hands.wall = hands
            .wall
            .checked_add(duration)
            .map_or(end, |wall| wall.min(end));
        hands.boot = hands.boot.saturating_add(duration);
    }

    /// Steps only the wall clock.
    pub fn set_wall(&self, wall: Timestamp) {
        self.lock().wall = wall.into();
        self.0.steps.send_modify(|steps| *steps += 1);
    }

    /// Boots the machine again: the time since the boot starts at zero.
    #[cfg(test)]
    pub(crate) fn reboot(&self) {
        let mut hands = self.lock();
        hands.boots += 1;
        hands.boot = BootTime::default();
    }

    /// Moves the process to another time namespace, with the same time since the boot.
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
        // It still decides whether windows hold.
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
