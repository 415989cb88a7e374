//! The credential of a request, from all configured places.
//!
//! Each check searches all configured places. The same credential in two places counts as one. Two
//! different credentials, or one place that occurs twice, are ambiguous: another reader might
//! choose the other one. An empty credential counts as none, but it counts as an occurrence of its
//! place. A header with another scheme (`Basic …`) is ignored and stays in the request.

use std::fmt;

use super::{
    cookie,
    credential_value::CredentialValue,
    place::Places,
    query,
    removal::{Inseparable, Removal},
    request::{CheckInput, Header},
    settings::{CredentialSource, Settings},
};
use crate::key::{PresentedKey, token::PresentedKeyError, wrapping::Wrapping};

/// The one credential of a request, and the places that hold it. It is never printed.
pub(crate) struct Credential<'a> {
    value: CredentialValue<'a>,
    removal: Removal,
}

/// The reason why a request does not have a single credential that can be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CredentialError {
    /// A credential is not printable ASCII, perhaps because of a text that surrounds the key.
    #[error("a credential is not printable ASCII")]
    Malformed(Option<Wrapping>),
    /// A credential cannot be removed, because the target or a `cookie` header around it may have
    /// bytes that are not UTF-8.
    #[error(
        "a key cannot be removed from a query or from cookies that are not UTF-8, or may not be: \
         Envoy shows each byte that is not UTF-8 as '!', unless the ext_authz filter has \
         encode_raw_headers: true"
    )]
    Inseparable,
    /// The request has more than one credential, or one place that occurs twice.
    #[error("there is more than one credential")]
    Ambiguous,
}

/// The result of the search so far.
struct Collector<'a> {
    joins_duplicates: bool,
    value: Option<CredentialValue<'a>>,
    seen: Places,
    repeated: Places,
    found: Places,
    conflict: bool,
    malformed: Option<CredentialError>,
}

impl<'a> Credential<'a> {
    /// Searches all places; none if no place has a credential.
    ///
    /// # Errors
    ///
    /// When there is more than one credential, or one that is not printable ASCII or cannot be
    /// removed.
    pub(crate) fn collect(
        settings: &Settings,
        input: &CheckInput<'a>,
    ) -> Result<Option<Self>, CredentialError> {
        let mut collector = Collector {
            joins_duplicates: input.joins_duplicates(),
            value: None,
            seen: Places::default(),
            repeated: Places::default(),
            found: Places::default(),
            conflict: false,
            malformed: None,
        };
        for header in input.headers() {
            collector.look_at_header(settings, header);
        }
        collector.look_at_query(settings, input.path());
        collector.finish(settings, input)
    }

    /// Returns the credential as a key to look up.
    ///
    /// # Errors
    ///
    /// When it is longer than any key.
    pub(crate) fn key(&self) -> Result<PresentedKey<'_>, PresentedKeyError> {
        PresentedKey::new(self.value.as_bytes())
    }

    /// Returns the text that surrounds the key, if any does.
    #[must_use]
    pub(super) fn wrapping(&self) -> Option<Wrapping> {
        Wrapping::of(self.value.as_bytes())
    }

    /// Returns how it is removed from the request.
    #[must_use]
    pub(super) const fn removal(&self) -> &Removal {
        &self.removal
    }
}

impl fmt::Debug for Credential<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential(redacted, {:?})", self.removal.places())
    }
}

impl<'a> Collector<'a> {
    fn look_at_header(&mut self, settings: &Settings, header: Header<'a>) {
        for (at, source) in settings.credentials().iter().enumerate() {
            match source {
                CredentialSource::Header { name, scheme } if header.is(name.as_str()) => {
                    self.occurs(at);
                    match scheme {
                        None => {
                            self.offer(at, CredentialValue::Borrowed(header.value.trim_ascii()));
                        }
                        Some(scheme) => {
                            self.offer_with_scheme(at, scheme.as_str(), header.value);
                        }
                    }
                }
                CredentialSource::Cookie { name } if header.is("cookie") => {
                    self.conflict |= cookie::hides(header.value, name.as_str());
                    let named = cookie::cookies(header.value)
                        .filter(|cookie| cookie.name == name.as_str().as_bytes());
                    for cookie in named {
                        self.occurs(at);
                        self.offer(at, CredentialValue::Borrowed(cookie.value));
                    }
                }
                CredentialSource::Header { .. }
                | CredentialSource::Cookie { .. }
                | CredentialSource::Query { .. } => {}
            }
        }
    }

    fn look_at_query(&mut self, settings: &Settings, path: &'a [u8]) {
        for (at, source) in settings.credentials().iter().enumerate() {
            if let CredentialSource::Query { name } = source {
                let named = query::parameters(path).filter(|parameter| parameter.is(name.as_str()));
                for parameter in named {
                    self.occurs(at);
                    self.offer(at, parameter.decoded());
                }
            }
        }
    }

    /// Offers the part of a value after the scheme. In both encodings a comma counts as the
    /// boundary of two header lines: Envoy joins the lines of `authorization` as it reads them. A
    /// later value with the scheme is a second credential.
    fn offer_with_scheme(&mut self, at: usize, scheme: &str, header: &'a [u8]) {
        if let Some(credential) = after_scheme(header, scheme) {
            self.offer_value(at, CredentialValue::Borrowed(credential), true);
        }
        self.conflict |= header
            .split(|b| *b == b',')
            .skip(1)
            .filter_map(|value| after_scheme(value, scheme))
            .any(|credential| !credential.is_empty());
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
            let malformed = CredentialError::Malformed(Wrapping::of(bytes));
            self.malformed.get_or_insert(malformed);
        }
        match &self.value {
            None => self.value = Some(value),
            Some(first) => self.conflict |= first.as_bytes() != value.as_bytes(),
        }
    }

    fn finish(
        self,
        settings: &Settings,
        input: &CheckInput<'_>,
    ) -> Result<Option<Credential<'a>>, CredentialError> {
        if let Some(malformed) = self.malformed {
            return Err(malformed);
        }
        let removal = Removal::plan(settings, input, self.found)
            .map_err(|Inseparable| CredentialError::Inseparable)?;
        if self.conflict || self.repeated.overlaps(self.found) {
            return Err(CredentialError::Ambiguous);
        }
        Ok(self.value.map(|value| Credential { value, removal }))
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
