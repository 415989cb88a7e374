//! The credential of a request, from all places of its route.
//!
//! Each check searches all places of its route. The same credential in two places counts as one. Two
//! different credentials, or one place that occurs twice, are ambiguous: another reader might
//! choose the other one. An empty credential counts as none, but it counts as an occurrence of its
//! place. A header with another scheme (`Basic …`) is ignored and stays in the request.

use std::fmt;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use super::{
    cookie,
    credential_value::CredentialValue,
    protocols, query,
    request::{CheckInput, Header},
    settings::{BASIC, BasicPart, CredentialSource, Places, Settings},
};
use crate::key::{PresentedKey, token::PresentedKeyError, wrapping::Wrapping};

/// The one credential of a request. It is never printed.
pub(crate) struct Credential<'a>(CredentialValue<'a>);

/// The result of a search.
#[derive(Debug)]
pub(crate) struct Search<'a> {
    /// The credential; none if no place has one.
    pub(super) credential: Result<Option<Credential<'a>>, NoCredential>,
    /// The places that hold a credential.
    pub(super) found: Places,
    /// Whether a credential is where relatch cannot remove it: in a cookie behind a comma.
    pub(super) is_hidden: bool,
}

/// The reason why a request has credentials, but none to judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoCredential {
    /// There is more than one, or one place occurs twice.
    Ambiguous,
    /// It is not printable ASCII, perhaps because of a text that surrounds the key, or it is not in
    /// the encoding of its place.
    Malformed(Option<Wrapping>),
}

/// The result of the search so far.
struct Collector<'a> {
    joins_duplicates: bool,
    value: Option<CredentialValue<'a>>,
    seen: Places,
    repeated: Places,
    found: Places,
    conflict: bool,
    is_hidden: bool,
    malformed: Option<NoCredential>,
}

/// Base64 as clients write it: RFC 7617 asks for padding, and some leave it out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl<'a> Search<'a> {
    /// Searches `places`.
    pub(crate) fn new(settings: &Settings, places: Places, input: &CheckInput<'a>) -> Self {
        let mut collector = Collector {
            joins_duplicates: input.joins_duplicates(),
            value: None,
            seen: Places::default(),
            repeated: Places::default(),
            found: Places::default(),
            conflict: false,
            is_hidden: false,
            malformed: None,
        };
        for header in input.headers() {
            collector.look_at_header(settings, places, header);
        }
        collector.look_at_query(settings, places, input.path());
        collector.finish()
    }
}

impl Credential<'_> {
    /// Returns the credential as a key to look up.
    ///
    /// # Errors
    ///
    /// When it is longer than any key.
    pub(crate) fn key(&self) -> Result<PresentedKey<'_>, PresentedKeyError> {
        PresentedKey::new(self.0.as_bytes())
    }

    /// Returns the text that surrounds the key, if any does.
    #[must_use]
    pub(super) fn wrapping(&self) -> Option<Wrapping> {
        Wrapping::of(self.0.as_bytes())
    }
}

impl fmt::Debug for Credential<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(redacted)")
    }
}

impl<'a> Collector<'a> {
    fn look_at_header(&mut self, settings: &Settings, places: Places, header: Header<'a>) {
        for (at, source) in places.sources(settings) {
            match source {
                CredentialSource::Header { name, scheme } if header.is(name.as_str()) => {
                    self.occurs(at);
                    match scheme {
                        None => {
                            self.offer(at, CredentialValue::Borrowed(header.value.trim_ascii()));
                        }
                        Some(scheme) => {
                            self.offer_with_scheme(at, scheme.as_str(), header.value, |value| {
                                Some(CredentialValue::Borrowed(value))
                            });
                        }
                    }
                }
                CredentialSource::Basic { part } if header.is("authorization") => {
                    self.occurs(at);
                    self.offer_with_scheme(at, BASIC, header.value, |value| part.of(value));
                }
                CredentialSource::Cookie { name } if header.is("cookie") => {
                    self.is_hidden |= cookie::hides(header.value, name.as_str());
                    let named = cookie::cookies(header.value)
                        .filter(|cookie| cookie.name == name.as_str().as_bytes());
                    for cookie in named {
                        self.occurs(at);
                        self.offer(at, CredentialValue::Borrowed(cookie.value));
                    }
                }
                CredentialSource::WebSocketProtocol { prefix }
                    if header.is("sec-websocket-protocol") =>
                {
                    let prefix = prefix.as_str().as_bytes();
                    let values =
                        protocols::items(header.value).filter_map(|item| item.strip_prefix(prefix));
                    for value in values {
                        self.occurs(at);
                        self.offer(at, CredentialValue::Borrowed(value));
                    }
                }
                CredentialSource::Header { .. }
                | CredentialSource::Basic { .. }
                | CredentialSource::Cookie { .. }
                | CredentialSource::WebSocketProtocol { .. }
                | CredentialSource::Query { .. } => {}
            }
        }
    }

    fn look_at_query(&mut self, settings: &Settings, places: Places, path: &'a [u8]) {
        for (at, source) in places.sources(settings) {
            if let CredentialSource::Query { name } = source {
                let named = query::parameters(path).filter(|parameter| parameter.is(name.as_str()));
                for parameter in named {
                    self.occurs(at);
                    self.offer(at, parameter.decoded());
                }
            }
        }
    }

    /// Offers the part of a value after the scheme, as `decode` reads it; if it cannot read it, the
    /// credential is malformed. In both encodings a comma counts as the boundary of two header
    /// lines: Envoy joins the lines of `authorization` as it reads them. A later value with the
    /// scheme is a second credential.
    fn offer_with_scheme(
        &mut self,
        at: usize,
        scheme: &str,
        header: &'a [u8],
        decode: impl FnOnce(&'a [u8]) -> Option<CredentialValue<'a>>,
    ) {
        if let Some(credential) = after_scheme(header, scheme)
            && !credential.is_empty()
        {
            if credential.contains(&b',') {
                self.found.add(at);
                self.conflict = true;
            } else if let Some(value) = decode(credential) {
                self.offer_value(at, value, false);
            } else {
                self.found.add(at);
                self.malformed.get_or_insert(NoCredential::Malformed(None));
            }
        }
        let has_later = header
            .split(|b| *b == b',')
            .skip(1)
            .filter_map(|value| after_scheme(value, scheme))
            .any(|credential| !credential.is_empty());
        if has_later {
            self.found.add(at);
            self.conflict = true;
        }
    }

    const fn occurs(&mut self, at: usize) {
        if self.seen.has(at) {
            self.repeated.add(at);
        }
        self.seen.add(at);
    }

    fn offer(&mut self, at: usize, value: CredentialValue<'a>) {
        self.offer_value(at, value, self.joins_duplicates);
    }

    /// Offers a credential. If `is_joined`, a comma in the value separates two values.
    fn offer_value(&mut self, at: usize, value: CredentialValue<'a>, is_joined: bool) {
        let bytes = value.as_bytes();
        if bytes.is_empty() {
            return;
        }
        self.found.add(at);
        if is_joined && bytes.contains(&b',') {
            self.conflict = true;
        } else if !bytes.iter().all(u8::is_ascii_graphic) {
            let malformed = NoCredential::Malformed(Wrapping::of(bytes));
            self.malformed.get_or_insert(malformed);
        }
        match &self.value {
            None => self.value = Some(value),
            Some(first) => self.conflict |= first.as_bytes() != value.as_bytes(),
        }
    }

    fn finish(self) -> Search<'a> {
        let credential = if let Some(malformed) = self.malformed {
            Err(malformed)
        } else if self.conflict || self.is_hidden || self.repeated.overlaps(self.found) {
            Err(NoCredential::Ambiguous)
        } else {
            Ok(self.value.map(Credential))
        };
        Search {
            credential,
            found: self.found,
            is_hidden: self.is_hidden,
        }
    }
}

impl BasicPart {
    /// Returns this part of Basic credentials (RFC 7617, section 2); none if they cannot be decoded,
    /// or have no colon.
    fn of<'a>(self, credentials: &[u8]) -> Option<CredentialValue<'a>> {
        let decoded = BASE64.decode(credentials).ok();
        let decoded = CredentialValue::owned(decoded?);
        let bytes = decoded.as_bytes();
        let colon = bytes.iter().position(|b| *b == b':')?;
        let part = match self {
            Self::UserName => &bytes[..colon],
            Self::Password => &bytes[colon + 1..],
        };
        Some(CredentialValue::owned(part.to_vec()))
    }
}

/// Returns the part of `value` after `scheme` (RFC 9110, section 11.4), which can be empty; none if
/// the value has another scheme.
fn after_scheme<'a>(value: &'a [u8], scheme: &str) -> Option<&'a [u8]> {
    let value = value.trim_ascii();
    let (head, rest) = value.split_at_checked(scheme.len())?;
    let is_ours = head.eq_ignore_ascii_case(scheme.as_bytes())
        && rest.first().is_none_or(u8::is_ascii_whitespace);
    is_ours.then(|| rest.trim_ascii_start())
}

#[cfg(test)]
mod tests;
