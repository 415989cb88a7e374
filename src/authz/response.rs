//! The answer to Envoy: only this module writes a `CheckResponse`.
//!
//! A status of 0 allows the request, whatever else the response contains, and so does an empty
//! response. This module writes 0 only with a [`Grant`], an [`Anonymous`] or an [`Unenforced`]. The
//! status of a denial has a type without 0.
//!
//! Envoy applies header changes first, then removals, then query changes. A header that is both set
//! and removed is lost.
//!
//! The fields are those of `proto/envoy/service/auth/v3/external_auth.proto`. They are written
//! directly, without a message in between: an allow costs no allocation.

use std::fmt;

use bytes::BytesMut;
use serde::Serialize;
use smallvec::SmallVec;

use super::{
    client_address::ClientAddress,
    decision::{Anonymous, Decision, Denial, Grant, KeyringFacts, Notice, Outcome, Unenforced},
    question::Question,
    reason::DenialStatus,
    request::{CheckInput, GrpcProtocol},
    settings::{Dialect, Notices, Places, Settings},
    writer::Writer,
};
use crate::{
    key::Timestamp, keyring::HeldKey, proto::auth::header_value_option::HeaderAppendAction,
    trace::TraceParent,
};

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
}

/// The fields of `DeniedHttpResponse`.
mod denied_field {
    pub(super) const STATUS: u32 = 1;
    pub(super) const HEADERS: u32 = 2;
    pub(super) const BODY: u32 = 3;
}

/// The form of a denial. The client must be able to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// A status of HTTP, and a JSON body (RFC 9457).
    Problem,
    /// A status of gRPC among the headers of HTTP 200, without a body: what gRPC calls a
    /// Trailers-Only response. From a status of HTTP, Envoy would make INTERNAL of 400, and of 429
    /// UNAVAILABLE, after which clients retry.
    Grpc,
    /// A [`Form::Problem`] that also has a status of gRPC among its headers: for a call of gRPC-Web
    /// that Envoy does not translate, because Envoy removes the content type of an answer without a
    /// body, so that a client could not read a Trailers-Only response; and for every call of gRPC
    /// behind another proxy.
    GrpcWeb,
}

/// What a denial says about its request.
pub(crate) struct About<'a> {
    /// Where a credential may be.
    places: Places,
    /// The address of the client; none if the request could not be read.
    client: Option<&'a ClientAddress<'a>>,
    trace: Option<&'a TraceParent>,
}

/// Names of headers to remove, as the request or the settings spell them.
type Removed<'a> = SmallVec<[&'a [u8]; 8]>;

/// Appends the answer to a decision on `question`.
pub(crate) fn respond(
    settings: &Settings,
    question: &Question<'_>,
    decision: &Decision<'_>,
    trace: Option<&TraceParent>,
    answer: &mut BytesMut,
) {
    match decision {
        Decision::Allow(grant) => allow(settings, question, grant, answer),
        Decision::Anonymous(anonymous) => {
            let outcome = Outcome::Anonymous;
            allow_anonymous(settings, question, anonymous, outcome, answer);
        }
        Decision::Preflight(anonymous) => {
            let outcome = Outcome::Preflight;
            allow_anonymous(settings, question, anonymous, outcome, answer);
        }
        Decision::WouldDeny(unenforced) => {
            allow_unenforced(settings, question, unenforced, answer);
        }
        Decision::Deny(denial) => {
            let (form, client) = (Form::of(settings, question.input()), question.client());
            let about = About {
                places: question.route().places,
                client: Some(&client),
                trace,
            };
            deny(settings, denial, form, &about, answer);
        }
    }
}

/// Appends the answer to a request that passes with an identity. In a trial, it passes without one.
pub(crate) fn allow(
    settings: &Settings,
    question: &Question<'_>,
    grant: &Grant<'_>,
    answer: &mut BytesMut,
) {
    let client = question.client();
    let key = grant.key();
    let is_trial = question.route().enforcement.is_observed();
    pass(answer, |ok| {
        if is_trial {
            clean(settings, question, None, ok);
            return;
        }
        identify(settings, key, ok);
        clean(settings, question, Some(key), ok);
        if let (Some(notice), Some(notices)) = (grant.notice(), settings.notices()) {
            announce(key, notice, notices, ok);
        }
    });
    let facts = Some(grant.keyring());
    let response = &mut Writer::new(answer);
    write_metadata(Outcome::Allowed, facts, Some(key), Some(&client), response);
}

/// Appends the answer to a request that passes without an identity.
pub(crate) fn allow_anonymous(
    settings: &Settings,
    question: &Question<'_>,
    anonymous: &Anonymous<'_>,
    outcome: Outcome,
    answer: &mut BytesMut,
) {
    pass(answer, |ok| clean(settings, question, None, ok));
    let facts = Some(anonymous.keyring());
    let (client, response) = (question.client(), &mut Writer::new(answer));
    write_metadata(outcome, facts, None, Some(&client), response);
}

/// Appends the answer to a request that passes although it is denied.
fn allow_unenforced(
    settings: &Settings,
    question: &Question<'_>,
    unenforced: &Unenforced<'_>,
    answer: &mut BytesMut,
) {
    pass(answer, |ok| clean(settings, question, None, ok));
    let denial = unenforced.denial();
    let outcome = Outcome::WouldDeny(denial.reason());
    let (client, response) = (question.client(), &mut Writer::new(answer));
    write_metadata(
        outcome,
        denial.keyring(),
        denial.key(),
        Some(&client),
        response,
    );
}

/// Appends the answer to a request that does not pass.
pub(crate) fn deny(
    settings: &Settings,
    denial: &Denial<'_>,
    form: Form,
    about: &About<'_>,
    answer: &mut BytesMut,
) {
    /// In seconds. By default, the control plane confirms a keyring every 5 s, and half of the
    /// budget for failed credentials refills in 5 s.
    const RETRY_AFTER: &str = "5";

    let reason = denial.reason();
    let status = reason.status();
    let mut response = Writer::new(answer);
    write_status(status.rpc(), reason.as_str(), &mut response);
    response.message(response_field::DENIED, |denied| {
        denied.message(denied_field::STATUS, |http| {
            let code = match form {
                Form::Problem | Form::GrpcWeb => status.http(),
                Form::Grpc => 200,
            };
            http.number(1, code.into());
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
        let content_type = match form {
            Form::Problem | Form::GrpcWeb => "application/problem+json",
            Form::Grpc => "application/grpc",
        };
        header("content-type", &content_type);
        if matches!(form, Form::Grpc | Form::GrpcWeb) {
            header("grpc-status", &status.rpc());
            header("grpc-message", &reason.title());
        }
        header("cache-control", &"no-store");
        if let Some(challenge) = challenge(settings, about.places, denial) {
            header("www-authenticate", &challenge);
        }
        if matches!(
            status,
            DenialStatus::Unavailable | DenialStatus::TooManyRequests
        ) {
            header("retry-after", &RETRY_AFTER);
        }
        if form != Form::Grpc {
            denied.text(denied_field::BODY, &problem(denial, about.trace));
        }
    });
    write_metadata(
        Outcome::Denied(reason),
        denial.keyring(),
        denial.key(),
        about.client,
        &mut response,
    );
}

impl<'a> About<'a> {
    /// Describes a request that could not be read.
    pub(super) fn unread(settings: &Settings, trace: Option<&'a TraceParent>) -> Self {
        Self {
            places: settings.general_places(),
            client: None,
            trace,
        }
    }
}

impl Form {
    fn of(settings: &Settings, input: &CheckInput<'_>) -> Self {
        Self::of_protocol(settings.dialect(), input.grpc())
    }

    /// Returns the form for a request that could not be judged.
    pub(super) fn of_message(settings: &Settings, message: &[u8]) -> Self {
        Self::of_protocol(settings.dialect(), CheckInput::grpc_of(message))
    }

    /// For a proxy that asks over HTTP, every status of 2xx is an allow.
    const fn of_protocol(dialect: Dialect, protocol: Option<GrpcProtocol>) -> Self {
        match (protocol, dialect) {
            (None, _) => Self::Problem,
            (Some(GrpcProtocol::Native), Dialect::Envoy) => Self::Grpc,
            (Some(GrpcProtocol::Native | GrpcProtocol::Web), _) => Self::GrpcWeb,
        }
    }
}

/// Writes the status 0; no other function does. Its callers have a [`Grant`], an
/// [`Anonymous`] or an [`Unenforced`].
fn pass(answer: &mut BytesMut, fill: impl FnOnce(&mut Writer<'_>)) {
    let mut response = Writer::new(answer);
    // An absent code is 0.
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

/// Returns whether [`identify`] sets the header with this name.
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

/// Removes what must not reach the upstream from outside: headers that it could mistake for an
/// identity header or for the header of a credential, unless [`identify`] sets them for `key`, and
/// the credentials, unless a trial leaves them.
///
/// Reserved names that are not set are removed even if the check does not show them:
/// `allowed_headers` of Envoy's filter may hide them from relatch, but not from the upstream.
fn clean(
    settings: &Settings,
    question: &Question<'_>,
    key: Option<&HeldKey<'_>>,
    ok: &mut Writer<'_>,
) {
    let places = question.route().removed_places();
    let mut removed = Removed::default();
    for header in settings.reserved(places) {
        let name = header.as_str().as_bytes();
        if !is_set(settings, key, name) {
            remove_header(name, &mut removed, ok);
        }
    }
    for header in question.input().headers() {
        if settings.is_spoofed(header.name, places) && !is_set(settings, key, header.name) {
            remove_header(header.name, &mut removed, ok);
        }
    }
    if question.route().enforcement.removes_credential() {
        remove_credential(settings, question, &mut removed, ok);
    }
}

/// Removes a header, unless it is already in `removed`.
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
    question: &Question<'_>,
    removed: &mut Removed<'a>,
    ok: &mut Writer<'_>,
) {
    let removal = question.removal();
    let removal = removal.expect("a request passes only if its credentials can be removed");
    for name in removal.headers(settings) {
        remove_header(name.as_bytes(), removed, ok);
    }
    if let Some(target) = removal.target() {
        // `query_parameters_to_remove` would have Envoy write the whole query anew, in another order.
        write_header(ok_field::HEADERS, ":path", &target, Existing::Overwrite, ok);
    }
    let lists = [
        ("cookie", removal.cookies()),
        ("sec-websocket-protocol", removal.protocols()),
    ];
    for (name, rest) in lists {
        match rest {
            Some("") => ok.text(ok_field::HEADERS_TO_REMOVE, name),
            Some(rest) => write_header(ok_field::HEADERS, name, &rest, Existing::Overwrite, ok),
            None => {}
        }
    }
}

/// Announces to the consumer that the version it used is retiring. The value of `API-Key-Rotation`
/// is a dictionary of RFC 9651. Its `sunset` is a date of section 3.3.7 in whole seconds, rounded
/// down, so that nobody relies on the second that the end cuts short.
///
/// `Deprecation` and `Sunset` have one date each, and the upstream may have sent a date for the
/// resource itself. The upstream's date stays: a second date would make both unreadable, and
/// relatch's date carries less than `API-Key-Rotation`.
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
        // The last `Timestamp` is in the year 9999, which is also the last year that this format
        // can have.
        let date = httpdate::fmt_http_date(sunset.into());
        header("sunset", &date, Existing::Keep);
    }
}

/// Returns the seconds since the Unix epoch, rounded down, as in a date of RFC 9651.
const fn seconds(time: Timestamp) -> i64 {
    time.as_millis().div_euclid(1000)
}

/// Returns whether a text is safe in a `Link` header. A text from the wire is not trusted.
fn is_uri(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_graphic() && !b"<>\"".contains(&b))
}

/// Returns the value of `WWW-Authenticate` for a 401 or for insufficient scopes (RFC 9110, section
/// 11.6.1; RFC 6750, section 3); none for other denials.
fn challenge(settings: &Settings, places: Places, denial: &Denial<'_>) -> Option<String> {
    let reason = denial.reason();
    let scopes = match reason.status() {
        DenialStatus::Unauthorized => None,
        DenialStatus::Forbidden => Some(denial.scopes()?),
        DenialStatus::BadRequest
        | DenialStatus::TooManyRequests
        | DenialStatus::HeadersTooLarge
        | DenialStatus::Unavailable => return None,
    };
    let schemes = places.sources(settings);
    let mut schemes = schemes.filter_map(|(_, source)| source.scheme());
    let scheme = schemes.next().unwrap_or("ApiKey");
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

/// Returns the body of a denial (RFC 9457).
fn problem(denial: &Denial<'_>, trace: Option<&TraceParent>) -> String {
    #[derive(Serialize)]
    struct Problem {
        r#type: String,
        title: &'static str,
        status: u16,
        reason: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        trace_id: Option<String>,
    }

    let reason = denial.reason();
    let detail = |wrapping| format!("The key {wrapping}: send the key alone");
    let problem = Problem {
        r#type: format!("urn:relatch:problem:{reason}"),
        title: reason.title(),
        status: reason.status().http(),
        reason: reason.as_str(),
        detail: denial.wrapping().map(detail),
        trace_id: trace.map(|trace| trace.trace_id().to_string()),
    };
    serde_json::to_string(&problem).expect("strings and numbers are JSON")
}

/// Writes the dynamic metadata, a `google.protobuf.Struct`. Envoy's access log and span can show
/// it, under `envoy.filters.http.ext_authz`.
fn write_metadata(
    outcome: Outcome,
    keyring: Option<&KeyringFacts<'_>>,
    key: Option<&HeldKey<'_>>,
    client: Option<&ClientAddress<'_>>,
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
        if let Some(client) = client {
            if let Some(address) = client.address() {
                write_display("client_address", address, fields);
            }
            write_display("client_address_from", client.origin(), fields);
        }
    });
}

/// Writes an entry of a `google.protobuf.Struct` whose value is the text of `value`.
fn write_display(name: &str, value: impl fmt::Display, fields: &mut Writer<'_>) {
    fields.message(1, |entry| {
        entry.text(1, name);
        entry.message(2, |text| text.display(3, value));
    });
}

/// Writes an entry of a `google.protobuf.Struct` whose value is a text.
fn write_text(name: &str, text: &str, fields: &mut Writer<'_>) {
    fields.message(1, |entry| {
        entry.text(1, name);
        entry.message(2, |value| value.text(3, text));
    });
}

/// Writes an entry of a `google.protobuf.Struct` whose value is a number.
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

/// The treatment of a header that already exists.
#[derive(Clone, Copy)]
enum Existing {
    /// It is replaced.
    Overwrite,
    /// It stays, and the new one is added.
    Append,
    /// It stays, and the new one is dropped.
    Keep,
}

/// Writes a `HeaderValueOption`.
///
/// For headers of a request, Envoy uses `append`. For headers of a response, it uses
/// `append_action` if `append` is not set. Other proxies differ, so both fields are set.
/// [`Existing::Keep`] sets `append_action` alone: `append` cannot express it.
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
