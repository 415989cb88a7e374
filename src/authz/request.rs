//! The request of a check: the same for both encodings of headers, and within bounds.

use std::{fmt, net::IpAddr};

pub(crate) use super::message::NotAMessage;
use super::message::{MAX_PAIRS, Message};

/// A request that is to be judged, borrowed from the message. It is never printed: it contains the
/// credential.
#[derive(Clone)]
pub struct CheckInput<'a> {
    message: Message<'a>,
    source: Option<IpAddr>,
}

/// The protocol of a call of gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GrpcProtocol {
    /// `application/grpc` (gRPC's PROTOCOL-HTTP2). Envoy's filter `grpc_web` translates calls of
    /// gRPC-Web to it before a check.
    Native,
    /// `application/grpc-web` or `application/grpc-web-text` (gRPC's PROTOCOL-WEB), which Envoy does
    /// not translate.
    Web,
}

/// One header as Envoy sent it.
#[derive(Clone, Copy)]
pub struct Header<'a> {
    /// The name. Envoy sends it in lower case.
    pub name: &'a [u8],
    /// The value; if [`CheckInput::joins_duplicates`], joined with the values of its duplicates.
    pub value: &'a [u8],
}

/// The reason why a message is not a valid request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The bytes are not an encoded `CheckRequest`.
    #[error(transparent)]
    NotAMessage(#[from] NotAMessage),
    /// The message has no attributes of an HTTP request.
    #[error("the check has no HTTP attributes")]
    NoHttpAttributes,
    /// The message has both `headers` and `header_map`, and the two may differ.
    #[error("the check has its headers in both encodings")]
    BothEncodings,
    /// A header of `header_map` has a value and a raw value that differ.
    #[error("a header of the check has a value and a raw value that differ")]
    TwoValues,
    /// The message has more than 512 headers or 64 context extensions.
    #[error("the check has too many headers or context extensions")]
    TooMany,
    /// The headers have more than 192 KiB, or the path has more than 64 KiB.
    #[error("the headers or the path of the check are too long")]
    TooLong,
    /// The fields that a decision needs have more than 256 KiB.
    #[error("what a decision needs of the check has more than 256 KiB")]
    TooLarge,
    /// A header in which a proxy passes a part of the original request is not there exactly once,
    /// or has an impossible value.
    #[error("the proxy does not send {0} exactly once, or its value is impossible")]
    Original(&'static str),
    /// A header occurs twice, of which the proxy can pass only one value on.
    #[error("a header that may hold a key occurs twice")]
    RepeatedHeader,
    /// The path has a character that no request target can have.
    #[error("the path of the check holds a control character, a space or a '#'")]
    ImpossiblePath,
}

impl RequestError {
    /// Returns whether the request is only too large.
    #[must_use]
    pub(crate) const fn is_size(self) -> bool {
        matches!(self, Self::TooMany | Self::TooLong | Self::TooLarge)
    }
}

impl<'a> CheckInput<'a> {
    /// The maximum number of headers. Envoy's own limit is 100 by default.
    pub(crate) const MAX_HEADERS: usize = 512;
    /// The maximum size of all names and values of headers, in bytes. Envoy's own limit is 60 KiB
    /// by default.
    pub(crate) const MAX_HEADER_BYTES: usize = 192 * 1024;
    /// The maximum length of the path, in bytes. Envoy counts the path among the headers.
    pub(crate) const MAX_PATH_LEN: usize = 64 * 1024;
    /// The maximum number of context extensions. An operator writes them on a route, and relatch
    /// uses three.
    pub(crate) const MAX_EXTENSIONS: usize = 64;

    /// Reads a serialized `CheckRequest`.
    ///
    /// # Errors
    ///
    /// When the message is not a `CheckRequest` of an HTTP request, when it can be read in two
    /// ways, when its path is impossible, or when it is out of bounds.
    pub fn read(message: &'a [u8]) -> Result<Self, RequestError> {
        let message = Message::read(message)?;
        if !message.has_http {
            return Err(RequestError::NoHttpAttributes);
        }
        let source = str::from_utf8(message.source).ok();
        let input = Self {
            source: source.and_then(|source| source.parse().ok()),
            message,
        };
        input.check_shape()?;
        input.check_bounds()?;
        Ok(input)
    }

    /// Returns the headers, with the pseudo-headers.
    #[must_use]
    pub fn headers(&self) -> impl DoubleEndedIterator<Item = Header<'a>> {
        let headers = self.message.headers();
        headers.map(|(name, value)| Header { name, value })
    }

    /// Returns the values of a header, whose name is compared without case.
    pub(crate) fn values(&self, name: &str) -> impl DoubleEndedIterator<Item = &'a [u8]> {
        self.headers()
            .filter(move |header| header.is(name))
            .map(|header| header.value)
    }

    /// Returns the protocol of a request of gRPC.
    #[must_use]
    pub(super) fn grpc(&self) -> Option<GrpcProtocol> {
        GrpcProtocol::of(&self.message)
    }

    /// Returns the protocol of a request of gRPC, from a serialized `CheckRequest` that may be out of
    /// bounds.
    #[must_use]
    pub(super) fn grpc_of(message: &[u8]) -> Option<GrpcProtocol> {
        GrpcProtocol::of(&Message::read(message).ok()?)
    }

    /// Returns whether a header that occurs twice is one value with a comma (Envoy's map) instead
    /// of two headers.
    #[must_use]
    pub(crate) const fn joins_duplicates(&self) -> bool {
        self.message.joined > 0
    }

    /// Returns the request target, with its query string as it was sent.
    #[must_use]
    pub const fn path(&self) -> &'a [u8] {
        self.message.path
    }

    /// Returns the request target in the bytes that the client sent: `:path` among raw headers. None
    /// if Envoy does not show it, or if it contradicts the path of the check.
    #[must_use]
    pub(super) fn raw_target(&self) -> Option<&'a [u8]> {
        if self.joins_duplicates() {
            return None;
        }
        let mut targets = self.values(":path");
        let (target, shown) = (targets.next()?, self.path());
        // In the path, Envoy writes `!` for a byte that is not UTF-8.
        let agrees = target.len() == shown.len()
            && (target.iter().zip(shown)).all(|(raw, shown)| raw == shown || *shown == b'!');
        (agrees && targets.next().is_none()).then_some(target)
    }

    /// Returns the host, with its port if it has one.
    #[must_use]
    pub const fn host(&self) -> &'a [u8] {
        self.message.host
    }

    /// Returns the HTTP method.
    #[must_use]
    pub const fn method(&self) -> &'a [u8] {
        self.message.method
    }

    /// Returns the address of the downstream peer as Envoy reports it; none if it is not an IP
    /// address. The client can be another one: see `client_address`.
    #[must_use]
    pub const fn source(&self) -> Option<IpAddr> {
        self.source
    }

    /// Returns the names and values of the context extensions that are set on the Envoy route.
    pub fn extensions(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        self.message.extensions()
    }

    fn check_shape(&self) -> Result<(), RequestError> {
        let (joined, all) = (self.message.joined, self.message.headers().len());
        if joined > 0 && joined < all {
            return Err(RequestError::BothEncodings);
        }
        if self.message.has_two_values {
            return Err(RequestError::TwoValues);
        }
        // Envoy also refuses a fragment. Envoy accepts bytes beyond ASCII, and so does relatch.
        if self
            .path()
            .iter()
            .any(|b| b.is_ascii_control() || matches!(b, b' ' | b'#'))
        {
            return Err(RequestError::ImpossiblePath);
        }
        Ok(())
    }

    fn check_bounds(&self) -> Result<(), RequestError> {
        let headers = self.message.headers().len();
        let extensions = self.message.extensions().len();
        if headers > Self::MAX_HEADERS || extensions > Self::MAX_EXTENSIONS {
            return Err(RequestError::TooMany);
        }
        let bytes: usize = self
            .headers()
            .map(|header| header.name.len() + header.value.len())
            .sum();
        if bytes > Self::MAX_HEADER_BYTES || self.path().len() > Self::MAX_PATH_LEN {
            return Err(RequestError::TooLong);
        }
        Ok(())
    }
}

/// A request with headers or extensions that the decoder leaves out is always out of bounds.
const _: () =
    assert!(CheckInput::MAX_HEADERS < MAX_PAIRS && CheckInput::MAX_EXTENSIONS < MAX_PAIRS);

impl GrpcProtocol {
    /// Returns the protocol that the content type names. `Native` is exactly what Envoy takes for a
    /// call of gRPC, and answers with its status.
    fn of(message: &Message<'_>) -> Option<Self> {
        let mut headers = message.headers();
        let (_, value) = headers.find(|(name, _)| name.eq_ignore_ascii_case(b"content-type"))?;
        let begins = |prefix: &[u8]| {
            let head = value.get(..prefix.len());
            head.is_some_and(|head| head.eq_ignore_ascii_case(prefix))
        };
        if begins(b"application/grpc-web") {
            Some(Self::Web)
        } else {
            let is_native = value == b"application/grpc" || value.starts_with(b"application/grpc+");
            is_native.then_some(Self::Native)
        }
    }
}

impl fmt::Debug for CheckInput<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CheckInput(redacted)")
    }
}

impl Header<'_> {
    /// Returns whether it has this name, compared without case.
    #[must_use]
    pub(crate) fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name.as_bytes())
    }
}

impl fmt::Debug for Header<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Header(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        authz::testing::{Message, entry},
        proto::auth::{AttributeContext, CheckRequest, Request},
    };
    use prost::Message as _;

    fn error(request: &CheckRequest) -> Option<RequestError> {
        CheckInput::read(&request.encode_to_vec()).err()
    }

    #[test]
    fn both_encodings_read_the_same() {
        let message = Message::get("/a?b=1")
            .header("X-Api-Key", "K")
            .from("192.0.2.1");
        for request in [message.joined(), message.raw()] {
            let request = request.encode_to_vec();
            let input = CheckInput::read(&request).expect("a request");
            assert_eq!(input.values("x-api-key").collect::<Vec<_>>(), [b"K"]);
            assert_eq!(input.path(), b"/a?b=1");
            assert_eq!(input.source(), Some([192, 0, 2, 1].into()));
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let error = CheckInput::read(b"\xff").err();
        assert_eq!(error, Some(RequestError::NotAMessage(NotAMessage)));
    }

    #[test]
    fn a_check_without_http_attributes_is_refused() {
        let expected = Some(RequestError::NoHttpAttributes);
        assert_eq!(error(&CheckRequest { attributes: None }), expected);
        let attributes = AttributeContext::default();
        assert_eq!(
            error(&CheckRequest {
                attributes: Some(attributes.clone())
            }),
            expected
        );
        let request = Some(Request { http: None });
        let attributes = Some(AttributeContext {
            request,
            ..attributes
        });
        assert_eq!(error(&CheckRequest { attributes }), expected);
    }

    #[test]
    fn two_encodings_at_once_are_refused() {
        let message = Message::get("/").header("a", "1");
        let mut request = message.raw();
        message.http_of(&mut request).headers = vec![entry("a", "1")];
        assert_eq!(error(&request), Some(RequestError::BothEncodings));
    }

    #[test]
    fn a_raw_header_with_two_values_is_refused() {
        let message = Message::get("/").header("a", "1");
        let mut request = message.raw();
        let map = message.http_of(&mut request).header_map.as_mut();
        map.expect("raw headers").headers[0].value = "2".into();
        assert_eq!(error(&request), Some(RequestError::TwoValues));
    }

    #[test]
    fn bounds_hold_at_their_very_edge() {
        let many = |count| (0..count).fold(Message::get("/"), |m, _| m.header("a", ""));
        assert_eq!(error(&many(CheckInput::MAX_HEADERS).raw()), None);
        let beyond = many(CheckInput::MAX_HEADERS + 1).raw();
        assert_eq!(error(&beyond), Some(RequestError::TooMany));

        let long = |len: usize| Message::get("/").header("a", "x".repeat(len - 1)).raw();
        assert_eq!(error(&long(CheckInput::MAX_HEADER_BYTES)), None);
        let beyond = long(CheckInput::MAX_HEADER_BYTES + 1);
        assert_eq!(error(&beyond), Some(RequestError::TooLong));

        let path = |len: usize| Message::get("x".repeat(len)).raw();
        assert_eq!(error(&path(CheckInput::MAX_PATH_LEN)), None);
        let beyond = path(CheckInput::MAX_PATH_LEN + 1);
        assert_eq!(error(&beyond), Some(RequestError::TooLong));
    }

    #[test]
    fn paths_that_no_client_can_send_are_refused() {
        for path in ["/a b", "/a\0", "/a\r\n", "/a#b", "/a\x7f"] {
            let request = Message::get(path).joined();
            assert_eq!(error(&request), Some(RequestError::ImpossiblePath));
        }
        assert_eq!(error(&Message::get("/ä%20b").joined()), None);
    }

    #[test]
    fn requests_do_not_print() {
        let request = Message::get("/?api_key=K").joined().encode_to_vec();
        let input = CheckInput::read(&request).expect("a request");
        assert_eq!(format!("{input:?}"), "CheckInput(redacted)");
    }
}
