//! The versions of one key that are held: let in, used and evicted together.

use std::{iter, slice, sync::Arc};

use super::CachedKey;
use crate::{
    key::{KeyDigest, KeyId, Revision},
    keyring::held::OwnedKey,
};

/// The versions of one key that are held; at least one. The first is the head: the cache has the group under its digest.
#[derive(Clone, Debug)]
pub(super) enum Group {
    /// Most keys have one version at a time.
    One(Arc<CachedKey>),
    /// A key in a rotation has two, seldom more.
    Several(Arc<[Arc<CachedKey>]>),
}

/// What a group takes beside its versions, in bytes: the cache's own node, its place in the order of use, and the writer's
/// note of the key. With what a version takes it is the 410 bytes that the growth of a process with 150,000 entries came to
/// before there were groups, and an estimate of 58 for the note and the wider entry.
const GROUP_OVERHEAD: usize = 420;
/// What a version takes beside its record: the two allocations around it.
const VERSION_OVERHEAD: usize = 48;
/// What a version that is not the head takes in addition: the link that leads from its digest to the group. An estimate:
/// `cargo bench --bench on_demand -- --memory-of 2` measures it.
const LINK_OVERHEAD: usize = 300;
/// The most versions that have ended which a group keeps beside its head. Requests with them are denied without a lookup;
/// more of them are looked up again. A key seldom has one that is still presented.
const MAX_ENDED: usize = 4;

impl Group {
    /// The version under whose digest the cache has the group.
    pub(super) fn head(&self) -> &Arc<CachedKey> {
        match self {
            Self::One(head) => head,
            Self::Several(versions) => &versions[0],
        }
    }

    /// The same, without a copy where that can be.
    pub(super) fn into_head(self) -> Arc<CachedKey> {
        match self {
            Self::One(head) => head,
            Self::Several(versions) => Arc::clone(&versions[0]),
        }
    }

    /// All of its versions, the head first.
    pub(super) fn versions(&self) -> &[Arc<CachedKey>] {
        match self {
            Self::One(head) => slice::from_ref(head),
            Self::Several(versions) => versions,
        }
    }

    /// Those behind the head.
    pub(super) fn others(&self) -> &[Arc<CachedKey>] {
        &self.versions()[1..]
    }

    /// The version with a digest.
    pub(super) fn find(&self, digest: &KeyDigest) -> Option<&Arc<CachedKey>> {
        let mut versions = self.versions().iter();
        versions.find(|version| version.key.digest() == digest)
    }

    /// Whose versions they are.
    pub(super) fn key_id(&self) -> KeyId {
        self.head().key.held().key_id()
    }

    /// At which revision the group had every version of its key that was accepted then.
    pub(super) fn complete_at(&self) -> Revision {
        let complete_at = self.versions().iter().map(|version| version.complete_at);
        complete_at.max().unwrap_or_default()
    }

    /// The first end of one of its versions, in milliseconds since the boot.
    pub(super) fn expires_at(&self) -> u64 {
        let ends = self.versions().iter().map(|version| version.expires_at);
        ends.min().unwrap_or_default()
    }

    /// The group with `changed` in the place of their former selves, or beside the others. Of those that have ended, the ones
    /// that changed or were looked up longest ago go when they are too many.
    pub(super) fn with(&self, changed: impl IntoIterator<Item = Arc<CachedKey>>) -> Self {
        let mut head = Arc::clone(self.head());
        // Behind the head, from the oldest to the newest.
        let mut others = self.others().to_vec();
        for version in changed {
            let digest = version.key.digest();
            if head.key.digest() == digest {
                head = version;
            } else {
                others.retain(|held| held.key.digest() != digest);
                others.push(version);
            }
        }
        let is_ended = |version: &Arc<CachedKey>| !version.key.held().state().is_live();
        let ended = others.iter().filter(|version| is_ended(version)).count();
        let mut excess = ended.saturating_sub(MAX_ENDED);
        others.retain(|version| {
            let goes = excess > 0 && is_ended(version);
            excess -= usize::from(goes);
            !goes
        });
        if others.is_empty() {
            Self::One(head)
        } else {
            Self::Several(iter::once(head).chain(others).collect())
        }
    }

    /// What it takes, in bytes.
    pub(super) fn weight(&self) -> usize {
        let versions = self.versions().iter().map(|version| {
            VERSION_OVERHEAD + size_of::<CachedKey>() - size_of::<OwnedKey>() + version.key.size()
        });
        GROUP_OVERHEAD + versions.sum::<usize>() + self.others().len() * LINK_OVERHEAD
    }
}
