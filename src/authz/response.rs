//! The answer to Envoy: the only place where a `CheckResponse` is written.
//!
//! A status of 0 allows, whatever else a response holds, and so does an empty response. Here 0 is written beside a
//! [`Grant`] or an [`Anonymous`] only, and a denial's status is of a type that has no 0.
//!
//! Envoy applies header changes first, then removals, then query changes; a header both set and removed is lost.
//!
//! The fields are those of `proto/envoy/service/auth/v3/external_auth.proto`. They are written as they are decided on,
//! without a message in between: an allow costs no allocation.

mod writer;

use std::fmt;

use bytes::BytesMut;
use serde::Serialize;
use smallvec::SmallVec;

use super::{
    cookie,
    credential::{Place, Places},
    decision::{Anonymous, Decision, Denial, Grant, KeyringFacts, Notice, Outcome},
    query,
    reason::{DenialStatus, DenyReason},
    request::CheckInput,
    settings::{CredentialSource, Notices, Settings},
};
use crate::{
    key::Timestamp, keyring::HeldKey, proto::auth::header_value_option::HeaderAppendAction,
    trace::TraceParent,
};
use writer::Writer;

/// The fields of `CheckResponse`.
mod response_field {
    pub(super) const STATUS: u32 = 1;
    pub(super) const DENIED: u32 = 2;
    pub(super) const OK: u32 = 3;
    pub(super) const METADATA: u32 = 4;
}

/// The fields of `OkHttpResponse`.
mod ok_field {
    pub(super) const HEADERS: u32 = 2;
    pub(super) const HEADERS_TO_REMOVE: u32 = 5;
    pub(super) const RESPONSE_HEADERS_TO_ADD: u32 = 6;
    pub(super) const QUERY_PARAMETERS_TO_REMOVE: u32 = 8;
}

/// The fields of `DeniedHttpResponse`.
mod denied_field {
    pub(super) const STATUS: u32 = 1;
    pub(super) const HEADERS: u32 = 2;
    pub(super) const BODY: u32 = 3;
}

/// Names of headers that are to be removed, as the request or the settings spell them.
type Removed<'a> = SmallVec<[&'a [u8]; 8]>;

/// Appends the answer to a decision on `input`.
pub(crate) fn respond(
    settings: &Settings,
    input: &CheckInput<'_>,
    decision: &Decision<'_>,
    trace: Option<&TraceParent>,
    answer: &mut BytesMut,
) {
    match decision {
        Decision::Allow(grant) => allow(settings, input, grant, answer),
        Decision::Anonymous(anonymous) => allow_anonymous(settings, input, anonymous, answer),
        Decision::Deny(denial) => deny(settings, denial, trace, answer),
    }
}

/// Appends the answer to a request that passes with an identity.
pub(crate) fn allow(
    settings: &Settings,
    input: &CheckInput<'_>,
    grant: &Grant<'_>,
    answer: &mut BytesMut,
) {
    let key = grant.key();
    pass(answer, |ok| {
        identify(settings, key, ok);
        let mut removed = remove_spoofed(settings, input, Some(key), ok);
        remove_credential(settings, input, grant.places(), &mut removed, ok);
        if let (Some(notice), Some(notices)) = (grant.notice(), settings.notices()) {
            announce(key, notice, notices, ok);
        }
    });
    let facts = Some(grant.keyring());
    write_metadata(Outcome::Allowed, facts, Some(key), &mut Writer::new(answer));
}

/// Appends the answer to a request that passes without one.
pub(crate) fn allow_anonymous(
    settings: &Settings,
    input: &CheckInput<'_>,
    anonymous: &Anonymous<'_>,
    answer: &mut BytesMut,
) {
    pass(answer, |ok| {
        remove_spoofed(settings, input, None, ok);
    });
    let facts = Some(anonymous.keyring());
    write_metadata(Outcome::Anonymous, facts, None, &mut Writer::new(answer));
}

/// Appends the answer to a request that does not pass.
pub(crate) fn deny(
    settings: &Settings,
    denial: &Denial<'_>,
    trace: Option<&TraceParent>,
    answer: &mut BytesMut,
) {
    /// In seconds: the control plane confirms a keyring every five, and a budget for failures has filled a good part.
    const RETRY_AFTER: &str = "5";

    let reason = denial.reason();
    let status = reason.status();
    let mut response = Writer::new(answer);
    write_status(status.rpc(), reason.as_str(), &mut response);
    response.message(response_field::DENIED, |denied| {
        denied.message(denied_field::STATUS, |http| {
            http.number(1, status.http().into());
        });
        let mut header = |name, value: &dyn fmt::Display| {
            write_header(
                denied_field::HEADERS,
                name,
                value,
                Existing::Overwrite,
                denied,
            );
        };
        header("content-type", &"application/problem+json");
        header("cache-control", &"no-store");
        if let Some(challenge) = challenge(settings, denial) {
            header("www-authenticate", &challenge);
        }
        if matches!(
            status,
            DenialStatus::Unavailable | DenialStatus::TooManyRequests
        ) {
            header("retry-after", &RETRY_AFTER);
        }
        denied.text(denied_field::BODY, &problem(reason, trace));
    });
    write_metadata(
        Outcome::Denied(reason),
        denial.keyring(),
        denial.key(),
        &mut response,
    );
}

/// Writes the one status 0. Its callers hold a [`Grant`] or an [`Anonymous`].
fn pass(answer: &mut BytesMut, fill: impl FnOnce(&mut Writer<'_>)) {
    let mut response = Writer::new(answer);
    // Zero is what an absent code is.
    response.message(response_field::STATUS, |_| {});
    response.message(response_field::OK, fill);
}

/// Writes the status of a denial.
fn write_status(code: i32, message: &str, response: &mut Writer<'_>) {
    response.message(response_field::STATUS, |status| {
        status.number(1, code.unsigned_abs());
        status.text(2, message);
    });
}

fn identify(settings: &Settings, key: &HeldKey<'_>, ok: &mut Writer<'_>) {
    let identity = settings.identity();
    let mut header = |name: &Option<http::HeaderName>, value: &dyn fmt::Display| {
        if let Some(name) = name {
            write_header(
                ok_field::HEADERS,
                name.as_str(),
                value,
                Existing::Overwrite,
                ok,
            );
        }
    };
    header(&identity.consumer, &key.consumer());
    header(&identity.key_id, &key.key_id());
    header(&identity.key_version, &key.version());
    if !key.scopes().is_empty() {
        header(&identity.scopes, &key.scopes());
    }
}

/// Whether [`identify`] sets the header of this name.
fn is_set(settings: &Settings, key: Option<&HeldKey<'_>>, name: &[u8]) -> bool {
    let Some(key) = key else {
        return false;
    };
    let identity = settings.identity();
    let scopes = identity
        .scopes
        .as_ref()
        .filter(|_| !key.scopes().is_empty());
    [
        identity.consumer.as_ref(),
        identity.key_id.as_ref(),
        identity.key_version.as_ref(),
        scopes,
    ]
    .into_iter()
    .flatten()
    .any(|header| header.as_str().as_bytes().eq_ignore_ascii_case(name))
}

/// Removes what could pass for an identity or a credential of ours, unless it is set, and returns the names.
///
/// Reserved names that are not set are removed whether the request shows them or not: `allowed_headers` of Envoy's
/// filter may hide them from us, but not from the upstream.
fn remove_spoofed<'a>(
    settings: &'a Settings,
    input: &CheckInput<'a>,
    key: Option<&HeldKey<'_>>,
    ok: &mut Writer<'_>,
) -> Removed<'a> {
    let mut removed = Removed::default();
    let reserved = settings.reserved().iter();
    for name in reserved.map(|header| header.as_str().as_bytes()) {
        if !is_set(settings, key, name) {
            remove_header(name, &mut removed, ok);
        }
    }
    for header in input.headers() {
        if settings.is_spoofed(header.name) && !is_set(settings, key, header.name) {
            remove_header(header.name, &mut removed, ok);
        }
    }
    removed
}

/// Removes a header, unless it was.
fn remove_header<'a>(name: &'a [u8], removed: &mut Removed<'a>, ok: &mut Writer<'_>) {
    if removed
        .as_slice()
        .iter()
        .any(|other| other.eq_ignore_ascii_case(name))
    {
        return;
    }
    removed.push(name);
    ok.lower_case(ok_field::HEADERS_TO_REMOVE, name);
}

fn remove_credential<'a>(
    settings: &'a Settings,
    input: &CheckInput<'_>,
    places: Places,
    removed: &mut Removed<'a>,
    ok: &mut Writer<'_>,
) {
    let (mut in_query, mut in_cookie) = (false, false);
    for place in places.iter(settings) {
        match place {
            Place::Header(name) => remove_header(name.as_bytes(), removed, ok),
            Place::Query(_) => in_query = true,
            Place::Cookie(_) => in_cookie = true,
        }
    }
    if in_query {
        remove_from_query(settings, input.path(), places, ok);
    }
    if in_cookie {
        remove_from_cookies(settings, input, places, ok);
    }
}

/// Takes the credential out of the query string.
///
/// The target without it is set as `:path`, which leaves the rest as it was; `query_parameters_to_remove` would have
/// Envoy write the whole query anew, in another order. Envoy tells us a target with `!` for every byte that is not
/// UTF-8, so that one with a `!` is not ours to set: Envoy removes the parameter then, by its name as it was spelled.
fn remove_from_query(settings: &Settings, path: &[u8], places: Places, ok: &mut Writer<'_>) {
    let holds_credential = |parameter: &query::Parameter<'_>| {
        places
            .iter(settings)
            .any(|place| matches!(place, Place::Query(name) if parameter.is(name)))
    };
    let rest = query::without(path, holds_credential);
    match str::from_utf8(&rest) {
        Ok(rest) if !path.contains(&b'!') => {
            write_header(ok_field::HEADERS, ":path", &rest, Existing::Overwrite, ok);
        }
        Ok(_) | Err(_) => {
            for parameter in query::parameters(path).filter(holds_credential) {
                let name = String::from_utf8_lossy(parameter.name);
                ok.text(ok_field::QUERY_PARAMETERS_TO_REMOVE, &name);
            }
        }
    }
}

/// Takes the credential out of the `cookie` header. Where the rest cannot be written down, the whole header goes.
fn remove_from_cookies(
    settings: &Settings,
    input: &CheckInput<'_>,
    places: Places,
    ok: &mut Writer<'_>,
) {
    let holds_credential = |cookie: &cookie::Cookie<'_>| {
        places
            .iter(settings)
            .any(|place| matches!(place, Place::Cookie(name) if cookie.name == name.as_bytes()))
    };
    let rest = cookie::without(input.values("cookie"), holds_credential);
    match str::from_utf8(&rest) {
        Ok(rest) if !rest.is_empty() => {
            write_header(ok_field::HEADERS, "cookie", &rest, Existing::Overwrite, ok);
        }
        Ok(_) | Err(_) => ok.text(ok_field::HEADERS_TO_REMOVE, "cookie"),
    }
}

/// Tells the consumer that the version it used is retiring. The value is a dictionary of RFC 9651; its `sunset` is a
/// date of section 3.3.7 in whole seconds, rounded down, so that nobody relies on the second that is cut.
///
/// `Deprecation` and `Sunset` hold one date each, and the upstream may have said when the resource itself ends. What it
/// said stays: a second date would make both unreadable, and ours says less than `API-Key-Rotation` does.
fn announce(key: &HeldKey<'_>, notice: &Notice<'_>, notices: Notices, ok: &mut Writer<'_>) {
    let mut header = |name, value: &dyn fmt::Display, existing| {
        write_header(ok_field::RESPONSE_HEADERS_TO_ADD, name, value, existing, ok);
    };
    let (version, state) = (key.version(), key.state());
    let rotation = fmt::from_fn(|f| {
        write!(f, "version={version}, state={state}")?;
        match notice.sunset {
            Some(sunset) => write!(f, ", sunset=@{}", seconds(sunset)),
            None => Ok(()),
        }
    });
    header("api-key-rotation", &rotation, Existing::Overwrite);
    if let Some(url) = notice.help_url.filter(|url| is_uri(url)) {
        let link = fmt::from_fn(|f| write!(f, "<{url}>; rel=\"help\""));
        header("link", &link, Existing::Append);
    }
    if let Some(since) = notice.since.filter(|_| notices.deprecation) {
        let date = fmt::from_fn(|f| write!(f, "@{}", seconds(since)));
        header("deprecation", &date, Existing::Keep);
    }
    if let Some(sunset) = notice.sunset.filter(|_| notices.sunset) {
        // A `Timestamp` ends with the year 9999, as what can be written here does.
        let date = httpdate::fmt_http_date(sunset.into());
        header("sunset", &date, Existing::Keep);
    }
}

/// Seconds since the Unix epoch, rounded down, as a date of RFC 9651 has them.
const fn seconds(time: Timestamp) -> i64 {
    time.as_millis().div_euclid(1000)
}

/// Whether a text can stand in a `Link` header: what came over the wire is not trusted to.
fn is_uri(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_graphic() && !b"<>\"".contains(&b))
}

/// What a client should do about a 401, or about missing scopes (RFC 9110, section 11.6.1; RFC 6750, section 3).
fn challenge(settings: &Settings, denial: &Denial<'_>) -> Option<String> {
    let reason = denial.reason();
    let scopes = match reason.status() {
        DenialStatus::Unauthorized => None,
        DenialStatus::Forbidden => Some(denial.scopes()?),
        DenialStatus::BadRequest | DenialStatus::TooManyRequests | DenialStatus::Unavailable => {
            return None;
        }
    };
    let scheme = settings
        .credentials()
        .iter()
        .find_map(|source| match source {
            CredentialSource::Header { scheme, .. } => scheme.as_ref(),
            CredentialSource::Query { .. } | CredentialSource::Cookie { .. } => None,
        })
        .map_or("ApiKey", |scheme| scheme.as_str());
    let realm = denial
        .keyring()
        .map_or("relatch", |keyring| keyring.name.as_str());
    let error = match scopes {
        Some(scopes) => format!(", error=\"insufficient_scope\", scope=\"{scopes}\""),
        None if reason.is_of_the_key() && scheme.eq_ignore_ascii_case("Bearer") => {
            ", error=\"invalid_token\"".to_owned()
        }
        None => String::new(),
    };
    Some(format!("{scheme} realm=\"{realm}\"{error}"))
}

/// The body of a denial (RFC 9457).
fn problem(reason: DenyReason, trace: Option<&TraceParent>) -> String {
    #[derive(Serialize)]
    struct Problem {
        r#type: String,
        title: &'static str,
        status: u16,
        reason: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        trace_id: Option<String>,
    }

    let problem = Problem {
        r#type: format!("urn:relatch:problem:{reason}"),
        title: reason.title(),
        status: reason.status().http(),
        reason: reason.as_str(),
        trace_id: trace.map(|trace| trace.trace_id().to_string()),
    };
    serde_json::to_string(&problem).expect("strings and numbers are JSON")
}

/// What Envoy's access log and span can show, under `envoy.filters.http.ext_authz`: a `google.protobuf.Struct`.
fn write_metadata(
    outcome: Outcome,
    keyring: Option<&KeyringFacts<'_>>,
    key: Option<&HeldKey<'_>>,
    response: &mut Writer<'_>,
) {
    response.message(response_field::METADATA, |fields| {
        write_text("decision", outcome.decision(), fields);
        write_text("reason", outcome.reason(), fields);
        if let Some(keyring) = keyring {
            write_text("keyring", keyring.name.as_str(), fields);
            if let Some(revision) = keyring.revision {
                write_number("revision", double(revision.get()), fields);
            }
        }
        if let Some(key) = key {
            write_text("consumer", key.consumer(), fields);
            write_text("key_id", key.key_id().as_str(), fields);
            write_number("key_version", f64::from(key.version().get()), fields);
            write_text("key_state", key.state().as_str(), fields);
        }
    });
}

/// Writes an entry of a `google.protobuf.Struct` whose value is a text.
fn write_text(name: &str, text: &str, fields: &mut Writer<'_>) {
    fields.message(1, |entry| {
        entry.text(1, name);
        entry.message(2, |value| value.text(3, text));
    });
}

/// The same of a number.
fn write_number(name: &str, number: f64, fields: &mut Writer<'_>) {
    fields.message(1, |entry| {
        entry.text(1, name);
        entry.message(2, |value| value.double(2, number));
    });
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a protobuf number is a double; a log of 2^53 revisions will not be written"
)]
const fn double(value: u64) -> f64 {
    value as f64
}

/// What becomes of a header that is there already.
#[derive(Clone, Copy)]
enum Existing {
    /// It goes.
    Overwrite,
    /// It stays beside the new one.
    Append,
    /// It stays, and the new one goes.
    Keep,
}

/// Writes a `HeaderValueOption`.
///
/// For headers of a request Envoy obeys `append`, for those of a response `append_action` where `append` is not set; other
/// proxies read them in other ways again, so that both are set. To keep what is there, Envoy is told by the second alone.
fn write_header(
    field: u32,
    name: &str,
    value: &dyn fmt::Display,
    existing: Existing,
    headers: &mut Writer<'_>,
) {
    let (append, action) = match existing {
        Existing::Overwrite => (Some(false), HeaderAppendAction::OverwriteIfExistsOrAdd),
        Existing::Append => (Some(true), HeaderAppendAction::AppendIfExistsOrAdd),
        Existing::Keep => (None, HeaderAppendAction::AddIfAbsent),
    };
    headers.message(field, |option| {
        option.message(1, |header| {
            header.text(1, name);
            header.display(2, value);
        });
        if let Some(append) = append {
            option.message(2, |value| value.number(1, append.into()));
        }
        option.number(3, (action as i32).unsigned_abs());
    });
}

#[cfg(test)]
mod tests;
