//! The basis of checks: the settings and the keyrings by which they are judged.
//!
//! A check loads the basis once, and keeps it until it is answered, also while it waits for a
//! lookup. So no check sees a part of a change.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, Guard};

use super::{all_settings::AllSettings, failures::Failures};
use crate::keyring::{Keyrings, Slot, Slots, SlotsObserver};

/// The settings and the keyrings by which a check is judged. Immutable: a change replaces it.
#[derive(Debug)]
pub(super) struct Basis {
    pub(super) settings: AllSettings,
    /// The budgets of failed credentials, which outlive a change of the keyrings.
    pub(super) failures: Arc<Failures>,
    slots: Arc<Slots>,
}

/// The basis of a check that has begun.
pub(super) type LoadedBasis = Guard<Arc<Basis>>;

/// The basis of the checks that begin now.
#[derive(Debug)]
pub(super) struct CurrentBasis {
    basis: ArcSwap<Basis>,
    /// The settings of the next change.
    next: Mutex<Option<AllSettings>>,
}

impl Basis {
    /// Returns the slot of a keyring, whose name need not be parsed.
    pub(super) fn slot(&self, name: &str) -> Option<&Slot> {
        self.slots.get(name).map(|slot| &**slot)
    }
}

impl CurrentBasis {
    /// Returns the basis of `settings` and `keyrings`, which follows each change of the keyrings.
    pub(super) fn of(settings: AllSettings, keyrings: &Keyrings) -> Arc<Self> {
        let failures = Arc::new(Failures::new(settings.envoy().failed_credentials()));
        let basis = Arc::new(Self {
            basis: ArcSwap::from_pointee(Basis {
                settings,
                failures,
                slots: Arc::default(),
            }),
            next: Mutex::default(),
        });
        keyrings.observe(&basis);
        basis
    }

    /// Returns the basis for one check, without a lock or an allocation.
    pub(super) fn load(&self) -> LoadedBasis {
        self.basis.load()
    }

    /// Changes the settings together with the next change of the keyrings.
    pub(super) fn settle(&self, settings: AllSettings) {
        *self.next() = Some(settings);
    }

    fn next(&self) -> MutexGuard<'_, Option<AllSettings>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotsObserver for CurrentBasis {
    fn changed(&self, slots: &Arc<Slots>) {
        let former = self.basis.load();
        let settings = self.next().take();
        let settings = settings.unwrap_or_else(|| former.settings.clone());
        let rate = settings.envoy().failed_credentials();
        let failures = if rate == former.settings.envoy().failed_credentials() {
            Arc::clone(&former.failures)
        } else {
            Arc::new(Failures::new(rate))
        };
        self.basis.store(Arc::new(Basis {
            settings,
            failures,
            slots: Arc::clone(slots),
        }));
    }
}
