//! The validated settings of checks: the places of credentials, the keyring of each route, and the
//! headers for the upstream and the consumer.

mod dialect;
mod enforcement;
mod header;
mod place;
mod rule;
mod source;

use http::HeaderName;

use super::client_address::AddressSource;
use crate::{
    budget::Rate,
    key::{KeyringName, KeyringPattern},
};

pub use dialect::Dialect;
pub(crate) use enforcement::{Enforcement, Enforcements};
pub(crate) use header::{
    IdentityHeaders, folds_to, parse_address_header, parse_credential_header, parse_identity_header,
};
pub(super) use place::{Place, Places};
#[cfg(test)]
pub(crate) use rule::HostPattern;
pub(crate) use rule::{Auth, Case, Host, PathPrefix, Preflight, RouteRule};
pub(super) use source::{BASIC, is_token};
pub(crate) use source::{BasicPart, CredentialSource};

/// Validated settings, created from [`SettingsParts`].
#[derive(Clone, Debug)]
pub struct Settings {
    parts: SettingsParts,
    /// The places of all routes, each once. The general ones come first.
    credentials: Vec<CredentialSource>,
    /// The general places.
    general: Places,
    /// The places of each rule, in their order.
    places: Vec<Places>,
    /// Whether denials of some keyring are not enforced.
    observes_some: bool,
    /// Whether a rule has places of its own, or enforces denials.
    always_needs_rule: bool,
    /// Headers that never pass from outside, in any spelling: the configured identity headers and
    /// those with the default names.
    reserved: Vec<HeaderName>,
    /// One bit for each length of the header names that [`Settings::is_spoofed`] compares.
    lengths: u128,
}

/// Settings as configuration gives them.
#[derive(Clone, Debug)]
pub struct SettingsParts {
    /// The general places where a credential may be, 1 to [`Settings::MAX_SOURCES`]: each check
    /// searches all of them, unless its rule has places of its own. Default:
    /// [`CredentialSource::defaults`].
    pub credentials: Vec<CredentialSource>,
    /// Rules for requests whose Envoy route does not set both a keyring and scopes, at most
    /// [`Settings::MAX_ROUTES`], in any order. Default: none.
    pub routes: Vec<RouteRule>,
    /// The keyring of requests whose Envoy route names no keyring and that no rule matches.
    /// Default: none.
    pub default_keyring: Option<KeyringName>,
    /// The enforcement of each keyring. Default: every keyring is enforced, and none is named.
    pub enforcements: Enforcements,
    /// The headers that name the caller to the upstream.
    pub identity: IdentityHeaders,
    /// The notices for a consumer that uses a retiring version; none to send no notice. Default:
    /// [`Notices::default`].
    pub notices: Option<Notices>,
    /// The rate at which each source may present credentials that the keyring does not hold.
    /// Default: 20 a second, 200 at once. That is more than a consumer with a wrong key sends by
    /// mistake, and a fifth of the default rate at which a sidecar looks up unknown keys.
    pub failed_credentials: Rate,
    /// Where the address of the client is found. Default: [`AddressSource::Peer`].
    pub client_address: AddressSource,
    /// The protocol of the proxy that asks. Default: [`Dialect::Envoy`].
    pub dialect: Dialect,
}

/// The headers that relatch adds for a consumer that uses a retiring version, beside
/// `API-Key-Rotation` and `Link`.
///
/// Both are off by default: they describe the resource, so that a client could conclude that the
/// API is deprecated, when only its key is rotated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notices {
    /// Whether to send `Deprecation` (RFC 9745) with the beginning of the overlap.
    pub(crate) deprecation: bool,
    /// Whether to send `Sunset` (RFC 8594) with the announced end of the version.
    pub(crate) sunset: bool,
}

/// The reason why settings are not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// The number of places is out of bounds.
    #[error("credentials: name 1 to {} places", Settings::MAX_SOURCES)]
    SourceCount,
    /// The general places and those of the rules are too many different ones.
    #[error(
        "credentials: name at most {} different places in all routes together",
        Settings::MAX_ALL_SOURCES
    )]
    AllSourcesCount,
    /// A place overlaps with an earlier one: both could yield the same credential, or the header of
    /// one is a spelling of the other.
    #[error("credentials: {0} is named twice")]
    RepeatedSource(String),
    /// A header cannot have the configured use: it has another meaning, a proxy cannot remove it,
    /// or it is a default identity header that is configured for a credential.
    #[error("the header {0:?} is reserved, use another one")]
    UnusableHeader(HeaderName),
    /// A proxy that asks over HTTP cannot take the credential out of a query or out of cookies.
    #[error(
        "credentials: a key in the {0} would reach the upstream, because {1} removes only whole headers from a request: name headers only"
    )]
    Unremovable(String, Dialect),
    /// An identity header, or a spelling of it, is also searched for a credential, or is a second
    /// identity header. It would be both set and removed, or set twice.
    #[error("the header {0:?}, or another spelling of it, is configured for two uses")]
    HeaderClash(HeaderName),
    /// The header with the address of the client is also searched for a credential, or names the
    /// caller.
    #[error("client_address: the header {0:?} is configured for another use, too")]
    AddressHeaderClash(String),
    /// There are more than [`Settings::MAX_ROUTES`] rules.
    #[error("routes: at most {} rules are possible", Settings::MAX_ROUTES)]
    RouteCount,
    /// Two rules match the same requests.
    #[error("routes: two rules match {0}")]
    RepeatedRoute(String),
}

/// A text that is not valid for a setting. The message describes the valid form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSettingError {
    /// Not a [`Token`].
    #[error("use 1 to 128 letters, digits and any of !#$%&'*+-.^_`|~")]
    Token,
    /// Not a [`QueryName`].
    #[error("use 1 to 128 letters, digits and any of - . _ ~")]
    QueryName,
    /// Not the name of a header.
    #[error("use a header name of letters, digits and '-', not a pseudo-header")]
    HeaderName,
    /// `Sec-WebSocket-Protocol`, as a header that holds nothing but a credential.
    #[error("use `websocket_protocol` for a key in this header")]
    WebSocketHeader,
    /// Not a [`BasicPart`].
    #[error("use username or password")]
    BasicPart,
    /// A header that frames or describes the message, that has a meaning of its own, or that a
    /// proxy cannot remove.
    #[error("this header has a fixed meaning in HTTP, use another one")]
    MessageHeader,
    /// A header that is reserved for the identity of the caller.
    #[error("this header is reserved for the identity of the caller, use another one")]
    IdentityHeader,
    /// `Forwarded` (RFC 7239), as the header with the address of the client.
    #[error(
        "relatch does not read `forwarded`, because proxies pass on what a client writes there: use x-forwarded-for, or a header that your proxy sets itself"
    )]
    Forwarded,
    /// A spelling of `X-Forwarded-For` that no proxy uses.
    #[error("use x-forwarded-for, or another header")]
    ForwardedForSpelling,
    /// `source.address`, as the header with the address of the client.
    #[error("source.address is the default: remove `client_address`")]
    SourceAddress,
    /// Not a [`HostPattern`].
    #[error("use a host name without a port, or \"*.domain\" for every host below a domain")]
    Host,
    /// Not a [`PathPrefix`].
    #[error(
        "use a path that begins with '/', in ASCII, without '%', ';', '?', '#', '\\', '//' and dot segments"
    )]
    Path,
    /// Not an [`Auth`].
    #[error("use required or optional")]
    Auth,
    /// Not a [`Preflight`].
    #[error("use allow or deny")]
    Preflight,
    /// Not a [`Dialect`] over HTTP.
    #[error("use traefik, caddy or nginx; Envoy asks over gRPC, at `listen`")]
    Dialect,
}

impl Settings {
    /// The maximum number of places of credentials in one list. Even four places are many.
    pub(crate) const MAX_SOURCES: usize = 16;
    /// The maximum number of different places in all lists. A word of 32 bits marks them.
    pub(crate) const MAX_ALL_SOURCES: usize = 32;
    /// The maximum number of rules: a check compares them one by one.
    pub(crate) const MAX_ROUTES: usize = 256;

    /// Checks the parts against each other.
    ///
    /// # Errors
    ///
    /// When they contradict each other, a header cannot be used, or the number of places or rules
    /// is out of bounds.
    pub fn new(mut parts: SettingsParts) -> Result<Self, SettingsError> {
        parts.routes.sort_by_key(RouteRule::rank);
        let lists = std::iter::once(&parts.credentials).chain(
            parts
                .routes
                .iter()
                .filter_map(|rule| rule.credentials.as_ref()),
        );
        for list in lists.clone() {
            check_sources(list)?;
        }
        check_removable(&parts.credentials, parts.dialect)?;
        let mut credentials: Vec<CredentialSource> = Vec::new();
        for source in lists.flatten() {
            if !credentials.contains(source) {
                credentials.push(source.clone());
            }
        }
        if credentials.len() > Self::MAX_ALL_SOURCES {
            return Err(SettingsError::AllSourcesCount);
        }
        check_identity(&parts.identity, &credentials)?;
        check_address(&parts, &credentials)?;
        check_routes(&parts.routes)?;
        let general = Places::first(parts.credentials.len());
        let places = parts.routes.iter().map(|rule| {
            let own = rule.credentials.as_ref();
            own.map_or(general, |own| Places::of(own, &credentials))
        });
        let places: Vec<Places> = places.collect();
        let mut rules = parts.routes.iter().zip(&places);
        let always_needs_rule = rules.any(|(rule, places)| {
            *places != general || rule.enforcement == Some(Enforcement::Enforced)
        });
        let reserved = reserve(&parts.identity);
        let lengths = credentials
            .iter()
            .filter_map(CredentialSource::header)
            .chain(&reserved)
            .fold(0, |lengths, name| lengths | length_bit(name.as_str().len()));
        Ok(Self {
            credentials,
            general,
            places,
            observes_some: parts.enforcements.observe_some(),
            always_needs_rule,
            parts,
            reserved,
            lengths,
        })
    }

    /// Returns the defaults, with `keyring` for every request whose Envoy route does not name one.
    #[must_use]
    pub(crate) fn of_keyring(keyring: KeyringName) -> Self {
        let mut settings = Self::default();
        settings.parts.default_keyring = Some(keyring);
        settings
    }

    /// Returns the places where a credential may be, of all routes.
    #[must_use]
    pub(crate) fn credentials(&self) -> &[CredentialSource] {
        &self.credentials
    }

    /// Returns the places for requests whose rule has none of its own.
    #[must_use]
    pub(super) const fn general_places(&self) -> Places {
        self.general
    }

    /// Returns the places for requests that the rule at this position matches.
    #[must_use]
    pub(super) fn places_of(&self, rule: usize) -> Places {
        self.places[rule]
    }

    /// Returns whether a rule matters even where an Envoy route has set keyring and scopes: it has
    /// places of its own, or enforces denials.
    #[must_use]
    pub(super) fn always_needs_rule(&self) -> bool {
        self.always_needs_rule
    }

    /// Returns whether the configuration names this keyring.
    #[must_use]
    pub(super) fn names(&self, keyring: &str) -> bool {
        self.parts.enforcements.names(keyring)
    }

    /// Returns whether denials of a keyring are enforced.
    #[must_use]
    pub(crate) fn enforcement_of(&self, keyring: &str) -> Enforcement {
        if self.observes_some {
            self.parts.enforcements.of(keyring)
        } else {
            Enforcement::Enforced
        }
    }

    /// Returns the patterns that find keyrings, and whether the denials of what they find are
    /// enforced.
    #[must_use]
    pub(crate) fn pattern_enforcements(&self) -> &[(KeyringPattern, Enforcement)] {
        &self.parts.enforcements.patterns
    }

    /// Returns whether denials are enforced where a rule applies.
    #[must_use]
    pub(crate) fn enforcement_by(&self, rule: &RouteRule) -> Enforcement {
        let of_keyring = || self.enforcement_of(rule.keyring.as_str());
        rule.enforcement.unwrap_or_else(of_keyring)
    }

    /// Returns whether all denials of a keyring are enforced, as far as the configuration decides it.
    #[must_use]
    pub(crate) fn enforces(&self, keyring: &KeyringName) -> bool {
        let mut rules = self.routes().iter();
        !self.enforcement_of(keyring.as_str()).is_observed()
            && rules
                .all(|rule| rule.keyring != *keyring || !self.enforcement_by(rule).is_observed())
    }

    /// Returns whether no denial of any keyring or rule is enforced, and no credential is removed.
    #[must_use]
    pub(super) fn leaves_everything(&self) -> bool {
        let leaves = |enforcement: Enforcement| !enforcement.removes_credential();
        self.parts.enforcements.are_all(leaves)
            && self
                .routes()
                .iter()
                .all(|rule| leaves(self.enforcement_by(rule)))
    }

    /// Returns the rules, most specific first: the first rule that matches applies.
    #[must_use]
    pub(crate) fn routes(&self) -> &[RouteRule] {
        &self.parts.routes
    }

    /// Returns the keyring of requests that no rule matches.
    #[must_use]
    pub(crate) const fn default_keyring(&self) -> Option<&KeyringName> {
        self.parts.default_keyring.as_ref()
    }

    /// Returns the headers that name the caller to the upstream.
    #[must_use]
    pub(crate) const fn identity(&self) -> &IdentityHeaders {
        &self.parts.identity
    }

    /// Returns the notices for a consumer that uses a retiring version; none to send no notice.
    #[must_use]
    pub(crate) const fn notices(&self) -> Option<Notices> {
        self.parts.notices
    }

    /// Returns the rate at which each source may present credentials that the keyring does not
    /// have.
    #[must_use]
    pub(crate) const fn failed_credentials(&self) -> Rate {
        self.parts.failed_credentials
    }

    /// Returns where the address of the client is found.
    #[must_use]
    pub(crate) const fn client_address(&self) -> &AddressSource {
        &self.parts.client_address
    }

    /// Returns the protocol of the proxy that asks.
    #[must_use]
    pub(crate) const fn dialect(&self) -> Dialect {
        self.parts.dialect
    }

    /// Returns the headers that a proxy that asks over HTTP has to take from an allow, and to remove
    /// where the allow lacks them.
    pub(crate) fn listed_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let reserved = self.reserved(self.general_places());
        reserved.chain(self.shared_headers())
    }

    /// Returns the headers that hold a credential behind a scheme, and other values too: they are
    /// removed only if they held the credential.
    pub(crate) fn shared_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let credentials = self.credentials().iter().enumerate();
        let named = credentials.filter_map(|(at, source)| Some((at, source.shared_header()?)));
        named.filter_map(|(at, name)| {
            let mut others = self.credentials()[..at].iter();
            let is_first = !others.any(|other| other.shared_header() == Some(name));
            is_first.then_some(name)
        })
    }

    /// Returns the headers that may hold a credential, each once.
    pub(crate) fn credential_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let credentials = self.credentials().iter();
        let pure = credentials.filter_map(CredentialSource::pure_header);
        pure.chain(self.shared_headers())
    }

    /// Returns whether the proxy can remove a header with this name. A proxy that asks over HTTP
    /// removes only the headers that its own configuration lists.
    #[must_use]
    pub(crate) fn can_remove(&self, name: &[u8]) -> bool {
        let is = |header: &HeaderName| name.eq_ignore_ascii_case(header.as_ref());
        match self.dialect() {
            Dialect::Envoy => true,
            Dialect::Traefik | Dialect::Caddy | Dialect::Nginx => self.listed_headers().any(is),
        }
    }

    /// Returns the headers of which no value of a client reaches the upstream: the identity headers,
    /// and those in `places` that hold nothing but a credential.
    pub(super) fn reserved(&self, places: Places) -> impl Iterator<Item = &HeaderName> {
        let credentials = places.sources(self);
        self.reserved
            .iter()
            .chain(credentials.filter_map(|(_, source)| source.pure_header()))
    }

    /// Returns whether a header with this name never passes from outside: a spelling of a reserved
    /// header, or another spelling of a header in `places`.
    #[must_use]
    pub(super) fn is_spoofed(&self, name: &[u8], places: Places) -> bool {
        // Most headers of a request differ in length from all names that are compared.
        if self.lengths & length_bit(name.len()) == 0 {
            return false;
        }
        self.reserved.iter().any(|header| folds_to(name, header))
            || places.sources(self).any(|(_, source)| {
                source.header().is_some_and(|header| {
                    folds_to(name, header)
                        && (source.pure_header().is_some()
                            || !name.eq_ignore_ascii_case(header.as_ref()))
                })
            })
    }
}

/// The bit of a length in `Settings::lengths`. Lengths of 127 and more share the last bit.
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
            enforcements: Enforcements::default(),
            identity: IdentityHeaders::default(),
            notices: Some(Notices::default()),
            failed_credentials: Rate {
                per_second: 20,
                burst: 200,
            },
            client_address: AddressSource::default(),
            dialect: Dialect::default(),
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

/// Refuses places from which the proxy cannot remove a credential.
fn check_removable(sources: &[CredentialSource], dialect: Dialect) -> Result<(), SettingsError> {
    match dialect {
        Dialect::Envoy => Ok(()),
        Dialect::Traefik | Dialect::Caddy | Dialect::Nginx => {
            match sources.iter().find(|source| !source.is_header()) {
                Some(source) => Err(SettingsError::Unremovable(source.to_string(), dialect)),
                None => Ok(()),
            }
        }
    }
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

/// Refuses a header that has another use. A client could choose both values.
fn check_address(
    parts: &SettingsParts,
    credentials: &[CredentialSource],
) -> Result<(), SettingsError> {
    let Some(name) = parts.client_address.header() else {
        return Ok(());
    };
    let mut credentials = credentials.iter().filter_map(CredentialSource::header);
    let is_credential = credentials.any(|header| folds_to(name.as_bytes(), header));
    let mut identity = parts.identity.names();
    if is_credential || identity.any(|header| folds_to(name.as_bytes(), header)) {
        return Err(SettingsError::AddressHeaderClash(name.to_owned()));
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

/// Returns the configured identity headers and the default ones, so that no header can be spoofed
/// after one is renamed or switched off.
fn reserve(identity: &IdentityHeaders) -> Vec<HeaderName> {
    let defaults = IdentityHeaders::default();
    let mut reserved: Vec<HeaderName> = Vec::new();
    for header in identity.names().chain(defaults.names()) {
        if !reserved.contains(header) {
            reserved.push(header.clone());
        }
    }
    reserved
}

#[cfg(test)]
mod tests;
