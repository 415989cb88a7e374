//! Rules: what holds for the requests of a host and below a path.

use std::{cmp::Reverse, fmt, net::Ipv6Addr, str::FromStr};

use super::ParseSettingError;
use crate::key::{KeyringName, Scopes};

/// What holds for the requests of a host and below a path. Of the rules that match, the most specific one applies.
#[derive(Clone, Debug)]
pub struct RouteRule {
    /// Which hosts; none for every one.
    pub(crate) host: Option<HostPattern>,
    /// Which paths.
    pub(crate) path_prefix: PathPrefix,
    /// The keyring that protects them.
    pub(crate) keyring: KeyringName,
    /// What a key must hold, all of it.
    pub(crate) scopes: Scopes,
    /// Whether a key is needed.
    pub(crate) auth: Auth,
}

/// Whether a route needs a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Auth {
    /// A request without a credential is denied.
    #[default]
    Required,
    /// A request without a credential passes without identity. A wrong one is denied still.
    Optional,
}

/// A host, or every host below one (`*.example.com`). Lower case, without port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HostPattern {
    /// This host.
    Exact(Box<str>),
    /// Hosts that end so; begins with a dot.
    Suffix(Box<str>),
}

/// A path and everything below it, by whole segments; the default, `/`, for all paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PathPrefix(Box<str>);

/// How the case of a path counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    /// As RFC 3986 has it.
    Sensitive,
    /// As some upstreams route.
    Insensitive,
}

impl RouteRule {
    /// Whether both match the same requests; paths that differ in case only are too easily confused.
    #[must_use]
    pub(crate) fn matches_as(&self, other: &Self) -> bool {
        self.host == other.host
            && self
                .path_prefix
                .0
                .eq_ignore_ascii_case(&other.path_prefix.0)
    }

    /// Lower wins: a host over a longer suffix over a shorter one over every host, then the longer path.
    pub(super) fn rank(&self) -> (u8, Reverse<usize>, Reverse<usize>) {
        let (class, host) = match &self.host {
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

impl HostPattern {
    /// Whether it matches a host without port and brackets.
    #[must_use]
    pub(crate) fn matches(&self, host: &str) -> bool {
        match self {
            Self::Exact(exact) => host.eq_ignore_ascii_case(exact),
            Self::Suffix(suffix) => host
                .len()
                .checked_sub(suffix.len())
                .and_then(|at| host.get(at..))
                .is_some_and(|end| end.len() < host.len() && end.eq_ignore_ascii_case(suffix)),
        }
    }
}

impl FromStr for HostPattern {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'))
            .unwrap_or(text);
        if bare.parse::<Ipv6Addr>().is_ok() {
            return Ok(Self::Exact(bare.to_ascii_lowercase().into()));
        }
        let suffix = text.strip_prefix("*.");
        let name = suffix.unwrap_or(text);
        let is_name = matches!(name.len(), 1..=253)
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && name.split('.').all(|label| !label.is_empty());
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
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
        }
    }
}

impl PathPrefix {
    /// The longest: a prefix is written by hand.
    const MAX_LENGTH: usize = 1024;

    /// Whether it matches a path, with case or without.
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

    /// Whether it matches every path.
    #[must_use]
    pub(crate) const fn is_root(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromStr for PathPrefix {
    type Err = ParseSettingError;

    /// Only what is sent as it is written can be a prefix: of a character that clients escape, a path would have two
    /// readings, and every request to it be refused.
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
        assert!(pattern.matches("a.example.COM"));
        assert!(pattern.matches("a.b.example.com"));
        for other in [
            "example.com",
            "badexample.com",
            ".example.com",
            "a.example.com.evil",
        ] {
            assert!(!pattern.matches(other), "{other} matched");
        }
    }

    #[test]
    fn an_address_is_written_with_brackets_or_without() {
        for text in ["[2001:DB8::1]", "2001:db8::1"] {
            let pattern: HostPattern = text.parse().expect("a host");
            assert!(pattern.matches("2001:db8::1"), "{text}");
        }
    }
}
