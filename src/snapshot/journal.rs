//! What was applied and is not on the disk yet.
//!
//! The task that applies it never waits for the disk: it leaves the change here, with the view that came of it. Whoever
//! writes takes all changes at once, and the newest views, which are the state after exactly these changes. What is kept here
//! is bounded: when changes come faster than they are written, they are dropped, and the views are written whole.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::write::Change;
use crate::{key::KeyringName, keyring::KeyringView};

/// Changes on their way to the disk.
#[derive(Debug)]
pub struct Journal {
    pending: Mutex<Pending>,
    news: Condvar,
}

/// What is to be written.
#[derive(Debug)]
pub struct Batch {
    /// Every keyring, after `changes`.
    pub views: Vec<Arc<KeyringView>>,
    /// What was applied since the last batch, in order.
    pub changes: Vec<Change>,
    /// The changes do not tell everything: the views have to be written.
    pub is_whole: bool,
    /// Nothing will follow.
    pub is_last: bool,
}

/// How long whoever writes waits.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the first change.
    pub idle: Duration,
    /// With one that is not urgent, for others, which are written together with it.
    pub gather: Duration,
}

/// How soon a change has to be on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// At once: it revokes.
    Now,
    /// Within a second.
    Soon,
}

#[derive(Debug, Default)]
struct Pending {
    views: BTreeMap<KeyringName, Arc<KeyringView>>,
    changes: Vec<Change>,
    /// Of the changes, in bytes.
    size: usize,
    is_whole: bool,
    is_urgent: bool,
    is_closed: bool,
}

/// Half of what a frame may have: the rest is room for the message that goes beyond it.
const MAX_PENDING: usize = 4 << 20;

impl Journal {
    /// A journal of keyrings whose state is to be written whole, if there is any.
    #[must_use]
    pub fn new(views: impl IntoIterator<Item = Arc<KeyringView>>) -> Self {
        let views: BTreeMap<_, _> = views
            .into_iter()
            .map(|view| (view.name().clone(), view))
            .collect();
        let is_whole = !views.is_empty();
        Self {
            pending: Mutex::new(Pending {
                views,
                is_whole,
                is_urgent: is_whole,
                ..Pending::default()
            }),
            news: Condvar::new(),
        }
    }

    /// Something was applied, and `view` came of it.
    pub fn changed(&self, change: Change, urgency: Urgency, view: Arc<KeyringView>) {
        let mut pending = self.lock();
        pending.views.insert(view.name().clone(), view);
        pending.is_urgent |= urgency == Urgency::Now;
        if !pending.is_whole {
            pending.size += change.size();
            pending.changes.push(change);
            if pending.size > MAX_PENDING {
                pending.need_whole();
            }
        }
        self.news.notify_all();
    }

    /// A keyring was replaced by `view`.
    pub fn replaced(&self, view: Arc<KeyringView>) {
        let mut pending = self.lock();
        pending.views.insert(view.name().clone(), view);
        pending.need_whole();
        self.news.notify_all();
    }

    /// Nothing will follow.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.news.notify_all();
    }

    /// What is to be written next; waits until there is something, at most as long as `patience` says. With `is_due` it does
    /// not wait where there are views, and they are to be written.
    #[must_use]
    pub fn next(&self, patience: Patience, is_due: bool) -> Batch {
        let mut pending = self.lock();
        if is_due && !pending.views.is_empty() {
            pending.need_whole();
        }
        pending = self.wait_while(pending, patience.idle, Pending::is_idle);
        if !pending.is_idle() {
            pending = self.wait_while(pending, patience.gather, |pending| !pending.is_pressing());
        }
        pending.size = 0;
        pending.is_urgent = false;
        Batch {
            views: pending.views.values().cloned().collect(),
            changes: std::mem::take(&mut pending.changes),
            is_whole: std::mem::take(&mut pending.is_whole),
            is_last: pending.is_closed,
        }
    }

    /// Waits for `pause`, or until nothing will follow.
    pub fn pause(&self, pause: Duration) {
        let pending = self.lock();
        drop(self.wait_while(pending, pause, |pending| !pending.is_closed));
    }

    fn wait_while<'a>(
        &self,
        pending: MutexGuard<'a, Pending>,
        longest: Duration,
        condition: impl Fn(&Pending) -> bool,
    ) -> MutexGuard<'a, Pending> {
        let waited = self
            .news
            .wait_timeout_while(pending, longest, |pending| condition(pending));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn need_whole(&mut self) {
        self.is_whole = true;
        self.is_urgent = true;
        self.changes = Vec::new();
        self.size = 0;
    }

    const fn is_idle(&self) -> bool {
        self.changes.is_empty() && !self.is_pressing()
    }

    const fn is_pressing(&self) -> bool {
        self.is_urgent || self.is_whole || self.is_closed
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        key::{Epoch, Revision, testing},
        keyring::{KeyringSettings, Restored},
        snapshot::write::ChangeKind,
    };

    const LONG: Duration = Duration::from_hours(1);
    const NEVER: Patience = Patience {
        idle: LONG,
        gather: Duration::ZERO,
    };
    const NOW: Patience = Patience {
        idle: Duration::ZERO,
        gather: Duration::ZERO,
    };

    fn view(revision: u64) -> Arc<KeyringView> {
        let settings = KeyringSettings {
            prefix: crate::key::Prefix::default(),
            issued_only: true,
            peppers: vec![testing::pepper()],
            help_url: None,
        };
        let (epoch, revision) = (Epoch::new(1), Revision::new(revision));
        let restored = Restored::new(testing::keyring_name(), epoch, revision, settings, 0);
        Arc::new(restored.view().clone())
    }

    fn change(len: usize) -> Change {
        Change {
            keyring: testing::keyring_name(),
            kind: ChangeKind::Delta(Bytes::from(vec![0; len])),
        }
    }

    fn revision(batch: &Batch) -> u64 {
        batch.views[0].revision().get()
    }

    #[test]
    fn changes_come_with_the_state_that_came_of_them() {
        let journal = Journal::new([view(1)]);
        let batch = journal.next(NEVER, false);
        assert!(batch.is_whole && revision(&batch) == 1);
        journal.changed(change(1), Urgency::Soon, view(2));
        journal.changed(change(2), Urgency::Now, view(3));
        let batch = journal.next(NEVER, false);
        assert!(batch.changes == [change(1), change(2)] && !batch.is_whole);
        assert_eq!(revision(&batch), 3);
        let batch = journal.next(NOW, false);
        assert!(batch.changes.is_empty() && !batch.is_whole && !batch.is_last);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let journal = Journal::new([]);
        for number in 1..=100 {
            journal.changed(change(MAX_PENDING / 10), Urgency::Soon, view(number));
            assert!(journal.lock().size <= MAX_PENDING);
        }
        let batch = journal.next(NEVER, false);
        assert!(batch.is_whole && batch.changes.is_empty());
        assert_eq!(revision(&batch), 100);
        journal.changed(change(1), Urgency::Now, view(101));
        assert_eq!(journal.next(NEVER, false).changes, [change(1)]);
    }

    #[test]
    fn who_has_lost_the_file_gets_the_state_and_not_what_led_to_it() {
        let journal = Journal::new([]);
        assert!(!journal.next(NOW, true).is_whole);
        journal.changed(change(1), Urgency::Soon, view(2));
        let batch = journal.next(NEVER, true);
        assert!(batch.is_whole && batch.changes.is_empty());
    }

    #[test]
    fn a_journal_that_is_closed_waits_no_more() {
        let journal = Journal::new([]);
        journal.changed(change(1), Urgency::Soon, view(2));
        journal.close();
        journal.pause(LONG);
        let batch = journal.next(NEVER, false);
        assert!(batch.is_last && batch.changes == [change(1)]);
        assert!(journal.next(NEVER, false).is_last);
    }
}
