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
    settings::{CredentialSource, Settings},
};
use crate::{
    key::KeyRecord,
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
    if let Some(notice) = grant.notice().filter(|_| settings.notices()) {
        announce(record, notice, &mut ok);
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
            denial.record().map(AsRef::as_ref),
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
fn announce(record: &KeyRecord, notice: &Notice, ok: &mut OkHttpResponse) {
    let sunset = notice.sunset.map_or_else(String::new, |sunset| {
        format!(", sunset=@{}", sunset.as_millis().div_euclid(1000))
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

/// Sets a header in place of any that is there. Envoy up to 1.36 obeys `append` alone, later versions `append_action`.
fn overwrite(name: &str, value: String) -> HeaderValueOption {
    option(name, value, HeaderAppendAction::OverwriteIfExistsOrAdd)
}

/// Adds a header beside any that is there.
fn append(name: &str, value: String) -> HeaderValueOption {
    option(name, value, HeaderAppendAction::AppendIfExistsOrAdd)
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
mod tests {
    use super::*;
    use crate::{
        authz::{
            settings::{IdentityHeaders, SettingsParts},
            testing::{CONFIRMED_AT, Message, judge, keyrings, parts, settings},
        },
        key::{KeyState, Scopes, Secret, Timestamp, testing},
    };

    fn header<'a>(headers: &'a [HeaderValueOption], name: &str) -> Option<&'a str> {
        headers
            .iter()
            .filter_map(|option| option.header.as_ref())
            .find(|header| header.key == name)
            .map(|header| header.value.as_str())
    }

    fn denied(response: &CheckResponse) -> &DeniedHttpResponse {
        match &response.http_response {
            Some(HttpResponse::DeniedResponse(denied)) => denied,
            Some(HttpResponse::OkResponse(_)) | None => panic!("not denied"),
        }
    }

    fn text<'a>(response: &'a CheckResponse, key: &str) -> Option<&'a Kind> {
        let metadata = response.dynamic_metadata.as_ref()?;
        metadata.fields.get(key)?.kind.as_ref()
    }

    /// What is answered to a request with a key of `record`.
    fn passed(
        parts: SettingsParts,
        change: impl FnOnce(&mut KeyRecord),
        message: impl FnOnce(&Secret) -> Message,
    ) -> OkHttpResponse {
        let secret = testing::secret("7Qm2Xc91TbKe".parse().expect("an id"));
        let mut record = testing::record_of(&secret);
        change(&mut record);
        let settings = Settings::new(parts).expect("valid settings");
        let keyrings = keyrings(vec![record], true);
        let request = message(&secret).joined();
        let now = Timestamp::from_millis(5_000);
        let (_, response) = judge(&settings, &keyrings, &request, now, CONFIRMED_AT);
        assert_eq!(response.status.map(|status| status.code), Some(0));
        match response.http_response {
            Some(HttpResponse::OkResponse(ok)) => ok,
            Some(HttpResponse::DeniedResponse(_)) | None => panic!("not allowed"),
        }
    }

    fn with_key(secret: &Secret) -> Message {
        Message::get("/").header("x-api-key", secret.expose().to_owned())
    }

    #[test]
    fn every_denial_has_its_statuses_and_its_body() {
        let trace = TraceParent::parse(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        for reason in DenyReason::ALL {
            let denial = Denial::of(reason, None);
            let response = deny(&settings(), &denial, trace.as_ref());
            let status = response.status.as_ref().expect("a status");
            assert_eq!(status.code, reason.status().rpc());
            assert_eq!(status.message, reason.as_str());
            let denied = denied(&response);
            let http = denied.status.expect("a status").code;
            assert_eq!(http, i32::from(reason.status().http()));
            assert_eq!(
                denied.body,
                format!(
                    r#"{{"type":"urn:relatch:problem:{reason}","title":"{}","status":{http},"reason":"{reason}","trace_id":"0af7651916cd43dd8448eb211c80319c"}}"#,
                    reason.title()
                )
            );
            let sent = |name| header(&denied.headers, name);
            assert_eq!(sent("content-type"), Some("application/problem+json"));
            assert_eq!(sent("cache-control"), Some("no-store"));
            assert_eq!(sent("retry-after").is_some(), http == 503);
        }
    }

    #[test]
    fn challenges_say_what_to_do_and_no_more() {
        let with = |credentials: Vec<CredentialSource>, reason| {
            let settings = Settings::new(SettingsParts {
                credentials,
                ..parts()
            });
            let denial = Denial::of(reason, None);
            let response = deny(&settings.expect("valid settings"), &denial, None);
            header(&denied(&response).headers, "www-authenticate").map(ToOwned::to_owned)
        };
        let all = || parts().credentials;
        let header_only = || parts().credentials[..1].to_vec();
        let expect = |text: &str| Some(text.to_owned());
        for reason in DenyReason::ALL {
            let bearer = match (reason, reason.status()) {
                (DenyReason::MissingCredential, _) => expect(r#"Bearer realm="payments""#),
                (DenyReason::InsufficientScope, _) => expect(
                    r#"Bearer realm="payments", error="insufficient_scope", scope="read write""#,
                ),
                (_, DenialStatus::Unauthorized) => {
                    expect(r#"Bearer realm="payments", error="invalid_token""#)
                }
                (
                    _,
                    DenialStatus::BadRequest | DenialStatus::Forbidden | DenialStatus::Unavailable,
                ) => None,
            };
            assert_eq!(with(all(), reason), bearer, "{reason}");
        }
        assert_eq!(
            with(header_only(), DenyReason::Revoked),
            expect(r#"ApiKey realm="payments""#)
        );
    }

    #[test]
    fn metadata_tells_identity_only_of_verified_keys() {
        let record = testing::record();
        let id = record.key_id;
        let known = deny(
            &settings(),
            &Denial::of(DenyReason::Revoked, Some(record)),
            None,
        );
        let string = |text: &str| Kind::StringValue(text.to_owned());
        assert_eq!(text(&known, "decision"), Some(&string("deny")));
        assert_eq!(text(&known, "reason"), Some(&string("revoked")));
        assert_eq!(text(&known, "keyring"), Some(&string("payments")));
        assert_eq!(text(&known, "revision"), Some(&Kind::NumberValue(7.0)));
        assert_eq!(text(&known, "consumer"), Some(&string("checkout")));
        assert_eq!(text(&known, "key_id"), Some(&string(id.as_str())));
        assert_eq!(text(&known, "key_version"), Some(&Kind::NumberValue(1.0)));
        assert_eq!(text(&known, "key_state"), Some(&string("active")));
        let unknown = deny(&settings(), &Denial::of(DenyReason::UnknownKey, None), None);
        for key in ["consumer", "key_id", "key_version", "key_state"] {
            assert_eq!(text(&unknown, key), None);
        }
    }

    #[test]
    fn identity_headers_are_set_so_that_every_envoy_overwrites() {
        let held = |record: &mut KeyRecord| {
            record.scopes = Scopes::parse("write read").expect("scopes");
        };
        let ok = passed(parts(), held, with_key);
        for (name, value) in [
            ("x-relatch-consumer", "checkout"),
            ("x-relatch-key-id", "7Qm2Xc91TbKe"),
            ("x-relatch-key-version", "1"),
            ("x-relatch-scopes", "read write"),
        ] {
            assert_eq!(header(&ok.headers, name), Some(value));
        }
        for option in &ok.headers {
            assert_eq!(option.append.map(|append| append.value), Some(false));
            let overwrite = i32::from(HeaderAppendAction::OverwriteIfExistsOrAdd);
            assert_eq!(option.append_action, overwrite);
        }
        assert_eq!(ok.headers_to_remove, ["x-api-key"]);
    }

    #[test]
    fn identity_headers_that_are_not_set_are_removed() {
        let identity = IdentityHeaders {
            consumer: Some(http::HeaderName::from_static("x-caller")),
            key_version: None,
            ..IdentityHeaders::default()
        };
        let settings = SettingsParts {
            identity,
            ..parts()
        };
        let ok = passed(
            settings,
            |_| {},
            |secret| {
                with_key(secret)
                    .header("x-relatch-consumer", "root")
                    .header("x_caller", "root")
            },
        );
        assert_eq!(header(&ok.headers, "x-caller"), Some("checkout"));
        assert_eq!(header(&ok.headers, "x-relatch-key-version"), None);
        assert_eq!(
            ok.headers_to_remove,
            [
                "x-relatch-scopes",
                "x-relatch-consumer",
                "x-relatch-key-version",
                "x_caller",
                "x-api-key"
            ]
        );
    }

    #[test]
    fn a_target_that_envoy_may_have_altered_is_left_to_envoy() {
        let query = |path: &'static str| {
            passed(
                parts(),
                |_| {},
                |secret| Message::get(path.replace("KEY", secret.expose())),
            )
        };
        let ok = query("/a?b=%7e&api%5Fkey=KEY");
        assert_eq!(header(&ok.headers, ":path"), Some("/a?b=%7e"));
        assert!(ok.query_parameters_to_remove.is_empty());
        let ok = query("/a!?b=1&api%5Fkey=KEY");
        assert_eq!(header(&ok.headers, ":path"), None);
        assert_eq!(ok.query_parameters_to_remove, ["api%5Fkey"]);
    }

    #[test]
    fn a_retiring_version_is_announced_where_notices_are_on() {
        let retiring = |record: &mut KeyRecord| {
            record.state = KeyState::Retiring;
            record.retires_at = Some(Timestamp::from_millis(1_798_761_600_999));
        };
        let ok = passed(parts(), retiring, with_key);
        let sent = |name| header(&ok.response_headers_to_add, name);
        assert_eq!(
            sent("api-key-rotation"),
            Some("version=1, state=retiring, sunset=@1798761600")
        );
        assert_eq!(
            sent("link"),
            Some(r#"<https://help.example.com/rotate>; rel="help""#)
        );
        let silent = SettingsParts {
            notices: false,
            ..parts()
        };
        let ok = passed(silent, retiring, with_key);
        assert!(ok.response_headers_to_add.is_empty());
        let ok = passed(parts(), |_| {}, with_key);
        assert!(ok.response_headers_to_add.is_empty());
    }

    #[test]
    fn an_anonymous_request_loses_every_reserved_header() {
        let ok = passed(
            parts(),
            |_| {},
            |_| {
                Message::get("/")
                    .extension("relatch.auth", "optional")
                    .header("X.Relatch_Consumer", "root")
                    .header("authorization", "Basic SzpL")
            },
        );
        assert!(ok.headers.is_empty());
        assert_eq!(
            ok.headers_to_remove,
            [
                "x-relatch-consumer",
                "x-relatch-key-id",
                "x-relatch-key-version",
                "x-relatch-scopes",
                "x.relatch_consumer"
            ]
        );
    }

    #[test]
    fn a_help_page_that_could_break_out_of_the_header_is_left_out() {
        assert!(is_uri("https://example.com/a?b=c"));
        for bad in ["https://a>; rel=x", "https://a b", "https://a\r\nx: y"] {
            assert!(!is_uri(bad), "{bad:?} was accepted");
        }
    }
}
