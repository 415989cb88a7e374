//! What a check asks about: a request that is the same for both encodings of headers, and within bounds.

use std::{fmt, net::IpAddr};

use super::message::{MAX_PAIRS, Message, NotAMessage};

/// A request to be judged, borrowed from the message. Never printed: it holds the credential.
#[derive(Clone)]
pub struct CheckInput<'a> {
    message: Message<'a>,
    source: Option<IpAddr>,
}

/// One header as Envoy sent it.
#[derive(Clone, Copy)]
pub struct Header<'a> {
    /// Its name, which Envoy has made lower case.
    pub name: &'a [u8],
    /// Its value, with those of its duplicates if [`CheckInput::joins_duplicates`].
    pub value: &'a [u8],
}

/// A message that is no request to judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It is no message at all.
    #[error(transparent)]
    NotAMessage(#[from] NotAMessage),
    /// It tells nothing of an HTTP request.
    #[error("the check has no HTTP attributes")]
    NoHttpAttributes,
    /// It has `headers` and `header_map`, and the two may differ.
    #[error("the check has its headers in both encodings")]
    BothEncodings,
    /// A raw header has two values.
    #[error("a header of the check has a value and a raw value that differ")]
    TwoValues,
    /// It has too many headers or context extensions.
    #[error("the check has too many headers or context extensions")]
    TooMany,
    /// Its headers or its path are too long.
    #[error("the headers or the path of the check are too long")]
    TooLong,
    /// Its path could not have been sent as a request target.
    #[error("the path of the check holds a control character, a space or a '#'")]
    ImpossiblePath,
}

impl<'a> CheckInput<'a> {
    /// The most headers; Envoy's own limit is 100 unless it was raised.
    pub(crate) const MAX_HEADERS: usize = 512;
    /// The most bytes in names and values; Envoy's own limit is 60 KiB unless it was raised.
    pub(crate) const MAX_HEADER_BYTES: usize = 192 * 1024;
    /// The longest path, which Envoy counts among the headers.
    pub(crate) const MAX_PATH_LEN: usize = 64 * 1024;
    /// The most context extensions; an operator writes them on a route, and relatch knows three.
    pub(crate) const MAX_EXTENSIONS: usize = 64;

    /// Reads a serialized `CheckRequest`.
    ///
    /// # Errors
    ///
    /// When it is none, when it can be read in two ways, or when it is out of bounds.
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

    /// The headers, pseudo-headers among them.
    pub fn headers(&self) -> impl Iterator<Item = Header<'a>> {
        let headers = self.message.headers();
        headers.map(|(name, value)| Header { name, value })
    }

    /// The values of a header.
    pub(crate) fn values(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.headers()
            .filter(move |header| header.is(name))
            .map(|header| header.value)
    }

    /// Whether a header that came twice is one value with a comma (Envoy's map) rather than two headers.
    #[must_use]
    pub(crate) const fn joins_duplicates(&self) -> bool {
        self.message.joined > 0
    }

    /// The request target, with its query string as it was sent.
    #[must_use]
    pub const fn path(&self) -> &'a [u8] {
        self.message.path
    }

    /// The host, with its port if it has one.
    #[must_use]
    pub const fn host(&self) -> &'a [u8] {
        self.message.host
    }

    /// The method.
    #[must_use]
    pub const fn method(&self) -> &'a [u8] {
        self.message.method
    }

    /// The downstream peer as Envoy sees it; none when it has no IP address.
    #[must_use]
    pub const fn source(&self) -> Option<IpAddr> {
        self.source
    }

    /// What was set on the Envoy route, by name and value.
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
        // Envoy refuses a fragment as well. A byte beyond ASCII is let through by Envoy, and so here.
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

/// What the decoder leaves out is out of bounds already.
const _: () =
    assert!(CheckInput::MAX_HEADERS < MAX_PAIRS && CheckInput::MAX_EXTENSIONS < MAX_PAIRS);

impl fmt::Debug for CheckInput<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CheckInput(redacted)")
    }
}

impl Header<'_> {
    /// Whether it has this name, without regard to case.
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
