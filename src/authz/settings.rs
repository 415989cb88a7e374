//! What configuration decides about checks, validated: where credentials are, which keyring a route belongs to, and
//! what the upstream is told.

use std::{cmp::Reverse, fmt, str::FromStr, sync::Arc};

use http::HeaderName;

use crate::key::{KeyringName, Scopes};

/// Validated settings; made from [`SettingsParts`].
#[derive(Clone, Debug)]
pub struct Settings {
    parts: SettingsParts,
    /// Headers whose spellings never pass from outside: the identity headers, whatever they were renamed to.
    reserved: Vec<HeaderName>,
}

/// Settings as configuration gives them.
#[derive(Clone, Debug)]
pub struct SettingsParts {
    /// Where a credential may be; all are looked at.
    pub credentials: Vec<CredentialSource>,
    /// Rules for requests whose Envoy route does not name a keyring, in any order.
    pub routes: Vec<RouteRule>,
    /// The keyring of requests that no rule matches.
    pub default_keyring: Option<KeyringName>,
    /// What the upstream is told of the caller.
    pub identity: IdentityHeaders,
    /// Whether a consumer is told that the version it used is retiring.
    pub notices: bool,
}

/// One place where a credential may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialSource {
    /// A header: its whole value, or what follows the scheme.
    Header {
        /// The header.
        name: HeaderName,
        /// The scheme (RFC 9110, section 11.1), compared without case. A value of another scheme is left alone.
        scheme: Option<Token>,
    },
    /// A query parameter, compared with case and after percent-decoding.
    Query {
        /// The parameter.
        name: Token,
    },
    /// A cookie, compared with case.
    Cookie {
        /// The cookie.
        name: Token,
    },
}

/// A token of RFC 9110, section 5.6.2, of at most 128 characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token(Arc<str>);

/// What holds for the requests of a host and below a path.
#[derive(Clone, Debug)]
pub struct RouteRule {
    /// Which hosts; none for every one.
    pub host: Option<HostPattern>,
    /// Which paths.
    pub path_prefix: PathPrefix,
    /// The keyring that protects them.
    pub keyring: KeyringName,
    /// What a key must hold, all of it.
    pub scopes: Scopes,
    /// Whether a key is needed.
    pub auth: Auth,
}

/// Whether a route needs a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// A request without a credential is denied.
    #[default]
    Required,
    /// A request without a credential passes without identity. A wrong one is denied still.
    Optional,
}

/// A host, or every host below one (`*.example.com`). Lower case, without port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// This host.
    Exact(Box<str>),
    /// Hosts that end so; begins with a dot.
    Suffix(Box<str>),
}

/// A path and everything below it, by whole segments; `/` for all paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPrefix(Box<str>);

/// The headers that tell the upstream who calls; none for one that is switched off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityHeaders {
    /// Whose key it was.
    pub consumer: Option<HeaderName>,
    /// Which key.
    pub key_id: Option<HeaderName>,
    /// Which version of it.
    pub key_version: Option<HeaderName>,
    /// What it holds.
    pub scopes: Option<HeaderName>,
}

/// Settings that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// The number of places is out of bounds.
    #[error("credentials: name 1 to {} places", Settings::MAX_SOURCES)]
    SourceCount,
    /// A place is named twice, or one header with and without a scheme.
    #[error("credentials: {0} is named twice")]
    RepeatedSource(String),
    /// A header that has another meaning, or that a proxy cannot remove.
    #[error("the header {0:?} can hold neither a credential nor an identity")]
    UnusableHeader(HeaderName),
    /// A header that would be set and removed.
    #[error("the header {0:?} has two uses, or a spelling of it has")]
    HeaderClash(HeaderName),
    /// There are too many rules.
    #[error("routes: at most {} rules are possible", Settings::MAX_ROUTES)]
    RouteCount,
    /// Two rules match the same.
    #[error("routes: two rules match {0}")]
    RepeatedRoute(String),
}

/// A text that is not what a setting needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSettingError {
    /// Not a [`Token`].
    #[error("not a name: use 1 to 128 of A-Z, a-z, 0-9 and !#$%&'*+-.^_`|~")]
    Token,
    /// Not a [`HostPattern`].
    #[error("not a host: write example.com or *.example.com, without port")]
    Host,
    /// Not a [`PathPrefix`].
    #[error(
        "not a path: begin with '/', write it as it is after decoding, without empty or dot segments and without ';', '?', '#', '%' and '\\'"
    )]
    Path,
}

impl Settings {
    /// The most places of credentials: they are marked in a word of 32 bits, and four kinds of them is much already.
    pub const MAX_SOURCES: usize = 16;
    /// The most rules: they are looked through one by one.
    pub const MAX_ROUTES: usize = 256;

    /// Checks the parts against each other.
    ///
    /// # Errors
    ///
    /// When they contradict each other, or a header cannot be used.
    pub fn new(mut parts: SettingsParts) -> Result<Self, SettingsError> {
        check_sources(&parts.credentials)?;
        let reserved = reserve(&parts.identity, &parts.credentials)?;
        if parts.routes.len() > Self::MAX_ROUTES {
            return Err(SettingsError::RouteCount);
        }
        parts.routes.sort_by_key(RouteRule::rank);
        for (at, rule) in parts.routes.iter().enumerate() {
            if parts.routes[..at]
                .iter()
                .any(|other| other.matches_as(rule))
            {
                let host = rule
                    .host
                    .as_ref()
                    .map_or_else(|| "every host".to_owned(), |host| format!("host {host}"));
                return Err(SettingsError::RepeatedRoute(format!(
                    "{host} and path {}",
                    rule.path_prefix
                )));
            }
        }
        Ok(Self { parts, reserved })
    }

    /// Where a credential may be.
    #[must_use]
    pub fn credentials(&self) -> &[CredentialSource] {
        &self.parts.credentials
    }

    /// The rules, those first that win over the others.
    #[must_use]
    pub fn routes(&self) -> &[RouteRule] {
        &self.parts.routes
    }

    /// The keyring of requests that no rule matches.
    #[must_use]
    pub const fn default_keyring(&self) -> Option<&KeyringName> {
        self.parts.default_keyring.as_ref()
    }

    /// What the upstream is told of the caller.
    #[must_use]
    pub const fn identity(&self) -> &IdentityHeaders {
        &self.parts.identity
    }

    /// Whether a consumer is told that the version it used is retiring.
    #[must_use]
    pub const fn notices(&self) -> bool {
        self.parts.notices
    }

    /// The headers that reach the upstream only from us.
    #[must_use]
    pub fn reserved(&self) -> &[HeaderName] {
        &self.reserved
    }

    /// Whether a header's name is one that never passes from outside as it came: a spelling of a reserved header, or
    /// another spelling of a header that holds credentials.
    #[must_use]
    pub fn is_spoofed(&self, name: &[u8]) -> bool {
        self.reserved.iter().any(|header| folds_to(name, header))
            || self.credentials().iter().any(|source| match source {
                CredentialSource::Header { name: header, .. } => {
                    folds_to(name, header) && !name.eq_ignore_ascii_case(header.as_ref())
                }
                CredentialSource::Query { .. } | CredentialSource::Cookie { .. } => false,
            })
    }
}

impl Default for SettingsParts {
    fn default() -> Self {
        Self {
            credentials: vec![
                CredentialSource::Header {
                    name: HeaderName::from_static("x-api-key"),
                    scheme: None,
                },
                CredentialSource::Header {
                    name: http::header::AUTHORIZATION,
                    scheme: Some(Token("Bearer".into())),
                },
            ],
            routes: Vec::new(),
            default_keyring: None,
            identity: IdentityHeaders::default(),
            notices: true,
        }
    }
}

impl Default for IdentityHeaders {
    fn default() -> Self {
        Self {
            consumer: Some(HeaderName::from_static("x-relatch-consumer")),
            key_id: Some(HeaderName::from_static("x-relatch-key-id")),
            key_version: Some(HeaderName::from_static("x-relatch-key-version")),
            scopes: Some(HeaderName::from_static("x-relatch-scopes")),
        }
    }
}

impl IdentityHeaders {
    fn iter(&self) -> impl Iterator<Item = &HeaderName> {
        [
            &self.consumer,
            &self.key_id,
            &self.key_version,
            &self.scopes,
        ]
        .into_iter()
        .flatten()
    }
}

impl RouteRule {
    /// Lower wins: a host over a longer suffix over a shorter one over every host, then the longer path.
    fn rank(&self) -> (u8, Reverse<usize>, Reverse<usize>) {
        let (class, host) = match &self.host {
            Some(HostPattern::Exact(host)) => (0, host.len()),
            Some(HostPattern::Suffix(suffix)) => (1, suffix.len()),
            None => (2, 0),
        };
        (class, Reverse(host), Reverse(self.path_prefix.0.len()))
    }

    /// Whether both match the same requests; paths that differ in case only are too easily confused.
    fn matches_as(&self, other: &Self) -> bool {
        self.host == other.host
            && self
                .path_prefix
                .0
                .eq_ignore_ascii_case(&other.path_prefix.0)
    }
}

impl HostPattern {
    /// Whether it matches a host without port.
    #[must_use]
    pub fn matches(&self, host: &str) -> bool {
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
        let (host, is_suffix) = match text.strip_prefix("*.") {
            Some(host) => (host, true),
            None => (text, false),
        };
        let is_address = host.parse::<std::net::Ipv6Addr>().is_ok() && !is_suffix;
        let is_name = matches!(host.len(), 1..=253)
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && host.split('.').all(|label| !label.is_empty());
        let host = host.to_ascii_lowercase();
        match (is_address || is_name, is_suffix) {
            (false, _) => Err(ParseSettingError::Host),
            (true, false) => Ok(Self::Exact(host.into())),
            (true, true) => Ok(Self::Suffix(format!(".{host}").into())),
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
    /// Whether it matches a path, with case or without.
    #[must_use]
    pub fn matches(&self, path: &[u8], case: Case) -> bool {
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
    pub const fn is_root(&self) -> bool {
        self.0.is_empty()
    }
}

/// How the case of a path counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// As RFC 3986 has it.
    Sensitive,
    /// As some upstreams route.
    Insensitive,
}

impl FromStr for PathPrefix {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.strip_suffix('/').unwrap_or(text);
        let has_good_segments = path
            .split('/')
            .skip(1)
            .all(|segment| !matches!(segment, "" | "." | ".."));
        let valid = text.starts_with('/')
            && text.len() <= 1024
            && has_good_segments
            && !text
                .bytes()
                .any(|b| b.is_ascii_control() || b" ;?#%\\".contains(&b));
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

impl Token {
    /// The token as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Token {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() <= 128 && is_token(text.as_bytes()) {
            Ok(Self(text.into()))
        } else {
            Err(ParseSettingError::Token)
        }
    }
}

impl fmt::Display for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header { name, .. } => write!(f, "header {name}"),
            Self::Query { name } => write!(f, "query parameter {}", name.as_str()),
            Self::Cookie { name } => write!(f, "cookie {}", name.as_str()),
        }
    }
}

/// Whether bytes are a token of RFC 9110, section 5.6.2: what the name of a header is.
pub(super) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

fn check_sources(sources: &[CredentialSource]) -> Result<(), SettingsError> {
    if !matches!(sources.len(), 1..=Settings::MAX_SOURCES) {
        return Err(SettingsError::SourceCount);
    }
    for (at, source) in sources.iter().enumerate() {
        if let CredentialSource::Header { name, .. } = source {
            check_usable(name)?;
        }
        let is_repeated = sources[..at].iter().any(|other| match (source, other) {
            (
                CredentialSource::Header { name, scheme },
                CredentialSource::Header {
                    name: other_name,
                    scheme: other_scheme,
                },
            ) => match (scheme, other_scheme) {
                (Some(scheme), Some(other)) => {
                    name == other_name && scheme.0.eq_ignore_ascii_case(&other.0)
                }
                (None, _) | (_, None) => name == other_name,
            },
            (source, other) => source == other,
        });
        if is_repeated {
            return Err(SettingsError::RepeatedSource(source.to_string()));
        }
    }
    Ok(())
}

/// The configured identity headers and the usual ones, so that renaming or switching one off leaves nothing to spoof.
fn reserve(
    identity: &IdentityHeaders,
    sources: &[CredentialSource],
) -> Result<Vec<HeaderName>, SettingsError> {
    let mut reserved: Vec<HeaderName> = Vec::new();
    for header in identity.iter() {
        check_usable(header)?;
        let is_credential = sources.iter().any(|source| match source {
            CredentialSource::Header { name, .. } => folds_to(name.as_ref(), header),
            CredentialSource::Query { .. } | CredentialSource::Cookie { .. } => false,
        });
        let is_taken = reserved
            .iter()
            .any(|other| folds_to(other.as_ref(), header));
        if is_credential || is_taken {
            return Err(SettingsError::HeaderClash(header.clone()));
        }
        reserved.push(header.clone());
    }
    for header in IdentityHeaders::default().iter() {
        if !reserved.contains(header) {
            reserved.push(header.clone());
        }
    }
    for source in sources {
        if let CredentialSource::Header { name, .. } = source
            && reserved
                .iter()
                .any(|header| folds_to(name.as_ref(), header))
        {
            return Err(SettingsError::HeaderClash(name.clone()));
        }
    }
    Ok(reserved)
}

/// Envoy refuses to remove `host`; a cookie has a source of its own; the others frame the message.
fn check_usable(name: &HeaderName) -> Result<(), SettingsError> {
    let unusable = [
        http::header::HOST,
        http::header::COOKIE,
        http::header::CONNECTION,
        http::header::CONTENT_LENGTH,
        http::header::TRANSFER_ENCODING,
    ];
    if unusable.contains(name) {
        Err(SettingsError::UnusableHeader(name.clone()))
    } else {
        Ok(())
    }
}

/// Whether a framework could take `name` for `header`. CGI and its heirs hand headers on in upper case, with `_` for
/// `-`, some with `_` for every character that is neither letter nor digit.
fn folds_to(name: &[u8], header: &HeaderName) -> bool {
    let header = header.as_str().as_bytes();
    name.len() == header.len()
        && name
            .iter()
            .zip(header)
            .all(|(one, other)| fold(*one) == fold(*other))
}

const fn fold(byte: u8) -> u8 {
    if byte.is_ascii_alphanumeric() {
        byte.to_ascii_lowercase()
    } else {
        b'-'
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &'static str, scheme: Option<&str>) -> CredentialSource {
        CredentialSource::Header {
            name: HeaderName::from_static(name),
            scheme: scheme.map(|scheme| scheme.parse().expect("a token")),
        }
    }

    fn with_credentials(credentials: Vec<CredentialSource>) -> Result<Settings, SettingsError> {
        Settings::new(SettingsParts {
            credentials,
            ..SettingsParts::default()
        })
    }

    fn rule(host: Option<&str>, path: &str) -> RouteRule {
        RouteRule {
            host: host.map(|host| host.parse().expect("a host")),
            path_prefix: path.parse().expect("a path"),
            keyring: crate::key::testing::keyring_name(),
            scopes: Scopes::default(),
            auth: Auth::Required,
        }
    }

    #[test]
    fn default_settings_are_valid() {
        assert!(Settings::new(SettingsParts::default()).is_ok());
    }

    #[test]
    fn contradictory_credentials_are_refused() {
        assert!(with_credentials(vec![]).is_err());
        assert!(
            with_credentials(vec![header("x-api-key", None), header("x-api-key", None)]).is_err()
        );
        assert!(
            with_credentials(vec![
                header("authorization", None),
                header("authorization", Some("Bearer"))
            ])
            .is_err()
        );
        assert!(
            with_credentials(vec![
                header("authorization", Some("bearer")),
                header("authorization", Some("Bearer"))
            ])
            .is_err()
        );
        assert!(
            with_credentials(vec![
                header("authorization", Some("ApiKey")),
                header("authorization", Some("Bearer"))
            ])
            .is_ok()
        );
        for unusable in ["host", "cookie", "x-relatch-consumer", "x_relatch_scopes"] {
            assert!(
                with_credentials(vec![header(unusable, None)]).is_err(),
                "{unusable} was accepted"
            );
        }
    }

    #[test]
    fn an_identity_header_has_one_use() {
        let with_consumer = |name: &'static str| {
            Settings::new(SettingsParts {
                identity: IdentityHeaders {
                    consumer: Some(HeaderName::from_static(name)),
                    ..IdentityHeaders::default()
                },
                ..SettingsParts::default()
            })
        };
        assert!(with_consumer("x-caller").is_ok());
        for clash in ["x_api_key", "x-relatch-key-id", "authorization", "host"] {
            assert!(with_consumer(clash).is_err(), "{clash} was accepted");
        }
    }

    #[test]
    fn every_spelling_of_a_reserved_header_is_known() {
        let settings = Settings::new(SettingsParts {
            identity: IdentityHeaders {
                consumer: Some(HeaderName::from_static("x-caller")),
                scopes: None,
                ..IdentityHeaders::default()
            },
            ..SettingsParts::default()
        })
        .expect("valid settings");
        for spoofed in [
            "x-caller",
            "X_Caller",
            "x.caller",
            "x-relatch-consumer",
            "X_RELATCH.scopes",
            "x_api_key",
            "X.API-KEY",
        ] {
            assert!(settings.is_spoofed(spoofed.as_bytes()), "{spoofed} passes");
        }
        for honest in [
            "x-api-key",
            "X-Api-Key",
            "authorization",
            "x-calle",
            "xcaller",
        ] {
            assert!(!settings.is_spoofed(honest.as_bytes()), "{honest} is taken");
        }
    }

    #[test]
    fn the_most_specific_rule_comes_first_whatever_their_order() {
        let settings = Settings::new(SettingsParts {
            routes: vec![
                rule(None, "/"),
                rule(Some("*.example.com"), "/a"),
                rule(None, "/a/b"),
                rule(Some("api.example.com"), "/"),
                rule(Some("*.eu.example.com"), "/"),
                rule(None, "/a"),
            ],
            ..SettingsParts::default()
        })
        .expect("valid settings");
        let order: Vec<String> = settings
            .routes()
            .iter()
            .map(|rule| {
                let host = rule.host.as_ref().map(ToString::to_string);
                format!("{}{}", host.unwrap_or_default(), rule.path_prefix)
            })
            .collect();
        assert_eq!(
            order,
            [
                "api.example.com/",
                "*.eu.example.com/",
                "*.example.com/a",
                "/a/b",
                "/a",
                "/"
            ]
        );
    }

    #[test]
    fn rules_that_match_the_same_are_refused() {
        for (one, other) in [("/a", "/a/"), ("/a", "/A")] {
            let settings = Settings::new(SettingsParts {
                routes: vec![rule(None, one), rule(None, other)],
                ..SettingsParts::default()
            });
            assert!(settings.is_err(), "{one} and {other} were accepted");
        }
    }

    #[test]
    fn hosts_and_paths_are_checked() {
        for bad in ["", "*", "*.", "a..b", "example.com:80", "exa mple", ".a"] {
            assert!(bad.parse::<HostPattern>().is_err(), "{bad:?} was accepted");
        }
        for bad in ["", "a", "//", "/a//b", "/a/../b", "/a%2f", "/a?b", "/a;b"] {
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
    }

    #[test]
    fn a_suffix_matches_hosts_below_it_only() {
        let pattern: HostPattern = "*.Example.com".parse().expect("a host");
        assert!(pattern.matches("a.example.COM"));
        assert!(pattern.matches("a.b.example.com"));
        assert!(!pattern.matches("example.com"));
        assert!(!pattern.matches("badexample.com"));
        assert!(!pattern.matches(".example.com"));
    }
}
