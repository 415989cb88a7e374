//! The bells that wake tasks when a keyring changes.

use std::sync::{
    Arc, Mutex, PoisonError, Weak,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::{Notify, watch};

use super::journal::Witness;
use crate::key::Revision;

/// The bells that a change of a keyring rings. Each belongs to one task, and several keyrings may
/// ring it.
#[derive(Debug, Default)]
pub(crate) struct Bells(Mutex<Vec<Weak<Notify>>>);

/// Rings once for each revision of a keyring that becomes visible.
#[derive(Debug)]
pub(crate) struct Ringer {
    bells: Bells,
    /// The newest revision for which the bells were rung.
    rung: AtomicU64,
    /// Counts changes of any keyring.
    changes: watch::Sender<u64>,
}

impl Ringer {
    /// Returns a ringer without bells; `changes` is incremented with every revision that becomes
    /// visible.
    #[must_use]
    pub(crate) fn new(changes: watch::Sender<u64>) -> Self {
        Self {
            bells: Bells::default(),
            rung: AtomicU64::new(0),
            changes,
        }
    }

    /// Returns its bells.
    #[must_use]
    pub(crate) const fn bells(&self) -> &Bells {
        &self.bells
    }
}

impl Witness for Ringer {
    fn published(&self, revision: Revision) {
        // Several commits that are written together ring once.
        if self.rung.fetch_max(revision.get(), Ordering::AcqRel) < revision.get() {
            self.bells.ring();
            self.changes
                .send_modify(|count| *count = count.wrapping_add(1));
        }
    }
}

impl Bells {
    /// Rings `bell` with every change from now on, as long as a task holds it.
    pub(crate) fn join(&self, bell: &Arc<Notify>) {
        let mut bells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if bells.len() == bells.capacity() {
            // Without changes, the bells of tasks that come and go must not pile up.
            bells.retain(|bell| bell.strong_count() > 0);
        }
        bells.push(Arc::downgrade(bell));
    }

    /// Rings all bells. A task that is not waiting now does not wait the next time.
    pub(crate) fn ring(&self) {
        let mut bells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bells.retain(|bell| match bell.upgrade() {
            Some(bell) => {
                bell.notify_one();
                true
            }
            None => false,
        });
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn has_rung(bell: &Notify) -> bool {
        bell.notified().now_or_never().is_some()
    }

    #[test]
    fn everybody_is_woken_once_by_a_change() {
        let (bells, others) = (Bells::default(), Bells::default());
        let [one, other] = [Arc::new(Notify::new()), Arc::new(Notify::new())];
        bells.join(&one);
        bells.join(&other);
        others.join(&other);
        bells.ring();
        assert!(has_rung(&one) && has_rung(&other));
        assert!(!has_rung(&one) && !has_rung(&other));
        others.ring();
        assert!(!has_rung(&one) && has_rung(&other));
    }

    #[test]
    fn who_is_gone_is_forgotten() {
        let bells = Bells::default();
        let kept = Arc::new(Notify::new());
        bells.join(&kept);
        for _ in 0..10_000 {
            bells.join(&Arc::new(Notify::new()));
        }
        let held = bells.0.lock().expect("nobody panics").len();
        assert!(held < 100, "{held} are held");
        bells.ring();
        assert!(has_rung(&kept));
    }
}
