//! The versions of one key: few, so a vector holds them.

use std::ops::Index;

use super::{id::VersionNumber, version::KeyVersion};

/// The versions of a key, sorted by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Versions(Vec<KeyVersion>);

impl Versions {
    /// Returns the number of versions.
    #[cfg(test)]
    #[must_use]
    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns version `number`.
    #[must_use]
    pub(crate) fn get(&self, number: VersionNumber) -> Option<&KeyVersion> {
        self.0.get(self.place_of(number).ok()?)
    }

    /// Returns whether version `number` exists.
    #[must_use]
    pub(crate) fn contains_key(&self, number: VersionNumber) -> bool {
        self.place_of(number).is_ok()
    }

    /// Returns the numbers in order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = VersionNumber> {
        self.0.iter().map(|version| version.number)
    }

    /// Returns the versions in the order of their numbers.
    pub(crate) fn values(&self) -> std::slice::Iter<'_, KeyVersion> {
        self.0.iter()
    }

    /// Returns the version with the highest number.
    #[must_use]
    pub(crate) fn last(&self) -> Option<&KeyVersion> {
        self.0.last()
    }

    /// Inserts a version, or replaces the one with the same number and returns it.
    pub(crate) fn put(&mut self, version: KeyVersion) -> Option<KeyVersion> {
        match self.place_of(version.number) {
            Ok(at) => Some(std::mem::replace(&mut self.0[at], version)),
            Err(at) => {
                // Only one more place: most keys never have a second version.
                self.0.reserve_exact(1);
                self.0.insert(at, version);
                None
            }
        }
    }

    fn place_of(&self, number: VersionNumber) -> Result<usize, usize> {
        self.0
            .binary_search_by_key(&number, |version| version.number)
    }
}

impl FromIterator<KeyVersion> for Versions {
    fn from_iter<I: IntoIterator<Item = KeyVersion>>(all: I) -> Self {
        let mut versions = Self::default();
        for version in all {
            versions.put(version);
        }
        versions
    }
}

impl Index<&VersionNumber> for Versions {
    type Output = KeyVersion;

    fn index(&self, number: &VersionNumber) -> &KeyVersion {
        self.get(*number).expect("the key has the version")
    }
}
