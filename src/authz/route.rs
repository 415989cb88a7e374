//! The keyring that protects a request, and the scopes that a key must have there.
//!
//! The settings of the Envoy route come first: the context extensions `relatch.keyring`,
//! `relatch.scopes` and `relatch.auth`. A setting that is missing there comes from the configured
//! rule for host and path. A rule never loosens an extension: if the route has an extension but no
//! `relatch.scopes`, the scopes of the rule still apply, but the rule does not make the key
//! optional, lets no preflight pass, and does not switch enforcement off; it still switches it on.
//! `relatch.enforce` switches enforcement on or off, off only for a keyring that the configuration
//! names. The places of credentials are always those of the rule. Without extensions and without a rule, the default
//! keyring requires a key and no scopes.
//!
//! **Odd spellings.** A client must not evade a rule by spelling its path in another way. Envoy
//! normalizes a path (`normalize_path`, `merge_slashes`, `path_with_escaped_slashes_action`) only
//! if it is configured to. Upstreams differ in whether they decode, merge slashes, drop
//! `;parameters` or ignore case. So if there are rules for paths, a path is read twice: once as it
//! was sent, and once decoded until nothing is left to decode, with `\` as `/`, without empty and
//! `.` segments and parameters, and without regard to case. If the two readings choose different
//! rules, if a segment reads as `..`, or if the path has too many layers of escapes, the request is
//! refused as malformed: the intended rule is unknown. So is a path with an encoded NUL, at which
//! some upstreams end a path. If there are rules for hosts, addresses are compared as addresses, and
//! a host is refused in the same way if it has characters that no host name has, or an empty label,
//! or if it ends in a number without being an address (upstreams read `127.1` as `127.0.0.1`).

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use super::{
    query,
    request::CheckInput,
    settings::{Auth, Case, Enforcement, Host, Places, Preflight, RouteRule, Settings},
};
use crate::key::{KeyringName, Scopes};

/// The requirements for a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route<'a> {
    /// The name of the keyring, not validated; none if neither the Envoy route nor the settings
    /// choose one.
    pub(crate) keyring: Option<&'a str>,
    pub(crate) scopes: RequiredScopes<'a>,
    pub(crate) auth: Auth,
    pub(crate) preflight: Preflight,
    pub(crate) enforcement: Enforcement,
    /// Where a credential may be.
    pub(super) places: Places,
    /// Why the rule is unknown, if the request is only observed.
    pub(super) error: Option<RouteError>,
}

/// The scopes of which a key must have every one: those of the Envoy route, or else those of a
/// rule.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RequiredScopes<'a> {
    of_route: Option<&'a str>,
    of_rule: Option<&'a Scopes>,
}

/// The reason why the route of a request cannot be determined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RouteError {
    /// An extension begins with `relatch.` and is unknown, so that relatch would not enforce it.
    #[error("the route has an unknown context extension that begins with 'relatch.'")]
    UnknownExtension,
    /// A `relatch.` extension occurs twice.
    #[error("the route has a context extension twice")]
    RepeatedExtension,
    /// A `relatch.` extension has an invalid value.
    #[error("the route has a context extension with an invalid value")]
    InvalidExtension,
    /// The extension `relatch.enforce` is for a keyring that the configuration does not name.
    #[error(
        "the route has relatch.enforce: false, but its keyring is not named in `keyrings` of the \
         sidecar's file"
    )]
    UnnamedKeyring,
    /// The host is not a host name, and a rule is for a host.
    #[error("the host name or its port is not valid")]
    OddHost,
    /// The path can be read in two ways that match different rules, has a `..` segment, or has too
    /// many layers of escapes.
    #[error("the path is ambiguous: the upstream could read it as a path of another rule")]
    OddPath,
}

/// The context extensions of the Envoy route that begin with `relatch.`.
#[derive(Default)]
struct Extensions<'a> {
    keyring: Option<&'a str>,
    scopes: Option<&'a str>,
    auth: Option<Auth>,
    is_enforced: Option<bool>,
}

impl<'a> Route<'a> {
    /// Determines the route of a request.
    ///
    /// # Errors
    ///
    /// When the extensions of the Envoy route are invalid, or the host or path is spelled so that
    /// the rule is unknown.
    pub(crate) fn choose(
        settings: &'a Settings,
        input: &CheckInput<'a>,
    ) -> Result<Self, RouteError> {
        let extensions = Extensions::read(input)?;
        let is_decided = extensions.keyring.is_some() && extensions.scopes.is_some();
        let at = if is_decided && !settings.always_needs_rule() {
            None
        } else {
            match find_rule(settings.routes(), input) {
                Ok(at) => at,
                Err(error) if extensions.leave_everything(settings) => {
                    return Ok(Self::unknown(settings, error));
                }
                Err(error) => return Err(error),
            }
        };
        let places = at.map_or_else(|| settings.general_places(), |at| settings.places_of(at));
        let rule = at.map(|at| &settings.routes()[at]);
        let rule_keyring = rule.map(|rule| &rule.keyring);
        let keyring = extensions.keyring.or_else(|| {
            rule_keyring
                .or(settings.default_keyring())
                .map(KeyringName::as_str)
        });
        let auth = if input.method() == b"CONNECT" {
            // It opens a tunnel, in which nothing is checked any more.
            Auth::Required
        } else if extensions.is_empty() {
            rule.map_or(Auth::Required, |rule| rule.auth)
        } else {
            extensions.auth.unwrap_or(Auth::Required)
        };
        let scopes = RequiredScopes {
            of_route: extensions.scopes,
            of_rule: rule
                .map(|rule| &rule.scopes)
                .filter(|_| extensions.scopes.is_none()),
        };
        let loosening = rule.filter(|_| extensions.is_empty());
        Ok(Self {
            keyring,
            scopes,
            auth,
            preflight: loosening.map_or(Preflight::Deny, |rule| rule.preflight),
            enforcement: match (keyring, extensions.is_enforced, loosening) {
                (None, _, _) | (Some(_), Some(true), _) => Enforcement::Enforced,
                (Some(keyring), Some(false), _) if settings.names(keyring) => {
                    match settings.enforcement_of(keyring) {
                        observed @ Enforcement::Observed { .. } => observed,
                        Enforcement::Enforced => Enforcement::Observed {
                            removes_credential: false,
                        },
                    }
                }
                (Some(_), Some(false), _) => return Err(RouteError::UnnamedKeyring),
                (Some(_), None, Some(rule)) => settings.enforcement_by(rule),
                (Some(keyring), None, None) => rule
                    .and_then(|rule| rule.enforcement)
                    .filter(|of_rule| !of_rule.is_observed())
                    .unwrap_or_else(|| settings.enforcement_of(keyring)),
            },
            places,
            error: None,
        })
    }

    /// Returns a route without a keyring, for a request whose rule is unknown and that passes all
    /// the same.
    fn unknown(settings: &Settings, error: RouteError) -> Self {
        Self {
            keyring: None,
            scopes: RequiredScopes::default(),
            auth: Auth::Required,
            preflight: Preflight::Deny,
            enforcement: Enforcement::Observed {
                removes_credential: false,
            },
            places: settings.general_places(),
            error: Some(error),
        }
    }

    /// Returns the places whose credentials do not reach the upstream if the request passes.
    #[must_use]
    pub(super) fn removed_places(&self) -> Places {
        if self.enforcement.removes_credential() {
            self.places
        } else {
            Places::default()
        }
    }
}

impl RequiredScopes<'_> {
    /// Returns whether `held`, which is separated by spaces, contains all of them.
    #[must_use]
    pub(crate) fn are_held_by(&self, held: &str) -> bool {
        let holds = |required: &str| held.split(' ').any(|scope| scope == required);
        let of_route = self.of_route.unwrap_or_default();
        of_route.split_ascii_whitespace().all(holds)
            && self
                .of_rule
                .is_none_or(|required| required.iter().all(|scope| holds(scope.as_str())))
    }

    /// Creates the scopes of an Envoy route, for tests.
    #[cfg(test)]
    pub(crate) const fn of_route(scopes: &'static str) -> Self {
        Self {
            of_route: Some(scopes),
            of_rule: None,
        }
    }
}

/// Writes the scopes, separated by spaces.
impl fmt::Display for RequiredScopes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.of_route, self.of_rule) {
            (Some(scopes), _) => f.write_str(scopes),
            (None, Some(scopes)) => scopes.fmt(f),
            (None, None) => Ok(()),
        }
    }
}

impl<'a> Extensions<'a> {
    fn read(input: &CheckInput<'a>) -> Result<Self, RouteError> {
        let mut extensions = Self::default();
        for (name, value) in input.extensions() {
            let Some(name) = name.strip_prefix(b"relatch.") else {
                continue;
            };
            let value = std::str::from_utf8(value).map_err(|_| RouteError::InvalidExtension)?;
            match name {
                b"keyring" => set_once(&mut extensions.keyring, value)?,
                b"scopes" => set_once(&mut extensions.scopes, parse_scopes(value)?)?,
                b"auth" => {
                    let auth = value.parse().map_err(|_| RouteError::InvalidExtension)?;
                    set_once(&mut extensions.auth, auth)?;
                }
                b"enforce" => {
                    let enforced = value.parse().map_err(|_| RouteError::InvalidExtension)?;
                    set_once(&mut extensions.is_enforced, enforced)?;
                }
                _ => return Err(RouteError::UnknownExtension),
            }
        }
        Ok(extensions)
    }

    /// Returns whether no request is enforced, and none changes, whichever rule applies.
    fn leave_everything(&self, settings: &Settings) -> bool {
        let is_observed = |keyring: &str| settings.enforcement_of(keyring).is_observed();
        settings.leaves_everything()
            && self.is_enforced != Some(true)
            && self.keyring.is_none_or(is_observed)
    }

    /// Returns whether there is none that chooses or loosens anything. `relatch.enforce` alone
    /// changes nothing else.
    const fn is_empty(&self) -> bool {
        self.keyring.is_none() && self.scopes.is_none() && self.auth.is_none()
    }
}

fn set_once<T>(setting: &mut Option<T>, value: T) -> Result<(), RouteError> {
    match setting.replace(value) {
        None => Ok(()),
        Some(_) => Err(RouteError::RepeatedExtension),
    }
}

/// Checks that `text` is a list of scope tokens (RFC 6749, section 3.3), separated by spaces.
fn parse_scopes(text: &str) -> Result<&str, RouteError> {
    let valid = text
        .bytes()
        .all(|b| b == b' ' || (b.is_ascii_graphic() && b != b'"' && b != b'\\'));
    if valid {
        Ok(text)
    } else {
        Err(RouteError::InvalidExtension)
    }
}

/// Returns the position of the rule that applies; none if no rule does.
fn find_rule(rules: &[RouteRule], input: &CheckInput<'_>) -> Result<Option<usize>, RouteError> {
    if rules.is_empty() {
        return Ok(None);
    }
    let host = if rules.iter().any(|rule| rule.host.is_some()) {
        host_of(input.host())?
    } else {
        Host::Name("")
    };
    let mut candidates = rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| {
            rule.host
                .as_ref()
                .is_none_or(|pattern| pattern.matches(&host))
        })
        .peekable();
    if candidates
        .peek()
        .is_none_or(|(_, rule)| rule.path_prefix.is_root())
    {
        return Ok(candidates.next().map(|(at, _)| at));
    }
    let (path, _) = query::split_at_first(input.path(), b'?');
    let candidates: Vec<(usize, &RouteRule)> = candidates.collect();
    let as_sent = first_match(&candidates, path, Case::Sensitive);
    let as_read = match plain_reading(path)? {
        None => first_match(&candidates, path, Case::Insensitive),
        Some(reading) => first_match(&candidates, &reading, Case::Insensitive),
    };
    if as_sent == as_read {
        Ok(as_sent)
    } else {
        Err(RouteError::OddPath)
    }
}

fn first_match(rules: &[(usize, &RouteRule)], path: &[u8], case: Case) -> Option<usize> {
    let mut matching = rules
        .iter()
        .filter(|(_, rule)| rule.path_prefix.matches(path, case));
    matching.next().map(|(at, _)| *at)
}

/// Reads a host without its port and its final dot.
fn host_of(host: &[u8]) -> Result<Host<'_>, RouteError> {
    let host = std::str::from_utf8(host).map_err(|_| RouteError::OddHost)?;
    let (host, port) = if let Some(rest) = host.strip_prefix('[') {
        let (address, port) = rest.split_once(']').ok_or(RouteError::OddHost)?;
        let address: Ipv6Addr = address.parse().map_err(|_| RouteError::OddHost)?;
        let port = match port.strip_prefix(':') {
            Some(port) => port,
            None if port.is_empty() => "",
            None => return Err(RouteError::OddHost),
        };
        (Host::Address(IpAddr::V6(address).to_canonical()), port)
    } else {
        let (name, port) = host.split_once(':').unwrap_or((host, ""));
        (Host::parse(name).ok_or(RouteError::OddHost)?, port)
    };
    if port.bytes().all(|b| b.is_ascii_digit()) {
        Ok(host)
    } else {
        Err(RouteError::OddHost)
    }
}

/// Returns the path as the most liberal upstream would read it; none if that is the path as it was
/// sent.
fn plain_reading(path: &[u8]) -> Result<Option<Vec<u8>>, RouteError> {
    let is_plain = path.first() == Some(&b'/')
        && !path.iter().any(|b| b"%;\\".contains(b))
        && !path.windows(2).any(|pair| pair == b"//" || pair == b"/.");
    if is_plain {
        return Ok(None);
    }
    let decoded = fully_decoded(path)?;
    if decoded.contains(&0) {
        return Err(RouteError::OddPath);
    }
    let mut reading = Vec::with_capacity(decoded.len() + 1);
    for segment in decoded.split(|b| matches!(b, b'/' | b'\\')) {
        match query::split_at_first(segment, b';').0 {
            b"" | b"." => {}
            b".." => return Err(RouteError::OddPath),
            segment => {
                reading.push(b'/');
                reading.extend_from_slice(segment);
            }
        }
    }
    Ok(Some(reading))
}

/// Returns the path without escapes. A path with more than three layers of escapes is refused: no
/// chain of honest proxies escapes a path that often.
fn fully_decoded(path: &[u8]) -> Result<Vec<u8>, RouteError> {
    const MAX_ROUNDS: usize = 4;
    let mut path = path.to_vec();
    for _ in 0..MAX_ROUNDS {
        let decoded: Vec<u8> = query::percent_decoded(&path).collect();
        if decoded.len() == path.len() {
            return Ok(path);
        }
        path = decoded;
    }
    Err(RouteError::OddPath)
}

#[cfg(test)]
mod tests;
