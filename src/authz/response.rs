//! The answer to Envoy: the only place where a `CheckResponse` is made.
//!
//! A status of 0 allows, whatever else a response holds, and so does an empty response. Here 0 is written beside a
//! [`Grant`] or an [`Anonymous`] only, and a denial's status is of a type that has no 0.
//!
//! Envoy applies header changes first, then removals, then query changes; a header both set and removed is lost.

use std::collections::BTreeMap;

use prost_types::{Struct, Value, value::Kind};
use serde::Serialize;

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
    key::{KeyRecord, Timestamp},
    proto::auth::{
        BoolValue, CheckResponse, DeniedHttpResponse, HeaderValue, HeaderValueOption, HttpStatus,
        OkHttpResponse, Status, check_response::HttpResponse,
        header_value_option::HeaderAppendAction,
    },
    telemetry::TraceParent,
};

/// The answer to a request that passes with an identity.
#[must_use]
pub fn allow(settings: &Settings, input: &CheckInput<'_>, grant: &Grant) -> CheckResponse {
    let record = grant.record();
    let mut ok = OkHttpResponse::default();
    identify(settings, record, &mut ok);
    remove_spoofed(settings, input, &mut ok);
    remove_credential(settings, input, grant.places(), &mut ok);
    if let (Some(notice), Some(notices)) = (grant.notice(), settings.notices()) {
        announce(record, notice, notices, &mut ok);
    }
    let metadata = metadata(Outcome::Allowed, Some(grant.keyring()), Some(record));
    passing(ok, metadata)
}

/// The answer to a request that passes without one.
#[must_use]
pub fn allow_anonymous(
    settings: &Settings,
    input: &CheckInput<'_>,
    anonymous: &Anonymous,
) -> CheckResponse {
    let mut ok = OkHttpResponse::default();
    remove_spoofed(settings, input, &mut ok);
    let metadata = metadata(Outcome::Anonymous, Some(anonymous.keyring()), None);
    passing(ok, metadata)
}

/// The answer to a request that does not pass.
#[must_use]
pub fn deny(settings: &Settings, denial: &Denial, trace: Option<&TraceParent>) -> CheckResponse {
    /// In seconds: the control plane confirms a keyring every five.
    const RETRY_AFTER: &str = "5";

    let reason = denial.reason();
    let status = reason.status();
    let mut headers = vec![
        overwrite("content-type", "application/problem+json".to_owned()),
        overwrite("cache-control", "no-store".to_owned()),
    ];
    if let Some(challenge) = challenge(settings, denial) {
        headers.push(overwrite("www-authenticate", challenge));
    }
    if status == DenialStatus::Unavailable {
        headers.push(overwrite("retry-after", RETRY_AFTER.to_owned()));
    }
    CheckResponse {
        status: Some(Status {
            code: status.rpc(),
            message: reason.as_str().to_owned(),
        }),
        http_response: Some(HttpResponse::DeniedResponse(DeniedHttpResponse {
            status: Some(HttpStatus {
                code: i32::from(status.http()),
            }),
            headers,
            body: problem(reason, trace),
        })),
        dynamic_metadata: Some(metadata(
            Outcome::Denied(reason),
            denial.keyring(),
            denial.record(),
        )),
    }
}

/// The answer to a decision on `input`.
#[must_use]
pub fn respond(
    settings: &Settings,
    input: &CheckInput<'_>,
    decision: &Decision,
    trace: Option<&TraceParent>,
) -> CheckResponse {
    match decision {
        Decision::Allow(grant) => allow(settings, input, grant),
        Decision::Anonymous(anonymous) => allow_anonymous(settings, input, anonymous),
        Decision::Deny(denial) => deny(settings, denial, trace),
    }
}

/// The one status 0. Its callers hold a [`Grant`] or an [`Anonymous`].
fn passing(ok: OkHttpResponse, metadata: Struct) -> CheckResponse {
    CheckResponse {
        status: Some(Status {
            code: 0,
            message: String::new(),
        }),
        http_response: Some(HttpResponse::OkResponse(ok)),
        dynamic_metadata: Some(metadata),
    }
}

fn identify(settings: &Settings, record: &KeyRecord, ok: &mut OkHttpResponse) {
    let identity = settings.identity();
    if let Some(name) = &identity.consumer {
        ok.headers
            .push(overwrite(name.as_str(), record.consumer.to_string()));
    }
    if let Some(name) = &identity.key_id {
        ok.headers
            .push(overwrite(name.as_str(), record.key_id.to_string()));
    }
    if let Some(name) = &identity.key_version {
        ok.headers
            .push(overwrite(name.as_str(), record.version.to_string()));
    }
    if let Some(name) = &identity.scopes
        && !record.scopes.is_empty()
    {
        ok.headers
            .push(overwrite(name.as_str(), record.scopes.to_string()));
    }
}

/// Removes what could pass for an identity or a credential of ours. Called after the identity was set.
///
/// Reserved names that are not set are removed whether the request shows them or not: `allowed_headers` of Envoy's
/// filter may hide them from us, but not from the upstream.
fn remove_spoofed(settings: &Settings, input: &CheckInput<'_>, ok: &mut OkHttpResponse) {
    for header in settings.reserved() {
        if !is_set(ok, header.as_str().as_bytes()) {
            ok.headers_to_remove.push(header.as_str().to_owned());
        }
    }
    for header in input.headers() {
        if settings.is_spoofed(header.name)
            && !is_set(ok, header.name)
            && !is_removed(ok, header.name)
        {
            let name = String::from_utf8_lossy(header.name);
            ok.headers_to_remove.push(name.to_ascii_lowercase());
        }
    }
}

fn is_set(ok: &OkHttpResponse, name: &[u8]) -> bool {
    ok.headers.iter().any(|option| {
        let header = option.header.as_ref();
        header.is_some_and(|header| header.key.as_bytes().eq_ignore_ascii_case(name))
    })
}

fn is_removed(ok: &OkHttpResponse, name: &[u8]) -> bool {
    ok.headers_to_remove
        .iter()
        .any(|removed| removed.as_bytes().eq_ignore_ascii_case(name))
}

fn remove_credential(
    settings: &Settings,
    input: &CheckInput<'_>,
    places: Places,
    ok: &mut OkHttpResponse,
) {
    let (mut in_query, mut in_cookie) = (false, false);
    for place in places.iter(settings) {
        match place {
            Place::Header(name) if !is_removed(ok, name.as_bytes()) => {
                ok.headers_to_remove.push(name.to_owned());
            }
            Place::Header(_) => {}
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
fn remove_from_query(settings: &Settings, path: &[u8], places: Places, ok: &mut OkHttpResponse) {
    let holds_credential = |parameter: &query::Parameter<'_>| {
        places
            .iter(settings)
            .any(|place| matches!(place, Place::Query(name) if parameter.is(name)))
    };
    let rest = query::without(path, holds_credential);
    match String::from_utf8(rest) {
        Ok(rest) if !path.contains(&b'!') => ok.headers.push(overwrite(":path", rest)),
        Ok(_) | Err(_) => {
            ok.query_parameters_to_remove = query::parameters(path)
                .filter(holds_credential)
                .map(|parameter| String::from_utf8_lossy(parameter.name).into_owned())
                .collect();
        }
    }
}

/// Takes the credential out of the `cookie` header. Where the rest cannot be written down, the whole header goes.
fn remove_from_cookies(
    settings: &Settings,
    input: &CheckInput<'_>,
    places: Places,
    ok: &mut OkHttpResponse,
) {
    let holds_credential = |cookie: &cookie::Cookie<'_>| {
        places
            .iter(settings)
            .any(|place| matches!(place, Place::Cookie(name) if cookie.name == name.as_bytes()))
    };
    let rest = cookie::without(input.values("cookie"), holds_credential);
    match String::from_utf8(rest) {
        Ok(rest) if !rest.is_empty() => ok.headers.push(overwrite("cookie", rest)),
        Ok(_) | Err(_) => ok.headers_to_remove.push("cookie".to_owned()),
    }
}

/// Tells the consumer that the version it used is retiring. The value is a dictionary of RFC 9651; its `sunset` is a
/// date of section 3.3.7 in whole seconds, rounded down, so that nobody relies on the second that is cut.
///
/// `Deprecation` and `Sunset` hold one date each, and the upstream may have said when the resource itself ends. What it
/// said stays: a second date would make both unreadable, and ours says less than `API-Key-Rotation` does.
fn announce(record: &KeyRecord, notice: &Notice, notices: Notices, ok: &mut OkHttpResponse) {
    let sunset = notice.sunset.map_or_else(String::new, |sunset| {
        format!(", sunset=@{}", seconds(sunset))
    });
    let (version, state) = (record.version, record.state);
    let value = format!("version={version}, state={state}{sunset}");
    ok.response_headers_to_add
        .push(overwrite("api-key-rotation", value));
    let help_url = notice.help_url.as_deref().filter(|url| is_uri(url));
    if let Some(url) = help_url {
        ok.response_headers_to_add
            .push(append("link", format!("<{url}>; rel=\"help\"")));
    }
    if let Some(since) = notice.since.filter(|_| notices.deprecation) {
        ok.response_headers_to_add
            .push(add_if_absent("deprecation", format!("@{}", seconds(since))));
    }
    if let Some(sunset) = notice.sunset.filter(|_| notices.sunset) {
        // A `Timestamp` ends with the year 9999, as what can be written here does.
        let date = httpdate::fmt_http_date(sunset.into());
        ok.response_headers_to_add
            .push(add_if_absent("sunset", date));
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
fn challenge(settings: &Settings, denial: &Denial) -> Option<String> {
    let reason = denial.reason();
    let scopes = match reason.status() {
        DenialStatus::Unauthorized => None,
        DenialStatus::Forbidden => Some(denial.scopes()?),
        DenialStatus::BadRequest | DenialStatus::Unavailable => return None,
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

/// What Envoy's access log and span can show, under `envoy.filters.http.ext_authz`.
fn metadata(
    outcome: Outcome,
    keyring: Option<&KeyringFacts>,
    record: Option<&KeyRecord>,
) -> Struct {
    let mut fields = BTreeMap::new();
    let mut put = |key: &str, kind| {
        fields.insert(key.to_owned(), Value { kind: Some(kind) });
    };
    let text = |text: &str| Kind::StringValue(text.to_owned());
    put("decision", text(outcome.decision()));
    put("reason", text(outcome.reason()));
    if let Some(keyring) = keyring {
        put("keyring", text(keyring.name.as_str()));
        if let Some(revision) = keyring.revision {
            put("revision", Kind::NumberValue(number(revision.get())));
        }
    }
    if let Some(record) = record {
        put("consumer", text(record.consumer.as_str()));
        put("key_id", text(record.key_id.as_str()));
        put(
            "key_version",
            Kind::NumberValue(f64::from(record.version.get())),
        );
        put("key_state", text(record.state.as_str()));
    }
    Struct { fields }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a protobuf number is a double; a log of 2^53 revisions will not be written"
)]
const fn number(value: u64) -> f64 {
    value as f64
}

/// Sets a header in place of any that is there. For headers of a request Envoy obeys `append`, for those of a response
/// `append_action` where `append` is not set; other proxies read them in other ways again, so that both are set.
fn overwrite(name: &str, value: String) -> HeaderValueOption {
    option(name, value, HeaderAppendAction::OverwriteIfExistsOrAdd)
}

/// Adds a header beside any that is there.
fn append(name: &str, value: String) -> HeaderValueOption {
    option(name, value, HeaderAppendAction::AppendIfExistsOrAdd)
}

/// Adds a header to a response that has none of its name. Envoy obeys this action only where `append` is not set.
fn add_if_absent(name: &str, value: String) -> HeaderValueOption {
    HeaderValueOption {
        append: None,
        ..option(name, value, HeaderAppendAction::AddIfAbsent)
    }
}

fn option(name: &str, value: String, action: HeaderAppendAction) -> HeaderValueOption {
    let appends = action == HeaderAppendAction::AppendIfExistsOrAdd;
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value,
        }),
        append: Some(BoolValue { value: appends }),
        append_action: action.into(),
    }
}

#[cfg(test)]
mod tests;
