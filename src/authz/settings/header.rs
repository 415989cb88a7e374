//! The headers that name the caller to the upstream, and the rules for their names and for the
//! names of headers that hold a credential.

use http::HeaderName;

use super::ParseSettingError;
use crate::authz::client_address::FORWARDED_FOR;

/// The headers that name the caller to the upstream; none for one that is switched off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityHeaders {
    /// The consumer that the key belongs to. Default: `x-relatch-consumer`.
    pub(crate) consumer: Option<HeaderName>,
    /// The id of the key. Default: `x-relatch-key-id`.
    pub(crate) key_id: Option<HeaderName>,
    /// The number of the version that was used. Default: `x-relatch-key-version`.
    pub(crate) key_version: Option<HeaderName>,
    /// The scopes of the key, separated by spaces. Default: `x-relatch-scopes`.
    pub(crate) scopes: Option<HeaderName>,
}

/// Headers that a proxy cannot remove (see `HeaderMutationRules` in Envoy), that frame or describe the message, or that
/// have a meaning of their own.
const OF_MESSAGE: [HeaderName; 10] = [
    http::header::HOST,
    http::header::COOKIE,
    http::header::SET_COOKIE,
    http::header::CONNECTION,
    http::header::CONTENT_LENGTH,
    http::header::CONTENT_TYPE,
    http::header::TE,
    http::header::TRAILER,
    http::header::TRANSFER_ENCODING,
    http::header::UPGRADE,
];

impl IdentityHeaders {
    /// Returns the names of the headers that are not switched off.
    pub(crate) fn names(&self) -> impl Iterator<Item = &HeaderName> {
        [
            &self.consumer,
            &self.key_id,
            &self.key_version,
            &self.scopes,
        ]
        .into_iter()
        .flatten()
    }
}

impl Default for IdentityHeaders {
    fn default() -> Self {
        Self {
            consumer: Some(HeaderName::from_static("x-relatch-consumer")),
            key_id: Some(HeaderName::from_static("x-relatch-key-id")),
            key_version: Some(HeaderName::from_static("x-relatch-key-version")),
            scopes: Some(HeaderName::from_static("x-relatch-scopes")),
        }
    }
}

/// Parses the name of a header for a credential.
///
/// # Errors
///
/// When the text is not the name of a header, the header has another meaning, or it is a spelling
/// of a default identity header.
pub(crate) fn parse_credential_header(text: &str) -> Result<HeaderName, ParseSettingError> {
    let name = parse(text)?;
    check_credential(&name).map(|()| name)
}

/// Parses the name of a header that names the caller.
///
/// # Errors
///
/// When the text is not the name of a header, or the header has another meaning.
pub(crate) fn parse_identity_header(text: &str) -> Result<HeaderName, ParseSettingError> {
    let name = parse(text)?;
    check_identity(&name).map(|()| name)
}

/// Parses the name of a header with the address of the client.
///
/// # Errors
///
/// When the text is not the name of a header, the header has another meaning, it is a spelling of a
/// default identity header, or proxies pass on what a client writes there.
pub(crate) fn parse_address_header(text: &str) -> Result<HeaderName, ParseSettingError> {
    if text.eq_ignore_ascii_case("source.address") {
        return Err(ParseSettingError::SourceAddress);
    }
    let name = parse(text)?;
    if name == http::header::FORWARDED {
        return Err(ParseSettingError::Forwarded);
    }
    let forwarded_for = HeaderName::from_static(FORWARDED_FOR);
    if folds_to(name.as_ref(), &forwarded_for) && name != forwarded_for {
        return Err(ParseSettingError::ForwardedForSpelling);
    }
    check_credential(&name).map(|()| name)
}

/// Refuses a header that cannot hold a credential. The default identity headers are refused even if
/// they are renamed or switched off: they never pass from outside.
pub(super) fn check_credential(name: &HeaderName) -> Result<(), ParseSettingError> {
    check_identity(name)?;
    let folds_to = |header| folds_to(name.as_ref(), header);
    if folds_to(&http::header::SEC_WEBSOCKET_PROTOCOL) {
        return Err(ParseSettingError::WebSocketHeader);
    }
    if IdentityHeaders::default().names().any(folds_to) {
        Err(ParseSettingError::IdentityHeader)
    } else {
        Ok(())
    }
}

/// Refuses a header that cannot name the caller.
pub(super) fn check_identity(name: &HeaderName) -> Result<(), ParseSettingError> {
    let folds_to = |header| folds_to(name.as_ref(), header);
    if OF_MESSAGE.iter().any(folds_to) {
        Err(ParseSettingError::MessageHeader)
    } else {
        Ok(())
    }
}

/// Returns whether a framework could mistake `name` for `header`. CGI and its successors pass
/// headers on in upper case, with `_` for `-`. Some use `_` for every character that is neither a
/// letter nor a digit.
#[must_use]
pub(crate) fn folds_to(name: &[u8], header: &HeaderName) -> bool {
    let header = header.as_str().as_bytes();
    name.len() == header.len()
        && name
            .iter()
            .zip(header)
            .all(|(one, other)| fold(*one) == fold(*other))
}

fn parse(text: &str) -> Result<HeaderName, ParseSettingError> {
    HeaderName::try_from(text).map_err(|_| ParseSettingError::HeaderName)
}

const fn fold(byte: u8) -> u8 {
    if byte.is_ascii_alphanumeric() {
        byte.to_ascii_lowercase()
    } else {
        b'-'
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_with_another_meaning_are_refused() {
        for (text, error) in [
            (":path", ParseSettingError::HeaderName),
            ("a b", ParseSettingError::HeaderName),
            ("", ParseSettingError::HeaderName),
            ("Host", ParseSettingError::MessageHeader),
            ("content_length", ParseSettingError::MessageHeader),
            ("set.cookie", ParseSettingError::MessageHeader),
        ] {
            assert_eq!(parse_identity_header(text), Err(error), "{text:?}");
            assert_eq!(parse_credential_header(text), Err(error), "{text:?}");
        }
        for text in ["x-relatch-key-id", "X_Relatch_Scopes"] {
            assert!(parse_identity_header(text).is_ok(), "{text:?} was refused");
            let refused = Err(ParseSettingError::IdentityHeader);
            assert_eq!(parse_credential_header(text), refused, "{text:?}");
        }
        assert!(parse_credential_header("X-Api-Key").is_ok());
    }

    #[test]
    fn headers_that_a_client_can_choose_have_no_address() {
        for (text, error) in [
            ("Forwarded", ParseSettingError::Forwarded),
            ("source.address", ParseSettingError::SourceAddress),
            ("X_Forwarded_For", ParseSettingError::ForwardedForSpelling),
            ("x-relatch-scopes", ParseSettingError::IdentityHeader),
            ("cookie", ParseSettingError::MessageHeader),
            ("a b", ParseSettingError::HeaderName),
        ] {
            assert_eq!(parse_address_header(text), Err(error), "{text:?}");
        }
        for text in ["X-Forwarded-For", "x-envoy-external-address", "x-real-ip"] {
            assert!(parse_address_header(text).is_ok(), "{text:?} was refused");
        }
    }
}
