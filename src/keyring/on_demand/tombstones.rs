//! The revocations that a sidecar remembers across epochs.

use std::collections::{HashSet, VecDeque};

use super::Hashing;
use crate::key::KeyDigest;

/// The newest revocations, by the digest of the revoked version.
#[derive(Debug, Default)]
pub(super) struct Tombstones {
    digests: HashSet<KeyDigest, Hashing>,
    /// From the oldest to the newest.
    order: VecDeque<KeyDigest>,
}

/// The most tombstones; they use some megabytes. They matter when a history lost its end, for
/// example after a restore of a backup. Their number then must be at least the number of lost
/// revocations.
const MAX: usize = 32_768;

impl Tombstones {
    /// Remembers a revocation, and drops the oldest one where there is no room.
    pub(super) fn add(&mut self, digest: KeyDigest) {
        if !self.digests.insert(digest) {
            return;
        }
        self.order.push_back(digest);
        if self.order.len() > MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.digests.remove(&oldest);
        }
    }

    pub(super) fn contains(&self, digest: &KeyDigest) -> bool {
        self.digests.contains(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: usize) -> KeyDigest {
        let mut bytes = [0; KeyDigest::LEN];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        KeyDigest::from_slice(&bytes).expect("32 bytes")
    }

    #[test]
    fn the_newest_are_kept() {
        let mut tombstones = Tombstones::default();
        (0..=MAX).for_each(|number| tombstones.add(digest(number)));
        tombstones.add(digest(MAX));
        assert!(!tombstones.contains(&digest(0)));
        assert!(tombstones.contains(&digest(1)));
        assert!(tombstones.contains(&digest(MAX)));
        assert_eq!(tombstones.order.len(), MAX);
        assert_eq!(tombstones.digests.len(), MAX);
    }
}
