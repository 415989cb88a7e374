//! What configuration decides about checks, validated: where credentials are, which keyring a route belongs to, and
//! what the upstream is told.

mod header;
mod rule;
mod source;

use http::HeaderName;

use crate::{budget::Rate, key::KeyringName};

pub(crate) use header::{
    IdentityHeaders, folds_to, parse_credential_header, parse_identity_header,
};
#[cfg(test)]
pub(crate) use rule::HostPattern;
pub(crate) use rule::{Auth, Case, PathPrefix, RouteRule};
pub(crate) use source::CredentialSource;
pub(super) use source::is_token;

/// Validated settings; made from [`SettingsParts`].
#[derive(Clone, Debug)]
pub struct Settings {
    parts: SettingsParts,
    /// Headers whose spellings never pass from outside: the identity headers, whatever they were renamed to.
    reserved: Vec<HeaderName>,
    /// A bit for each length that the name of a header has which [`Settings::is_spoofed`] looks for.
    lengths: u128,
}

/// Settings as configuration gives them.
#[derive(Clone, Debug)]
pub struct SettingsParts {
    /// Where a credential may be, 1 to [`Settings::MAX_SOURCES`]; all are looked at.
    /// Default: [`CredentialSource::defaults`].
    pub credentials: Vec<CredentialSource>,
    /// Rules for requests whose Envoy route does not name a keyring, at most [`Settings::MAX_ROUTES`], in any order.
    /// Default: none.
    pub routes: Vec<RouteRule>,
    /// The keyring of requests that no rule matches. Default: none.
    pub default_keyring: Option<KeyringName>,
    /// What the upstream is told of the caller.
    pub identity: IdentityHeaders,
    /// What a consumer is told that used a retiring version; none for nothing. Default: [`Notices::default`].
    pub notices: Option<Notices>,
    /// How many credentials that no keyring holds each source may present. Default: 20 a second, 200 at once: more than a
    /// consumer that has a wrong key sends by mistake, and a fifth of what a sidecar looks up of keys that it does not know.
    pub failed_credentials: Rate,
}

/// What a consumer is told that used a retiring version, beside `API-Key-Rotation` and `Link`.
///
/// Off by default: both headers speak of the resource, so that a client may take an API for deprecated whose key is
/// rotated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notices {
    /// `Deprecation` (RFC 9745), the beginning of the overlap.
    pub(crate) deprecation: bool,
    /// `Sunset` (RFC 8594), the announced end of the version.
    pub(crate) sunset: bool,
}

/// Settings that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// The number of places is out of bounds.
    #[error("credentials: name 1 to {} places", Settings::MAX_SOURCES)]
    SourceCount,
    /// One credential could be found in a place and in one named before.
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

/// A text that is not what a setting needs; says what is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSettingError {
    /// Not a [`Token`].
    #[error("use 1 to 128 letters, digits and any of !#$%&'*+-.^_`|~")]
    Token,
    /// Not a [`QueryName`].
    #[error("use 1 to 128 letters, digits and any of - . _ ~")]
    QueryName,
    /// Not the name of a header.
    #[error("use the name of a header: letters, digits and '-', no pseudo-header")]
    HeaderName,
    /// A header that belongs to the message.
    #[error("this header belongs to the message itself, use another one")]
    MessageHeader,
    /// A header that is kept for identities.
    #[error("this header is kept to tell the upstream who calls, use another one")]
    IdentityHeader,
    /// Not a [`HostPattern`].
    #[error("use a host name without a port, or \"*.domain\" for all below a domain")]
    Host,
    /// Not a [`PathPrefix`].
    #[error(
        "use a path that begins with '/', in ASCII, without '%', ';', '?', '#', '\\', '//' and dot segments"
    )]
    Path,
    /// Not an [`Auth`].
    #[error("use required or optional")]
    Auth,
}

impl Settings {
    /// The most places of credentials: they are marked in a word of 32 bits, and four kinds of them is much already.
    pub(crate) const MAX_SOURCES: usize = 16;
    /// The most rules: they are looked through one by one.
    pub(crate) const MAX_ROUTES: usize = 256;

    /// Checks the parts against each other.
    ///
    /// # Errors
    ///
    /// When they contradict each other, or a header cannot be used.
    pub fn new(mut parts: SettingsParts) -> Result<Self, SettingsError> {
        check_sources(&parts.credentials)?;
        check_identity(&parts.identity, &parts.credentials)?;
        check_routes(&parts.routes)?;
        parts.routes.sort_by_key(RouteRule::rank);
        let reserved = reserve(&parts.identity);
        let credentials = parts.credentials.iter().filter_map(|source| match source {
            CredentialSource::Header { name, .. } => Some(name),
            CredentialSource::Query { .. } | CredentialSource::Cookie { .. } => None,
        });
        let lengths = credentials
            .chain(&reserved)
            .fold(0, |lengths, name| lengths | length_bit(name.as_str().len()));
        Ok(Self {
            parts,
            reserved,
            lengths,
        })
    }

    /// The defaults, with `keyring` for every request whose Envoy route does not name one.
    #[must_use]
    pub(crate) fn of_keyring(keyring: KeyringName) -> Self {
        let mut settings = Self::default();
        settings.parts.default_keyring = Some(keyring);
        settings
    }

    /// Where a credential may be.
    #[must_use]
    pub(crate) fn credentials(&self) -> &[CredentialSource] {
        &self.parts.credentials
    }

    /// The rules, those first that win over the others.
    #[must_use]
    pub(crate) fn routes(&self) -> &[RouteRule] {
        &self.parts.routes
    }

    /// The keyring of requests that no rule matches.
    #[must_use]
    pub(crate) const fn default_keyring(&self) -> Option<&KeyringName> {
        self.parts.default_keyring.as_ref()
    }

    /// What the upstream is told of the caller.
    #[must_use]
    pub(crate) const fn identity(&self) -> &IdentityHeaders {
        &self.parts.identity
    }

    /// What a consumer is told that used a retiring version; none for nothing.
    #[must_use]
    pub(crate) const fn notices(&self) -> Option<Notices> {
        self.parts.notices
    }

    /// How many credentials that no keyring holds each source may present.
    #[must_use]
    pub(crate) const fn failed_credentials(&self) -> Rate {
        self.parts.failed_credentials
    }

    /// The headers that reach the upstream only from us.
    #[must_use]
    pub(crate) fn reserved(&self) -> &[HeaderName] {
        &self.reserved
    }

    /// Whether a header's name is one that never passes from outside as it came: a spelling of a reserved header, or
    /// another spelling of a header that holds credentials.
    #[must_use]
    pub(crate) fn is_spoofed(&self, name: &[u8]) -> bool {
        // Most headers of a request have a length that none of ours has.
        if self.lengths & length_bit(name.len()) == 0 {
            return false;
        }
        self.reserved.iter().any(|header| folds_to(name, header))
            || self.credentials().iter().any(|source| match source {
                CredentialSource::Header { name: header, .. } => {
                    folds_to(name, header) && !name.eq_ignore_ascii_case(header.as_ref())
                }
                CredentialSource::Query { .. } | CredentialSource::Cookie { .. } => false,
            })
    }
}

/// Lengths beyond the last bit share it.
fn length_bit(len: usize) -> u128 {
    1 << len.min(127)
}

impl Default for Settings {
    fn default() -> Self {
        Self::new(SettingsParts::default()).expect("the defaults do not contradict each other")
    }
}

impl Default for SettingsParts {
    fn default() -> Self {
        Self {
            credentials: CredentialSource::defaults(),
            routes: Vec::new(),
            default_keyring: None,
            identity: IdentityHeaders::default(),
            notices: Some(Notices::default()),
            failed_credentials: Rate {
                per_second: 20,
                burst: 200,
            },
        }
    }
}

fn check_sources(sources: &[CredentialSource]) -> Result<(), SettingsError> {
    if !matches!(sources.len(), 1..=Settings::MAX_SOURCES) {
        return Err(SettingsError::SourceCount);
    }
    for (at, source) in sources.iter().enumerate() {
        if let CredentialSource::Header { name, .. } = source {
            header::check_credential(name)
                .map_err(|_| SettingsError::UnusableHeader(name.clone()))?;
        }
        if sources[..at].iter().any(|other| other.overlaps(source)) {
            return Err(SettingsError::RepeatedSource(source.to_string()));
        }
    }
    Ok(())
}

fn check_identity(
    identity: &IdentityHeaders,
    sources: &[CredentialSource],
) -> Result<(), SettingsError> {
    for (at, header) in identity.names().enumerate() {
        header::check_identity(header)
            .map_err(|_| SettingsError::UnusableHeader(header.clone()))?;
        let is_credential = sources.iter().any(|source| source.folds_to(header));
        let is_taken = identity
            .names()
            .take(at)
            .any(|other| folds_to(other.as_ref(), header));
        if is_credential || is_taken {
            return Err(SettingsError::HeaderClash(header.clone()));
        }
    }
    Ok(())
}

fn check_routes(rules: &[RouteRule]) -> Result<(), SettingsError> {
    if rules.len() > Settings::MAX_ROUTES {
        return Err(SettingsError::RouteCount);
    }
    for (at, rule) in rules.iter().enumerate() {
        if rules[..at].iter().any(|other| other.matches_as(rule)) {
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
    Ok(())
}

/// The configured identity headers and the usual ones, so that renaming or switching one off leaves nothing to spoof.
fn reserve(identity: &IdentityHeaders) -> Vec<HeaderName> {
    let mut reserved: Vec<HeaderName> = identity.names().cloned().collect();
    for header in IdentityHeaders::default().names() {
        if !reserved.contains(header) {
            reserved.push(header.clone());
        }
    }
    reserved
}

#[cfg(test)]
mod tests;
