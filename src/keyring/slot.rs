//! Where the newest view of a keyring is published.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwapOption, Guard};

use super::{usage::Ledger, view::KeyringView};
use crate::{clock::BootTime, key::KeyringName};

/// The keyrings that a sidecar is configured to hold.
#[derive(Clone, Debug)]
pub struct Keyrings(Arc<BTreeMap<KeyringName, Arc<Slot>>>);

/// The newest view of one keyring, how fresh it is, and how its keys are used.
#[derive(Debug)]
pub struct Slot {
    name: KeyringName,
    staleness: Staleness,
    view: ArcSwapOption<KeyringView>,
    usage: Ledger,
    /// When the control plane last confirmed the view, in milliseconds since the boot; 0 for never.
    confirmed_at: AtomicU64,
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

impl Keyrings {
    /// Empty slots for `keyrings`.
    pub fn new(keyrings: impl IntoIterator<Item = (KeyringName, Staleness)>) -> Self {
        let slots = keyrings
            .into_iter()
            .map(|(name, staleness)| (name.clone(), Arc::new(Slot::new(name, staleness))));
        Self(Arc::new(slots.collect()))
    }

    /// The slot of a keyring.
    #[must_use]
    pub fn get(&self, name: &KeyringName) -> Option<&Arc<Slot>> {
        self.0.get(name)
    }

    /// All slots by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.0.values()
    }
}

impl Slot {
    fn new(name: KeyringName, staleness: Staleness) -> Self {
        Self {
            name,
            staleness,
            view: ArcSwapOption::empty(),
            usage: Ledger::default(),
            confirmed_at: AtomicU64::new(0),
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
            0 => None,
            confirmed_at => Some(now.saturating_since(BootTime::from_millis(confirmed_at))),
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
            .fetch_max(as_of.as_millis().max(1), Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing;

    fn slot() -> Slot {
        let staleness = Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: Duration::from_mins(1),
        };
        Slot::new(testing::keyring_name(), staleness)
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
    fn limits_are_reached_at_their_very_millisecond() {
        let slot = slot();
        let at = |millis| slot.freshness(Duration::from_millis(millis));
        assert_eq!(at(29_999), Freshness::Fresh);
        assert_eq!(at(30_000), Freshness::Warned);
        assert_eq!(at(59_999), Freshness::Warned);
        assert_eq!(at(60_000), Freshness::Stale);
    }
}
