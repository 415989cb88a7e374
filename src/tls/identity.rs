//! The identity of a certificate: the one URI among its subject alternative names, as in SPIFFE.

use std::{fmt, str::FromStr, sync::Arc};

use super::Certificate;

/// A URI with a scheme: up to 2,048 printable ASCII characters without spaces and without `*`.
/// Compared byte by byte.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Identity(Arc<str>);

/// One identity; or, with `/*` at its end, all identities that differ only in their last path
/// segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IdentityPattern {
    /// The text without the `*`.
    text: Arc<str>,
    is_any_last: bool,
}

/// The reason that a certificate has no identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdentityError {
    /// The certificate has no URI.
    #[error("it has no URI among its subject alternative names, so it has no identity")]
    Missing,
    /// The certificate has more than one URI.
    #[error(
        "it has {0} URIs among its subject alternative names, but an identity must be the only one"
    )]
    Many(usize),
    /// The URI is not an identity that a rule can name.
    #[error(transparent)]
    Malformed(#[from] ParseIdentityError),
}

/// A text that is not an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "an identity is a URI of at most 2048 printable characters, such as spiffe://mesh.example/relatch/edge-1"
)]
pub(crate) struct ParseIdentityError;

/// The maximum length of a SPIFFE ID, in bytes.
const MAX_LEN: usize = 2_048;

impl Identity {
    /// Returns the identity of a certificate.
    ///
    /// # Errors
    ///
    /// When the certificate has no URI, more than one, or one that is not an [`Identity`].
    pub(crate) fn of(certificate: &Certificate) -> Result<Self, IdentityError> {
        match certificate.uris() {
            [] => Err(IdentityError::Missing),
            [uri] => Ok(uri.parse()?),
            many => Err(IdentityError::Many(many.len())),
        }
    }

    /// Returns the identity as text.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the text after the last `/`.
    #[must_use]
    pub(crate) fn last_segment(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }
}

impl FromStr for Identity {
    type Err = ParseIdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = text.split_once("://").ok_or(ParseIdentityError)?;
        let valid = text.len() <= MAX_LEN
            && !scheme.is_empty()
            && !rest.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_graphic())
            && !text.contains('*');
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(ParseIdentityError)
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl IdentityPattern {
    /// Whether the pattern includes `identity`.
    #[must_use]
    pub(crate) fn matches(&self, identity: &Identity) -> bool {
        if self.is_any_last {
            identity
                .as_str()
                .strip_prefix(&*self.text)
                .is_some_and(|last| !last.is_empty() && !last.contains('/'))
        } else {
            identity.as_str() == &*self.text
        }
    }
}

impl FromStr for IdentityPattern {
    type Err = ParseIdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (text, is_any_last) = match text.strip_suffix("/*") {
            // The wildcard must follow the trust domain: no pattern includes all trust domains.
            Some(before)
                if before
                    .split_once("://")
                    .is_some_and(|(_, rest)| !rest.is_empty()) =>
            {
                (text.strip_suffix('*').unwrap_or_default(), true)
            }
            Some(_) => return Err(ParseIdentityError),
            None => (text, false),
        };
        let Identity(text) = text.parse()?;
        Ok(Self { text, is_any_last })
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        if self.is_any_last {
            f.write_str("*")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::testing::{Authority, Leaf};

    fn identity(text: &str) -> Identity {
        text.parse().expect("an identity")
    }

    #[test]
    fn a_pattern_stands_for_itself_or_for_one_last_segment() {
        for (pattern, yes, no) in [
            (
                "spiffe://mesh/relatch/edge-1",
                &["spiffe://mesh/relatch/edge-1"][..],
                &[
                    "spiffe://mesh/relatch/edge-10",
                    "spiffe://mesh/relatch/edge-1/",
                    "spiffe://mesh/relatch",
                    "spiffe://MESH/relatch/edge-1",
                ][..],
            ),
            (
                "spiffe://mesh/ns/payments/sa/*",
                &[
                    "spiffe://mesh/ns/payments/sa/a",
                    "spiffe://mesh/ns/payments/sa/b.c",
                ],
                &[
                    "spiffe://mesh/ns/payments/sa/",
                    "spiffe://mesh/ns/payments/sa",
                    "spiffe://mesh/ns/payments/sa/a/b",
                    "spiffe://mesh/ns/payments/sab",
                    "spiffe://other/ns/payments/sa/a",
                ],
            ),
        ] {
            let parsed: IdentityPattern = pattern.parse().expect(pattern);
            assert_eq!(parsed.to_string(), pattern);
            for text in yes {
                assert!(parsed.matches(&identity(text)), "{pattern} {text}");
            }
            for text in no {
                assert!(!parsed.matches(&identity(text)), "{pattern} {text}");
            }
        }
    }

    #[test]
    fn wild_patterns_and_texts_that_are_no_uris_are_refused() {
        for bad in [
            "",
            "*",
            "edge-1",
            "spiffe://",
            "spiffe:///*",
            "spiffe://*",
            "spiffe://*/a",
            "spiffe://a/*/b",
            "spiffe://a/b*",
            "spiffe://a/b c",
            "://a",
        ] {
            assert!(bad.parse::<IdentityPattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_certificate_speaks_for_its_only_uri() {
        let authority = Authority::new("CA");
        let of = |leaf: &Leaf| {
            let issued = authority.issue(leaf);
            Identity::of(&Certificate::read(issued.der()).expect("a certificate"))
        };
        let one = Leaf::client("a").uri("spiffe://mesh/a");
        assert_eq!(of(&one), Ok(identity("spiffe://mesh/a")));
        assert_eq!(of(&Leaf::client("a")), Err(IdentityError::Missing));
        let two = one.uri("spiffe://mesh/b");
        assert_eq!(of(&two), Err(IdentityError::Many(2)));
    }
}
