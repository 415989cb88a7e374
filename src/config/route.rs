//! Routes of the sidecar's file: which keyring and scopes a request needs where the mesh cannot say so.

use std::{fmt, str::FromStr, sync::Arc};

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::{
    reader::{Findings, Text},
    value::ParseValueError,
};
use crate::key::{KeyringName, Scope, Scopes};

/// What a request to some hosts and paths needs; the first route that matches applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The hosts; none: all. Default: none.
    pub host: Option<HostPattern>,
    /// Where the path begins; none: anywhere. Default: none.
    pub path_prefix: Option<PathPrefix>,
    /// The keyring; none: the default keyring. Default: none.
    pub keyring: Option<KeyringName>,
    /// The scopes that are all needed. Default: none.
    pub scopes: Scopes,
    /// Default: required.
    pub auth: Auth,
}

/// Whether a request needs a credential.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// Without one it is denied.
    #[default]
    Required,
    /// Without one it passes, without identity. A wrong one is denied all the same.
    Optional,
}

/// The hosts that a route is for, in small letters and without a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// This host alone.
    Exact(Arc<str>),
    /// Every host below this domain, which begins with a dot; not the domain itself.
    Below(Arc<str>),
}

/// A path and all that lies below it: `/v1` holds `/v1` and `/v1/keys`, not `/v10`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPrefix(Arc<str>);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRoute {
    host: Option<Text>,
    path_prefix: Option<Text>,
    keyring: Option<Text>,
    scopes: Option<Vec<Text>>,
    auth: Option<Text>,
}

impl Route {
    /// Whether a request to `host`, as sent and possibly with a port, and to `path`, without its query, is of this
    /// route.
    ///
    /// The path is compared as it is: one with `..`, `//` or an encoded `/` may mean another to the upstream. Envoy's
    /// `normalize_path`, `merge_slashes` and `path_with_escaped_slashes_action` settle that before we are asked.
    #[must_use]
    pub fn matches(&self, host: &str, path: &str) -> bool {
        self.host
            .as_ref()
            .is_none_or(|pattern| pattern.matches(host))
            && self
                .path_prefix
                .as_ref()
                .is_none_or(|prefix| prefix.holds(path))
    }

    pub(super) fn from_raw(
        at: usize,
        raw: &Spanned<RawRoute>,
        known: &[KeyringName],
        found: &mut Findings,
    ) -> Self {
        let raw = &raw.value;
        let field = |name: &str| format!("routes[{at}].{name}");
        let keyring = found.parse(field("keyring"), raw.keyring.as_ref(), |text| {
            known_keyring(text, known)
        });
        let scopes = raw
            .scopes
            .iter()
            .flatten()
            .enumerate()
            .filter_map(|(i, scope)| {
                found.parse(
                    format_args!("routes[{at}].scopes[{i}]"),
                    Some(scope),
                    str::parse::<Scope>,
                )
            })
            .collect();
        Self {
            host: found.parse(field("host"), raw.host.as_ref(), str::parse),
            path_prefix: found.parse(field("path_prefix"), raw.path_prefix.as_ref(), str::parse),
            keyring,
            scopes,
            auth: found
                .parse(field("auth"), raw.auth.as_ref(), str::parse)
                .unwrap_or_default(),
        }
    }
}

impl HostPattern {
    /// Whether `host` is one of them; its case and port do not count.
    #[must_use]
    pub fn matches(&self, host: &str) -> bool {
        let host = without_port(host);
        match self {
            Self::Exact(name) => host.eq_ignore_ascii_case(name),
            Self::Below(domain) => host.len().checked_sub(domain.len()).is_some_and(|at| {
                at > 0
                    && host
                        .get(at..)
                        .is_some_and(|end| end.eq_ignore_ascii_case(domain))
            }),
        }
    }
}

impl FromStr for HostPattern {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let below = text.strip_prefix('*');
        let name = below.map_or(text, |domain| domain.strip_prefix('.').unwrap_or(""));
        let bare = name
            .strip_prefix('[')
            .and_then(|name| name.strip_suffix(']'));
        let valid = match bare {
            Some(address) => below.is_none() && address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                name.len() <= 253
                    && name.split('.').all(|label| {
                        !label.is_empty()
                            && label
                                .bytes()
                                .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
                    })
            }
        };
        if !valid {
            return Err(ParseValueError::new(
                "use a host name without a port, or \"*.domain\" for all below a domain",
            ));
        }
        Ok(if below.is_some() {
            Self::Below(format!(".{}", name.to_ascii_lowercase()).into())
        } else {
            Self::Exact(name.to_ascii_lowercase().into())
        })
    }
}

impl PathPrefix {
    /// Whether `path`, without its query, is the prefix or lies below it.
    #[must_use]
    pub fn holds(&self, path: &str) -> bool {
        path.strip_prefix(&*self.0)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || self.0.ends_with('/'))
    }

    /// The prefix as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PathPrefix {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = text.starts_with('/')
            && text.bytes().all(|byte| byte.is_ascii_graphic())
            && !text.contains(['?', '#', '%', '\\'])
            && !text.contains("//")
            && !text.split('/').any(|part| part == "." || part == "..");
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(ParseValueError::new(
                "use a path that begins with '/', without '%', '?', '#', '\\', '//' and dot segments",
            ))
        }
    }
}

impl FromStr for Auth {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "required" => Ok(Self::Required),
            "optional" => Ok(Self::Optional),
            _ => Err(ParseValueError::new("use required or optional")),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Below(domain) => write!(f, "*{domain}"),
        }
    }
}

/// Parses the name of a keyring that the file holds.
pub(super) fn known_keyring(text: &str, known: &[KeyringName]) -> Result<KeyringName, String> {
    let name: KeyringName = text.parse().map_err(|error| format!("{error}"))?;
    if known.contains(&name) {
        Ok(name)
    } else {
        Err("is not in `keyrings`, add it there or name one of those".to_owned())
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port))
            if port.bytes().all(|byte| byte.is_ascii_digit())
                && (name.ends_with(']') || !name.contains(':')) =>
        {
            name
        }
        Some(_) | None => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> HostPattern {
        text.parse().expect("a valid pattern")
    }

    fn prefix(text: &str) -> PathPrefix {
        text.parse().expect("a valid prefix")
    }

    #[test]
    fn hosts_match_whatever_their_case_and_port() {
        let exact = host("API.example.com");
        assert!(exact.matches("api.example.com"));
        assert!(exact.matches("Api.Example.Com:8443"));
        assert!(!exact.matches("v2.api.example.com"));
        assert!(host("[::1]").matches("[::1]:80"));
    }

    #[test]
    fn a_wildcard_holds_what_is_below_its_domain_only() {
        let below = host("*.Example.com");
        assert!(below.matches("a.example.com"));
        assert!(below.matches("a.b.EXAMPLE.com:80"));
        for other in [
            "example.com",
            ".example.com",
            "badexample.com",
            "a.example.com.evil",
        ] {
            assert!(!below.matches(other), "{other} matched");
        }
    }

    #[test]
    fn prefixes_end_at_a_segment() {
        assert!(prefix("/v1").holds("/v1"));
        assert!(prefix("/v1").holds("/v1/keys"));
        assert!(!prefix("/v1").holds("/v10"));
        assert!(!prefix("/v1/").holds("/v1"));
        assert!(prefix("/v1/").holds("/v1/keys"));
        assert!(prefix("/").holds("/anything"));
    }

    #[test]
    fn patterns_that_cannot_match_are_refused() {
        for bad in [
            "",
            "*",
            "*.",
            "*example.com",
            "a..b",
            "a:80",
            "a/b",
            "*.*.b",
            "[10.0.0.1]",
        ] {
            assert!(bad.parse::<HostPattern>().is_err(), "{bad:?} was accepted");
        }
        for bad in ["", "v1", "/a?b", "/a/../b", "/a//b", "/a%2fb", "/ä"] {
            assert!(bad.parse::<PathPrefix>().is_err(), "{bad:?} was accepted");
        }
    }
}
