//! Applies the messages of the control plane to the keyring that a sidecar holds.
//!
//! Three rules hold in whatever order messages arrive. A delta applies only to exactly the revision
//! that it starts from. A revoked version stays revoked, whatever the control plane announces about
//! it later. The set digest counts each item as it was announced, so that it can be compared with
//! the control plane's even where a tombstone overrules the item.

use std::{borrow::Borrow, collections::HashMap, sync::Arc};

use super::{
    position::{DeltaError, KeyringPosition},
    slot::Slot,
    usage::Ledger,
    view::{KeyringSettings, KeyringView},
};
use crate::key::{Epoch, KeyDigest, KeyRecord, KeyState, KeyringName, Revision, VersionRef};

/// The writer of a [`Slot`]. Each slot has one.
#[derive(Debug)]
pub struct Mirror {
    slot: Arc<Slot>,
    settings: Option<Arc<KeyringSettings>>,
    view: Option<Arc<KeyringView>>,
    /// Revocations that arrived before the first snapshot.
    early: HashMap<KeyDigest, KeyRecord>,
}

/// A version as the control plane announced it.
#[derive(Clone, Debug)]
pub struct Announced {
    /// The announced record.
    pub record: KeyRecord,
    /// The hash of the item, which counts in the keyring's set digest; 0 for a tombstone that the
    /// control plane does not announce.
    pub hash: u64,
}

/// A snapshot that is being received. It is built apart from the published view.
#[derive(Debug)]
pub struct SnapshotBuilder {
    view: KeyringView,
}

/// A keyring that is loaded from the snapshot file, before any of it is published.
#[derive(Debug)]
pub struct Restored {
    view: KeyringView,
    /// An empty ledger, which `change` needs: no version was used yet.
    unused: Ledger,
}

/// Why a snapshot is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The settings of the keyring have not arrived.
    #[error("a snapshot arrived before the keyring's settings")]
    NoSettings,
    /// The snapshot is older than the held view of the same epoch.
    #[error(
        "a snapshot is at revision {found}, but the keyring is already at revision {held} of the same epoch"
    )]
    Older {
        /// The revision of the held keyring.
        held: Revision,
        /// The revision of the snapshot.
        found: Revision,
    },
    /// The items of the snapshot do not match its set digest.
    #[error("the items of a snapshot do not match its digest")]
    Digest,
    /// The snapshot would drop more than half of the held items, and no operator confirmed its
    /// number of items.
    #[error(
        "a snapshot of {found} items would drop more than half of {held}; it is held until an operator confirms it"
    )]
    Shrinks {
        /// The number of held items that the control plane announced.
        held: usize,
        /// The number of items in the snapshot.
        found: usize,
    },
}

/// The most versions for which memory is reserved in advance. The number comes from the control
/// plane; memory for more versions is allocated as they arrive.
const MAX_RESERVED: usize = 1 << 24;

impl Mirror {
    /// Creates a mirror that publishes to `slot`.
    #[must_use]
    pub fn new(slot: Arc<Slot>) -> Self {
        Self {
            slot,
            settings: None,
            view: None,
            early: HashMap::new(),
        }
    }

    /// Returns the slot that the mirror publishes to.
    #[must_use]
    pub const fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// Returns the position of the held view; all zero when no view is held.
    #[must_use]
    pub(crate) fn position(&self) -> KeyringPosition {
        self.view
            .as_deref()
            .map_or_else(KeyringPosition::default, KeyringPosition::of)
    }

    /// Returns the record of the held version with `digest`.
    #[must_use]
    pub(crate) fn record(&self, digest: &KeyDigest) -> Option<KeyRecord> {
        self.view.as_ref()?.record(digest)
    }

    /// Publishes a restored keyring as the first view.
    pub(crate) fn restore(&mut self, restored: Restored) {
        let Restored { view, unused: _ } = restored;
        self.settings = Some(view.shared_settings());
        self.publish(view);
    }

    /// Drops everything that the mirror holds: checks of the keyring are denied from now on, until
    /// another view is published and confirmed.
    pub(crate) fn forget(&mut self) {
        self.slot.withdraw();
        self.settings = None;
        self.view = None;
        self.early.clear();
    }

    /// Applies new settings. They are in use at once.
    pub fn adopt(&mut self, settings: KeyringSettings) {
        let settings = Arc::new(settings);
        self.settings = Some(Arc::clone(&settings));
        if let Some(view) = &self.view {
            let mut view = KeyringView::clone(view);
            view.adopt(settings);
            self.publish(view);
        }
    }

    /// Begins a snapshot of about `versions` versions. It is built apart from the published view.
    ///
    /// # Errors
    ///
    /// When the settings have not arrived, or the snapshot is older than the held view of the same
    /// epoch.
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

    /// Publishes a complete snapshot in the place of the held view. Revocations that the snapshot
    /// does not contain are kept.
    ///
    /// `set_digest` is the control plane's digest of the items. It is none when items were
    /// rejected, because the two digests cannot agree then. `confirmed` is the number of items that
    /// an operator confirmed.
    ///
    /// # Errors
    ///
    /// When the items do not match `set_digest`, or when the snapshot would drop more than half of
    /// the held items and `confirmed` is not its number of items. The former view stays in use.
    pub fn finish_snapshot(
        &mut self,
        snapshot: SnapshotBuilder,
        set_digest: Option<u64>,
        confirmed: usize,
    ) -> Result<(), SnapshotError> {
        let SnapshotBuilder { mut view } = snapshot;
        // These settings may be newer than those that the snapshot began with: a snapshot can be
        // resumed on another stream.
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
    /// When the delta does not start at exactly the held position, or does not lead to a later
    /// revision. Nothing is changed then.
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

    /// Revokes versions ahead of the delta that contains their revocation. The revision stays the
    /// same.
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

    /// Returns how many of the held items the control plane announced. Tombstones that only this
    /// sidecar remembers do not count.
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
    /// Returns every held version with the hash under which it was announced; 0 for a tombstone
    /// that the control plane does not announce.
    pub fn announced(&self) -> impl Iterator<Item = Announced> + '_ {
        self.entries().map(|entry| Announced {
            record: entry.key.to_record(),
            hash: entry.announced,
        })
    }
}

impl Restored {
    /// Creates a keyring without versions, with memory for `versions` of them.
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

    /// Returns the keyring as it was loaded so far.
    #[must_use]
    pub const fn view(&self) -> &KeyringView {
        &self.view
    }

    /// Adds a version from the snapshot file.
    pub(crate) fn add(&mut self, announced: &Announced) {
        self.view.put(&announced.record, announced.hash);
    }

    /// Applies new settings.
    pub(crate) fn adopt(&mut self, settings: KeyringSettings) {
        self.view.adopt(Arc::new(settings));
    }

    /// Applies a delta as [`Mirror::apply_delta`] does.
    ///
    /// # Errors
    ///
    /// When the delta does not start at exactly the held position, or does not lead to a later
    /// revision. Nothing is changed then.
    pub(crate) fn apply_delta(
        &mut self,
        epoch: Epoch,
        from: Revision,
        to: Revision,
        revocations: &[Announced],
        upserts: &[Announced],
        removals: &[KeyDigest],
    ) -> Result<(), DeltaError> {
        KeyringPosition::of(&self.view).check(epoch, from, to)?;
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
    /// Returns the revision of the snapshot.
    #[must_use]
    pub(crate) const fn revision(&self) -> Revision {
        self.view.revision()
    }

    /// Returns the epoch of the snapshot.
    #[must_use]
    pub(crate) const fn epoch(&self) -> Epoch {
        self.view.epoch()
    }

    /// Adds a version. A version that the snapshot already holds as revoked stays revoked; it is
    /// then counted under the new hash.
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
        // It is revoked, whatever state its record names.
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

/// Marks a version as revoked and keeps the hash under which it is counted. A version that is
/// already revoked stays unchanged: the later of two records of it may contain only the fields that
/// could be read.
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

/// Drops the recorded callers of a version that `view` no longer holds, or holds as pending or
/// active. Callers are recorded only for versions that they should stop using. A check that still
/// reads the former view may record one more caller; the next change drops it.
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
