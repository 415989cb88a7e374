//! The places of credentials, and the identity headers for the upstream, in the configuration file of a sidecar.

use ::http::HeaderName;
use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::reader::{Findings, Text};
use crate::authz::{
    CredentialSource, IdentityHeaders, Settings,
    settings::{folds_to, parse_credential_header, parse_identity_header},
};

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

/// A source of credentials, with its place in the file; a default has none.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) source: CredentialSource,
    at: Option<Location>,
}

impl Placed {
    /// The sources of the file, or the default sources if it has none.
    pub(super) fn from_raw(
        raw: Option<&Spanned<Vec<Spanned<RawCredential>>>>,
        found: &mut Findings,
    ) -> Vec<Self> {
        let Some(raw) = raw else {
            return CredentialSource::defaults()
                .into_iter()
                .map(|source| Self { source, at: None })
                .collect();
        };
        found.bound("credentials", raw, Settings::MAX_SOURCES);
        if raw.value.is_empty() {
            found.note(
                raw.referenced,
                "credentials",
                "is empty, add a header, query or cookie, or remove the field",
            );
        }
        let mut placed: Vec<Self> = Vec::new();
        for (at, raw) in raw.value.iter().enumerate().take(Settings::MAX_SOURCES) {
            let Some(source) = source(at, raw, found) else {
                continue;
            };
            if placed.iter().any(|other| other.source.overlaps(&source)) {
                found.note(
                    raw.referenced,
                    format_args!("credentials[{at}]"),
                    format_args!("{source} is already in the list, remove one of the two"),
                );
            }
            placed.push(Self {
                source,
                at: Some(raw.referenced),
            });
        }
        placed
    }
}

impl RawIdentityHeaders {
    /// The headers of the file. A header that folds into the header of a credential, or into another identity header, is
    /// refused: the upstream could mistake one for the other.
    pub(super) fn into_headers(
        self,
        credentials: &[Placed],
        found: &mut Findings,
    ) -> IdentityHeaders {
        let default = IdentityHeaders::default();
        let mut taken: Vec<HeaderName> = Vec::new();
        let mut read = |name: &str, raw: Option<Text>, default: Option<HeaderName>| {
            let field = format!("identity_headers.{name}");
            let header = match &raw {
                Some(text) if text.value == "false" => None,
                Some(text) => found.parse(&field, Some(text), parse_identity_header),
                None => default,
            }?;
            let credential = credentials
                .iter()
                .find(|placed| placed.source.folds_to(&header));
            // A default has no place in the file: the collision is reported at the place of the other header.
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
            if taken.iter().any(|other| folds_to(other.as_ref(), &header)) {
                found.note(
                    at,
                    &field,
                    format_args!("`{header}` is also another identity header, use another name"),
                );
            }
            taken.push(header.clone());
            Some(header)
        };
        IdentityHeaders {
            consumer: read("consumer", self.consumer, default.consumer),
            key_id: read("key_id", self.key_id, default.key_id),
            key_version: read("key_version", self.key_version, default.key_version),
            scopes: read("scopes", self.scopes, default.scopes),
        }
    }
}

/// The source at index `at`; none if it is wrong, which is then noted.
fn source(
    at: usize,
    raw: &Spanned<RawCredential>,
    found: &mut Findings,
) -> Option<CredentialSource> {
    let field = |name: &str| format!("credentials[{at}].{name}");
    let RawCredential {
        header,
        scheme,
        query,
        cookie,
    } = &raw.value;
    if let (Some(scheme), None) = (scheme, header)
        && query.is_some() != cookie.is_some()
    {
        found.note(
            scheme.referenced,
            field("scheme"),
            "can be used only with `header`, remove it",
        );
    }
    match (header, query, cookie) {
        (Some(header), None, None) => {
            let name = found.parse(field("header"), Some(header), parse_credential_header);
            let scheme = found.parse_or(field("scheme"), scheme.as_ref(), None, |text| {
                text.parse().map(Some)
            });
            Some(CredentialSource::Header {
                name: name?,
                scheme: scheme?,
            })
        }
        (None, Some(query), None) => found
            .parse(field("query"), Some(query), str::parse)
            .map(|name| CredentialSource::Query { name }),
        (None, None, Some(cookie)) => found
            .parse(field("cookie"), Some(cookie), str::parse)
            .map(|name| CredentialSource::Cookie { name }),
        (None, None, None)
        | (Some(_), Some(_), _)
        | (_, Some(_), Some(_))
        | (Some(_), _, Some(_)) => {
            found.note(
                raw.referenced,
                format_args!("credentials[{at}]"),
                "use exactly one of header, query and cookie",
            );
            None
        }
    }
}
