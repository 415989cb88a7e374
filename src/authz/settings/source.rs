//! The places where a credential may be.

use std::{fmt, str::FromStr, sync::Arc};

use http::HeaderName;

use super::{ParseSettingError, header};

/// One place where a credential may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialSource {
    /// A header: its whole value, or the part of the value after the scheme.
    Header {
        /// The name of the header, compared without case.
        name: HeaderName,
        /// The scheme (RFC 9110, section 11.1), compared without case. A value of another scheme is
        /// ignored and stays in the request. None if the whole value is the credential.
        scheme: Option<Token>,
    },
    /// The credentials of the scheme `Basic` in `authorization` (RFC 7617). The other part is ignored.
    Basic {
        /// The part that is the credential.
        part: BasicPart,
    },
    /// An item of `sec-websocket-protocol` (RFC 6455, section 11.3.4): the part after a prefix. The
    /// other items stay in the request.
    WebSocketProtocol {
        /// The beginning of the item, compared with case.
        prefix: Token,
    },
    /// A query parameter.
    Query {
        /// The name of the parameter, compared with case and after percent-decoding.
        name: QueryName,
    },
    /// A cookie.
    Cookie {
        /// The name of the cookie, compared with case.
        name: Token,
    },
}

/// A part of the credentials of the scheme `Basic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BasicPart {
    /// Everything before the first colon.
    UserName,
    /// Everything after the first colon.
    Password,
}

/// A token of RFC 9110, section 5.6.2, of 1 to 128 characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token(Arc<str>);

/// The name of a query parameter: 1 to 128 of the unreserved characters of RFC 3986, section 2.3,
/// which are never escaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryName(Arc<str>);

/// The maximum length of a name, in bytes: a longer one is a mistake.
const MAX_NAME: usize = 128;

/// The scheme of RFC 7617.
pub(in crate::authz) const BASIC: &str = "Basic";

static AUTHORIZATION: HeaderName = http::header::AUTHORIZATION;
static WEB_SOCKET_PROTOCOL: HeaderName = http::header::SEC_WEBSOCKET_PROTOCOL;

impl CredentialSource {
    /// Returns the sources that apply if the configuration names none: `x-api-key`, and
    /// `authorization` with `Bearer`.
    #[must_use]
    pub(crate) fn defaults() -> Vec<Self> {
        vec![
            Self::Header {
                name: HeaderName::from_static("x-api-key"),
                scheme: None,
            },
            Self::Header {
                name: http::header::AUTHORIZATION,
                scheme: Some(Token("Bearer".into())),
            },
        ]
    }

    /// Returns whether both could yield the same credential, or one header is a spelling of the
    /// other.
    #[must_use]
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Header { name, scheme },
                Self::Header {
                    name: other,
                    scheme: other_scheme,
                },
            ) if name == other => match (scheme, other_scheme) {
                (Some(scheme), Some(other)) => scheme.0.eq_ignore_ascii_case(&other.0),
                (None, _) | (_, None) => true,
            },
            (Self::Header { name, .. }, Self::Header { name: other, .. }) => {
                header::folds_to(name.as_ref(), other)
            }
            (Self::Header { name, scheme }, Self::Basic { .. })
            | (Self::Basic { .. }, Self::Header { name, scheme }) => {
                *name == AUTHORIZATION
                    && scheme
                        .as_ref()
                        .is_none_or(|scheme| scheme.0.eq_ignore_ascii_case(BASIC))
            }
            (Self::Basic { .. }, Self::Basic { .. }) => true,
            (
                Self::WebSocketProtocol { prefix: Token(one) },
                Self::WebSocketProtocol {
                    prefix: Token(other),
                },
            ) => one.starts_with(&**other) || other.starts_with(&**one),
            (Self::Query { name }, Self::Query { name: other }) => name == other,
            (Self::Cookie { name }, Self::Cookie { name: other }) => name == other,
            (
                Self::Header { .. }
                | Self::Basic { .. }
                | Self::WebSocketProtocol { .. }
                | Self::Query { .. }
                | Self::Cookie { .. },
                _,
            ) => false,
        }
    }

    /// Returns the header of the credential; none if it is in the query, or in `cookie`, whose
    /// spellings nobody reads.
    #[must_use]
    pub(crate) fn header(&self) -> Option<&HeaderName> {
        match self {
            Self::Header { name, .. } => Some(name),
            Self::Basic { .. } => Some(&AUTHORIZATION),
            Self::WebSocketProtocol { .. } => Some(&WEB_SOCKET_PROTOCOL),
            Self::Query { .. } | Self::Cookie { .. } => None,
        }
    }

    /// Returns the header, if it holds nothing but a credential.
    #[must_use]
    pub(crate) fn pure_header(&self) -> Option<&HeaderName> {
        match self {
            Self::Header { name, scheme: None } => Some(name),
            Self::Header {
                scheme: Some(_), ..
            }
            | Self::Basic { .. }
            | Self::WebSocketProtocol { .. }
            | Self::Query { .. }
            | Self::Cookie { .. } => None,
        }
    }

    /// Returns the scheme of the credential (RFC 9110, section 11.1); none if it has none.
    #[must_use]
    pub(crate) fn scheme(&self) -> Option<&str> {
        match self {
            Self::Header { scheme, .. } => scheme.as_ref().map(Token::as_str),
            Self::Basic { .. } => Some(BASIC),
            Self::WebSocketProtocol { .. } | Self::Query { .. } | Self::Cookie { .. } => None,
        }
    }

    /// Returns whether the credential is removed with its whole header.
    #[must_use]
    pub(crate) fn is_header(&self) -> bool {
        self.pure_header().is_some() || self.shared_header().is_some()
    }

    /// Returns the header that has other values than credentials, too, and that is removed as a
    /// whole if it holds one.
    #[must_use]
    pub(crate) fn shared_header(&self) -> Option<&HeaderName> {
        match self {
            Self::Header {
                name,
                scheme: Some(_),
            } => Some(name),
            Self::Basic { .. } => Some(&AUTHORIZATION),
            Self::Header { scheme: None, .. }
            | Self::WebSocketProtocol { .. }
            | Self::Query { .. }
            | Self::Cookie { .. } => None,
        }
    }

    /// Returns whether it is a header that a framework could mistake for `header`.
    #[must_use]
    pub(crate) fn folds_to(&self, header: &HeaderName) -> bool {
        self.header()
            .is_some_and(|name| header::folds_to(name.as_ref(), header))
    }
}

impl fmt::Display for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header { name, scheme: None } => write!(f, "header {name}"),
            Self::Header {
                name,
                scheme: Some(scheme),
            } => write!(f, "header {name} with scheme {}", scheme.as_str()),
            Self::Basic { part } => write!(f, "{part} of {BASIC} in header {AUTHORIZATION}"),
            Self::WebSocketProtocol { prefix } => {
                let prefix = prefix.as_str();
                write!(f, "item {prefix}... of header {WEB_SOCKET_PROTOCOL}")
            }
            Self::Query { name } => write!(f, "query parameter {}", name.as_str()),
            Self::Cookie { name } => write!(f, "cookie {}", name.as_str()),
        }
    }
}

impl FromStr for BasicPart {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "username" => Ok(Self::UserName),
            "password" => Ok(Self::Password),
            _ => Err(ParseSettingError::BasicPart),
        }
    }
}

impl fmt::Display for BasicPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UserName => "username",
            Self::Password => "password",
        })
    }
}

impl Token {
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Token {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() <= MAX_NAME && is_token(text.as_bytes()) {
            Ok(Self(text.into()))
        } else {
            Err(ParseSettingError::Token)
        }
    }
}

impl QueryName {
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for QueryName {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = matches!(text.len(), 1..=MAX_NAME)
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(ParseSettingError::QueryName)
        }
    }
}

/// Returns whether the bytes are a token of RFC 9110, section 5.6.2. The name of a header is a
/// token.
pub(in crate::authz) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

#[cfg(test)]
mod tests {
    use super::{BasicPart::*, *};

    fn header(name: &'static str, scheme: Option<&str>) -> CredentialSource {
        CredentialSource::Header {
            name: HeaderName::from_static(name),
            scheme: scheme.map(|scheme| scheme.parse().expect("a token")),
        }
    }

    #[test]
    fn sources_that_could_hold_one_credential_overlap() {
        let query = |name: &str| CredentialSource::Query {
            name: name.parse().expect("a name"),
        };
        let cookie = |name: &str| CredentialSource::Cookie {
            name: name.parse().expect("a name"),
        };
        let basic = |part| CredentialSource::Basic { part };
        let protocol = |prefix: &str| CredentialSource::WebSocketProtocol {
            prefix: prefix.parse().expect("a token"),
        };
        for (one, other, overlaps) in [
            (header("x-a", None), header("x-a", None), true),
            (header("x-a", None), header("x_a", None), true),
            (header("x-a", None), header("x-a", Some("Key")), true),
            (header("x-a", Some("key")), header("x-a", Some("Key")), true),
            (header("x-a", Some("a")), header("x.a", Some("b")), true),
            (header("x-a", Some("a")), header("x-a", Some("b")), false),
            (header("x-a", None), header("x-b", None), false),
            (basic(UserName), basic(Password), true),
            (
                basic(UserName),
                header("authorization", Some("BASIC")),
                true,
            ),
            (basic(UserName), header("authorization", None), true),
            (
                basic(UserName),
                header("authorization", Some("Bearer")),
                false,
            ),
            (protocol("key."), protocol("key."), true),
            (protocol("key."), protocol("key.v2."), true),
            (protocol("key."), protocol("Key."), false),
            (protocol("a"), basic(Password), false),
            (query("a"), query("a"), true),
            (query("a"), query("A"), false),
            (cookie("a"), cookie("a"), true),
            (cookie("a"), query("a"), false),
        ] {
            assert_eq!(one.overlaps(&other), overlaps, "{one} and {other}");
            assert_eq!(other.overlaps(&one), overlaps, "{other} and {one}");
        }
    }

    #[test]
    fn names_are_checked() {
        let longest = "a".repeat(128);
        for good in ["api_key", "a.b-c~d", &longest] {
            assert!(good.parse::<Token>().is_ok(), "{good:?} was refused");
            assert!(good.parse::<QueryName>().is_ok(), "{good:?} was refused");
        }
        let too_long = "a".repeat(129);
        for bad in ["", "a b", "a;b", "a=b", "a,b", "\u{e4}", &too_long] {
            assert!(bad.parse::<Token>().is_err(), "{bad:?} was accepted");
            assert!(bad.parse::<QueryName>().is_err(), "{bad:?} was accepted");
        }
        for escaped in ["a+b", "a%5Fb", "a&b", "a'b"] {
            assert!(escaped.parse::<Token>().is_ok(), "{escaped:?} was refused");
            assert!(
                escaped.parse::<QueryName>().is_err(),
                "{escaped:?} was accepted"
            );
        }
    }
}
