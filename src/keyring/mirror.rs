//! Applies what the control plane sends to the keyring that a sidecar holds.
//!
//! Three rules hold whatever order things arrive in: a delta applies to exactly the revision that it names; a revoked
//! version stays revoked, whatever is announced of it later; the set digest counts what was announced, so that it can
//! be compared with the control plane's even where a tombstone overrules it.

use std::{borrow::Borrow, collections::HashMap, sync::Arc};

use super::{
    position::{DeltaError, Position},
    slot::Slot,
    usage::Ledger,
    view::{KeyringSettings, KeyringView},
};
use crate::key::{Epoch, KeyDigest, KeyRecord, KeyState, KeyringName, Revision, VersionRef};

/// The writing side of a [`Slot`]. There is one for each.
#[derive(Debug)]
pub struct Mirror {
    slot: Arc<Slot>,
    settings: Option<Arc<KeyringSettings>>,
    view: Option<Arc<KeyringView>>,
    /// Revocations that came before the first snapshot.
    early: HashMap<KeyDigest, KeyRecord>,
}

/// A version as the control plane announced it.
#[derive(Clone, Debug)]
pub struct Announced {
    /// What was announced.
    pub record: KeyRecord,
    /// The hash under which the control plane counts it.
    pub hash: u64,
}

/// A snapshot on its way, built aside.
#[derive(Debug)]
pub struct SnapshotBuilder {
    view: KeyringView,
}

/// A keyring that is read back from where it was kept, before anything of it is published.
#[derive(Debug)]
pub struct Restored {
    view: KeyringView,
    /// Of uses, of which there are none yet.
    unused: Ledger,
}

/// A snapshot is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The settings of the keyring have not come.
    #[error("a snapshot came before the keyring's settings")]
    NoSettings,
    /// It is older than what is held.
    #[error(
        "a snapshot at revision {found} came to a keyring at revision {held} of the same epoch"
    )]
    Older {
        /// Of the keyring.
        held: Revision,
        /// Of the snapshot.
        found: Revision,
    },
    /// Its items are not those that were announced.
    #[error("a snapshot has other items than its digest says")]
    Digest,
    /// It would drop more than half of what is held, and nobody confirmed that.
    #[error(
        "a snapshot of {found} items would drop more than half of {held}; it is held until an operator confirms it"
    )]
    Shrinks {
        /// How many items are held.
        held: usize,
        /// How many the snapshot has.
        found: usize,
    },
}

/// The most versions that room is made for ahead: the number is the control plane's, and more grow as they come.
const MAX_RESERVED: usize = 1 << 24;

impl Mirror {
    /// A mirror that publishes to `slot`.
    #[must_use]
    pub fn new(slot: Arc<Slot>) -> Self {
        Self {
            slot,
            settings: None,
            view: None,
            early: HashMap::new(),
        }
    }

    /// The slot that it publishes to.
    #[must_use]
    pub const fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// What it holds.
    #[must_use]
    pub(crate) fn position(&self) -> Position {
        self.view
            .as_deref()
            .map_or_else(Position::default, Position::of)
    }

    /// A version that it holds.
    #[must_use]
    pub(crate) fn record(&self, digest: &KeyDigest) -> Option<KeyRecord> {
        self.view.as_ref()?.record(digest)
    }

    /// Publishes what was kept, as the first that it holds.
    pub(crate) fn restore(&mut self, restored: Restored) {
        let Restored { view, unused: _ } = restored;
        self.settings = Some(view.shared_settings());
        self.publish(view);
    }

    /// Forgets everything that it holds: checks of the keyring are denied from now on.
    pub(crate) fn forget(&mut self) {
        self.slot.withdraw();
        self.settings = None;
        self.view = None;
        self.early.clear();
    }

    /// Takes new settings; they are in use at once.
    pub fn adopt(&mut self, settings: KeyringSettings) {
        let settings = Arc::new(settings);
        self.settings = Some(Arc::clone(&settings));
        if let Some(view) = &self.view {
            let mut view = KeyringView::clone(view);
            view.adopt(settings);
            self.publish(view);
        }
    }

    /// Begins a snapshot of about `versions` versions, to be built aside.
    ///
    /// # Errors
    ///
    /// When the settings have not come, or the snapshot is older than what is held.
    pub fn begin_snapshot(
        &self,
        epoch: Epoch,
        revision: Revision,
        versions: usize,
    ) -> Result<SnapshotBuilder, SnapshotError> {
        let settings = self.settings.clone().ok_or(SnapshotError::NoSettings)?;
        let held = self.position();
        if held.epoch == epoch && revision < held.revision {
            return Err(SnapshotError::Older {
                held: held.revision,
                found: revision,
            });
        }
        let name = self.slot.name().clone();
        let versions = versions.min(MAX_RESERVED);
        Ok(SnapshotBuilder {
            view: KeyringView::empty(name, epoch, revision, settings, versions),
        })
    }

    /// Swaps a whole snapshot in. Revocations that it does not know of are kept.
    ///
    /// `set_digest` is the control plane's; none when items were rejected, so that the two cannot agree. `confirmed` is
    /// the number of items that an operator confirmed.
    ///
    /// # Errors
    ///
    /// When the snapshot is not what was announced, or shrinks the keyring too much. What was held stays in use.
    pub fn finish_snapshot(
        &mut self,
        snapshot: SnapshotBuilder,
        set_digest: Option<u64>,
        confirmed: usize,
    ) -> Result<(), SnapshotError> {
        let SnapshotBuilder { mut view } = snapshot;
        // They may be newer than those that the snapshot began with: it can be resumed on another stream.
        if let Some(settings) = &self.settings {
            view.adopt(Arc::clone(settings));
        }
        if set_digest.is_some_and(|announced| announced != view.set_digest()) {
            return Err(SnapshotError::Digest);
        }
        let (held, found) = (self.announced_len(), view.len());
        if found < held.div_ceil(2) && confirmed != found {
            return Err(SnapshotError::Shrinks { held, found });
        }
        if let Some(former) = self.view.take() {
            for entry in former.entries() {
                match entry.key.state() {
                    KeyState::Revoked => revoke(&mut view, entry.key.to_record()),
                    KeyState::Retiring | KeyState::Retired => {
                        let version = entry.key.version_ref();
                        forget_callers(self.slot.usage(), version, entry.key.digest(), &view);
                    }
                    KeyState::Pending | KeyState::Active => {}
                }
            }
        }
        for (_, record) in self.early.drain() {
            revoke(&mut view, record);
        }
        self.publish(view);
        Ok(())
    }

    /// Applies a delta: revocations first, then upserts, then removals.
    ///
    /// # Errors
    ///
    /// When it does not start at exactly what is held; nothing is changed then.
    pub fn apply_delta(
        &mut self,
        epoch: Epoch,
        from: Revision,
        to: Revision,
        revocations: Vec<Announced>,
        upserts: Vec<Announced>,
        removals: &[KeyDigest],
    ) -> Result<(), DeltaError> {
        let held = self.position();
        held.check(epoch, from, to)?;
        let view = self.view.as_ref().ok_or(DeltaError::Gap {
            held: held.revision,
            from,
        })?;
        let mut view = KeyringView::clone(view);
        change(&mut view, self.slot.usage(), revocations, upserts, removals);
        view.advance(to);
        self.publish(view);
        Ok(())
    }

    /// Revokes versions ahead of the delta that tells of it; the revision stays.
    pub(crate) fn revoke(&mut self, records: Vec<KeyRecord>) {
        match &self.view {
            Some(view) => {
                let mut view = KeyringView::clone(view);
                for record in records {
                    revoke(&mut view, record);
                }
                self.publish(view);
            }
            None => self
                .early
                .extend(records.into_iter().map(|record| (record.digest, record))),
        }
    }

    /// How many of the held items the control plane announces; not the tombstones that only this sidecar remembers.
    fn announced_len(&self) -> usize {
        self.view.as_ref().map_or(0, |view| {
            view.entries().filter(|entry| entry.announced != 0).count()
        })
    }

    fn publish(&mut self, view: KeyringView) {
        let view = Arc::new(view);
        self.slot.publish(Arc::clone(&view));
        self.view = Some(view);
    }
}

impl KeyringView {
    /// Every version that it holds, as it was announced; a tombstone that the control plane does not announce has the hash
    /// zero.
    pub fn announced(&self) -> impl Iterator<Item = Announced> + '_ {
        self.entries().map(|entry| Announced {
            record: entry.key.to_record(),
            hash: entry.announced,
        })
    }
}

impl Restored {
    /// A keyring without versions, with room for `versions` of them.
    #[must_use]
    pub(crate) fn new(
        name: KeyringName,
        epoch: Epoch,
        revision: Revision,
        settings: KeyringSettings,
        versions: usize,
    ) -> Self {
        let versions = versions.min(MAX_RESERVED);
        Self {
            view: KeyringView::empty(name, epoch, revision, Arc::new(settings), versions),
            unused: Ledger::default(),
        }
    }

    /// What it holds so far.
    #[must_use]
    pub const fn view(&self) -> &KeyringView {
        &self.view
    }

    /// Adds a version as it was kept.
    pub(crate) fn add(&mut self, announced: &Announced) {
        self.view.put(&announced.record, announced.hash);
    }

    /// Takes new settings.
    pub(crate) fn adopt(&mut self, settings: KeyringSettings) {
        self.view.adopt(Arc::new(settings));
    }

    /// Applies a delta as [`Mirror::apply_delta`] does.
    ///
    /// # Errors
    ///
    /// When it does not start at exactly what is held; nothing is changed then.
    pub(crate) fn apply_delta(
        &mut self,
        epoch: Epoch,
        from: Revision,
        to: Revision,
        revocations: &[Announced],
        upserts: &[Announced],
        removals: &[KeyDigest],
    ) -> Result<(), DeltaError> {
        Position::of(&self.view).check(epoch, from, to)?;
        change(&mut self.view, &self.unused, revocations, upserts, removals);
        self.view.advance(to);
        Ok(())
    }

    /// Revokes versions as [`Mirror::revoke`] does.
    pub(crate) fn revoke(&mut self, records: Vec<KeyRecord>) {
        for record in records {
            revoke(&mut self.view, record);
        }
    }
}

impl SnapshotBuilder {
    /// The revision that the snapshot is at.
    #[must_use]
    pub(crate) const fn revision(&self) -> Revision {
        self.view.revision()
    }

    /// The history that it belongs to.
    #[must_use]
    pub(crate) const fn epoch(&self) -> Epoch {
        self.view.epoch()
    }

    /// Adds a version.
    pub fn add(&mut self, announced: &Announced) {
        let Announced { record, hash } = announced;
        match self.view.entry(&record.digest).map(|held| held.key.state()) {
            Some(KeyState::Revoked) => self.view.announce(&record.digest, *hash),
            Some(_) | None => self.view.put(record, *hash),
        }
    }
}

fn change(
    view: &mut KeyringView,
    ledger: &Ledger,
    revocations: impl IntoIterator<Item = impl Borrow<Announced>>,
    upserts: impl IntoIterator<Item = impl Borrow<Announced>>,
    removals: &[KeyDigest],
) {
    for announced in revocations {
        // Whatever else is said of it.
        let Announced { record, hash } = announced.borrow();
        let state = KeyState::Revoked;
        let record = KeyRecord {
            state,
            ..record.clone()
        };
        let hash = *hash;
        upsert(view, ledger, &Announced { record, hash });
    }
    for announced in upserts {
        upsert(view, ledger, announced.borrow());
    }
    for digest in removals {
        remove(view, ledger, digest);
    }
}

fn upsert(view: &mut KeyringView, ledger: &Ledger, announced: &Announced) {
    let Announced { record, hash } = announced;
    let Some(former) = view.entry(&record.digest).map(|held| held.key) else {
        return view.put(record, *hash);
    };
    match former.state() {
        KeyState::Revoked => view.announce(&record.digest, *hash),
        KeyState::Pending | KeyState::Active | KeyState::Retiring | KeyState::Retired => {
            let version = former.version_ref();
            view.put(record, *hash);
            forget_callers(ledger, version, &record.digest, view);
        }
    }
}

fn remove(view: &mut KeyringView, ledger: &Ledger, digest: &KeyDigest) {
    let Some(former) = view.entry(digest).map(|held| held.key) else {
        return;
    };
    match former.state() {
        KeyState::Revoked => view.announce(digest, 0),
        KeyState::Pending | KeyState::Active | KeyState::Retiring | KeyState::Retired => {
            let version = former.version_ref();
            view.remove(digest);
            forget_callers(ledger, version, digest, view);
        }
    }
}

/// Holds a version as revoked, counted under the hash that it has. One that is revoked already stays as it is: of two records
/// of it the later one may be all that could be read.
fn revoke(view: &mut KeyringView, record: KeyRecord) {
    let state = KeyState::Revoked;
    let held = view.entry(&record.digest);
    if held
        .as_ref()
        .is_some_and(|held| held.key.state() == KeyState::Revoked)
    {
        return;
    }
    let announced = held.map_or(0, |held| held.announced);
    view.put(&KeyRecord { state, ..record }, announced);
}

/// Forgets who used a version that is gone from `view`, or is there as one that may be used: callers are looked for only
/// where they should move on. A check that still sees the former view may note one more, which goes with the next change.
fn forget_callers(ledger: &Ledger, version: VersionRef, digest: &KeyDigest, view: &KeyringView) {
    match view.lookup(digest).map(|held| held.state()) {
        Some(KeyState::Retiring | KeyState::Retired | KeyState::Revoked) => {}
        Some(KeyState::Pending | KeyState::Active) | None => {
            if let Some(usage) = ledger.find(version) {
                usage.forget_callers();
            }
        }
    }
}

#[cfg(test)]
mod tests;
