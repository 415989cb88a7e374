//! The values that many keys of a keyring have in common, held once for all of them.

use std::{collections::HashSet, sync::Arc};

use super::{
    consumer::Key,
    permission::{AllowedSources, Scopes},
};

/// The sets of scopes and of sources of a keyring's keys. Keys are read one by one from a log:
/// without these sets, each key would hold its own copy.
#[derive(Clone, Debug, Default)]
pub(super) struct Shared(Arc<Sets>);

#[derive(Clone, Debug, Default)]
struct Sets {
    scopes: HashSet<Scopes>,
    sources: HashSet<AllowedSources>,
}

/// The maximum number of sets of each kind. Most keyrings have a handful. The limit is for a
/// keyring in which every key has a different set: each set would be held twice, and a change
/// copies all of them.
const MAX_SETS: usize = 1_000;

impl Shared {
    /// Adds the sets of a key that already shares them with other keys.
    pub(super) fn learn(&mut self, key: &Key) {
        let _ = self.sets(&key.scopes, &key.allowed_sources);
    }

    /// Returns the key with the sets that are held here, so that it shares them with other keys.
    pub(super) fn key(&mut self, key: Key) -> Key {
        let (scopes, allowed_sources) = self.sets(&key.scopes, &key.allowed_sources);
        Key {
            scopes,
            allowed_sources,
            ..key
        }
    }

    fn sets(&mut self, scopes: &Scopes, sources: &AllowedSources) -> (Scopes, AllowedSources) {
        let held_scopes = self.0.scopes.get(scopes).cloned();
        let held_sources = self.0.sources.get(sources).cloned();
        if held_scopes.is_none() && self.0.scopes.len() < MAX_SETS {
            Arc::make_mut(&mut self.0).scopes.insert(scopes.clone());
        }
        if held_sources.is_none() && self.0.sources.len() < MAX_SETS {
            Arc::make_mut(&mut self.0).sources.insert(sources.clone());
        }
        (
            held_scopes.unwrap_or_else(|| scopes.clone()),
            held_sources.unwrap_or_else(|| sources.clone()),
        )
    }
}
