//! The permissions of a key: its scopes, and the addresses that it may be used from.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// One permission, a scope token of RFC 6749 section 3.3: 1 to 128 printable ASCII characters without space, `"` and
/// `\`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Scope(Arc<str>);

/// A set of scopes, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<Scope>", into = "Vec<Scope>")]
pub struct Scopes(Arc<[Scope]>);

/// The address blocks that a key may be used from. Without a block, all addresses are allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<IpNet>", into = "Vec<IpNet>")]
pub struct AllowedSources(Arc<[IpNet]>);

/// A text that is not a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid scope: use 1 to 128 printable ASCII characters without space, '\"' and '\\'")]
pub struct ParseScopeError;

/// A text that is neither an address nor a block of addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is neither an address nor a CIDR block, such as 10.0.0.0/8")]
pub(crate) struct ParseSourceError {
    text: String,
}

impl Scope {
    /// Returns the scope as text.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Scope {
    type Err = ParseScopeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = matches!(text.len(), 1..=128)
            && text
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\');
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(ParseScopeError)
        }
    }
}

impl TryFrom<String> for Scope {
    type Error = ParseScopeError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Scope> for String {
    fn from(scope: Scope) -> Self {
        scope.as_str().to_owned()
    }
}

impl Scopes {
    /// Parses scopes that are separated by ASCII white space. The empty text is the empty set.
    ///
    /// # Errors
    ///
    /// When one of them is not a scope.
    pub fn parse(text: &str) -> Result<Self, ParseScopeError> {
        text.split_ascii_whitespace().map(str::parse).collect()
    }

    /// Returns whether the set contains all of `required`.
    #[must_use]
    pub(crate) fn hold_all(&self, required: &Self) -> bool {
        required
            .iter()
            .all(|scope| self.0.binary_search(scope).is_ok())
    }

    /// Returns the scopes in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Scope> {
        self.0.iter()
    }

    /// Returns whether the set is empty.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Vec<Scope>> for Scopes {
    fn from(mut scopes: Vec<Scope>) -> Self {
        scopes.sort_unstable();
        scopes.dedup();
        Self(scopes.into())
    }
}

impl From<Scopes> for Vec<Scope> {
    fn from(scopes: Scopes) -> Self {
        scopes.0.to_vec()
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        scopes.into_iter().collect::<Vec<_>>().into()
    }
}

/// Separated by spaces, as in RFC 6749.
impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, scope) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str(" ")?;
            }
            f.write_str(scope.as_str())?;
        }
        Ok(())
    }
}

impl AllowedSources {
    /// Parses addresses and CIDR blocks. Bits after the prefix of a block are dropped.
    ///
    /// # Errors
    ///
    /// When one of them is neither.
    pub(crate) fn parse<S: AsRef<str>>(blocks: &[S]) -> Result<Self, ParseSourceError> {
        blocks
            .iter()
            .map(|text| parse_block(text.as_ref()))
            .collect::<Result<Vec<_>, _>>()
            .map(Self::from)
    }

    /// Returns whether a request from `source` is allowed: it is within a block, or there is no
    /// block. An unknown source is allowed only if there is no block.
    #[must_use]
    pub(crate) fn permit(&self, source: Option<IpAddr>) -> bool {
        permit_source(self.0.iter().copied(), source)
    }

    /// Returns the blocks in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &IpNet> {
        self.0.iter()
    }
}

impl From<Vec<IpNet>> for AllowedSources {
    fn from(blocks: Vec<IpNet>) -> Self {
        let mut blocks: Vec<IpNet> = blocks.into_iter().map(canonical).collect();
        blocks.sort_unstable();
        blocks.dedup();
        Self(blocks.into())
    }
}

impl From<AllowedSources> for Vec<IpNet> {
    fn from(sources: AllowedSources) -> Self {
        sources.0.to_vec()
    }
}

/// Returns whether a request from `source` is within one of `blocks`, or `blocks` is empty. It is
/// [`AllowedSources::permit`] for blocks that are stored elsewhere.
pub(crate) fn permit_source(blocks: impl Iterator<Item = IpNet>, source: Option<IpAddr>) -> bool {
    let source = source.map(|source| source.to_canonical());
    let mut blocks = blocks.peekable();
    blocks.peek().is_none()
        || source.is_some_and(|source| blocks.any(|block| block.contains(&source)))
}

/// Parses an address or a CIDR block. Bits after the prefix of a block are dropped, and an
/// IPv4-mapped block is the IPv4 block.
///
/// # Errors
///
/// When it is neither.
pub(crate) fn parse_block(text: &str) -> Result<IpNet, ParseSourceError> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map(canonical)
        .map_err(|_| ParseSourceError {
            text: text.to_owned(),
        })
}

/// Converts a block of IPv4 addresses that is written as IPv6 (`::ffff:10.0.0.0/104`) to the IPv4
/// block, because `permit` compares IPv4 addresses.
fn canonical(block: IpNet) -> IpNet {
    const MAPPED_BITS: u8 = 128 - 32;
    let block = block.trunc();
    match block {
        IpNet::V6(v6) if v6.prefix_len() >= MAPPED_BITS => v6
            .network()
            .to_ipv4_mapped()
            .and_then(|v4| IpNet::new(v4.into(), v6.prefix_len() - MAPPED_BITS).ok())
            .unwrap_or(block),
        IpNet::V4(_) | IpNet::V6(_) => block,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(blocks: &[&str]) -> AllowedSources {
        AllowedSources::parse(blocks).expect("valid blocks")
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn scopes_are_a_set() {
        let held = Scopes::parse("write read  read").expect("valid scopes");
        assert_eq!(held.to_string(), "read write");
        assert!(held.hold_all(&Scopes::default()));
        assert!(held.hold_all(&Scopes::parse("read").expect("valid")));
        assert!(!held.hold_all(&Scopes::parse("read admin").expect("valid")));
        assert!(!Scopes::default().hold_all(&held));
        assert!(Scopes::parse("re\"ad").is_err());
    }

    #[test]
    fn no_allowed_source_means_any_even_an_unknown_one() {
        assert!(AllowedSources::default().permit(None));
        assert!(AllowedSources::default().permit(Some(ip("192.0.2.1"))));
    }

    #[test]
    fn sources_outside_the_blocks_are_not_permitted() {
        let allowed = sources(&["10.1.2.3/8", "2001:db8::/32", "192.0.2.7"]);
        for inside in ["10.255.0.1", "2001:db8::1", "192.0.2.7", "::ffff:10.0.0.1"] {
            assert!(
                allowed.permit(Some(ip(inside))),
                "{inside} was not permitted"
            );
        }
        for outside in ["11.0.0.1", "2001:db9::1", "192.0.2.8", "::ffff:11.0.0.1"] {
            assert!(
                !allowed.permit(Some(ip(outside))),
                "{outside} was permitted"
            );
        }
        assert!(!allowed.permit(None), "an unknown source was permitted");
    }

    #[test]
    fn a_mapped_block_means_the_ipv4_block() {
        assert!(sources(&["::ffff:10.0.0.0/104"]).permit(Some(ip("10.9.9.9"))));
    }

    #[test]
    fn what_is_not_a_block_is_named() {
        let error = AllowedSources::parse(&["10.0.0.0/33"]).expect_err("not a block");
        assert!(error.to_string().contains("10.0.0.0/33"));
    }
}
