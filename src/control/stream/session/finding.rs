//! The keyrings that a session lists for the patterns of its sidecar.

use crate::{
    admission::Audience,
    control::catalog::Catalog,
    key::{KeyringName, KeyringPattern},
    proto::discovery,
};

/// Lists the keyrings that the patterns of a sidecar match.
#[derive(Debug)]
pub(super) struct Finding {
    audience: Audience,
    /// Empty before the sidecar has sent any.
    patterns: Vec<KeyringPattern>,
    /// The list that was sent last; none before the first one.
    listed: Option<Vec<KeyringName>>,
    /// Whether the list may have changed since it was sent.
    is_due: bool,
}

/// The most names in a list. A sidecar holds at most a quarter of them.
const MAX_LISTED: usize = 1_000;

impl Finding {
    /// Returns the state of a sidecar that has sent no patterns.
    pub(super) const fn new(audience: Audience) -> Self {
        Self {
            audience,
            patterns: Vec::new(),
            listed: None,
            is_due: false,
        }
    }

    /// Lists by `patterns` from now on. The next list is sent in any case.
    pub(super) fn find(&mut self, patterns: Vec<KeyringPattern>) {
        self.patterns = patterns;
        self.list_again();
    }

    /// Sends the list again, although it may be the same.
    pub(super) fn list_again(&mut self) {
        self.listed = None;
        self.is_due = true;
    }

    /// Notes that the control plane may serve other keyrings than before.
    pub(super) const fn note_served(&mut self) {
        self.is_due = true;
    }

    /// Returns the list, if it is not the one that was sent last.
    pub(super) fn next(&mut self, catalog: &Catalog) -> Option<discovery::Listing> {
        if !std::mem::take(&mut self.is_due) || self.patterns.is_empty() {
            return None;
        }
        let names = self.matching(catalog);
        if self.listed.as_ref() == Some(&names) {
            return None;
        }
        let listing = discovery::Listing {
            keyrings: names
                .iter()
                .take(MAX_LISTED)
                .map(ToString::to_string)
                .collect(),
            total: names.len() as u64,
        };
        self.listed = Some(names);
        Some(listing)
    }

    fn matching(&self, catalog: &Catalog) -> Vec<KeyringName> {
        let Ok(admitted) = self.audience.admitted() else {
            return Vec::new();
        };
        let served = catalog.list().into_iter();
        let names = served.map(|served| served.name().clone());
        names
            .filter(|name| self.patterns.iter().any(|pattern| pattern.matches(name)))
            .filter(|name| admitted.subscribe(name.as_str()).is_ok())
            .collect()
    }
}
