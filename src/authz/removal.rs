//! The parts of a request that are left when its credential is removed.
//!
//! Everything else keeps its bytes. Envoy shows a text that is not UTF-8 with a `!` for each byte
//! that it cannot show, so that a `!` may be such a byte. Only raw headers (`encode_raw_headers`)
//! show the bytes themselves. A response can set a header only to UTF-8. So a part that may have
//! other bytes cannot be written again, and the request has to be denied.

use super::{
    cookie,
    place::{Place, Places},
    query,
    request::CheckInput,
    settings::Settings,
};

/// The credential cannot be removed without a change to other bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inseparable;

/// Returns the request target without its credential.
///
/// # Errors
///
/// When the rest may have bytes that are not UTF-8.
pub(super) fn target(
    settings: &Settings,
    input: &CheckInput<'_>,
    places: Places,
) -> Result<String, Inseparable> {
    let holds_credential = |parameter: &query::Parameter<'_>| {
        places
            .iter(settings)
            .any(|place| matches!(place, Place::Query(name) if parameter.is(name)))
    };
    let raw = input.raw_target();
    let rest = query::without(raw.unwrap_or(input.path()), holds_credential);
    text(rest, raw.is_some())
}

/// Returns the value of the `cookie` header without its credential; empty if no cookie is left.
///
/// # Errors
///
/// When the rest may have bytes that are not UTF-8.
pub(super) fn cookies(
    settings: &Settings,
    input: &CheckInput<'_>,
    places: Places,
) -> Result<String, Inseparable> {
    let holds_credential = |cookie: &cookie::Cookie<'_>| {
        places
            .iter(settings)
            .any(|place| matches!(place, Place::Cookie(name) if cookie.name == name.as_bytes()))
    };
    let rest = cookie::without(input.values("cookie"), holds_credential);
    text(rest, !input.joins_duplicates())
}

/// Returns bytes as a text. Bytes that are not raw must not contain a `!`.
fn text(bytes: Vec<u8>, is_raw: bool) -> Result<String, Inseparable> {
    if !is_raw && bytes.contains(&b'!') {
        return Err(Inseparable);
    }
    String::from_utf8(bytes).map_err(|_| Inseparable)
}
