//! Readiness as ownership: a part of the process that is not ready holds a guard.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Whether the process can do its work: it is ready while no guard exists. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readiness(Arc<Inner>);

/// Blocks readiness until it is dropped.
#[derive(Debug)]
#[must_use = "readiness is blocked only as long as the guard lives"]
pub(crate) struct ReadinessGuard {
    readiness: Readiness,
    id: u64,
}

#[derive(Debug, Default)]
struct Inner {
    /// The number of blockers, for a check without the lock.
    count: AtomicUsize,
    blockers: Mutex<Blockers>,
}

#[derive(Debug, Default)]
struct Blockers {
    next: u64,
    names: BTreeMap<u64, Arc<str>>,
}

impl Readiness {
    /// Blocks readiness under `name`, which operators see, until the guard is dropped.
    pub(crate) fn block(&self, name: impl Into<Arc<str>>) -> ReadinessGuard {
        let mut blockers = self.lock();
        let id = blockers.next;
        blockers.next += 1;
        blockers.names.insert(id, name.into());
        self.publish(&blockers);
        ReadinessGuard {
            readiness: self.clone(),
            id,
        }
    }

    /// Whether no guard blocks readiness.
    #[must_use]
    pub(crate) fn is_ready(&self) -> bool {
        self.0.count.load(Ordering::Acquire) == 0
    }

    /// Returns the names of the guards, the oldest first.
    #[must_use]
    pub(crate) fn blocked_by(&self) -> Vec<Arc<str>> {
        self.lock().names.values().cloned().collect()
    }

    fn publish(&self, blockers: &Blockers) {
        self.0.count.store(blockers.names.len(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Blockers> {
        self.0
            .blockers
            .lock()
            .expect("no holder of the blockers panics")
    }
}

impl Drop for ReadinessGuard {
    fn drop(&mut self) {
        let mut blockers = self.readiness.lock();
        blockers.names.remove(&self.id);
        self.readiness.publish(&blockers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_the_last_guard_is_dropped() {
        let readiness = Readiness::default();
        assert!(readiness.is_ready());
        let first = readiness.block("keyring payments");
        let second = readiness.block(String::from("keyring partners"));
        assert_eq!(
            readiness.blocked_by(),
            ["keyring payments".into(), "keyring partners".into()]
        );
        drop(first);
        assert!(!readiness.is_ready());
        assert_eq!(readiness.blocked_by(), ["keyring partners".into()]);
        drop(second);
        assert!(readiness.is_ready());
        assert_eq!(readiness.blocked_by(), []);
    }

    #[test]
    fn guards_of_one_name_count_each() {
        let readiness = Readiness::default();
        let first = readiness.block("store");
        let second = readiness.block("store");
        drop(second);
        assert!(!readiness.is_ready());
        drop(first);
        assert!(readiness.is_ready());
    }
}
