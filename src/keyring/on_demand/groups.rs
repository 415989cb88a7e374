//! The writer's side of the groups in a cache: which groups exist, and under which digest each one
//! is stored.

use std::{collections::HashMap, mem, sync::Arc};

use super::{CachedKey, Group, KeyCache};
use crate::key::{KeyDigest, KeyId};

/// The groups of a cache, for its only writer.
#[derive(Debug)]
pub(super) struct Groups {
    cache: Arc<KeyCache>,
    /// The digests of the heads of the groups, by key. The digest of an evicted group stays until
    /// [`Groups::tidy`].
    heads: HashMap<KeyId, KeyDigest>,
}

/// A group that the cache no longer contains.
#[derive(Debug)]
pub(super) struct Gone {
    key_id: KeyId,
    head: KeyDigest,
    others: Vec<KeyDigest>,
}

impl Groups {
    pub(super) fn new(cache: Arc<KeyCache>) -> Self {
        Self {
            cache,
            heads: HashMap::new(),
        }
    }

    /// Returns the group of a key, if it may be used. A search for a key that is not held does not
    /// count as its use.
    pub(super) fn of(&self, key_id: KeyId) -> Option<Group> {
        let group = self.at(self.heads.get(&key_id)?)?;
        (group.key_id() == key_id).then_some(group)
    }

    /// Returns the group with the version of a digest, if it may be used.
    pub(super) fn with(&self, digest: &KeyDigest) -> Option<Group> {
        self.at(digest).or_else(|| {
            let group = self.at(&self.cache.links.get(digest)?)?;
            group.find(digest).is_some().then_some(group)
        })
    }

    /// Stores a group in the place of the held group of its key. Each version can be found as long
    /// as the group is held: when this returns, checks find all of them.
    pub(super) fn put(&mut self, group: Group) {
        let head = *group.head().key.digest();
        let former = self.heads.insert(group.key_id(), head);
        match former {
            Some(former) if former == head => self.unlink_others(&head, &group),
            Some(former) => self.cache.groups.invalidate(&former),
            None => {}
        }
        let others: Vec<_> = group.others().iter().map(digest_of).collect();
        self.cache.groups.insert(head, group);
        for other in others {
            self.cache.links.insert(other, head);
        }
    }

    /// Drops the group with the version of a digest.
    pub(super) fn remove(&mut self, digest: &KeyDigest) {
        if let Some(head) = self.cache.links.get(digest)
            && let Some(group) = self.cache.groups.get(&head)
            && group.find(digest).is_some()
        {
            self.cache.groups.invalidate(&head);
        }
        if self.cache.groups.contains_key(digest) {
            self.cache.groups.invalidate(digest);
        }
    }

    /// Drops every group.
    pub(super) fn clear(&mut self) {
        self.heads.clear();
        self.cache.groups.invalidate_all();
        self.cache.links.invalidate_all();
    }

    /// Drops the heads and links of the groups that were evicted or removed since the last call.
    pub(super) fn tidy(&mut self) {
        for gone in mem::take(&mut *self.cache.lock_gone()) {
            // The group may have been looked up again.
            let present = self.peek(&gone.head);
            if present.is_none() && self.heads.get(&gone.key_id) == Some(&gone.head) {
                self.heads.remove(&gone.key_id);
            }
            for other in gone.others {
                let is_held = present
                    .as_ref()
                    .is_some_and(|group| group.find(&other).is_some());
                if !is_held && self.cache.links.get(&other) == Some(gone.head) {
                    self.cache.links.invalidate(&other);
                }
            }
        }
    }

    fn at(&self, head: &KeyDigest) -> Option<Group> {
        let group = self.peek(head)?;
        self.cache
            .is_current(group.head().generation)
            .then_some(group)
    }

    fn peek(&self, head: &KeyDigest) -> Option<Group> {
        if self.cache.groups.contains_key(head) {
            self.cache.groups.get(head)
        } else {
            None
        }
    }

    /// Removes the links to versions that the former group under this head had and `group` does not
    /// have.
    fn unlink_others(&self, head: &KeyDigest, group: &Group) {
        let Some(former) = self.peek(head) else {
            return;
        };
        for other in former.others() {
            if group.find(other.key.digest()).is_none() {
                self.cache.links.invalidate(other.key.digest());
            }
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.heads.len()
    }
}

impl Gone {
    pub(super) fn new(group: &Group) -> Self {
        Self {
            key_id: group.key_id(),
            head: *group.head().key.digest(),
            others: group.others().iter().map(digest_of).collect(),
        }
    }
}

fn digest_of(version: &Arc<CachedKey>) -> KeyDigest {
    *version.key.digest()
}
