//! The keyrings that a sidecar holds. They change while it runs: patterns find further ones, and a
//! changed configuration asks for others.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use super::{
    mode::Mode,
    on_demand::KeyCache,
    slot::{Counts, Slot, Staleness},
    wanted::Wanted,
};
use crate::key::KeyringName;

/// The keyrings that a sidecar holds now. Cheap to clone: all clones share the keyrings.
#[derive(Clone, Debug)]
pub struct Keyrings(Arc<Shared>);

/// The slots of all keyrings at one moment, sorted by name. Immutable.
#[derive(Clone, Debug, Default)]
pub struct Slots(Box<[Arc<Slot>]>);

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
    /// The keyrings that the configuration asks for. It changes under the lock.
    wanted: ArcSwap<Wanted>,
    /// Notified when the configuration asks for other keyrings.
    reconfigured: Notify,
    /// Notified when a key must be looked up.
    lookups: Arc<Notify>,
}

/// A keyring that the sidecar holds cannot be held in the mode of the new configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("keyring {0} is held in another mode or with another cache")]
pub(crate) struct ModeError(pub(crate) KeyringName);

#[derive(Debug, Default)]
struct Changing {
    observers: Vec<Weak<dyn SlotsObserver>>,
    /// The slots of keyrings that the configuration does not ask for any more, and that are still
    /// in memory. One that it asks for again continues with its slot.
    parting: BTreeMap<KeyringName, Arc<Slot>>,
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
        Self::of(Wanted::new(keyrings, Vec::new()))
    }

    /// Creates empty slots for the keyrings that `wanted` names.
    #[must_use]
    pub(crate) fn of(wanted: Wanted) -> Self {
        let created = Self(Arc::new(Shared {
            slots: ArcSwap::default(),
            changing: Mutex::default(),
            wanted: ArcSwap::default(),
            reconfigured: Notify::new(),
            lookups: Arc::new(Notify::new()),
        }));
        created
            .reconfigure(wanted, || {})
            .expect("no keyring is held in another mode");
        created
    }

    /// Returns the keyrings that the configuration asks for.
    #[must_use]
    pub(crate) fn wanted(&self) -> Arc<Wanted> {
        self.0.wanted.load_full()
    }

    /// Notifies one waiter when the configuration asks for other keyrings.
    pub(crate) fn reconfigured(&self) -> &Notify {
        &self.0.reconfigured
    }

    /// Holds what a new configuration asks for, with its limits: slots are added, kept and removed.
    /// Keyrings that a pattern found are kept if a pattern still matches them. `settle` is called
    /// before the observers see the new slots.
    ///
    /// # Errors
    ///
    /// When a keyring that is held would change its mode; then nothing changes.
    pub(crate) fn reconfigure(
        &self,
        wanted: Wanted,
        settle: impl FnOnce(),
    ) -> Result<(), ModeError> {
        let mut changing = self.changing();
        let held = self.load();
        for slot in held.iter().chain(changing.parting.values()) {
            let mode = wanted.of(slot.name()).map(|(_, mode)| mode);
            if mode.is_some_and(|mode| mode != slot.mode()) {
                return Err(ModeError(slot.name().clone()));
            }
        }
        let mut slots = Vec::new();
        for slot in held.iter() {
            if let Some((staleness, _)) = wanted.of(slot.name()) {
                slot.limit(staleness);
                slots.push(Arc::clone(slot));
            } else {
                let parting = Arc::clone(slot);
                changing.parting.insert(slot.name().clone(), parting);
            }
        }
        for (name, staleness, mode) in wanted.named() {
            if held.get(name.as_str()).is_some() {
                continue;
            }
            if let Some(slot) = changing.parting.remove(name) {
                slot.limit(staleness);
                slots.push(slot);
            } else {
                let counts = changing.counts.entry(name.clone()).or_default();
                slots.push(self.slot(name.clone(), staleness, mode, counts));
            }
        }
        self.0.wanted.store(Arc::new(wanted));
        settle();
        self.publish(&mut changing, slots.into_iter().collect());
        drop(changing);
        self.0.reconfigured.notify_one();
        Ok(())
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

    /// Adds an empty slot for a keyring that a pattern finds, and returns it. None when no pattern
    /// finds it, or the process has held too many different keyrings.
    pub(crate) fn find(&self, name: &KeyringName) -> Option<Arc<Slot>> {
        let mut changing = self.changing();
        let (staleness, mode) = self.0.wanted.load().of(name)?;
        if !changing.counts.contains_key(name) && changing.counts.len() >= MAX_EVER {
            return None;
        }
        let counts = changing.counts.entry(name.clone()).or_default();
        let added = self.slot(name.clone(), staleness, mode, counts);
        let held = self.load();
        let others = held.iter().filter(|slot| slot.name() != name);
        let slots = others.chain([&added]).cloned().collect();
        self.publish(&mut changing, slots);
        Some(added)
    }

    /// Notes that a keyring is not in memory any more, and removes it unless the configuration names
    /// it. Returns whether it was removed. A check that has begun with it keeps its slot.
    pub(crate) fn lose(&self, name: &KeyringName) -> bool {
        let mut changing = self.changing();
        changing.parting.remove(name);
        if self.0.wanted.load().is_named(name) {
            return false;
        }
        self.publish_without(&mut changing, name);
        true
    }

    /// Removes a keyring, even one that the configuration names.
    #[cfg(test)]
    pub(crate) fn remove(&self, name: &KeyringName) {
        self.publish_without(&mut self.changing(), name);
    }

    fn publish_without(&self, changing: &mut Changing, name: &KeyringName) {
        let held = self.load();
        let others = held.iter().filter(|slot| slot.name() != name);
        self.publish(changing, others.cloned().collect());
    }

    /// Calls `observer` with the current slots, and then with the slots after each change.
    pub(crate) fn observe(&self, observer: &Arc<impl SlotsObserver + 'static>) {
        let mut changing = self.changing();
        observer.changed(&self.load());
        let observer = Arc::downgrade(observer);
        changing.observers.push(observer);
    }

    fn publish(&self, changing: &mut Changing, slots: Slots) {
        let slots = Arc::new(slots);
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
    use std::time::Duration;

    use super::*;
    use crate::keyring::{PatternRule, on_demand::CacheSettings};

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

    /// The keyrings `names` by name, and all others by a pattern.
    fn keyrings(names: &[&str]) -> Keyrings {
        let keyrings = Keyrings::new(names.iter().map(|text| (name(text), Staleness::default())));
        want(&keyrings, names, "*").expect("nothing changes its mode");
        keyrings
    }

    fn want(keyrings: &Keyrings, texts: &[&str], pattern: &str) -> Result<(), ModeError> {
        let named = texts
            .iter()
            .map(|text| (name(text), Staleness::default(), Mode::Full));
        let rule = PatternRule {
            pattern: pattern.parse().expect("a pattern"),
            mode: Mode::Full,
            staleness: Staleness {
                deny_after: Duration::from_mins(5),
                ..Staleness::default()
            },
        };
        keyrings.reconfigure(Wanted::new(named, vec![rule]), || {})
    }

    fn held(keyrings: &Keyrings) -> Vec<String> {
        let slots = keyrings.load();
        slots.iter().map(|slot| slot.name().to_string()).collect()
    }

    #[test]
    fn keyrings_come_and_go_in_the_order_of_their_names() {
        let keyrings = keyrings(&["m"]);
        let names = Arc::new(Names::default());
        keyrings.observe(&names);
        let added = keyrings.find(&name("z")).expect("there is room");
        assert!(keyrings.find(&name("a")).is_some());
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
        let keyrings = keyrings(&[]);
        let names = Arc::new(Names::default());
        keyrings.observe(&names);
        drop(names);
        keyrings.remove(&name("a"));
        assert!(keyrings.changing().observers.is_empty());
    }

    #[test]
    fn a_keyring_that_comes_back_continues_to_count() {
        let keyrings = keyrings(&["a"]);
        let slot = keyrings.get(&name("a")).expect("it was made");
        slot.tally().count(3);
        keyrings.remove(&name("a"));
        let again = keyrings.find(&name("a")).expect("there is room");
        assert!(!Arc::ptr_eq(&slot, &again));
        assert_eq!(again.tally().get(3), 1);
    }

    #[test]
    fn the_number_of_different_keyrings_that_patterns_find_is_bounded() {
        let keyrings = keyrings(&[]);
        let find = |at: usize| {
            let name = name(&format!("k{at}"));
            let found = keyrings.find(&name);
            keyrings.remove(&name);
            found.is_some()
        };
        assert!((0..MAX_EVER).all(find));
        assert!(!find(MAX_EVER));
        assert!(find(0), "it has counters already");
        assert_eq!(held(&keyrings), [""; 0]);
    }

    #[test]
    fn a_new_configuration_keeps_what_it_asks_for_and_nothing_else() {
        let keyrings = keyrings(&["a", "b"]);
        for found in ["x-1", "y-1"] {
            assert!(keyrings.find(&name(found)).is_some());
        }
        let before = keyrings.load();
        want(&keyrings, &["b", "c"], "x-*").expect("nothing changes its mode");
        assert_eq!(held(&keyrings), ["b", "c", "x-1"]);
        for kept in ["b", "x-1"] {
            let slot = keyrings.get(&name(kept)).expect("it is held");
            let former = before.get(kept).expect("it was held");
            assert!(Arc::ptr_eq(&slot, former), "{kept}");
        }
        let found = keyrings.get(&name("x-1")).expect("it is held");
        assert_eq!(found.staleness().deny_after, Duration::from_mins(5));
        assert!(keyrings.find(&name("y-1")).is_none(), "no pattern finds it");
        assert!(keyrings.find(&name("x-2")).is_some());
    }

    #[test]
    fn a_keyring_that_is_asked_for_again_before_it_is_erased_continues() {
        let keyrings = keyrings(&["a", "b"]);
        let slot = keyrings.get(&name("a")).expect("it is held");
        for is_released in [false, true] {
            want(&keyrings, &["b"], "x-*").expect("nothing changes its mode");
            assert_eq!(held(&keyrings), ["b"]);
            if is_released {
                keyrings.lose(&name("a"));
            }
            want(&keyrings, &["a", "b"], "x-*").expect("nothing changes its mode");
            let again = keyrings.get(&name("a")).expect("it is held");
            assert_eq!(Arc::ptr_eq(&again, &slot), !is_released);
        }
    }

    #[test]
    fn a_keyring_that_is_held_does_not_change_its_mode() {
        let keyrings = keyrings(&["a"]);
        let on_demand = Mode::OnDemand(CacheSettings::default());
        let named = ["a", "b"].map(|text| (name(text), Staleness::default(), on_demand));
        let refused = keyrings.reconfigure(Wanted::new(named, Vec::new()), || {
            panic!("nothing is settled");
        });
        assert_eq!(refused, Err(ModeError(name("a"))));
        assert_eq!(held(&keyrings), ["a"]);
        assert!(keyrings.find(&name("c")).is_some(), "the patterns stay");
    }
}
