//! The places of a request that hold its credential.

use super::settings::{CredentialSource, Settings};

/// A set of configured sources: one bit for each, by its position in the settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Places(pub(super) u32);

/// A place from which a credential must be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place<'s> {
    /// The header of this name.
    Header(&'s str),
    /// The query parameter whose name decodes to this.
    Query(&'s str),
    /// The cookie of this name.
    Cookie(&'s str),
}

impl Places {
    /// Returns the places with their names.
    pub(crate) fn iter(self, settings: &Settings) -> impl Iterator<Item = Place<'_>> {
        settings
            .credentials()
            .iter()
            .enumerate()
            .filter(move |(at, _)| self.has(*at))
            .map(|(_, source)| match source {
                CredentialSource::Header { name, .. } => Place::Header(name.as_str()),
                CredentialSource::Query { name } => Place::Query(name.as_str()),
                CredentialSource::Cookie { name } => Place::Cookie(name.as_str()),
            })
    }

    pub(super) const fn has(self, at: usize) -> bool {
        self.0 & (1 << at) != 0
    }

    pub(super) const fn add(&mut self, at: usize) {
        self.0 |= 1 << at;
    }

    pub(super) const fn overlaps(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}
