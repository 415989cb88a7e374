//! The changes that were applied and are not on the disk yet.
//!
//! The task that applies changes never waits for the disk: it adds each change here, with the resulting view. The thread that
//! writes receives all changes together, with the newest views, which are the state after exactly these changes. The memory
//! is bounded: if changes arrive faster than they are written, they are dropped, and the whole state is written.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{durable::Durable, write::Change};
use crate::{
    key::{KeyringName, Revision},
    keyring::KeyringView,
};

/// Changes on their way to the disk.
#[derive(Debug)]
pub(crate) struct Journal {
    pending: Mutex<Pending>,
    news: Condvar,
}

/// The next write.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The state of every keyring after `changes`.
    pub(crate) state: BTreeMap<KeyringName, Applied>,
    /// The changes since the last batch, in order.
    pub(crate) changes: Vec<Change>,
    /// Whether the whole state has to be written, because the changes are not complete.
    pub(crate) is_whole: bool,
    /// The newest removal of a keyring, which `state` does not have any more.
    pub(crate) removal: Removal,
    /// The end of the file, if this is the last batch.
    pub(crate) ending: Option<Ending>,
}

/// The applied state of a keyring.
#[derive(Clone, Debug)]
pub(crate) struct Applied {
    /// The view after the last change.
    pub(crate) view: Arc<KeyringView>,
    /// Every revocation up to this revision is in the view.
    pub(crate) revoked_through: Revision,
}

/// The number of a removal of a keyring, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Removal(u64);

/// What happens to the file at an orderly stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The file is kept, with all applied changes.
    Keep,
    /// The file is erased.
    Erase,
}

/// How long the thread that writes waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WritePatience {
    /// The wait for the first change.
    pub(crate) idle: Duration,
    /// The additional wait of a change that is not urgent for others, which are written together with it.
    pub(crate) gather: Duration,
}

/// How soon a change has to be on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteUrgency {
    /// Immediately: it revokes.
    Now,
    /// Together with the changes that follow within a short time.
    Soon,
}

#[derive(Debug, Default)]
struct Pending {
    state: BTreeMap<KeyringName, Applied>,
    changes: Vec<Change>,
    /// The size of the changes, in bytes.
    size: usize,
    is_whole: bool,
    is_urgent: bool,
    /// The newest one.
    removal: Removal,
    ending: Option<Ending>,
}

/// The largest size of the changes, in bytes: half of the largest frame, so that the message that exceeds it fits too.
const MAX_PENDING: usize = 4 << 20;

impl Journal {
    /// A journal of keyrings. If there are any, their whole state is written first.
    #[must_use]
    pub(crate) fn new(state: impl IntoIterator<Item = Applied>) -> Self {
        let state: BTreeMap<_, _> = state
            .into_iter()
            .map(|applied| (applied.view.name().clone(), applied))
            .collect();
        let is_whole = !state.is_empty();
        Self {
            pending: Mutex::new(Pending {
                state,
                is_whole,
                is_urgent: is_whole,
                ..Pending::default()
            }),
            news: Condvar::new(),
        }
    }

    /// Adds a change that was applied, with the resulting state.
    pub(crate) fn changed(&self, change: Change, urgency: WriteUrgency, applied: Applied) {
        let mut pending = self.lock();
        pending.put(applied);
        pending.is_urgent |= urgency == WriteUrgency::Now;
        if !pending.is_whole {
            pending.size += change.size();
            pending.changes.push(change);
            if pending.size > MAX_PENDING {
                pending.need_whole();
            }
        }
        self.news.notify_all();
    }

    /// Adds the state of a keyring that was replaced as a whole.
    pub(crate) fn replaced(&self, applied: Applied) {
        let mut pending = self.lock();
        pending.put(applied);
        pending.need_whole();
        self.news.notify_all();
    }

    /// Removes a keyring from the file, whether or not the file has it. [`Disk::has_removed`] reports when this is done.
    ///
    /// [`Disk::has_removed`]: super::disk::Disk::has_removed
    pub(crate) fn removed(&self, keyring: &KeyringName) -> Removal {
        let mut pending = self.lock();
        pending.state.remove(keyring);
        pending.removal.0 += 1;
        pending.need_whole();
        self.news.notify_all();
        pending.removal
    }

    /// Ends the journal: no change follows. If it is called again, the first `ending` applies.
    pub(crate) fn close(&self, ending: Ending) {
        self.lock().ending.get_or_insert(ending);
        self.news.notify_all();
    }

    /// Waits for the next batch, for at most the time of `patience`. If `is_due` is set and there is a state, the call does not
    /// wait for a first change, and the batch has the whole state.
    #[must_use]
    pub(crate) fn next(&self, patience: WritePatience, is_due: bool) -> Batch {
        let mut pending = self.lock();
        if is_due && pending.has_state() {
            pending.need_whole();
        }
        pending = self.wait_while(pending, patience.idle, Pending::is_idle);
        if !pending.is_idle() {
            pending = self.wait_while(pending, patience.gather, |pending| !pending.is_pressing());
        }
        pending.size = 0;
        pending.is_urgent = false;
        Batch {
            state: pending.state.clone(),
            changes: std::mem::take(&mut pending.changes),
            is_whole: std::mem::take(&mut pending.is_whole),
            removal: pending.removal,
            ending: pending.ending,
        }
    }

    /// Waits for `pause`, or until the journal ends.
    pub(crate) fn pause(&self, pause: Duration) {
        let pending = self.lock();
        drop(self.wait_while(pending, pause, |pending| pending.ending.is_none()));
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

impl Applied {
    /// The state of the keyring on the disk after this was written.
    pub(super) fn durable(&self) -> Durable {
        Durable {
            epoch: self.view.epoch(),
            revision: self.view.revision(),
            revoked_through: self.revoked_through,
        }
    }
}

impl Pending {
    fn put(&mut self, applied: Applied) {
        self.state.insert(applied.view.name().clone(), applied);
    }

    /// Whether there is a state to write; the removal of a keyring is one, too.
    fn has_state(&self) -> bool {
        !self.state.is_empty() || self.removal > Removal::default()
    }

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
        self.is_urgent || self.is_whole || self.ending.is_some()
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
    const NEVER: WritePatience = WritePatience {
        idle: LONG,
        gather: Duration::ZERO,
    };
    const NOW: WritePatience = WritePatience {
        idle: Duration::ZERO,
        gather: Duration::ZERO,
    };

    fn applied(revision: u64) -> Applied {
        let settings = KeyringSettings {
            prefix: crate::key::Prefix::default(),
            issued_only: true,
            peppers: vec![testing::pepper()],
            help_url: None,
        };
        let (epoch, revision) = (Epoch::new(1), Revision::new(revision));
        let restored = Restored::new(testing::keyring_name(), epoch, revision, settings, 0);
        Applied {
            view: Arc::new(restored.view().clone()),
            revoked_through: revision,
        }
    }

    fn change(len: usize) -> Change {
        Change {
            keyring: testing::keyring_name(),
            kind: ChangeKind::Delta(Bytes::from(vec![0; len])),
        }
    }

    fn revision(batch: &Batch) -> u64 {
        let (_, applied) = batch.state.first_key_value().expect("it has one");
        applied.view.revision().get()
    }

    #[test]
    fn changes_come_with_the_state_that_came_of_them() {
        let journal = Journal::new([applied(1)]);
        let batch = journal.next(NEVER, false);
        assert!(batch.is_whole && revision(&batch) == 1);
        journal.changed(change(1), WriteUrgency::Soon, applied(2));
        journal.changed(change(2), WriteUrgency::Now, applied(3));
        let batch = journal.next(NEVER, false);
        assert!(batch.changes == [change(1), change(2)] && !batch.is_whole);
        assert_eq!(revision(&batch), 3);
        let batch = journal.next(NOW, false);
        assert!(batch.changes.is_empty() && !batch.is_whole && batch.ending.is_none());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let journal = Journal::new([]);
        for number in 1..=100 {
            journal.changed(
                change(MAX_PENDING / 10),
                WriteUrgency::Soon,
                applied(number),
            );
            assert!(journal.lock().size <= MAX_PENDING);
        }
        let batch = journal.next(NEVER, false);
        assert!(batch.is_whole && batch.changes.is_empty());
        assert_eq!(revision(&batch), 100);
        journal.changed(change(1), WriteUrgency::Now, applied(101));
        assert_eq!(journal.next(NEVER, false).changes, [change(1)]);
    }

    #[test]
    fn who_has_lost_the_file_gets_the_state_and_not_what_led_to_it() {
        let journal = Journal::new([]);
        assert!(!journal.next(NOW, true).is_whole);
        journal.changed(change(1), WriteUrgency::Soon, applied(2));
        let batch = journal.next(NEVER, true);
        assert!(batch.is_whole && batch.changes.is_empty());
    }

    #[test]
    fn a_journal_that_is_closed_waits_no_more() {
        for ending in [Ending::Keep, Ending::Erase] {
            let journal = Journal::new([]);
            journal.changed(change(1), WriteUrgency::Soon, applied(2));
            journal.close(ending);
            journal.close(Ending::Keep);
            journal.pause(LONG);
            let batch = journal.next(NEVER, false);
            assert!(batch.ending == Some(ending) && batch.changes == [change(1)]);
            assert_eq!(journal.next(NEVER, false).ending, Some(ending));
        }
    }

    #[test]
    fn a_keyring_that_is_removed_is_not_in_the_next_state() {
        let journal = Journal::new([applied(1)]);
        let batch = journal.next(NEVER, false);
        assert_eq!((batch.state.len(), batch.removal), (1, Removal::default()));
        journal.changed(change(1), WriteUrgency::Soon, applied(2));
        let first = journal.removed(&testing::keyring_name());
        let batch = journal.next(NEVER, false);
        assert!(batch.is_whole && batch.state.is_empty() && batch.changes.is_empty());
        assert_eq!(batch.removal, first);
        // Who has lost the file writes that it is not there, too.
        assert!(journal.next(NEVER, true).is_whole);
        assert!(journal.removed(&testing::keyring_name()) > first);
    }
}
