//! Patterns for the names of keyrings.

use std::{fmt, str::FromStr, sync::Arc};

use super::KeyringName;

/// A pattern for the names of keyrings: 1 to 63 of `a-z`, `0-9`, `-` and `*`. A `*` matches any
/// characters, also none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyringPattern(Arc<str>);

/// A text that is not a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "use 1 to 63 of a-z, 0-9, '-' and '*', beginning with a letter or '*', such as \"payments-*\""
)]
pub struct ParsePatternError;

/// The longest pattern, in bytes: that of a name.
const MAX_LEN: usize = 63;

impl KeyringPattern {
    /// Returns the pattern that matches every keyring.
    #[must_use]
    pub(crate) fn all() -> Self {
        Self("*".into())
    }

    /// Returns the pattern as text.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns whether the pattern matches a name.
    #[must_use]
    pub(crate) fn matches(&self, name: &KeyringName) -> bool {
        matches(self.0.as_bytes(), name.as_str().as_bytes())
    }

    /// Returns whether the pattern matches every name that `other` matches.
    ///
    /// A `*` of `other` stands for any text, so that only a `*` of this pattern can match it.
    #[must_use]
    pub(crate) fn covers(&self, other: &Self) -> bool {
        matches(self.0.as_bytes(), other.0.as_bytes())
    }
}

impl FromStr for KeyringPattern {
    type Err = ParsePatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-*".contains(&b);
        let begins = |c: char| c.is_ascii_lowercase() || c == '*';
        if (1..=MAX_LEN).contains(&text.len())
            && text.starts_with(begins)
            && text.bytes().all(is_allowed)
        {
            Ok(Self(text.into()))
        } else {
            Err(ParsePatternError)
        }
    }
}

impl fmt::Display for KeyringPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns whether `pattern` matches the whole of `text`. The time is at most the product of both
/// lengths: a mismatch goes back to the last `*` alone.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut read) = (0, 0);
    let mut star = None;
    while read < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(byte) if *byte == text[read] => {
                at += 1;
                read += 1;
            }
            Some(_) | None => {
                let Some((at_star, taken)) = star else {
                    return false;
                };
                star = Some((at_star, taken + 1));
                at = at_star + 1;
                read = taken + 1;
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> KeyringPattern {
        text.parse().expect("a pattern")
    }

    #[test]
    fn a_star_matches_any_characters_and_everything_else_itself() {
        for (text, name, is_match) in [
            ("*", "payments", true),
            ("payments", "payments", true),
            ("payments", "payments-eu", false),
            ("payments-*", "payments-eu", true),
            ("payments-*", "payments-", true),
            ("payments-*", "payments", false),
            ("*-eu", "payments-eu", true),
            ("*-eu", "payments-eu-1", false),
            ("*-eu", "eu", false),
            ("p*-*-eu", "payments-x-eu", true),
            ("p*-*-eu", "payments-eu", false),
            ("*a*b", "xaab", true),
            ("*a*b", "xaba", false),
            ("**", "a", true),
            ("a*a", "a", false),
        ] {
            let name = name.parse().expect("a name");
            assert_eq!(pattern(text).matches(&name), is_match, "{text} on {name}");
        }
    }

    #[test]
    fn a_pattern_covers_what_it_matches_and_nothing_wider() {
        for (one, other, covers) in [
            ("*", "payments-*", true),
            ("payments-*", "*", false),
            ("payments-*", "payments-eu-*", true),
            ("payments-*", "payments-*", true),
            ("*-eu", "payments-*-eu", true),
            ("*-eu", "payments-*", false),
            ("a*b", "a*", false),
            ("a*", "a*b", true),
            ("a", "a", true),
            ("a", "a*", false),
        ] {
            assert_eq!(
                pattern(one).covers(&pattern(other)),
                covers,
                "{one} on {other}"
            );
        }
    }

    #[test]
    fn patterns_are_checked() {
        for good in ["*", "a", "payments-*", "*-eu", &"a".repeat(63)] {
            assert_eq!(pattern(good).as_str(), good);
        }
        for bad in [
            "",
            "Payments-*",
            "-a*",
            "2*",
            "a?",
            "[a]",
            "a.*",
            "a *",
            &"*".repeat(64),
        ] {
            assert!(bad.parse::<KeyringPattern>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_worst_pattern_ends() {
        let pattern = pattern(&format!("{}b", "*a".repeat(31)));
        let name = "a".repeat(63).parse().expect("a name");
        assert!(!pattern.matches(&name));
    }
}
