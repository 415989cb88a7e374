//! The content of each answer, and the parts of the request that it removes.

use prost_types::value::Kind;

use super::*;
use crate::{
    authz::{
        DenyReason,
        settings::{CredentialSource, IdentityHeaders, SettingsParts},
        testing::{
            CONFIRMED_AT, Message, behind_proxies, judge, keyrings, parts, settings, written,
        },
    },
    key::{KeyRecord, KeyState, Scopes, Secret, Timestamp, testing},
    keyring::OwnedKey,
    proto::auth::{
        CheckResponse, DeniedHttpResponse, HeaderValueOption, OkHttpResponse,
        check_response::HttpResponse,
    },
};

/// Returns the answer for a denial.
fn denial(settings: &Settings, denial: &Denial<'_>, trace: Option<&TraceParent>) -> CheckResponse {
    let about = About::unread(settings, trace);
    written(|answer| deny(settings, denial, Form::Problem, &about, answer))
}

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

/// Returns the answer to a request with a key of `record`.
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
        let response = denial(&settings(), &Denial::of(reason, None), trace.as_ref());
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
        assert_eq!(sent("retry-after").is_some(), [429, 503].contains(&http));
    }
}

#[test]
fn challenges_say_what_to_do_and_no_more() {
    let with = |credentials: Vec<CredentialSource>, reason| {
        let settings = Settings::new(SettingsParts {
            credentials,
            ..parts()
        });
        let settings = settings.expect("valid settings");
        let response = denial(&settings, &Denial::of(reason, None), None);
        header(&denied(&response).headers, "www-authenticate").map(ToOwned::to_owned)
    };
    let all = || parts().credentials;
    let header_only = || parts().credentials[..1].to_vec();
    let expect = |text: &str| Some(text.to_owned());
    for reason in DenyReason::ALL {
        let bearer = match (reason, reason.status()) {
            (DenyReason::MissingCredential, _) => expect(r#"Bearer realm="payments""#),
            (DenyReason::InsufficientScope, _) => {
                expect(r#"Bearer realm="payments", error="insufficient_scope", scope="read write""#)
            }
            (_, DenialStatus::Unauthorized) => {
                expect(r#"Bearer realm="payments", error="invalid_token""#)
            }
            (
                _,
                DenialStatus::BadRequest
                | DenialStatus::Forbidden
                | DenialStatus::TooManyRequests
                | DenialStatus::HeadersTooLarge
                | DenialStatus::Unavailable,
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
fn a_client_of_grpc_gets_a_status_of_grpc() {
    let with = |content_type: &'static str, message: Message| {
        let message = message.header("content-type", content_type).joined();
        let now = Timestamp::from_millis(5_000);
        let keyrings = keyrings(Vec::new(), true);
        judge(&settings(), &keyrings, &message, now, CONFIRMED_AT).1
    };
    for (content_type, is_native) in [
        ("application/grpc", true),
        ("application/grpc+proto", true),
        ("Application/gRPC-Web", false),
        ("application/grpc-web-text", false),
    ] {
        for (message, http, code, title) in [
            (Message::get("/"), 401, "16", "An API key is required"),
            (
                Message::get("/a b"),
                400,
                "3",
                "The request cannot be understood",
            ),
            (
                Message::get("/").header("a", "b".repeat(200_000)),
                431,
                "8",
                "The headers of the request are too large",
            ),
        ] {
            let response = with(content_type, message);
            let denied = denied(&response);
            assert_eq!(header(&denied.headers, "grpc-status"), Some(code));
            assert_eq!(header(&denied.headers, "grpc-message"), Some(title));
            let status = denied.status.map(|status| status.code);
            assert_eq!(status, Some(if is_native { 200 } else { http }));
            let rpc = response
                .status
                .as_ref()
                .map(|status| status.code.to_string());
            assert_eq!(rpc.as_deref(), Some(code));
            assert_eq!(denied.body.is_empty(), is_native);
        }
    }
    for content_type in [
        "application/json",
        "application/grp",
        "application/grpcx",
        "Application/gRPC",
        "text/application/grpc",
    ] {
        let response = with(content_type, Message::get("/"));
        let denied = denied(&response);
        assert_eq!(header(&denied.headers, "grpc-status"), None);
        assert!(denied.body.starts_with('{'));
    }
}

#[test]
fn metadata_tells_identity_only_of_verified_keys() {
    let record = testing::record();
    let id = record.key_id;
    let key = OwnedKey::new(&record);
    let known = Denial::of(DenyReason::Revoked, Some(key.held()));
    let known = denial(&settings(), &known, None);
    let string = |text: &str| Kind::StringValue(text.to_owned());
    assert_eq!(text(&known, "decision"), Some(&string("deny")));
    assert_eq!(text(&known, "reason"), Some(&string("revoked")));
    assert_eq!(text(&known, "keyring"), Some(&string("payments")));
    assert_eq!(text(&known, "revision"), Some(&Kind::NumberValue(7.0)));
    assert_eq!(text(&known, "consumer"), Some(&string("checkout")));
    assert_eq!(text(&known, "key_id"), Some(&string(id.as_str())));
    assert_eq!(text(&known, "key_version"), Some(&Kind::NumberValue(1.0)));
    assert_eq!(text(&known, "key_state"), Some(&string("active")));
    let unknown = denial(&settings(), &Denial::of(DenyReason::UnknownKey, None), None);
    for key in ["consumer", "key_id", "key_version", "key_state"] {
        assert_eq!(text(&unknown, key), None);
    }
}

#[test]
fn metadata_tells_the_address_of_the_client_and_how_it_was_found() {
    let settings = Settings::new(behind_proxies()).expect("valid settings");
    let keyrings = keyrings(Vec::new(), true);
    let string = |text: &str| Kind::StringValue(text.to_owned());
    for (peer, address, from) in [
        ("10.0.0.1", Some("203.0.113.9"), "x-forwarded-for"),
        (
            "192.0.2.1",
            Some("192.0.2.1"),
            "source.address (not trusted)",
        ),
        ("", None, "source.address (not trusted)"),
    ] {
        let message = Message::get("/")
            .from(peer)
            .header("x-forwarded-for", "203.0.113.9");
        let optional = message.clone().extension("relatch.auth", "optional");
        for message in [message, optional] {
            let now = Timestamp::from_millis(5_000);
            let (_, response) = judge(&settings, &keyrings, &message.raw(), now, CONFIRMED_AT);
            let expected = address.map(string);
            assert_eq!(text(&response, "client_address"), expected.as_ref());
            assert_eq!(text(&response, "client_address_from"), Some(&string(from)));
        }
    }
    let unread = Message::get("/ ").raw();
    let (_, response) = judge(
        &settings,
        &keyrings,
        &unread,
        Timestamp::from_millis(0),
        CONFIRMED_AT,
    );
    assert_eq!(text(&response, "client_address_from"), None);
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
            "x-api-key",
            "x_caller"
        ]
    );
}

#[test]
fn a_target_is_set_without_the_credential_and_nothing_else_changes() {
    let ok = passed(
        parts(),
        |_| {},
        |secret| Message::get(format!("/a?b=%7e&&api%5Fkey={}", secret.expose())),
    );
    assert_eq!(header(&ok.headers, ":path"), Some("/a?b=%7e&"));
    assert!(ok.query_parameters_to_remove.is_empty());
}

#[test]
fn a_header_of_a_key_is_removed_even_if_envoy_does_not_show_it() {
    let bearer = |secret: &Secret| {
        Message::get("/").header("authorization", format!("Bearer {}", secret.expose()))
    };
    let ok = passed(parts(), |_| {}, bearer);
    for name in ["x-api-key", "authorization"] {
        assert!(ok.headers_to_remove.iter().any(|removed| removed == name));
    }
    // A header with a scheme may hold something else, which the upstream needs.
    let ok = passed(parts(), |_| {}, with_key);
    assert!(
        !ok.headers_to_remove
            .iter()
            .any(|removed| removed == "authorization")
    );
}

#[test]
fn what_surrounds_a_key_is_named() {
    let detail = |value: String| {
        let record = testing::record();
        let message = Message::get("/").header("x-api-key", value).joined();
        let now = Timestamp::from_millis(5_000);
        let keyrings = keyrings(vec![record], true);
        let (_, response) = judge(&settings(), &keyrings, &message, now, CONFIRMED_AT);
        let denied = denied(&response);
        assert_eq!(denied.status.map(|status| status.code), Some(401));
        let problem: serde_json::Value = serde_json::from_str(&denied.body).expect("JSON");
        assert_eq!(problem["reason"], "malformed_credential");
        problem["detail"].as_str().map(ToOwned::to_owned)
    };
    let key = "rlk_7Qm2Xc91TbKe_abc";
    for (value, expected) in [
        (
            format!("Bearer {key}"),
            Some("The key begins with the scheme Bearer: send the key alone"),
        ),
        (
            format!("\"{key}\""),
            Some("The key is in quotation marks: send the key alone"),
        ),
        (
            format!("{key}%0A"),
            Some("The key has a line end: send the key alone"),
        ),
        (key.to_owned(), None),
        (format!("{key}\u{e4}"), None),
    ] {
        assert_eq!(detail(value).as_deref(), expected);
    }
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
        notices: None,
        ..parts()
    };
    let ok = passed(silent, retiring, with_key);
    assert!(ok.response_headers_to_add.is_empty());
    let ok = passed(parts(), |_| {}, with_key);
    assert!(ok.response_headers_to_add.is_empty());
}

#[test]
fn deprecation_and_sunset_are_told_on_request_and_leave_the_upstreams() {
    let retiring = |record: &mut KeyRecord| {
        record.state = KeyState::Retiring;
        record.retiring_since = Some(Timestamp::from_millis(1_798_156_799_999));
        record.retires_at = Some(Timestamp::from_millis(1_798_761_600_999));
    };
    let told = |deprecation, sunset, change: &dyn Fn(&mut KeyRecord)| {
        let notices = Some(Notices {
            deprecation,
            sunset,
        });
        passed(SettingsParts { notices, ..parts() }, change, with_key)
    };
    let sent = |ok: &OkHttpResponse| {
        ["deprecation", "sunset"]
            .map(|name| header(&ok.response_headers_to_add, name).map(ToOwned::to_owned))
    };
    let deprecation = Some("@1798156799".to_owned());
    let sunset = Some("Fri, 01 Jan 2027 00:00:00 GMT".to_owned());
    let both = told(true, true, &retiring);
    assert_eq!(sent(&both), [deprecation.clone(), sunset.clone()]);
    for option in &both.response_headers_to_add {
        let name = option.header.as_ref().map(|header| header.key.as_str());
        if matches!(name, Some("deprecation" | "sunset")) {
            assert!(option.append.is_none(), "Envoy would append or overwrite");
            let add_if_absent = i32::from(HeaderAppendAction::AddIfAbsent);
            assert_eq!(option.append_action, add_if_absent);
        }
    }
    assert_eq!(sent(&told(true, false, &retiring)), [deprecation, None]);
    assert_eq!(sent(&told(false, true, &retiring)), [None, sunset.clone()]);
    assert_eq!(sent(&passed(parts(), retiring, with_key)), [None, None]);
    assert_eq!(sent(&told(true, true, &|_| {})), [None, None]);
    let unsaid = |record: &mut KeyRecord| {
        retiring(record);
        record.retiring_since = None;
    };
    assert_eq!(sent(&told(true, true, &unsaid)), [None, sunset]);
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
            "x-api-key",
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
#[test]
fn an_announced_end_that_has_passed_stays_announced() {
    let held = |record: &mut KeyRecord| {
        record.state = KeyState::Retiring;
        record.retires_at = Some(Timestamp::from_millis(4_000));
    };
    let notices = Some(Notices {
        deprecation: false,
        sunset: true,
    });
    let ok = passed(SettingsParts { notices, ..parts() }, held, with_key);
    let sent = |name| header(&ok.response_headers_to_add, name);
    assert_eq!(
        sent("api-key-rotation"),
        Some("version=1, state=retiring, sunset=@4")
    );
    assert_eq!(sent("sunset"), Some("Thu, 01 Jan 1970 00:00:04 GMT"));
}
