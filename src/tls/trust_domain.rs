//! The trust domain of a SPIFFE ID, and the authorities of each trust domain.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use super::Identity;

/// The name of a trust domain (SPIFFE ID, section 2.1): 1 to 255 of `a-z`, `0-9`, `.`, `-` and `_`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// A value for the authorities, either for all certificates or for each trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Authorities<T> {
    /// One value for all certificates.
    Flat(T),
    /// One value for each trust domain; a certificate of another trust domain is not verified with
    /// it. Not empty.
    Bundles(BTreeMap<TrustDomain, T>),
}

/// A text that is not a trust domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a trust domain is 1 to 255 of `a-z`, `0-9`, `.`, `-` and `_`, such as mesh.example, without spiffe://"
)]
pub struct ParseTrustDomainError;

/// An identity that belongs to no trust domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its identity {0} is not a SPIFFE ID, such as spiffe://mesh.example/relatch/edge-1")]
pub(crate) struct NoTrustDomainError(Identity);

/// The scheme of a SPIFFE ID, with the separator before the trust domain.
const SCHEME: &str = "spiffe://";
/// The maximum length of a trust domain, in bytes (SPIFFE ID, section 2.1).
const MAX_LEN: usize = 255;

impl TrustDomain {
    /// Returns the trust domain of an identity.
    ///
    /// # Errors
    ///
    /// When the identity is not the SPIFFE ID of a workload, which has a path after its trust
    /// domain (X.509-SVID, section 2).
    pub(crate) fn of(identity: &Identity) -> Result<Self, NoTrustDomainError> {
        let rest = identity.as_str().strip_prefix(SCHEME);
        rest.and_then(|rest| rest.split_once('/'))
            .filter(|(_, path)| !path.is_empty())
            .and_then(|(domain, _)| domain.parse().ok())
            .ok_or_else(|| NoTrustDomainError(identity.clone()))
    }

    /// Returns the trust domain as text.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = ParseTrustDomainError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if (1..=MAX_LEN).contains(&text.len()) && text.bytes().all(is_allowed) {
            Ok(Self(text.into()))
        } else {
            Err(ParseTrustDomainError)
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<T> Authorities<T> {
    /// Returns each value, with the trust domain that it is for.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Option<&TrustDomain>, &T)> {
        let (flat, bundles) = match self {
            Self::Flat(flat) => (Some((None, flat)), None),
            Self::Bundles(bundles) => (None, Some(bundles)),
        };
        let bundles = bundles.into_iter().flatten();
        let bundles = bundles.map(|(domain, bundle)| (Some(domain), bundle));
        flat.into_iter().chain(bundles)
    }

    pub(super) fn as_ref(&self) -> Authorities<&T> {
        match self {
            Self::Flat(flat) => Authorities::Flat(flat),
            Self::Bundles(bundles) => {
                let bundles = bundles.iter();
                Authorities::Bundles(bundles.map(|(name, of)| (name.clone(), of)).collect())
            }
        }
    }

    /// Converts each value.
    ///
    /// # Errors
    ///
    /// The first error of `convert`.
    pub(super) fn try_map<U, E>(
        self,
        mut convert: impl FnMut(Option<&TrustDomain>, T) -> Result<U, E>,
    ) -> Result<Authorities<U>, E> {
        match self {
            Self::Flat(flat) => convert(None, flat).map(Authorities::Flat),
            Self::Bundles(bundles) => {
                let bundles = bundles.into_iter().map(|(domain, bundle)| {
                    let converted = convert(Some(&domain), bundle)?;
                    Ok((domain, converted))
                });
                bundles.collect::<Result<_, _>>().map(Authorities::Bundles)
            }
        }
    }

    /// Returns the value of a trust domain; none if one value is for all certificates.
    pub(super) fn of(&self, domain: &TrustDomain) -> Option<&T> {
        match self {
            Self::Flat(_) => None,
            Self::Bundles(bundles) => bundles.get(domain),
        }
    }
}

/// Returns the text between scheme and path of a SPIFFE ID, or of a pattern of SPIFFE IDs; none for
/// another URI. The text is not parsed: texts that differ in case are different.
pub(crate) fn domain_text(uri: &str) -> Option<&str> {
    let (scheme, rest) = uri.split_once("://")?;
    let is_spiffe = scheme.eq_ignore_ascii_case("spiffe");
    is_spiffe.then(|| rest.split_once('/').map_or(rest, |(domain, _)| domain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spiffe_id_has_a_trust_domain() {
        let of = |text: &str| TrustDomain::of(&text.parse().expect("an identity"));
        let domain = of("spiffe://mesh.example/relatch/edge-1").expect("a SPIFFE ID");
        assert_eq!(domain.as_str(), "mesh.example");
        for bad in [
            "https://mesh.example/relatch/edge-1",
            "SPIFFE://mesh.example/relatch/edge-1",
            "spiffe://MESH.example/relatch/edge-1",
            "spiffe://mesh.example:443/relatch/edge-1",
            "spiffe://someone@mesh.example/relatch/edge-1",
            "spiffe://mesh.example?a/b",
            "spiffe:///relatch/edge-1",
            // The ID of the trust domain itself, not of a workload in it.
            "spiffe://mesh.example",
            "spiffe://mesh.example/",
        ] {
            let refused = of(bad).expect_err(bad).to_string();
            assert!(
                refused.starts_with(&format!("its identity {bad} is not a SPIFFE ID")),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_trust_domain_is_short_and_of_few_characters() {
        for good in ["a", "mesh.example", "m_1-2.x", &"d".repeat(255)] {
            assert!(good.parse::<TrustDomain>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "Mesh",
            "mesh example",
            "mesh:1",
            "spiffe://mesh",
            "m\u{e9}sh",
            &"d".repeat(256),
        ] {
            assert!(bad.parse::<TrustDomain>().is_err(), "{bad}");
        }
    }
}
