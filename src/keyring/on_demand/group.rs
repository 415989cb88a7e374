//! The held versions of one key, which are admitted, used and evicted together.

use std::{iter, slice, sync::Arc};

use super::CachedKey;
use crate::{
    key::{KeyDigest, KeyId, Revision},
    keyring::held::OwnedKey,
};

/// The held versions of one key; at least one. The first is the head: the cache stores the group
/// under its digest.
#[derive(Clone, Debug)]
pub(super) enum Group {
    /// Most keys have one version at a time.
    One(Arc<CachedKey>),
    /// A key in a rotation has two, seldom more.
    Several(Arc<[Arc<CachedKey>]>),
}

/// The memory of a group beside its versions, in bytes: the cache's own node, its place in the
/// order of use, and the writer's entry for the key. Together with `VERSION_OVERHEAD`, this is the
/// sum of two numbers. The first is 410 bytes, by which a process grew for each of 150,000 entries
/// before there were groups. The second is an estimate of 58 bytes for the writer's entry and the
/// wider entry of the cache.
const GROUP_OVERHEAD: usize = 420;
/// The memory of a version beside its record, in bytes: the two allocations around it.
const VERSION_OVERHEAD: usize = 48;
/// The additional memory of a version that is not the head, in bytes: the link from its digest to
/// the group. It is an estimate: `cargo bench --bench on_demand -- --memory-of 2` measures it.
const LINK_OVERHEAD: usize = 300;
/// The most retired or revoked versions that a group keeps beside its head. Requests with them are
/// denied without a lookup; any more such versions are looked up again. Few keys have such a
/// version that is still presented.
const MAX_ENDED: usize = 4;

impl Group {
    /// Returns the version under whose digest the cache stores the group.
    pub(super) fn head(&self) -> &Arc<CachedKey> {
        match self {
            Self::One(head) => head,
            Self::Several(versions) => &versions[0],
        }
    }

    /// Returns the head, without a copy where that is possible.
    pub(super) fn into_head(self) -> Arc<CachedKey> {
        match self {
            Self::One(head) => head,
            Self::Several(versions) => Arc::clone(&versions[0]),
        }
    }

    /// Returns all versions, the head first.
    pub(super) fn versions(&self) -> &[Arc<CachedKey>] {
        match self {
            Self::One(head) => slice::from_ref(head),
            Self::Several(versions) => versions,
        }
    }

    /// Returns the versions after the head.
    pub(super) fn others(&self) -> &[Arc<CachedKey>] {
        &self.versions()[1..]
    }

    /// Returns the version with a digest.
    pub(super) fn find(&self, digest: &KeyDigest) -> Option<&Arc<CachedKey>> {
        let mut versions = self.versions().iter();
        versions.find(|version| version.key.digest() == digest)
    }

    /// Returns the id of the key.
    pub(super) fn key_id(&self) -> KeyId {
        self.head().key.held().key_id()
    }

    /// Returns the newest revision at which the group had every version of its key that was
    /// accepted then.
    pub(super) fn complete_at(&self) -> Revision {
        let complete_at = self.versions().iter().map(|version| version.complete_at);
        complete_at.max().unwrap_or_default()
    }

    /// Returns the earliest expiry of its versions, in milliseconds since the boot.
    pub(super) fn expires_at(&self) -> u64 {
        let ends = self.versions().iter().map(|version| version.expires_at);
        ends.min().unwrap_or_default()
    }

    /// Returns the group with the versions `changed`, which replace the versions with the same
    /// digests or are added. Beside the head, at most [`MAX_ENDED`] retired or revoked versions
    /// stay: those that changed or were looked up longest ago are dropped.
    pub(super) fn with(&self, changed: impl IntoIterator<Item = Arc<CachedKey>>) -> Self {
        let mut head = Arc::clone(self.head());
        // The versions after the head, from the oldest change to the newest.
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

    /// Returns the memory of the group, in bytes.
    pub(super) fn weight(&self) -> usize {
        let versions = self.versions().iter().map(|version| {
            VERSION_OVERHEAD + size_of::<CachedKey>() - size_of::<OwnedKey>() + version.key.size()
        });
        GROUP_OVERHEAD + versions.sum::<usize>() + self.others().len() * LINK_OVERHEAD
    }
}
