//! The keyrings that a sidecar holds. A running sidecar can add and remove keyrings.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use super::{
    on_demand::{CacheSettings, KeyCache},
    slot::{Counts, Slot, Staleness},
};
use crate::key::KeyringName;

/// The keyrings that a sidecar holds now. Cheap to clone: all clones share the keyrings.
#[derive(Clone, Debug)]
pub struct Keyrings(Arc<Shared>);

/// The slots of all keyrings at one moment, sorted by name. Immutable.
#[derive(Clone, Debug, Default)]
pub struct Slots(Box<[Arc<Slot>]>);

/// How much of a keyring a sidecar holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Every key.
    #[default]
    Full,
    /// Only the keys that the sidecar has looked up.
    OnDemand(CacheSettings),
}

/// Receives the slots of a sidecar when they change.
pub(crate) trait SlotsObserver: fmt::Debug + Send + Sync {
    /// Receives the new slots. All changes are in one order, and the next change waits for the
    /// return.
    fn changed(&self, slots: &Arc<Slots>);
}

#[derive(Debug)]
struct Shared {
    slots: ArcSwap<Slots>,
    /// Locked during a change, so that all observers see all changes in one order.
    changing: Mutex<Changing>,
    /// Notified when a key must be looked up.
    lookups: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Changing {
    observers: Vec<Weak<dyn SlotsObserver>>,
    /// The counters of every keyring that the process has held.
    counts: BTreeMap<KeyringName, Arc<Counts>>,
}

/// The most keyrings of a sidecar: each adds a subscription, and a label value in every metric.
pub(crate) const MAX_KEYRINGS: usize = 256;

/// The most different keyrings that a process holds in its life: it keeps the counters of each.
const MAX_EVER: usize = 4 * MAX_KEYRINGS;

impl Keyrings {
    /// Creates empty slots for `keyrings`, all of which are held in full.
    pub fn new(keyrings: impl IntoIterator<Item = (KeyringName, Staleness)>) -> Self {
        let full = |(name, staleness)| (name, staleness, Mode::Full);
        Self::with_modes(keyrings.into_iter().map(full))
    }

    /// Creates empty slots for `keyrings`, each of which is held in its mode.
    pub fn with_modes(keyrings: impl IntoIterator<Item = (KeyringName, Staleness, Mode)>) -> Self {
        let created = Self(Arc::new(Shared {
            slots: ArcSwap::default(),
            changing: Mutex::default(),
            lookups: Arc::new(Notify::new()),
        }));
        created.change(|_, counts| {
            let slots = keyrings.into_iter();
            let slots = slots.map(|(name, staleness, mode)| {
                let counts = counts.entry(name.clone()).or_default();
                created.slot(name, staleness, mode, counts)
            });
            slots.collect()
        });
        created
    }

    /// Returns the handle that is notified when a key of any of the keyrings must be looked up.
    #[must_use]
    pub(crate) fn lookups(&self) -> &Arc<Notify> {
        &self.0.lookups
    }

    /// Returns the current slots.
    #[must_use]
    pub fn load(&self) -> Arc<Slots> {
        self.0.slots.load_full()
    }

    /// Returns the slot of a keyring; none when the sidecar does not hold the keyring.
    #[must_use]
    pub fn get(&self, name: &KeyringName) -> Option<Arc<Slot>> {
        self.0.slots.load().get(name.as_str()).cloned()
    }

    /// Adds an empty slot for a keyring, and returns it. A slot of that name is replaced. None when
    /// the process has held too many different keyrings.
    pub(crate) fn add(
        &self,
        name: &KeyringName,
        staleness: Staleness,
        mode: Mode,
    ) -> Option<Arc<Slot>> {
        let mut added = None;
        self.change(|slots, counts| {
            if counts.contains_key(name) || counts.len() < MAX_EVER {
                let counts = counts.entry(name.clone()).or_default();
                added = Some(self.slot(name.clone(), staleness, mode, counts));
            }
            let others = slots
                .iter()
                .filter(|slot| added.is_none() || slot.name() != name);
            others.chain(&added).cloned().collect()
        });
        added
    }

    /// Removes a keyring. A check that has begun with it keeps its slot.
    pub(crate) fn remove(&self, name: &KeyringName) {
        self.change(|slots, _| {
            let others = slots.iter().filter(|slot| slot.name() != name);
            others.cloned().collect()
        });
    }

    /// Calls `observer` with the current slots, and then with the slots after each change.
    pub(crate) fn observe(&self, observer: &Arc<impl SlotsObserver + 'static>) {
        let mut changing = self.changing();
        observer.changed(&self.load());
        let observer = Arc::downgrade(observer);
        changing.observers.push(observer);
    }

    fn change(&self, plan: impl FnOnce(&Slots, &mut BTreeMap<KeyringName, Arc<Counts>>) -> Slots) {
        let mut changing = self.changing();
        let slots = Arc::new(plan(&self.load(), &mut changing.counts));
        self.0.slots.store(Arc::clone(&slots));
        changing
            .observers
            .retain(|observer| match observer.upgrade() {
                Some(observer) => {
                    observer.changed(&slots);
                    true
                }
                None => false,
            });
    }

    fn slot(
        &self,
        name: KeyringName,
        staleness: Staleness,
        mode: Mode,
        counts: &Arc<Counts>,
    ) -> Arc<Slot> {
        let cache = match mode {
            Mode::Full => None,
            Mode::OnDemand(settings) => Some(Arc::new(KeyCache::new(
                settings,
                Arc::clone(&self.0.lookups),
            ))),
        };
        Arc::new(Slot::new(name, staleness, cache, Arc::clone(counts)))
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        self.0
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// Returns the slot of a keyring. The name need not be parsed.
    #[must_use]
    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Slot>> {
        let at = self
            .0
            .binary_search_by(|slot| slot.name().as_str().cmp(name));
        at.ok().map(|at| &self.0[at])
    }

    /// Returns whether the sidecar holds no keyring.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns all slots, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.0.iter()
    }
}

impl FromIterator<Arc<Slot>> for Slots {
    fn from_iter<T: IntoIterator<Item = Arc<Slot>>>(slots: T) -> Self {
        let mut slots: Box<[_]> = slots.into_iter().collect();
        slots.sort_unstable_by(|one, other| one.name().cmp(other.name()));
        Self(slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Names(Mutex<Vec<Vec<String>>>);

    impl SlotsObserver for Names {
        fn changed(&self, slots: &Arc<Slots>) {
            let names = slots.iter().map(|slot| slot.name().to_string()).collect();
            self.0.lock().expect("no test panics here").push(names);
        }
    }

    fn name(text: &str) -> KeyringName {
        text.parse().expect("a name")
    }

    #[test]
    fn keyrings_come_and_go_in_the_order_of_their_names() {
        let keyrings = Keyrings::new([(name("m"), Staleness::default())]);
        let names = Arc::new(Names::default());
        keyrings.observe(&names);
        let add = |text| keyrings.add(&name(text), Staleness::default(), Mode::Full);
        let added = add("z").expect("there is room");
        assert!(add("a").is_some());
        let before = keyrings.load();
        keyrings.remove(&name("m"));
        keyrings.remove(&name("m"));
        let seen = names.0.lock().expect("no test panics here").clone();
        assert_eq!(
            seen,
            [
                vec!["m"],
                vec!["m", "z"],
                vec!["a", "m", "z"],
                vec!["a", "z"],
                vec!["a", "z"]
            ]
        );
        let found = keyrings.get(&name("z")).expect("it was added");
        assert!(Arc::ptr_eq(&found, &added));
        assert!(keyrings.get(&name("m")).is_none());
        assert!(before.get("m").is_some(), "a check keeps its slots");
    }

    #[test]
    fn an_observer_that_is_gone_is_not_called() {
        let keyrings = Keyrings::new([]);
        let names = Arc::new(Names::default());
        keyrings.observe(&names);
        drop(names);
        keyrings.remove(&name("a"));
        assert!(keyrings.changing().observers.is_empty());
    }

    #[test]
    fn a_keyring_that_comes_back_continues_to_count() {
        let keyrings = Keyrings::new([(name("a"), Staleness::default())]);
        let slot = keyrings.get(&name("a")).expect("it was made");
        slot.tally().count(3);
        keyrings.remove(&name("a"));
        let again = keyrings.add(&name("a"), Staleness::default(), Mode::Full);
        let again = again.expect("there is room");
        assert!(!Arc::ptr_eq(&slot, &again));
        assert_eq!(again.tally().get(3), 1);
    }

    #[test]
    fn the_number_of_different_keyrings_is_bounded() {
        let keyrings = Keyrings::new([]);
        let add = |at: usize| {
            let name = name(&format!("k{at}"));
            let added = keyrings.add(&name, Staleness::default(), Mode::Full);
            keyrings.remove(&name);
            added.is_some()
        };
        assert!((0..MAX_EVER).all(add));
        assert!(!add(MAX_EVER));
        assert!(add(0), "it has counters already");
        assert_eq!(keyrings.load().iter().count(), 0);
    }
}
