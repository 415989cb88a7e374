//! The answer to a proxy that asks over HTTP, made of a serialized `CheckResponse`.
//!
//! Such a proxy takes every status of 2xx for an allow. This module writes 200 only for a response
//! with status 0 and an `OkHttpResponse`, both of which only `authz/response` writes. Every other
//! response is a denial, also one that cannot be read.

use bytes::Buf as _;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use prost::encoding::{WireType, decode_key, decode_varint};

use super::super::{
    reason::DenyReason,
    settings::{Dialect, Settings},
};

/// A `CheckResponse`, read in place.
#[derive(Default)]
struct Answer<'a> {
    has_status: bool,
    /// The code of the status: 0 allows.
    code: u64,
    reason: &'a str,
    ok: Option<&'a [u8]>,
    denied: Option<&'a [u8]>,
}

/// A response that cannot be passed on.
struct Unreadable;

/// The value of a field.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

/// The headers in which nginx learns the whole denial. It passes on the status of a denial only if
/// that is 401 or 403, and never the body.
mod nginx_header {
    use http::HeaderName;

    pub(super) const STATUS: HeaderName = HeaderName::from_static("x-relatch-status");
    pub(super) const REASON: HeaderName = HeaderName::from_static("x-relatch-reason");
    pub(super) const PROBLEM: HeaderName = HeaderName::from_static("x-relatch-problem");
}

/// Translates the answer to the check with `headers`.
pub(super) fn respond(settings: &Settings, headers: &HeaderMap, answer: &[u8]) -> Response<String> {
    let translated = Answer::read(answer).and_then(|answer| match (answer.ok, answer.denied) {
        (Some(ok), None) if answer.has_status && answer.code == 0 => allow(settings, headers, ok),
        (None, Some(denied)) if answer.code != 0 => deny(settings.dialect(), answer.reason, denied),
        (Some(_) | None, _) => Err(Unreadable),
    });
    translated.unwrap_or_else(|Unreadable| {
        tracing::error!(
            auth.dialect = settings.dialect().as_str(),
            "an answer cannot be translated, and is a denial"
        );
        refuse(settings.dialect())
    })
}

/// Returns an allow: the identity headers, the notices, and the headers that may hold a credential,
/// with their values unless they are removed. The proxy passes on those that it lists.
fn allow(
    settings: &Settings,
    headers: &HeaderMap,
    ok: &[u8],
) -> Result<Response<String>, Unreadable> {
    let mut response = Response::new(String::new());
    let mut removed: Vec<&[u8]> = Vec::new();
    for field in fields(ok) {
        match field? {
            (2 | 6, Field::Bytes(option)) => {
                let (name, value) = header(option)?;
                response.headers_mut().append(name, value);
            }
            (5, Field::Bytes(name)) => removed.push(name),
            _ => {}
        }
    }
    for name in settings.credential_headers() {
        let mut removed = removed.iter();
        if !removed.any(|other| *other == name.as_str().as_bytes()) {
            for value in headers.get_all(name) {
                response.headers_mut().append(name.clone(), value.clone());
            }
        }
    }
    Ok(response)
}

fn deny(dialect: Dialect, reason: &str, denied: &[u8]) -> Result<Response<String>, Unreadable> {
    let mut response = Response::new(String::new());
    let mut status = None;
    for field in fields(denied) {
        match field? {
            (1, Field::Bytes(http)) => {
                for field in fields(http) {
                    if let (1, Field::Number(code)) = field? {
                        status = u16::try_from(code).ok();
                    }
                }
            }
            (2, Field::Bytes(option)) => {
                let (name, value) = header(option)?;
                response.headers_mut().append(name, value);
            }
            (3, Field::Bytes(body)) => text(body)?.clone_into(response.body_mut()),
            _ => {}
        }
    }
    let status = status.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.filter(|status| status.is_client_error() || status.is_server_error());
    *response.status_mut() = status.ok_or(Unreadable)?;
    match dialect {
        Dialect::Envoy | Dialect::Traefik | Dialect::Caddy => Ok(response),
        Dialect::Nginx => for_nginx(response, reason),
    }
}

/// Returns a denial that nginx passes on, with the whole of it in headers.
fn for_nginx(denial: Response<String>, reason: &str) -> Result<Response<String>, Unreadable> {
    let (head, body) = denial.into_parts();
    let mut response = Response::new(String::new());
    *response.status_mut() = match head.status {
        StatusCode::UNAUTHORIZED => StatusCode::UNAUTHORIZED,
        _ => StatusCode::FORBIDDEN,
    };
    let headers = response.headers_mut();
    *headers = head.headers;
    headers.insert(nginx_header::STATUS, head.status.as_u16().into());
    let reason = HeaderValue::from_str(reason).map_err(|_| Unreadable)?;
    headers.insert(nginx_header::REASON, reason);
    let problem = HeaderValue::from_maybe_shared(bytes::Bytes::from(body));
    headers.insert(nginx_header::PROBLEM, problem.map_err(|_| Unreadable)?);
    Ok(response)
}

/// Returns the denial for an answer that cannot be translated.
fn refuse(dialect: Dialect) -> Response<String> {
    let mut response = Response::new(String::new());
    *response.status_mut() = match dialect {
        Dialect::Envoy | Dialect::Traefik | Dialect::Caddy => StatusCode::SERVICE_UNAVAILABLE,
        Dialect::Nginx => StatusCode::FORBIDDEN,
    };
    let reason = HeaderValue::from_static(DenyReason::InternalError.as_str());
    response.headers_mut().insert(nginx_header::REASON, reason);
    response
}

impl<'a> Answer<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, Unreadable> {
        let mut answer = Self::default();
        for field in fields(bytes) {
            match field? {
                (1, Field::Bytes(status)) => {
                    answer.has_status = true;
                    for field in fields(status) {
                        match field? {
                            (1, Field::Number(code)) => answer.code = code,
                            (2, Field::Bytes(reason)) => answer.reason = text(reason)?,
                            _ => {}
                        }
                    }
                }
                (2, Field::Bytes(denied)) => answer.denied = Some(denied),
                (3, Field::Bytes(ok)) => answer.ok = Some(ok),
                _ => {}
            }
        }
        Ok(answer)
    }
}

/// Reads a `HeaderValueOption`.
fn header(option: &[u8]) -> Result<(HeaderName, HeaderValue), Unreadable> {
    let (mut name, mut value) = (None, None);
    for field in fields(option) {
        if let (1, Field::Bytes(header)) = field? {
            for field in fields(header) {
                match field? {
                    (1, Field::Bytes(bytes)) => name = HeaderName::from_bytes(bytes).ok(),
                    (2, Field::Bytes(bytes)) => value = HeaderValue::from_bytes(bytes).ok(),
                    _ => {}
                }
            }
        }
    }
    name.zip(value).ok_or(Unreadable)
}

/// Returns the numbers and values of the fields of a message.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = Result<(u32, Field<'_>), Unreadable>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let field = field(&mut rest);
        if field.is_err() {
            rest = &[];
        }
        Some(field)
    })
}

fn field<'a>(rest: &mut &'a [u8]) -> Result<(u32, Field<'a>), Unreadable> {
    let (number, kind) = decode_key(rest).map_err(|_| Unreadable)?;
    let value = match kind {
        WireType::Varint => Field::Number(decode_varint(rest).map_err(|_| Unreadable)?),
        WireType::LengthDelimited => {
            let len = decode_varint(rest).map_err(|_| Unreadable)?;
            let len = usize::try_from(len).map_err(|_| Unreadable)?;
            let (bytes, after) = rest.split_at_checked(len).ok_or(Unreadable)?;
            *rest = after;
            Field::Bytes(bytes)
        }
        WireType::SixtyFourBit => {
            rest.try_get_u64_le().map_err(|_| Unreadable)?;
            Field::Other
        }
        WireType::ThirtyTwoBit | WireType::StartGroup | WireType::EndGroup => {
            return Err(Unreadable);
        }
    };
    Ok((number, value))
}

fn text(bytes: &[u8]) -> Result<&str, Unreadable> {
    str::from_utf8(bytes).map_err(|_| Unreadable)
}
