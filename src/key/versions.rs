//! The versions of one key: a few, so that they lie side by side.

use std::ops::Index;

use super::{id::VersionNumber, version::KeyVersion};

/// The versions of a key, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Versions(Vec<KeyVersion>);

impl Versions {
    /// How many there are.
    #[cfg(test)]
    #[must_use]
    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    /// Version `number`.
    #[must_use]
    pub(crate) fn get(&self, number: VersionNumber) -> Option<&KeyVersion> {
        self.0.get(self.place_of(number).ok()?)
    }

    /// Whether there is a version `number`.
    #[must_use]
    pub(crate) fn contains_key(&self, number: VersionNumber) -> bool {
        self.place_of(number).is_ok()
    }

    /// The numbers in order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = VersionNumber> {
        self.0.iter().map(|version| version.number)
    }

    /// The versions in the order of their numbers.
    pub(crate) fn values(&self) -> std::slice::Iter<'_, KeyVersion> {
        self.0.iter()
    }

    /// The one with the highest number.
    #[must_use]
    pub(crate) fn last(&self) -> Option<&KeyVersion> {
        self.0.last()
    }

    /// Puts a version in the place of the one with its number, which is returned.
    pub(crate) fn put(&mut self, version: KeyVersion) -> Option<KeyVersion> {
        match self.place_of(version.number) {
            Ok(at) => Some(std::mem::replace(&mut self.0[at], version)),
            Err(at) => {
                // Most keys never have a second version.
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
