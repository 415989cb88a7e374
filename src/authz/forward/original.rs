//! The original request, which a proxy describes in headers of its own request.

use bytes::BytesMut;
use http::{HeaderMap, HeaderValue};

use super::super::{
    client_address::FORWARDED_FOR,
    request::RequestError,
    settings::{Dialect, is_token},
    writer::Writer,
};

/// The request that the proxy asks about. It is never printed: the target may hold a credential.
pub(super) struct Original<'a> {
    method: &'a [u8],
    target: &'a [u8],
    host: &'a [u8],
    /// The address of the peer of the proxy, as text.
    source: &'a [u8],
}

/// The headers of one dialect. The proxy sets each of them itself.
struct Family {
    method: &'static str,
    target: &'static str,
    host: &'static str,
    /// The header whose last element is the address of the peer of the proxy.
    source: &'static str,
    /// Another header that the proxy always sets.
    also: Option<&'static str>,
}

/// The headers of Traefik and Caddy, which both remove or replace those of a client that is no
/// trusted proxy.
const FORWARDED: Family = Family {
    method: "x-forwarded-method",
    target: "x-forwarded-uri",
    host: "x-forwarded-host",
    source: FORWARDED_FOR,
    also: Some("x-forwarded-proto"),
};

/// The headers that the configuration of nginx has to set.
const ORIGINAL: Family = Family {
    method: "x-original-method",
    target: "x-original-uri",
    host: "host",
    source: "x-original-address",
    also: None,
};

/// The fields of `AttributeContext`.
mod attributes_field {
    pub(super) const SOURCE: u32 = 1;
    pub(super) const REQUEST: u32 = 4;
    pub(super) const CONTEXT_EXTENSIONS: u32 = 10;
}

/// The fields of `AttributeContext.HttpRequest`.
mod http_field {
    pub(super) const METHOD: u32 = 2;
    pub(super) const PATH: u32 = 4;
    pub(super) const HOST: u32 = 5;
    pub(super) const HEADER_MAP: u32 = 13;
}

impl<'a> Original<'a> {
    /// Reads the headers of `dialect`; those of other dialects have no effect.
    ///
    /// # Errors
    ///
    /// When one of them does not occur exactly once, or has an impossible value.
    pub(super) fn read(dialect: Dialect, headers: &'a HeaderMap) -> Result<Self, RequestError> {
        let family = match dialect {
            Dialect::Traefik | Dialect::Caddy => FORWARDED,
            Dialect::Nginx | Dialect::Envoy => ORIGINAL,
        };
        if let Some(name) = family.also {
            only(headers, name)?;
        }
        let method = only(headers, family.method)?;
        if !is_token(method) {
            return Err(RequestError::Original(family.method));
        }
        let source = only(headers, family.source)?;
        let last = source.rsplit(|byte| *byte == b',').next();
        Ok(Self {
            method,
            target: only(headers, family.target)?,
            host: only(headers, family.host)?,
            source: last.unwrap_or_default().trim_ascii(),
        })
    }

    /// Appends the serialized `CheckRequest` that Envoy would send with raw headers, on a route with
    /// the context extensions of `keyring` and `scopes`.
    pub(super) fn write(
        &self,
        keyring: &str,
        scopes: &str,
        headers: &HeaderMap,
        message: &mut BytesMut,
    ) {
        Writer::new(message).message(1, |attributes| {
            attributes.message(attributes_field::SOURCE, |peer| {
                peer.message(1, |address| {
                    address.message(1, |socket| socket.bytes(2, self.source));
                });
            });
            attributes.message(attributes_field::REQUEST, |request| {
                request.message(2, |http| self.write_http(headers, http));
            });
            for (name, value) in [("relatch.keyring", keyring), ("relatch.scopes", scopes)] {
                attributes.message(attributes_field::CONTEXT_EXTENSIONS, |entry| {
                    entry.text(1, name);
                    entry.text(2, value);
                });
            }
        });
    }

    fn write_http(&self, headers: &HeaderMap, http: &mut Writer<'_>) {
        http.bytes(http_field::METHOD, self.method);
        http.bytes(http_field::PATH, self.target);
        http.bytes(http_field::HOST, self.host);
        http.message(http_field::HEADER_MAP, |map| {
            for (name, value) in headers {
                map.message(1, |header| {
                    header.text(1, name.as_str());
                    header.bytes(3, value.as_bytes());
                });
            }
        });
    }
}

/// Returns the value of a header that occurs exactly once and is not empty.
fn only<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<&'a [u8], RequestError> {
    let mut values = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    match (values.next(), values.next()) {
        (Some(value), None) if !value.is_empty() => Ok(value),
        (Some(_) | None, _) => Err(RequestError::Original(name)),
    }
}
