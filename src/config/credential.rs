//! Where a request carries its credential, and the headers that tell the upstream who was let in.

use std::fmt;

use ::http::HeaderName;
use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::{
    reader::{Findings, Text},
    value::ParseValueError,
};

/// A place that is searched for a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialPlace {
    /// A header: its whole value, or what stands behind a scheme.
    Header {
        /// The header; never `host`, `cookie` or one that frames the message.
        name: HeaderName,
        /// The authentication scheme (RFC 9110 section 11.1) before the credential, compared without regard to case.
        scheme: Option<String>,
    },
    /// A parameter of the query.
    Query {
        /// Its name, compared as it is: 1 to 128 of `A-Z`, `a-z`, `0-9` and `- . _ ~`.
        name: String,
    },
    /// A cookie.
    Cookie {
        /// Its name, a token of RFC 6265 of 1 to 128 characters, compared as it is.
        name: String,
    },
}

/// The headers by which the upstream learns who was let in; none: that fact is not sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityHeaders {
    /// Default: `x-relatch-consumer`.
    pub consumer: Option<HeaderName>,
    /// Default: `x-relatch-key-id`.
    pub key_id: Option<HeaderName>,
    /// Default: `x-relatch-key-version`.
    pub key_version: Option<HeaderName>,
    /// Default: `x-relatch-scopes`, separated by spaces.
    pub scopes: Option<HeaderName>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCredential {
    header: Option<Text>,
    scheme: Option<Text>,
    query: Option<Text>,
    cookie: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIdentityHeaders {
    consumer: Option<Text>,
    key_id: Option<Text>,
    key_version: Option<Text>,
    scopes: Option<Text>,
}

/// A place of a credential, with the place in the file where it was named; none for a default.
#[derive(Debug)]
pub(super) struct Placed {
    place: CredentialPlace,
    at: Option<Location>,
}

/// The most places: each is looked at on every Check.
const MAX_PLACES: usize = 16;

/// The longest name of a query parameter or cookie: longer ones are a mistake, not a name.
const MAX_NAME: usize = 128;

/// Headers that are not a credential's to take away or an identity's to set: Envoy protects the first (see
/// `mutation_rules` in its `HeaderMutationRules`), the others frame or route the message.
const RESERVED: [&str; 10] = [
    "host",
    "cookie",
    "set-cookie",
    "connection",
    "content-length",
    "content-type",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The header's name as a framework may fold it: `_` and `.` count as `-`.
#[must_use]
pub fn folded(name: &str) -> String {
    name.to_ascii_lowercase().replace(['_', '.'], "-")
}

impl CredentialPlace {
    /// The places that are searched where the file names none: `x-api-key`, and `authorization` with `Bearer`.
    #[must_use]
    pub fn defaults() -> Vec<Self> {
        vec![
            Self::Header {
                name: HeaderName::from_static("x-api-key"),
                scheme: None,
            },
            Self::Header {
                name: ::http::header::AUTHORIZATION,
                scheme: Some("Bearer".to_owned()),
            },
        ]
    }

    /// Whether one credential could be found in both.
    fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Header { name, scheme },
                Self::Header {
                    name: other,
                    scheme: other_scheme,
                },
            ) => {
                folded(name.as_str()) == folded(other.as_str())
                    && match (scheme, other_scheme) {
                        (Some(one), Some(two)) => one.eq_ignore_ascii_case(two) || name != other,
                        (None, _) | (_, None) => true,
                    }
            }
            (Self::Query { name }, Self::Query { name: other })
            | (Self::Cookie { name }, Self::Cookie { name: other }) => name == other,
            (Self::Header { .. } | Self::Query { .. } | Self::Cookie { .. }, _) => false,
        }
    }

    fn from_raw(at: usize, raw: &Spanned<RawCredential>, found: &mut Findings) -> Option<Self> {
        let field = |name: &str| format!("credentials[{at}].{name}");
        let RawCredential {
            header,
            scheme,
            query,
            cookie,
        } = &raw.value;
        match (header, query, cookie) {
            (Some(header), None, None) => {
                let name = found.parse(field("header"), Some(header), header_name);
                let scheme = match scheme {
                    Some(scheme) => Some(found.parse(field("scheme"), Some(scheme), token)?),
                    None => None,
                };
                return name.map(|name| Self::Header { name, scheme });
            }
            (None, Some(_), None) | (None, None, Some(_)) => {}
            _ => {
                found.note(
                    raw.referenced,
                    format_args!("credentials[{at}]"),
                    "use exactly one of header, query and cookie",
                );
                return None;
            }
        }
        if let Some(scheme) = scheme {
            found.note(
                scheme.referenced,
                field("scheme"),
                "belongs to a header only, remove it",
            );
        }
        let query = found
            .parse(field("query"), query.as_ref(), query_name)
            .map(|name| Self::Query { name });
        let cookie = found
            .parse(field("cookie"), cookie.as_ref(), token)
            .map(|name| Self::Cookie { name });
        query.or(cookie)
    }
}

impl fmt::Display for CredentialPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header { name, scheme: None } => write!(f, "header {name}"),
            Self::Header {
                name,
                scheme: Some(scheme),
            } => write!(f, "header {name} with scheme {scheme}"),
            Self::Query { name } => write!(f, "query parameter {name}"),
            Self::Cookie { name } => write!(f, "cookie {name}"),
        }
    }
}

impl IdentityHeaders {
    /// The headers that are sent.
    pub fn names(&self) -> impl Iterator<Item = &HeaderName> {
        [
            &self.consumer,
            &self.key_id,
            &self.key_version,
            &self.scopes,
        ]
        .into_iter()
        .flatten()
    }

    /// The headers of the file. One that folds into a credential's or into another would be taken for it.
    pub(super) fn from_raw(
        raw: &RawIdentityHeaders,
        credentials: &[Placed],
        found: &mut Findings,
    ) -> Self {
        let default = Self::default();
        let mut taken: Vec<String> = Vec::new();
        let mut read = |name: &str, raw: Option<&Text>, default: Option<HeaderName>| {
            let field = format!("identity_headers.{name}");
            let header = match raw {
                Some(text) if text.value == "false" => None,
                Some(text) => found.parse(&field, Some(text), header_name),
                None => default,
            }?;
            let folded = folded(header.as_str());
            let credential = credentials.iter().find(|placed| placed.folds_into(&folded));
            // A default stands nowhere in the file, so that the collision is shown where the other one stands.
            let at = raw
                .map(|text| text.referenced)
                .or_else(|| credential.and_then(|placed| placed.at))
                .unwrap_or(Location::UNKNOWN);
            if credential.is_some() {
                found.note(
                    at,
                    &field,
                    format_args!("`{header}` is also searched for a credential, use another name"),
                );
            }
            if taken.contains(&folded) {
                found.note(
                    at,
                    &field,
                    format_args!("`{header}` is also another identity header, use another name"),
                );
            }
            taken.push(folded);
            Some(header)
        };
        Self {
            consumer: read("consumer", raw.consumer.as_ref(), default.consumer),
            key_id: read("key_id", raw.key_id.as_ref(), default.key_id),
            key_version: read("key_version", raw.key_version.as_ref(), default.key_version),
            scopes: read("scopes", raw.scopes.as_ref(), default.scopes),
        }
    }
}

impl Default for IdentityHeaders {
    fn default() -> Self {
        let header = |name| Some(HeaderName::from_static(name));
        Self {
            consumer: header("x-relatch-consumer"),
            key_id: header("x-relatch-key-id"),
            key_version: header("x-relatch-key-version"),
            scopes: header("x-relatch-scopes"),
        }
    }
}

impl Placed {
    /// The places of the file; the default ones where it has none.
    pub(super) fn from_raw(
        raw: Option<&Spanned<Vec<Spanned<RawCredential>>>>,
        found: &mut Findings,
    ) -> Vec<Self> {
        let Some(raw) = raw else {
            return CredentialPlace::defaults()
                .into_iter()
                .map(|place| Self { place, at: None })
                .collect();
        };
        found.bound("credentials", raw, MAX_PLACES);
        if raw.value.is_empty() {
            found.note(
                raw.referenced,
                "credentials",
                "is empty, name a place or leave the field out",
            );
        }
        let mut placed: Vec<Self> = Vec::new();
        for (at, raw) in raw.value.iter().enumerate().take(MAX_PLACES) {
            let Some(place) = CredentialPlace::from_raw(at, raw, found) else {
                continue;
            };
            if placed.iter().any(|other| other.place.overlaps(&place)) {
                found.note(
                    raw.referenced,
                    format_args!("credentials[{at}]"),
                    format_args!("{place} is already searched, remove one of the two"),
                );
            }
            placed.push(Self {
                place,
                at: Some(raw.referenced),
            });
        }
        placed
    }

    pub(super) fn into_place(self) -> CredentialPlace {
        self.place
    }

    fn folds_into(&self, header: &str) -> bool {
        match &self.place {
            CredentialPlace::Header { name, .. } => folded(name.as_str()) == header,
            CredentialPlace::Query { .. } | CredentialPlace::Cookie { .. } => false,
        }
    }
}

fn header_name(text: &str) -> Result<HeaderName, ParseValueError> {
    let name = HeaderName::try_from(text).map_err(|_| {
        ParseValueError::new("use the name of a header: letters, digits and '-', no pseudo-header")
    })?;
    if RESERVED.contains(&folded(name.as_str()).as_str()) {
        Err(ParseValueError::new(
            "this header belongs to the message itself, use another one",
        ))
    } else {
        Ok(name)
    }
}

/// A token (RFC 9110 section 5.6.2).
fn token(text: &str) -> Result<String, ParseValueError> {
    let valid = matches!(text.len(), 1..=MAX_NAME)
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte));
    if valid {
        Ok(text.to_owned())
    } else {
        Err(ParseValueError::new(
            "use 1 to 128 letters, digits and any of !#$%&'*+-.^_`|~",
        ))
    }
}

fn query_name(text: &str) -> Result<String, ParseValueError> {
    let valid = matches!(text.len(), 1..=MAX_NAME)
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte));
    if valid {
        Ok(text.to_owned())
    } else {
        Err(ParseValueError::new(
            "use 1 to 128 letters, digits and any of - . _ ~",
        ))
    }
}
