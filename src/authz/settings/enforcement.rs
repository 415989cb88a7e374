//! Whether denials are enforced: trials.

use crate::key::{KeyringName, KeyringPattern};

/// Whether denials are enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Enforcement {
    /// A request that is denied does not pass.
    #[default]
    Enforced,
    /// A trial: every request passes without identity, and the decision is only reported.
    Observed {
        /// Whether the credential is removed. Otherwise it stays, because the upstream still checks
        /// it.
        removes_credential: bool,
    },
}

/// The enforcement of each keyring. A keyring that is neither named nor matched is enforced.
#[derive(Clone, Debug, Default)]
pub struct Enforcements {
    /// The keyrings that the configuration names. Only for these can an Envoy route switch
    /// enforcement off.
    pub(crate) named: Vec<(KeyringName, Enforcement)>,
    /// The patterns for other keyrings; the first that matches applies.
    pub(crate) patterns: Vec<(KeyringPattern, Enforcement)>,
}

impl Enforcement {
    /// Returns whether denials are only reported.
    #[must_use]
    pub(crate) const fn is_observed(self) -> bool {
        matches!(self, Self::Observed { .. })
    }

    /// Returns whether a credential is removed from a request that passes.
    #[must_use]
    pub(crate) const fn removes_credential(self) -> bool {
        match self {
            Self::Enforced => true,
            Self::Observed { removes_credential } => removes_credential,
        }
    }
}

impl Enforcements {
    /// Returns whether the configuration names this keyring.
    #[must_use]
    pub(super) fn names(&self, keyring: &str) -> bool {
        let mut named = self.named.iter();
        named.any(|(name, _)| name.as_str() == keyring)
    }

    /// Returns the enforcement of a keyring, whose name need not be parsed.
    #[must_use]
    pub(super) fn of(&self, keyring: &str) -> Enforcement {
        let mut named = self.named.iter();
        if let Some((_, enforcement)) = named.find(|(name, _)| name.as_str() == keyring) {
            return *enforcement;
        }
        let Ok(keyring) = keyring.parse::<KeyringName>() else {
            return Enforcement::Enforced;
        };
        let mut patterns = self.patterns.iter();
        patterns
            .find(|(pattern, _)| pattern.matches(&keyring))
            .map_or(Enforcement::Enforced, |(_, enforcement)| *enforcement)
    }

    /// Returns whether denials of some keyring are not enforced.
    #[must_use]
    pub(super) fn observe_some(&self) -> bool {
        self.all().any(Enforcement::is_observed)
    }

    /// Returns whether `is` holds for every keyring. It holds for none if the configuration has
    /// none.
    #[must_use]
    pub(super) fn are_all(&self, is: impl Fn(Enforcement) -> bool) -> bool {
        self.all().next().is_some() && self.all().all(is)
    }

    fn all(&self) -> impl Iterator<Item = Enforcement> {
        let named = self.named.iter().map(|(_, enforcement)| *enforcement);
        named.chain(self.patterns.iter().map(|(_, enforcement)| *enforcement))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OBSERVED: Enforcement = Enforcement::Observed {
        removes_credential: false,
    };

    fn enforcements(
        named: &[(&str, Enforcement)],
        patterns: &[(&str, Enforcement)],
    ) -> Enforcements {
        let named = named.iter();
        let patterns = patterns.iter();
        Enforcements {
            named: named
                .map(|(name, enforcement)| (name.parse().expect("a name"), *enforcement))
                .collect(),
            patterns: patterns
                .map(|(pattern, enforcement)| (pattern.parse().expect("a pattern"), *enforcement))
                .collect(),
        }
    }

    #[test]
    fn a_name_comes_before_patterns_and_the_first_pattern_applies() {
        let enforcements = enforcements(
            &[("payments-eu", Enforcement::Enforced)],
            &[("payments-*", OBSERVED), ("*", Enforcement::Enforced)],
        );
        for (keyring, expected) in [
            ("payments-eu", Enforcement::Enforced),
            ("payments-us", OBSERVED),
            ("partners", Enforcement::Enforced),
            ("Not a name", Enforcement::Enforced),
        ] {
            assert_eq!(enforcements.of(keyring), expected, "{keyring}");
        }
        assert!(enforcements.names("payments-eu"));
        assert!(!enforcements.names("payments-us"));
        assert!(enforcements.observe_some());
        assert!(!enforcements.are_all(Enforcement::is_observed));
    }

    #[test]
    fn everything_is_observed_if_no_entry_is_enforced() {
        let are_observed =
            |named, patterns| enforcements(named, patterns).are_all(Enforcement::is_observed);
        assert!(!are_observed(&[], &[]));
        assert!(are_observed(&[("a", OBSERVED)], &[("*", OBSERVED)]));
        assert!(!are_observed(
            &[("a", OBSERVED)],
            &[("*", Enforcement::Enforced)]
        ));
        assert!(!enforcements(&[("a", Enforcement::Enforced)], &[]).observe_some());
    }
}
