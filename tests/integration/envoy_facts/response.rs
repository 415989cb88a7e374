//! What an answer decides, and what the consumer and the observers get of it.

use std::{thread, time::Duration};

use envoy_types::pb::{
    envoy::{
        config::core::v3::header_value_option::HeaderAppendAction::AppendIfExistsOrAdd,
        service::auth::v3::{
            CheckResponse, DeniedHttpResponse, OkHttpResponse, check_response::HttpResponse,
        },
    },
    google::protobuf::{Struct, Value, value::Kind},
};
use tonic::Status;

use super::{Mesh, answering, answering_in_turn, with_each_envoy};
use crate::support::{
    client::{Request, Response},
    envoy::{EnvoyOptions, EnvoyVersion},
    otlp::OtlpReceiver,
    scripted_authz::{Call, allowed, change, denied, overwrite},
};

#[tokio::test]
async fn an_empty_response_allows() {
    with_each_envoy(async |version| {
        let mesh = answering(version, Ok(CheckResponse::default())).await;
        mesh.send(Request::get("/")).await.seen();
    })
    .await;
}

#[tokio::test]
async fn a_denied_response_with_an_ok_or_absent_status_allows() {
    with_each_envoy(async |version| {
        let statuses = [allowed(OkHttpResponse::default()).status, None];
        let responses = statuses.map(|status| CheckResponse {
            status,
            ..denied(401, DeniedHttpResponse::default())
        });
        let mesh = answering_in_turn(version, responses).await;
        mesh.send(Request::get("/")).await.seen();
        mesh.send(Request::get("/")).await.seen();
    })
    .await;
}

#[tokio::test]
async fn a_denial_is_403_unless_it_says_otherwise() {
    with_each_envoy(async |version| {
        let bare = |http_response| CheckResponse {
            http_response,
            ..denied(401, DeniedHttpResponse::default())
        };
        let contradiction = allowed(OkHttpResponse::default()).http_response;
        let no_status = HttpResponse::DeniedResponse(DeniedHttpResponse::default());
        let responses = [None, contradiction, Some(no_status)].map(bare);
        let mesh = answering_in_turn(version, responses).await;
        for _ in 0..3 {
            let response = mesh.send(Request::get("/")).await;
            assert_eq!((response.status, response.text().as_str()), (403, ""));
        }
        assert_eq!(mesh.upstream.requests(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_denial_reaches_the_consumer_as_it_was_given() {
    with_each_envoy(async |version| {
        let response = DeniedHttpResponse {
            headers: vec![
                overwrite("www-authenticate", "ApiKey realm=\"payments\""),
                overwrite("content-type", "application/problem+json"),
            ],
            body: "{\"reason\":\"unknown_key\"}".to_owned(),
            ..DeniedHttpResponse::default()
        };
        let mesh = answering(version, Ok(denied(401, response))).await;
        let response = mesh.send(Request::get("/")).await;
        assert_eq!(response.status, 401);
        assert_eq!(
            response.header("www-authenticate"),
            Some("ApiKey realm=\"payments\"")
        );
        assert_eq!(
            values(&response, "content-type"),
            ["application/problem+json"]
        );
        assert_eq!(response.header("content-length"), Some("24"));
        assert_eq!(response.text(), "{\"reason\":\"unknown_key\"}");
        assert_eq!(mesh.upstream.requests(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_header_of_a_denial_that_says_append_is_lost() {
    with_each_envoy(async |version| {
        let response = DeniedHttpResponse {
            headers: vec![
                change("x-lost", "1", Some(true), AppendIfExistsOrAdd),
                change("x-unsaid", "2", None, AppendIfExistsOrAdd),
                overwrite("x-kept", "3"),
            ],
            ..DeniedHttpResponse::default()
        };
        let mesh = answering(version, Ok(denied(401, response))).await;
        let response = mesh.send(Request::get("/")).await;
        assert_eq!(response.header("x-lost"), None);
        assert_eq!(response.header("x-unsaid"), Some("2"));
        assert_eq!(response.header("x-kept"), Some("3"));
    })
    .await;
}

#[tokio::test]
async fn a_denial_holds_also_where_failures_are_let_through() {
    with_each_envoy(async |version| {
        let response = denied(503, DeniedHttpResponse::default());
        let script = move |_: &Call| Ok(response.clone());
        let mesh = Mesh::start_with(version, EnvoyOptions::failure_mode_allow, script).await;
        assert_eq!(mesh.send(Request::get("/")).await.status, 503);
        assert_eq!(mesh.upstream.requests(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_failed_call_is_no_denial_whatever_its_status() {
    with_each_envoy(async |version| {
        let fail = |call: &Call| match call.http().path.as_str() {
            "/internal" => Err(Status::internal("broken")),
            "/permission-denied" => Err(Status::permission_denied("no")),
            _ => Err(Status::unauthenticated("no")),
        };
        let closed = Mesh::start(version, fail).await;
        let open = Mesh::start_with(version, EnvoyOptions::failure_mode_allow, fail).await;
        for path in ["/internal", "/permission-denied", "/unauthenticated"] {
            assert_eq!(closed.send(Request::get(path)).await.status, 503);
            open.send(Request::get(path)).await.seen();
        }
        assert_eq!(closed.upstream.requests(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_past_its_timeout_is_a_failed_call() {
    with_each_envoy(async |version| {
        let timeout = Duration::from_millis(40);
        let slow = move |_: &Call| {
            // Long after the timeout, also where Envoy gets no processor for a while.
            thread::sleep(timeout * 50);
            Ok(allowed(OkHttpResponse::default()))
        };
        let options = |options: EnvoyOptions| options.timeout(timeout);
        let mesh = Mesh::start_with(version, options, slow).await;
        assert_eq!(mesh.send(Request::get("/")).await.status, 503);
        assert_eq!(mesh.upstream.requests(), 0);
        let log = mesh.envoy.access_log(1).await;
        assert_eq!(log[0]["details"], "ext_authz_error");

        let options = |options: EnvoyOptions| options.timeout(timeout).failure_mode_allow();
        let mesh = Mesh::start_with(version, options, slow).await;
        mesh.send(Request::get("/")).await.seen();
    })
    .await;
}

#[tokio::test]
async fn an_error_response_is_a_denial_to_1_36_and_a_failed_call_to_1_40() {
    with_each_envoy(async |version| {
        let error = CheckResponse {
            http_response: Some(HttpResponse::ErrorResponse(DeniedHttpResponse::default())),
            ..denied(403, DeniedHttpResponse::default())
        };
        let script = move |_: &Call| Ok(error.clone());
        let mesh = Mesh::start_with(version, EnvoyOptions::failure_mode_allow, script).await;
        let status = mesh.send(Request::get("/")).await.status;
        match version {
            EnvoyVersion::V1_36 => assert_eq!(status, 403),
            EnvoyVersion::V1_40 => assert_eq!(status, 200),
        }
    })
    .await;
}

#[tokio::test]
async fn dynamic_metadata_reaches_the_access_log_and_the_span_of_allowed_and_denied_requests() {
    with_each_envoy(async |version| {
        let collector = OtlpReceiver::start().await;
        let tracing = |options: EnvoyOptions| options.tracing(collector.addr());
        let script = |call: &Call| {
            let response = if call.header("x-api-key").is_some() {
                allowed(OkHttpResponse::default())
            } else {
                denied(401, DeniedHttpResponse::default())
            };
            let fields = [
                ("consumer", Kind::StringValue("acme".to_owned())),
                ("key_version", Kind::NumberValue(3.0)),
                ("revision", Kind::NumberValue(12_345_678_901.0)),
            ];
            Ok(CheckResponse {
                dynamic_metadata: Some(metadata(&fields)),
                ..response
            })
        };
        let mesh = Mesh::start_with(version, tracing, script).await;
        mesh.send(Request::get("/").header("x-api-key", "K")).await;
        mesh.send(Request::get("/")).await;
        let log = mesh.envoy.access_log(2).await;
        assert_eq!([&log[0]["status"], &log[1]["status"]], [200, 401]);
        for line in log {
            assert_eq!(line["consumer"], "acme");
            assert_eq!(line["key_version"], 3);
            assert_eq!(line["authz"]["revision"], 12_345_678_901_u64);
            assert!(line["reason"].is_null(), "a field that was not set");
        }
        for status in ["200", "401"] {
            let span = collector
                .span(|span| span.text("http.status_code") == Some(status))
                .await;
            assert_eq!(span.text("auth.consumer.id"), Some("acme"));
        }
    })
    .await;
}

#[tokio::test]
async fn the_query_of_a_denied_request_stays_in_envoys_access_log_and_span() {
    with_each_envoy(async |version| {
        let collector = OtlpReceiver::start().await;
        let tracing = |options: EnvoyOptions| options.tracing(collector.addr());
        let script = |_: &Call| Ok(denied(401, DeniedHttpResponse::default()));
        let mesh = Mesh::start_with(version, tracing, script).await;
        mesh.send(Request::get("/p?api_key=K")).await;
        assert_eq!(mesh.envoy.access_log(1).await[0]["path"], "/p?api_key=K");
        let span = collector
            .span(|span| span.text("http.status_code") == Some("401"))
            .await;
        let url = span.text("http.url").expect("Envoy names the URL");
        assert!(url.ends_with("/p?api_key=K"), "{url}");
    })
    .await;
}

fn values<'a>(response: &'a Response, name: &str) -> Vec<&'a str> {
    let lines = response.headers.iter().filter(|(other, _)| other == name);
    lines
        .map(|(_, value)| str::from_utf8(value).expect("the script's headers are text"))
        .collect()
}

fn metadata(fields: &[(&str, Kind)]) -> Struct {
    let field = |(name, kind): &(&str, Kind)| {
        let value = Value {
            kind: Some(kind.clone()),
        };
        ((*name).to_owned(), value)
    };
    Struct {
        fields: fields.iter().map(field).collect(),
    }
}
