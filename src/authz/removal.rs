//! The removal of a credential, and the parts of the request that are left.
//!
//! Everything else keeps its bytes. Envoy shows a text that is not UTF-8 with a `!` for each byte
//! that it cannot show, so that a `!` may be such a byte. Only raw headers (`encode_raw_headers`)
//! show the bytes themselves. A response can set a header only to UTF-8. So a part that may have
//! other bytes cannot be written again, and the request has to be denied.

use std::fmt;

use super::{
    cookie, protocols, query,
    request::CheckInput,
    settings::{Place, Places, Settings},
};

/// The removal of all credentials from the places that hold them. Never printed: it holds other
/// cookies.
#[derive(Default)]
pub(super) struct Removal {
    places: Places,
    /// The request target without the credential; none if the credential is not in it.
    target: Option<String>,
    /// The `cookie` header without the credential, empty if no cookie is left; none if the
    /// credential is not in it.
    cookies: Option<String>,
    /// The `sec-websocket-protocol` header without the credential, empty if no item is left; none if
    /// the credential is not in it.
    protocols: Option<String>,
}

/// A credential cannot be removed without a change to other bytes: the target or the header around
/// it may have bytes that are not UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a key cannot be removed from a query or from cookies that are not UTF-8, or may not be: Envoy \
     shows each byte that is not UTF-8 as '!', unless the ext_authz filter has \
     encode_raw_headers: true"
)]
pub(crate) struct Inseparable;

impl Removal {
    /// Plans the removal of the credentials from `places`.
    ///
    /// # Errors
    ///
    /// When the rest of the target or of the cookies may have bytes that are not UTF-8.
    pub(super) fn plan(
        settings: &Settings,
        input: &CheckInput<'_>,
        places: Places,
    ) -> Result<Self, Inseparable> {
        let mut removal = Self {
            places,
            ..Self::default()
        };
        for place in places.iter(settings) {
            match place {
                Place::Query(_) if removal.target.is_none() => {
                    removal.target = Some(target(settings, input, places)?);
                }
                Place::Cookie(_) if removal.cookies.is_none() => {
                    removal.cookies = Some(cookies(settings, input, places)?);
                }
                Place::WebSocketProtocol(_) if removal.protocols.is_none() => {
                    removal.protocols = Some(protocols(settings, input, places)?);
                }
                Place::Header(_)
                | Place::Query(_)
                | Place::Cookie(_)
                | Place::WebSocketProtocol(_) => {}
            }
        }
        Ok(removal)
    }

    /// Returns the headers that hold the credential.
    pub(super) fn headers<'s>(&self, settings: &'s Settings) -> impl Iterator<Item = &'s str> {
        self.places.iter(settings).filter_map(|place| match place {
            Place::Header(name) => Some(name),
            Place::Query(_) | Place::Cookie(_) | Place::WebSocketProtocol(_) => None,
        })
    }

    /// Returns the request target without the credential; none if the credential is not in it.
    pub(super) fn target(&self) -> Option<&str> {
        self.target.as_deref()
    }

    /// Returns the `cookie` header without the credential, empty if no cookie is left; none if the
    /// credential is not in it.
    pub(super) fn cookies(&self) -> Option<&str> {
        self.cookies.as_deref()
    }

    /// Returns the `sec-websocket-protocol` header without the credential, empty if no item is left;
    /// none if the credential is not in it.
    pub(super) fn protocols(&self) -> Option<&str> {
        self.protocols.as_deref()
    }
}

impl fmt::Debug for Removal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Removal(redacted, {:?})", self.places)
    }
}

/// Returns the request target without its credential.
fn target(
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
fn cookies(
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

/// Returns the value of the `sec-websocket-protocol` header without its credential; empty if no item
/// is left.
fn protocols(
    settings: &Settings,
    input: &CheckInput<'_>,
    places: Places,
) -> Result<String, Inseparable> {
    let holds_credential = |item: &[u8]| {
        places.iter(settings).any(|place| {
            matches!(place, Place::WebSocketProtocol(prefix) if item.starts_with(prefix.as_bytes()))
        })
    };
    let rest = protocols::without(input.values("sec-websocket-protocol"), holds_credential);
    text(rest, !input.joins_duplicates())
}

/// Returns bytes as a text. Bytes that are not raw must not contain a `!`.
fn text(bytes: Vec<u8>, is_raw: bool) -> Result<String, Inseparable> {
    if !is_raw && bytes.contains(&b'!') {
        return Err(Inseparable);
    }
    String::from_utf8(bytes).map_err(|_| Inseparable)
}
