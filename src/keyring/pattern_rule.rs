//! How a sidecar holds the keyrings that a pattern finds.

use super::{mode::Mode, slot::Staleness};
use crate::key::{KeyringName, KeyringPattern};

/// An entry of the configuration that finds keyrings by a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PatternRule {
    pub(crate) pattern: KeyringPattern,
    /// The mode of each keyring that the pattern finds.
    pub(crate) mode: Mode,
    /// The limits of each keyring that the pattern finds.
    pub(crate) staleness: Staleness,
}

impl PatternRule {
    /// Returns the rule for a keyring: the first whose pattern matches.
    #[must_use]
    pub(crate) fn of<'a>(rules: &'a [Self], name: &KeyringName) -> Option<&'a Self> {
        rules.iter().find(|rule| rule.pattern.matches(name))
    }
}
