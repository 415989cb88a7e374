//! Rules: what applies to the requests to a host and below a path.

use std::{
    cmp::Reverse,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use super::{CredentialSource, Enforcement, ParseSettingError};
use crate::key::{KeyringName, Scopes};

/// A rule for the requests to a host and below a path. Of the rules that match, the most specific
/// one applies.
#[derive(Clone, Debug)]
pub struct RouteRule {
    /// The hosts that the rule matches; none for every host.
    pub(crate) host: Option<HostPattern>,
    pub(crate) path_prefix: PathPrefix,
    /// The keyring that protects the requests.
    pub(crate) keyring: KeyringName,
    /// The scopes of which a key must hold every one.
    pub(crate) scopes: Scopes,
    pub(crate) auth: Auth,
    pub(crate) preflight: Preflight,
    /// Whether denials are enforced; none for the setting of the keyring.
    pub(crate) enforcement: Option<Enforcement>,
    /// The places where a credential may be, instead of the general ones, 1 to
    /// [`Settings::MAX_SOURCES`](super::Settings::MAX_SOURCES); none for the general ones.
    pub(crate) credentials: Option<Vec<CredentialSource>>,
}

/// Whether a route needs a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Auth {
    /// A request without a credential is denied.
    #[default]
    Required,
    /// A request without a credential passes without identity. A request with a wrong credential is
    /// still denied.
    Optional,
}

/// Whether CORS preflights pass without a key. They have no credentials (Fetch Standard, "CORS
/// protocol and credentials").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Preflight {
    /// A preflight is judged as any other request.
    #[default]
    Deny,
    /// A preflight passes without identity and without a credential.
    Allow,
}

/// A host, or every host below a domain (`*.example.com`), in lower case and without a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HostPattern {
    /// Exactly this host.
    Exact(Box<str>),
    /// This address, however it is spelled. An IPv4-mapped IPv6 address is an IPv4 address.
    Address(IpAddr),
    /// Every host that ends with this suffix, which begins with a dot.
    Suffix(Box<str>),
}

/// The host of a request, without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host<'a> {
    /// A host name without a final dot.
    Name(&'a str),
    Address(IpAddr),
}

/// A path and everything below it, by whole segments. The default, `/`, matches every path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PathPrefix(Box<str>);

/// Whether the comparison of paths distinguishes upper and lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    /// It does, as in RFC 3986.
    Sensitive,
    /// It does not, as in the routing of some upstreams.
    Insensitive,
}

impl RouteRule {
    /// Returns whether both match the same requests. Paths that differ only in case count as the
    /// same: they are too easily confused.
    #[must_use]
    pub(crate) fn matches_as(&self, other: &Self) -> bool {
        self.host == other.host
            && self
                .path_prefix
                .0
                .eq_ignore_ascii_case(&other.path_prefix.0)
    }

    /// Returns the sort key of the rule; the lowest one wins. The order is: an exact host, a longer
    /// suffix, a shorter suffix, every host. Between equal hosts, the longer path wins.
    pub(super) fn rank(&self) -> (u8, Reverse<usize>, Reverse<usize>) {
        let (class, host) = match &self.host {
            Some(HostPattern::Address(_)) => (0, 0),
            Some(HostPattern::Exact(host)) => (0, host.len()),
            Some(HostPattern::Suffix(suffix)) => (1, suffix.len()),
            None => (2, 0),
        };
        (class, Reverse(host), Reverse(self.path_prefix.0.len()))
    }
}

impl FromStr for Auth {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "required" => Ok(Self::Required),
            "optional" => Ok(Self::Optional),
            _ => Err(ParseSettingError::Auth),
        }
    }
}

impl FromStr for Preflight {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "deny" => Ok(Self::Deny),
            "allow" => Ok(Self::Allow),
            _ => Err(ParseSettingError::Preflight),
        }
    }
}

impl HostPattern {
    /// Returns whether it matches `host`.
    #[must_use]
    pub(crate) fn matches(&self, host: &Host<'_>) -> bool {
        match (self, host) {
            (Self::Address(address), Host::Address(host)) => address == host,
            (Self::Address(_), Host::Name(_)) | (_, Host::Address(_)) => false,
            (Self::Exact(exact), Host::Name(host)) => host.eq_ignore_ascii_case(exact),
            (Self::Suffix(suffix), Host::Name(host)) => host
                .len()
                .checked_sub(suffix.len())
                .and_then(|at| host.get(at..))
                .is_some_and(|end| end.len() < host.len() && end.eq_ignore_ascii_case(suffix)),
        }
    }
}

impl<'a> Host<'a> {
    /// Reads a host name or an IPv4 address; none if upstreams could read it as another host: it has
    /// an empty label, characters that no host name has, or a number at its end without being an
    /// address (WHATWG URL, "ends in a number checker").
    #[must_use]
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let name = text.strip_suffix('.').unwrap_or(text);
        if let Ok(address) = name.parse::<Ipv4Addr>() {
            return Some(Self::Address(address.into()));
        }
        let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let is_number = |label: &str| {
            let hex = label.strip_prefix("0x").or(label.strip_prefix("0X"));
            label.bytes().all(|b| b.is_ascii_digit())
                || hex.is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
        };
        let is_whole = name.bytes().all(is_name)
            && name.split('.').all(|label| !label.is_empty())
            && !name.rsplit('.').next().is_some_and(is_number);
        // A request of HTTP/1.0 may have no host.
        (is_whole || text.is_empty()).then_some(Self::Name(name))
    }
}

impl FromStr for HostPattern {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bracketed = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'));
        let address = match bracketed {
            Some(address) => address.parse::<Ipv6Addr>().map(IpAddr::V6),
            None => text.parse::<IpAddr>(),
        };
        if let Ok(address) = address {
            return Ok(Self::Address(address.to_canonical()));
        }
        let suffix = text.strip_prefix("*.");
        let name = suffix.unwrap_or(text);
        let is_name = matches!(name.len(), 1..=253)
            && !name.ends_with('.')
            && matches!(Host::parse(name), Some(Host::Name(_)));
        let name = name.to_ascii_lowercase();
        match (is_name, suffix) {
            (false, _) => Err(ParseSettingError::Host),
            (true, None) => Ok(Self::Exact(name.into())),
            (true, Some(_)) => Ok(Self::Suffix(format!(".{name}").into())),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(host) => f.write_str(host),
            Self::Address(address) => address.fmt(f),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
        }
    }
}

impl PathPrefix {
    /// The maximum length in bytes. An operator writes a prefix by hand.
    const MAX_LENGTH: usize = 1024;

    /// Returns whether it matches `path`.
    #[must_use]
    pub(crate) fn matches(&self, path: &[u8], case: Case) -> bool {
        let prefix = self.0.as_bytes();
        let Some((head, rest)) = path.split_at_checked(prefix.len()) else {
            return false;
        };
        let same = match case {
            Case::Sensitive => head == prefix,
            Case::Insensitive => head.eq_ignore_ascii_case(prefix),
        };
        same && (prefix.is_empty() || rest.is_empty() || rest[0] == b'/')
    }

    /// Returns whether it matches every path.
    #[must_use]
    pub(crate) const fn is_root(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromStr for PathPrefix {
    type Err = ParseSettingError;

    /// A prefix may have only characters that clients send unescaped. A path with a character that
    /// clients escape has two readings, so that every request to it would be refused.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.strip_suffix('/').unwrap_or(text);
        let has_good_segments = path
            .split('/')
            .skip(1)
            .all(|segment| !matches!(segment, "" | "." | ".."));
        let valid = text.starts_with('/')
            && text.len() <= Self::MAX_LENGTH
            && has_good_segments
            && text
                .bytes()
                .all(|b| b.is_ascii_graphic() && !b";?#%\\".contains(&b));
        if valid {
            Ok(Self(path.into()))
        } else {
            Err(ParseSettingError::Path)
        }
    }
}

impl fmt::Display for PathPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_root() { "/" } else { &self.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_paths_are_checked() {
        for bad in [
            "",
            "*",
            "*.",
            "*a.b",
            "*.*.b",
            "a..b",
            "a/b",
            "a:80",
            "exa mple",
            ".a",
            "[10.0.0.1]",
            "*.::1",
        ] {
            assert!(bad.parse::<HostPattern>().is_err(), "{bad:?} was accepted");
        }
        for bad in [
            "", "a", "//", "/a//b", "/a/../b", "/./a", "/a%2f", "/a?b", "/a;b", "/a b", "/\u{e4}",
        ] {
            assert!(bad.parse::<PathPrefix>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn paths_match_by_whole_segments() {
        let prefix: PathPrefix = "/admin/".parse().expect("a path");
        for (path, matches) in [
            ("/admin", true),
            ("/admin/", true),
            ("/admin/x", true),
            ("/administrator", false),
            ("/ADMIN", false),
            ("/", false),
        ] {
            assert_eq!(
                prefix.matches(path.as_bytes(), Case::Sensitive),
                matches,
                "{path}"
            );
        }
        assert!(prefix.matches(b"/Admin/x", Case::Insensitive));
        let root: PathPrefix = "/".parse().expect("a path");
        assert_eq!(root, PathPrefix::default());
        assert!(root.matches(b"/anything", Case::Sensitive));
    }

    #[test]
    fn a_suffix_matches_hosts_below_it_only() {
        let pattern: HostPattern = "*.Example.com".parse().expect("a host");
        assert!(pattern.matches(&Host::Name("a.example.COM")));
        assert!(pattern.matches(&Host::Name("a.b.example.com")));
        for other in [
            "example.com",
            "badexample.com",
            ".example.com",
            "a.example.com.evil",
        ] {
            assert!(!pattern.matches(&Host::Name(other)), "{other} matched");
        }
    }

    #[test]
    fn an_address_is_written_with_brackets_or_without() {
        for text in ["[2001:DB8::1]", "2001:db8::1"] {
            let pattern: HostPattern = text.parse().expect("a host");
            let address = "2001:db8:0::1".parse().expect("an address");
            assert!(pattern.matches(&Host::Address(address)), "{text}");
        }
        for refused in ["[192.0.2.1]", "192.0.2.01", "127.1", "a..b", "a.", "*.1"] {
            assert!(
                refused.parse::<HostPattern>().is_err(),
                "{refused} was accepted"
            );
        }
    }
}
