//! The places of a request that hold its credential.

use super::{CredentialSource, Settings};

/// A set of configured sources: one bit for each, by its position in the settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Places(pub(in crate::authz) u32);

/// A place from which a credential must be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place<'s> {
    /// The header of this name.
    Header(&'s str),
    /// The query parameter whose name decodes to this.
    Query(&'s str),
    /// The cookie of this name.
    Cookie(&'s str),
    /// The items of `sec-websocket-protocol` that begin with this.
    WebSocketProtocol(&'s str),
}

impl Places {
    /// Returns the first `count` sources, at most [`Settings::MAX_ALL_SOURCES`].
    pub(in crate::authz) fn first(count: usize) -> Self {
        (0..count).fold(Self::default(), |mut places, at| {
            places.add(at);
            places
        })
    }

    /// Returns the positions in `all` of the sources in `list`.
    pub(in crate::authz) fn of(list: &[CredentialSource], all: &[CredentialSource]) -> Self {
        let mut places = Self::default();
        for (at, source) in all.iter().enumerate() {
            if list.contains(source) {
                places.add(at);
            }
        }
        places
    }

    /// Returns the places with their names.
    pub(crate) fn iter(self, settings: &Settings) -> impl Iterator<Item = Place<'_>> {
        self.sources(settings).map(|(_, source)| match source {
            CredentialSource::Header { name, .. } => Place::Header(name.as_str()),
            CredentialSource::Basic { .. } => Place::Header("authorization"),
            CredentialSource::WebSocketProtocol { prefix } => {
                Place::WebSocketProtocol(prefix.as_str())
            }
            CredentialSource::Query { name } => Place::Query(name.as_str()),
            CredentialSource::Cookie { name } => Place::Cookie(name.as_str()),
        })
    }

    /// Returns the sources with their positions in the settings.
    pub(in crate::authz) fn sources(
        self,
        settings: &Settings,
    ) -> impl Iterator<Item = (usize, &CredentialSource)> {
        let sources = settings.credentials().iter().enumerate();
        sources.filter(move |(at, _)| self.has(*at))
    }

    pub(in crate::authz) const fn has(self, at: usize) -> bool {
        self.0 & (1 << at) != 0
    }

    pub(in crate::authz) const fn add(&mut self, at: usize) {
        self.0 |= 1 << at;
    }

    pub(in crate::authz) const fn overlaps(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}
