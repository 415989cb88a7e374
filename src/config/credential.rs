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
    basic: Option<Text>,
    websocket_protocol: Option<Text>,
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
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) source: CredentialSource,
    pub(super) at: Option<Location>,
}

impl Placed {
    /// The sources of the list `field`, or the default sources if there is none.
    pub(super) fn from_raw(
        raw: Option<&Spanned<Vec<Spanned<RawCredential>>>>,
        field: &str,
        found: &mut Findings,
    ) -> Vec<Self> {
        if let Some(raw) = raw {
            return Self::list(field, raw, found);
        }
        CredentialSource::defaults()
            .into_iter()
            .map(|source| Self { source, at: None })
            .collect()
    }

    /// The sources of the list `field`.
    pub(super) fn list(
        field: &str,
        raw: &Spanned<Vec<Spanned<RawCredential>>>,
        found: &mut Findings,
    ) -> Vec<Self> {
        found.bound(field, raw, Settings::MAX_SOURCES);
        if raw.value.is_empty() {
            found.note(
                raw.referenced,
                field,
                "is empty, add a place such as { header: x-api-key }, or remove the field",
            );
        }
        let mut placed: Vec<Self> = Vec::new();
        for (at, raw) in raw.value.iter().enumerate().take(Settings::MAX_SOURCES) {
            let field = format!("{field}[{at}]");
            let Some(source) = source(&field, raw, found) else {
                continue;
            };
            if placed.iter().any(|other| other.source.overlaps(&source)) {
                found.note(
                    raw.referenced,
                    field,
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

/// The source in `field`; none if it is wrong, which is then noted.
fn source(
    field: &str,
    raw: &Spanned<RawCredential>,
    found: &mut Findings,
) -> Option<CredentialSource> {
    let part = |name: &str| format!("{field}.{name}");
    let RawCredential {
        header,
        scheme,
        basic,
        websocket_protocol,
        query,
        cookie,
    } = &raw.value;
    let kinds = [header, basic, websocket_protocol, query, cookie];
    if kinds.into_iter().flatten().count() != 1 {
        found.note(
            raw.referenced,
            field,
            "use exactly one of header, basic, websocket_protocol, query and cookie",
        );
        return None;
    }
    if let (Some(scheme), None) = (scheme, header) {
        found.note(
            scheme.referenced,
            part("scheme"),
            "can be used only with `header`, remove it",
        );
    }
    if let Some(header) = header {
        let name = found.parse(part("header"), Some(header), parse_credential_header);
        let scheme = found.parse_or(part("scheme"), scheme.as_ref(), None, |text| {
            text.parse().map(Some)
        });
        return Some(CredentialSource::Header {
            name: name?,
            scheme: scheme?,
        });
    }
    let basic = found
        .parse(part("basic"), basic.as_ref(), str::parse)
        .map(|part| CredentialSource::Basic { part });
    let protocol = part("websocket_protocol");
    let protocol = found
        .parse(protocol, websocket_protocol.as_ref(), str::parse)
        .map(|prefix| CredentialSource::WebSocketProtocol { prefix });
    let query = found
        .parse(part("query"), query.as_ref(), str::parse)
        .map(|name| CredentialSource::Query { name });
    let cookie = found
        .parse(part("cookie"), cookie.as_ref(), str::parse)
        .map(|name| CredentialSource::Cookie { name });
    basic.or(protocol).or(query).or(cookie)
}
