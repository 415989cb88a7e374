//! The keyrings that a configuration asks for.

use std::collections::BTreeMap;

use super::{mode::Mode, pattern_rule::PatternRule, slot::Staleness};
use crate::key::KeyringName;

/// The keyrings that a configuration asks for: by name, and by pattern. A name comes before
/// patterns, and the first pattern that matches applies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    named: BTreeMap<KeyringName, (Staleness, Mode)>,
    rules: Vec<PatternRule>,
}

impl Wanted {
    pub(crate) fn new(
        named: impl IntoIterator<Item = (KeyringName, Staleness, Mode)>,
        rules: Vec<PatternRule>,
    ) -> Self {
        let named = named.into_iter();
        let named = named.map(|(name, staleness, mode)| (name, (staleness, mode)));
        Self {
            named: named.collect(),
            rules,
        }
    }

    /// Returns the limits and the mode of a keyring; none if the sidecar must not hold it.
    #[must_use]
    pub(crate) fn of(&self, name: &KeyringName) -> Option<(Staleness, Mode)> {
        let named = self.named.get(name).copied();
        named.or_else(|| {
            let rule = PatternRule::of(&self.rules, name)?;
            Some((rule.staleness, rule.mode))
        })
    }

    /// Returns whether the keyring is asked for by its name.
    #[must_use]
    pub(crate) fn is_named(&self, name: &KeyringName) -> bool {
        self.named.contains_key(name)
    }

    /// Returns the keyrings that are asked for by name.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&KeyringName, Staleness, Mode)> {
        let named = self.named.iter();
        named.map(|(name, (staleness, mode))| (name, *staleness, *mode))
    }

    /// Returns the patterns, in the order in which they apply.
    #[must_use]
    pub(crate) fn rules(&self) -> &[PatternRule] {
        &self.rules
    }
}
