//! Where the newest view of a keyring is published.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwapOption, Guard};
use tokio::sync::Notify;

use super::{
    on_demand::{CacheSettings, KeyCache},
    usage::Ledger,
    view::KeyringView,
};
use crate::{clock::BootTime, key::KeyringName};

/// The keyrings that a sidecar is configured to hold.
#[derive(Clone, Debug)]
pub struct Keyrings {
    slots: Arc<BTreeMap<KeyringName, Arc<Slot>>>,
    /// Woken when a key is to be looked up.
    lookups: Arc<Notify>,
}

/// How much of a keyring a sidecar holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Every key.
    #[default]
    Full,
    /// The keys that it has looked up.
    OnDemand(CacheSettings),
}

/// The newest view of one keyring, how fresh it is, and how its keys are used.
#[derive(Debug)]
pub struct Slot {
    name: KeyringName,
    staleness: Staleness,
    /// The keys of a keyring that is held on demand, which its view does not have.
    cache: Option<Arc<KeyCache>>,
    view: ArcSwapOption<KeyringView>,
    usage: Ledger,
    /// When the control plane last confirmed the view, in milliseconds since the boot: below zero when that was before, and
    /// [`NEVER`].
    confirmed_at: AtomicI64,
}

/// How long a keyring may go without a confirmation by the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staleness {
    /// From then on it is reported; at least one second. Default: 30 seconds.
    pub warn_after: Duration,
    /// From then on every check is denied; more than `warn_after`, at most 30 days. Default: one hour.
    pub deny_after: Duration,
}

/// How fresh a keyring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Confirmed lately.
    Fresh,
    /// Older than the warning limit.
    Warned,
    /// Older than the limit at which checks are denied.
    Stale,
}

const NEVER: i64 = i64::MIN;

impl Keyrings {
    /// Empty slots for `keyrings`, all of which are held in full.
    pub fn new(keyrings: impl IntoIterator<Item = (KeyringName, Staleness)>) -> Self {
        let full = |(name, staleness)| (name, staleness, Mode::Full);
        Self::with_modes(keyrings.into_iter().map(full))
    }

    /// Empty slots for `keyrings`.
    pub fn with_modes(keyrings: impl IntoIterator<Item = (KeyringName, Staleness, Mode)>) -> Self {
        let lookups = Arc::new(Notify::new());
        let slots = keyrings.into_iter().map(|(name, staleness, mode)| {
            let cache = match mode {
                Mode::Full => None,
                Mode::OnDemand(settings) => {
                    Some(Arc::new(KeyCache::new(settings, Arc::clone(&lookups))))
                }
            };
            (name.clone(), Arc::new(Slot::new(name, staleness, cache)))
        });
        Self {
            slots: Arc::new(slots.collect()),
            lookups,
        }
    }

    /// Woken when a key of any of them is to be looked up.
    #[must_use]
    pub const fn lookups(&self) -> &Arc<Notify> {
        &self.lookups
    }

    /// The slot of a keyring.
    #[must_use]
    pub fn get(&self, name: &KeyringName) -> Option<&Arc<Slot>> {
        self.slots.get(name)
    }

    /// All slots by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.slots.values()
    }
}

impl Slot {
    fn new(name: KeyringName, staleness: Staleness, cache: Option<Arc<KeyCache>>) -> Self {
        Self {
            name,
            staleness,
            cache,
            view: ArcSwapOption::empty(),
            usage: Ledger::default(),
            confirmed_at: AtomicI64::new(NEVER),
        }
    }

    /// The keyring's name.
    #[must_use]
    pub const fn name(&self) -> &KeyringName {
        &self.name
    }

    /// Its limits.
    #[must_use]
    pub const fn staleness(&self) -> Staleness {
        self.staleness
    }

    /// The keys of a keyring that is held on demand; none of one that is held in full.
    #[must_use]
    pub const fn cache(&self) -> Option<&Arc<KeyCache>> {
        self.cache.as_ref()
    }

    /// The newest view; none before the first snapshot. A check calls this once.
    #[must_use]
    pub fn load(&self) -> Guard<Option<Arc<KeyringView>>> {
        self.view.load()
    }

    /// How often the keyring's versions were used, whatever its view.
    #[must_use]
    pub const fn usage(&self) -> &Ledger {
        &self.usage
    }

    /// The time since the control plane last confirmed the view; none when it never has.
    #[must_use]
    pub fn age(&self, now: BootTime) -> Option<Duration> {
        match self.confirmed_at.load(Ordering::Relaxed) {
            NEVER => None,
            confirmed_at => {
                let age = millis(now).saturating_sub(confirmed_at);
                Some(Duration::from_millis(u64::try_from(age).unwrap_or(0)))
            }
        }
    }

    /// How fresh the view is at an age.
    #[must_use]
    pub fn freshness(&self, age: Duration) -> Freshness {
        if age >= self.staleness.deny_after {
            Freshness::Stale
        } else if age >= self.staleness.warn_after {
            Freshness::Warned
        } else {
            Freshness::Fresh
        }
    }

    /// Notes that the control plane's store confirmed the view at `as_of`. An older confirmation changes nothing.
    pub fn confirm(&self, as_of: BootTime) {
        self.confirmed_at
            .fetch_max(millis(as_of), Ordering::Relaxed);
    }

    /// Notes that the view, which was kept, is `age` old at `now`: it may have been confirmed before the boot.
    pub fn restore_age(&self, now: BootTime, age: Duration) {
        let age = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
        let confirmed_at = millis(now).saturating_sub(age).max(NEVER + 1);
        self.confirmed_at.fetch_max(confirmed_at, Ordering::Relaxed);
    }

    /// Makes `view` the newest.
    pub(super) fn publish(&self, view: Arc<KeyringView>) {
        self.view.store(Some(view));
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

fn millis(time: BootTime) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing;

    fn slot() -> Slot {
        let staleness = Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: Duration::from_mins(1),
        };
        Slot::new(testing::keyring_name(), staleness, None)
    }

    #[test]
    fn age_counts_from_the_newest_confirmation() {
        let slot = slot();
        assert_eq!(slot.age(BootTime::from_millis(9_000)), None);
        slot.confirm(BootTime::from_millis(5_000));
        slot.confirm(BootTime::from_millis(4_000));
        let age = slot.age(BootTime::from_millis(9_000));
        assert_eq!(age, Some(Duration::from_secs(4)));
    }

    #[test]
    fn an_age_that_was_kept_goes_back_before_the_boot() {
        let slot = slot();
        slot.restore_age(BootTime::from_millis(9_000), Duration::from_hours(1));
        let age = slot.age(BootTime::from_millis(10_000));
        assert_eq!(age, Some(Duration::from_secs(3_601)));
        slot.confirm(BootTime::from_millis(9_500));
        let age = slot.age(BootTime::from_millis(10_000));
        assert_eq!(age, Some(Duration::from_millis(500)));
        slot.restore_age(BootTime::from_millis(10_000), Duration::MAX);
        assert_eq!(slot.age(BootTime::from_millis(10_000)), age);
    }

    #[test]
    fn limits_are_reached_at_their_very_millisecond() {
        let slot = slot();
        let at = |millis| slot.freshness(Duration::from_millis(millis));
        assert_eq!(at(29_999), Freshness::Fresh);
        assert_eq!(at(30_000), Freshness::Warned);
        assert_eq!(at(59_999), Freshness::Warned);
        assert_eq!(at(60_000), Freshness::Stale);
    }
}
