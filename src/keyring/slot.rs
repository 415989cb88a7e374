//! The slot in which the newest view of a keyring is published.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwapOption, Guard};

use super::{mode::Mode, on_demand::KeyCache, tally::Tally, usage::Ledger, view::KeyringView};
use crate::{clock::Reading, key::KeyringName};

/// The newest view of one keyring, how fresh it is, and how its keys are used.
#[derive(Debug)]
pub struct Slot {
    name: KeyringName,
    /// The cached keys of a keyring that is held on demand. Its view contains no keys.
    cache: Option<Arc<KeyCache>>,
    view: ArcSwapOption<KeyringView>,
    counts: Arc<Counts>,
    /// The newest confirmation with its grant, and the limits. A thread that changes this field or
    /// one of the next two holds the lock, so that they can be read as a whole.
    granted: Mutex<Granted>,
    confirmed_at: ByClocks,
    /// The moment from which checks are denied.
    stale_at: ByClocks,
}

/// The counters of a keyring. They only grow, and outlive the slot: a keyring that the process holds
/// again continues to count.
#[derive(Debug, Default)]
pub(super) struct Counts {
    usage: Ledger,
    tally: Tally,
}

/// What decides until when a keyring is served.
#[derive(Debug)]
struct Granted {
    /// The newest confirmation and its grant; none before the first one.
    newest: Option<(Confirmation, Duration)>,
    staleness: Staleness,
}

/// The moment at which a sidecar asked the question that the control plane then confirmed, by both
/// clocks of the sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmation {
    /// In milliseconds since the boot.
    pub(crate) boot_ms: i64,
    /// In milliseconds since the Unix epoch.
    pub(crate) wall_ms: i64,
}

/// A keyring as one check sees it.
#[derive(Debug)]
pub(crate) struct Look<'s> {
    slot: &'s Slot,
    now: Reading,
    age: Option<Duration>,
    is_stale: bool,
    view: Guard<Option<Arc<KeyringView>>>,
}

/// A moment by both clocks, in milliseconds; [`NEVER`] where there is none.
#[derive(Debug)]
struct ByClocks {
    boot: AtomicI64,
    wall: AtomicI64,
}

/// How long a keyring may go without a confirmation by the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staleness {
    /// The age from which the keyring is reported as degraded; at least one second. Default: 30
    /// seconds.
    pub warn_after: Duration,
    /// The age from which every check is denied; more than `warn_after`, at most 30 days. Checks
    /// are denied earlier where the control plane grants less. Default: one hour.
    pub deny_after: Duration,
}

/// How fresh a keyring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// Younger than `warn_after`.
    Fresh,
    /// Of at least the age `warn_after`: reported as degraded.
    Warned,
    /// Of at least the age `deny_after`, beyond its grant, or never confirmed: checks are denied.
    Stale,
}

const NEVER: i64 = i64::MIN;

impl Slot {
    pub(super) fn new(
        name: KeyringName,
        staleness: Staleness,
        cache: Option<Arc<KeyCache>>,
        counts: Arc<Counts>,
    ) -> Self {
        Self {
            name,
            cache,
            view: ArcSwapOption::empty(),
            counts,
            granted: Mutex::new(Granted {
                newest: None,
                staleness,
            }),
            confirmed_at: ByClocks::never(),
            stale_at: ByClocks::never(),
        }
    }

    #[must_use]
    pub(crate) const fn name(&self) -> &KeyringName {
        &self.name
    }

    /// Returns the limits of the keyring's age.
    #[must_use]
    pub(crate) fn staleness(&self) -> Staleness {
        self.lock().staleness
    }

    /// Changes the limits of the keyring's age. A longer `deny_after` is in force when the control
    /// plane grants it.
    pub(super) fn limit(&self, staleness: Staleness) {
        let mut granted = self.lock();
        granted.staleness = staleness;
        if let Some((asked, serve_for)) = granted.newest {
            self.stale_at
                .store(asked.after(serve_for.min(staleness.deny_after)));
        }
    }

    /// Returns how much of the keyring the sidecar holds.
    #[must_use]
    pub(crate) fn mode(&self) -> Mode {
        self.cache
            .as_ref()
            .map_or(Mode::Full, |cache| Mode::OnDemand(*cache.settings()))
    }

    /// Returns the cache of a keyring that is held on demand; none for a keyring that is held in
    /// full.
    #[must_use]
    pub const fn cache(&self) -> Option<&Arc<KeyCache>> {
        self.cache.as_ref()
    }

    /// Returns the newest view; none while no view is published. A check calls [`look`](Self::look)
    /// instead.
    #[must_use]
    pub fn load(&self) -> Guard<Option<Arc<KeyringView>>> {
        self.view.load()
    }

    /// Returns the keyring as a check at `now` sees it. A check calls this once.
    ///
    /// The freshness is read before the view. So a check that is delayed between the two reads
    /// never treats an old view as fresh because of a later confirmation.
    #[must_use]
    pub(crate) fn look(&self, now: Reading) -> Look<'_> {
        Look {
            is_stale: self.is_stale(now),
            age: self.age(now),
            view: self.view.load(),
            slot: self,
            now,
        }
    }

    /// Returns the counters of the keyring's versions, which do not depend on its view.
    #[must_use]
    pub(crate) fn usage(&self) -> &Ledger {
        &self.counts.usage
    }

    /// Returns the counters of the keyring's checks.
    #[must_use]
    pub(crate) fn tally(&self) -> &Tally {
        &self.counts.tally
    }

    /// Returns the time since the sidecar asked the question that the control plane last confirmed:
    /// the larger of the times that the two clocks measured. None when the control plane has not
    /// confirmed anything.
    #[must_use]
    pub(crate) fn age(&self, now: Reading) -> Option<Duration> {
        let (boot, wall) = self.confirmed_at.load();
        if boot == NEVER {
            return None;
        }
        let now = Confirmation::from(now);
        let by_boot = now.boot_ms.saturating_sub(boot);
        let by_wall = now.wall_ms.saturating_sub(wall);
        let age = u64::try_from(by_boot.max(by_wall)).unwrap_or(0);
        Some(Duration::from_millis(age))
    }

    /// Returns how fresh the view is. A view that was never confirmed is stale.
    #[must_use]
    pub(crate) fn freshness(&self, now: Reading) -> Freshness {
        if self.is_stale(now) {
            Freshness::Stale
        } else if self.age(now) >= Some(self.staleness().warn_after) {
            Freshness::Warned
        } else {
            Freshness::Fresh
        }
    }

    /// Returns the newest confirmation, and the time for which the control plane lets the sidecar
    /// serve from then on; none before the first confirmation. The sidecar serves for `deny_after`
    /// where that is shorter.
    #[must_use]
    pub(crate) fn confirmation(&self) -> Option<(Confirmation, Duration)> {
        self.lock().newest
    }

    /// Records that the control plane confirmed the view for the moment at which the sidecar
    /// `asked`, and that the sidecar may serve for `serve_for` from that moment. A confirmation
    /// that was asked for earlier than the newest one changes nothing.
    pub fn confirm(&self, asked: Confirmation, serve_for: Duration) {
        let mut granted = self.lock();
        let newest = granted.newest.map_or(NEVER, |(newest, _)| newest.boot_ms);
        if asked.boot_ms < newest {
            return;
        }
        granted.newest = Some((asked, serve_for));
        // By each clock, one number combines confirmation and grant: a reader sees both or neither.
        self.stale_at
            .store(asked.after(serve_for.min(granted.staleness.deny_after)));
        self.confirmed_at.store(asked);
    }

    /// Continues the grant of a former process of the same boot, which asked for its last
    /// confirmation at `confirmed`.
    pub(crate) fn restore(&self, confirmed: Confirmation, serve_for: Duration) {
        self.confirm(confirmed, serve_for);
    }

    fn is_stale(&self, now: Reading) -> bool {
        let (boot, wall) = self.stale_at.load();
        let now = Confirmation::from(now);
        now.boot_ms >= boot || now.wall_ms >= wall
    }

    fn lock(&self) -> MutexGuard<'_, Granted> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Withdraws the view: checks of the keyring are denied until another view is published and
    /// confirmed.
    pub(super) fn withdraw(&self) {
        let mut granted = self.lock();
        granted.newest = None;
        self.stale_at.clear();
        self.confirmed_at.clear();
        self.view.store(None);
    }

    /// Publishes `view` as the newest one.
    pub(super) fn publish(&self, view: Arc<KeyringView>) {
        self.view.store(Some(view));
    }
}

impl<'s> Look<'s> {
    #[must_use]
    pub(crate) const fn slot(&self) -> &'s Slot {
        self.slot
    }

    #[must_use]
    pub(crate) const fn now(&self) -> Reading {
        self.now
    }

    /// See [`Slot::age`].
    #[must_use]
    pub(crate) const fn age(&self) -> Option<Duration> {
        self.age
    }

    /// Returns whether checks are denied because the view was not confirmed for too long.
    #[must_use]
    pub(crate) const fn is_stale(&self) -> bool {
        self.is_stale
    }

    /// Returns the view; none while no view is published.
    #[must_use]
    pub(crate) fn view(&self) -> Option<&KeyringView> {
        self.view.as_deref()
    }
}

impl ByClocks {
    const fn never() -> Self {
        Self {
            boot: AtomicI64::new(NEVER),
            wall: AtomicI64::new(NEVER),
        }
    }

    /// Returns the moment by the boot clock and by the wall clock. During a change, one number may
    /// be of the former moment and the other of the new one.
    fn load(&self) -> (i64, i64) {
        let boot = self.boot.load(Ordering::Acquire);
        (boot, self.wall.load(Ordering::Acquire))
    }

    fn clear(&self) {
        self.wall.store(NEVER, Ordering::Release);
        self.boot.store(NEVER, Ordering::Release);
    }

    fn store(&self, at: Confirmation) {
        self.wall.store(at.wall_ms, Ordering::Release);
        self.boot.store(at.boot_ms, Ordering::Release);
    }
}

impl Confirmation {
    fn after(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self {
            boot_ms: self.boot_ms.saturating_add(millis),
            wall_ms: self.wall_ms.saturating_add(millis),
        }
    }
}

impl From<Reading> for Confirmation {
    fn from(reading: Reading) -> Self {
        Self {
            boot_ms: i64::try_from(reading.boot.as_millis()).unwrap_or(i64::MAX),
            wall_ms: reading.wall.as_millis(),
        }
    }
}

impl Default for Staleness {
    fn default() -> Self {
        Self {
            warn_after: Duration::from_secs(30),
            deny_after: Duration::from_hours(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::BootTime,
        key::{Timestamp, testing},
    };

    const DENY_AFTER: Duration = Duration::from_mins(1);
    const LONG: Duration = Duration::from_hours(24);

    fn slot() -> Slot {
        let staleness = Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: DENY_AFTER,
        };
        Slot::new(testing::keyring_name(), staleness, None, Arc::default())
    }

    /// A moment by both clocks. The wall clock is an hour ahead of the boot clock.
    fn at(millis: u64) -> Reading {
        by(millis, 3_600_000 + i64::try_from(millis).expect("few"))
    }

    const fn by(boot: u64, wall: i64) -> Reading {
        Reading {
            boot: BootTime::from_millis(boot),
            wall: Timestamp::from_millis(wall),
        }
    }

    fn confirm(slot: &Slot, millis: u64, serve_for: Duration) {
        slot.confirm(at(millis).into(), serve_for);
    }

    #[test]
    fn age_counts_from_the_asking_for_the_newest_confirmation() {
        let slot = slot();
        assert_eq!(slot.age(at(9_000)), None);
        assert_eq!(slot.freshness(at(9_000)), Freshness::Stale);
        confirm(&slot, 5_000, LONG);
        confirm(&slot, 4_000, LONG);
        assert_eq!(slot.age(at(9_000)), Some(Duration::from_secs(4)));
        assert_eq!(slot.freshness(at(9_000)), Freshness::Fresh);
    }

    #[test]
    fn age_is_the_larger_of_what_both_clocks_say() {
        let slot = slot();
        confirm(&slot, 5_000, LONG);
        let aged = |boot, wall| (slot.age(by(boot, wall)), slot.freshness(by(boot, wall)));
        let seconds = Duration::from_secs;
        // A guest whose boot clock stood still while it was paused.
        let paused = aged(6_000, 3_665_000);
        assert_eq!(paused, (Some(seconds(60)), Freshness::Stale));
        // A wall clock that was set back.
        let back = aged(64_999, 0);
        assert_eq!(
            back,
            (Some(Duration::from_millis(59_999)), Freshness::Warned)
        );
        assert_eq!(aged(65_000, 0), (Some(seconds(60)), Freshness::Stale));
        // Asking again makes it fresh, by the clock as it is now.
        slot.confirm(by(66_000, 1_000).into(), LONG);
        assert_eq!(aged(67_000, 2_000), (Some(seconds(1)), Freshness::Fresh));
    }

    #[test]
    fn a_grant_that_is_shorter_than_the_limit_ends_first() {
        let slot = slot();
        confirm(&slot, 1_000, Duration::from_secs(10));
        assert_eq!(slot.freshness(at(10_999)), Freshness::Fresh);
        assert_eq!(slot.freshness(at(11_000)), Freshness::Stale);
        // Neither does an earlier confirmation bring a longer one.
        confirm(&slot, 999, LONG);
        assert_eq!(slot.freshness(at(11_000)), Freshness::Stale);
        let granted = (at(1_000).into(), Duration::from_secs(10));
        assert_eq!(slot.confirmation(), Some(granted));
    }

    #[test]
    fn a_grant_that_is_longer_than_the_limit_does_not_extend_it() {
        let slot = slot();
        confirm(&slot, 0, LONG);
        assert_eq!(slot.freshness(at(59_999)), Freshness::Warned);
        assert_eq!(slot.freshness(at(60_000)), Freshness::Stale);
    }

    #[test]
    fn limits_change_while_the_keyring_is_served_and_no_grant_becomes_longer() {
        let slot = slot();
        confirm(&slot, 0, Duration::from_mins(1));
        let limit = |warn_after, deny_after| {
            slot.limit(Staleness {
                warn_after: Duration::from_secs(warn_after),
                deny_after: Duration::from_secs(deny_after),
            });
        };
        limit(5, 10);
        assert_eq!(slot.freshness(at(5_000)), Freshness::Warned);
        assert_eq!(slot.freshness(at(10_000)), Freshness::Stale);
        limit(5, 3_600);
        assert_eq!(slot.freshness(at(59_999)), Freshness::Warned);
        assert_eq!(slot.freshness(at(60_000)), Freshness::Stale);
        confirm(&slot, 60_000, LONG);
        assert_eq!(slot.freshness(at(3_659_999)), Freshness::Warned);
    }

    #[test]
    fn what_a_former_process_was_granted_goes_on_with_its_own_end() {
        let slot = slot();
        slot.restore(at(1_000).into(), Duration::from_secs(4));
        assert_eq!(slot.age(at(2_000)), Some(Duration::from_secs(1)));
        assert_eq!(slot.freshness(at(4_999)), Freshness::Fresh);
        assert_eq!(slot.freshness(at(5_000)), Freshness::Stale);
        confirm(&slot, 5_000, LONG);
        assert_eq!(slot.freshness(at(5_000)), Freshness::Fresh);
    }

    #[test]
    fn limits_are_reached_at_their_very_millisecond() {
        let slot = slot();
        confirm(&slot, 0, LONG);
        let freshness = |millis| slot.freshness(at(millis));
        assert_eq!(freshness(29_999), Freshness::Fresh);
        assert_eq!(freshness(30_000), Freshness::Warned);
        assert_eq!(freshness(59_999), Freshness::Warned);
        assert_eq!(freshness(60_000), Freshness::Stale);
        assert!(!slot.look(at(59_999)).is_stale());
        assert!(slot.look(at(60_000)).is_stale());
    }
}
