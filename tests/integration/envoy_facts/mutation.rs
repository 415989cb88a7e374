//! What an answer changes in a request that it allows, and in the response to it.

use envoy_types::pb::envoy::{
    config::core::v3::header_value_option::HeaderAppendAction::{
        self, AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExists, OverwriteIfExistsOrAdd,
    },
    service::auth::v3::{CheckResponse, OkHttpResponse},
};

use super::{Mesh, answering, answering_in_turn, with_each_envoy};
use crate::support::{
    client::Request,
    envoy::EnvoyOptions,
    scripted_authz::{Call, allowed, change, overwrite},
};

#[tokio::test]
async fn a_request_header_is_replaced_unless_append_is_true_whatever_append_action_says() {
    with_each_envoy(async |version| {
        let responses = changes().map(|(append, action)| OkHttpResponse {
            headers: vec![
                change("x-relatch-consumer", "ours", append, action),
                change("x-absent", "ours", append, action),
            ],
            ..OkHttpResponse::default()
        });
        let mesh = answering_in_turn(version, responses.map(allowed)).await;
        for (append, action) in changes() {
            let request = Request::get("/")
                .header("x-relatch-consumer", "forged")
                .header("x-relatch-consumer", "forged too");
            let seen = mesh.send(request).await.seen();
            let (present, absent) = if append == Some(true) {
                (vec!["forged,ours", "forged too"], vec![])
            } else {
                (vec!["ours"], vec!["ours"])
            };
            let what = format!("{append:?} {action:?}");
            assert_eq!(seen.values("x-relatch-consumer"), present, "{what}");
            assert_eq!(seen.values("x-absent"), absent, "{what}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_response_header_obeys_append_and_without_it_append_action() {
    with_each_envoy(async |version| {
        let responses = changes().map(|(append, action)| OkHttpResponse {
            response_headers_to_add: vec![
                change("content-type", "ours", append, action),
                change("api-key-rotation", "ours", append, action),
            ],
            ..OkHttpResponse::default()
        });
        let mesh = answering_in_turn(version, responses.map(allowed)).await;
        for (append, action) in changes() {
            let response = mesh.send(Request::get("/")).await;
            let appended = "application/json,ours";
            let (present, absent) = match (append, action) {
                (Some(true), _) | (None, AppendIfExistsOrAdd) => (appended, Some("ours")),
                (Some(false), _) | (None, OverwriteIfExistsOrAdd) => ("ours", Some("ours")),
                (None, AddIfAbsent) => ("application/json", Some("ours")),
                (None, OverwriteIfExists) => ("ours", None),
            };
            let what = format!("{append:?} {action:?}");
            assert_eq!(response.header("content-type"), Some(present), "{what}");
            assert_eq!(response.header("api-key-rotation"), absent, "{what}");
        }
    })
    .await;
}

#[tokio::test]
async fn the_raw_value_of_a_header_change_is_ignored() {
    with_each_envoy(async |version| {
        let mut raw = overwrite("x-relatch-consumer", "");
        let header = raw.header.as_mut().expect("a change has a header");
        header.raw_value = b"ours".to_vec();
        let response = OkHttpResponse {
            headers: vec![raw],
            ..OkHttpResponse::default()
        };
        let mesh = answering(version, Ok(allowed(response))).await;
        let request = Request::get("/").header("x-relatch-consumer", "forged");
        let seen = mesh.send(request).await.seen();
        assert_eq!(seen.values("x-relatch-consumer"), [""]);
    })
    .await;
}

#[tokio::test]
async fn of_two_changes_of_a_header_the_last_counts_and_one_also_removed_is_lost() {
    with_each_envoy(async |version| {
        let response = OkHttpResponse {
            headers: vec![
                overwrite("x-twice", "1"),
                overwrite("X-Twice", "2"),
                overwrite("x-removed", "ours"),
            ],
            headers_to_remove: vec!["x-removed".to_owned()],
            ..OkHttpResponse::default()
        };
        let mesh = answering(version, Ok(allowed(response))).await;
        let seen = mesh.send(Request::get("/")).await.seen();
        assert_eq!(seen.values("x-twice"), ["2"]);
        assert_eq!(seen.values("x-removed").len(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_header_is_removed_in_every_case_and_in_no_other_spelling() {
    const SPELLINGS: [&str; 4] = [
        "x-relatch-consumer",
        "x_relatch_consumer",
        "x.relatch.consumer",
        "x-relatch_consumer",
    ];
    with_each_envoy(async |version| {
        let responses = SPELLINGS.map(|removed| OkHttpResponse {
            headers_to_remove: vec![removed.to_uppercase()],
            ..OkHttpResponse::default()
        });
        let mesh = answering_in_turn(version, responses.map(allowed)).await;
        for removed in SPELLINGS {
            let request = SPELLINGS
                .iter()
                .fold(Request::get("/"), |request, spelling| {
                    request.header(spelling, "1").header(spelling, "2")
                });
            let seen = mesh.send(request).await.seen();
            for spelling in SPELLINGS {
                let left = if spelling == removed { 0 } else { 2 };
                assert_eq!(seen.values(spelling).len(), left, "{spelling}, {removed}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn pseudo_headers_and_host_cannot_be_removed() {
    with_each_envoy(async |version| {
        let names = [":path", ":method", ":authority", "host", "Host"];
        let response = OkHttpResponse {
            headers_to_remove: names.map(str::to_owned).to_vec(),
            ..OkHttpResponse::default()
        };
        let mesh = answering(version, Ok(allowed(response))).await;
        let request = Request::get("/p?a=1").header("host", "api.example.com");
        let seen = mesh.send(request).await.seen();
        assert_eq!(
            (seen.method.as_str(), seen.target.as_str()),
            ("GET", "/p?a=1")
        );
        assert_eq!(seen.values("host"), ["api.example.com"]);
    })
    .await;
}

#[tokio::test]
async fn a_value_that_is_no_header_value_fails_the_request() {
    with_each_envoy(async |version| {
        let response = OkHttpResponse {
            headers: vec![overwrite("x-relatch-consumer", "a\r\nx-forged: b")],
            ..OkHttpResponse::default()
        };
        let mesh = answering(version, Ok(allowed(response))).await;
        assert_eq!(mesh.send(Request::get("/")).await.status, 500);
        assert_eq!(mesh.upstream.requests(), 0);
    })
    .await;
}

#[tokio::test]
async fn removing_a_query_parameter_sorts_and_respells_the_others() {
    with_each_envoy(async |version| {
        let cases = [
            (
                "/p?b=2&api_key=K&a=1&b=1&c=%2f&flag&e=",
                "/p?a=1&b=2&b=1&c=%2f&e=&flag=",
            ),
            ("/p?api_key=K&z=1&api_key=L", "/p?z=1"),
            ("/p?api_key=K", "/p"),
            ("/p?", "/p"),
            // Even when there is nothing to remove.
            ("/p?b=2&&a", "/p?=&a=&b=2"),
        ];
        let mesh = answering(version, Ok(removing("api_key"))).await;
        for (target, left) in cases {
            assert_eq!(mesh.send(Request::get(target)).await.seen().target, left);
        }
    })
    .await;
}

#[tokio::test]
async fn a_query_parameter_is_removed_by_its_exact_undecoded_name() {
    with_each_envoy(async |version| {
        let cases = [
            ("api_key", "/p?api%5Fkey=K", "/p?api%5Fkey=K"),
            ("api%5Fkey", "/p?api%5Fkey=K", "/p"),
            ("api%5fkey", "/p?api%5Fkey=K", "/p?api%5Fkey=K"),
            ("api_key", "/p?API_KEY=K", "/p?API_KEY=K"),
            ("api_key", "/p?a=1;api_key=K", "/p?a=1;api_key=K"),
        ];
        let responses = cases.map(|(name, _, _)| removing(name));
        let mesh = answering_in_turn(version, responses).await;
        for (_, target, left) in cases {
            assert_eq!(mesh.send(Request::get(target)).await.seen().target, left);
        }
    })
    .await;
}

#[tokio::test]
async fn overwriting_the_path_leaves_the_rest_of_the_query_byte_for_byte() {
    with_each_envoy(async |version| {
        let cases = [
            (
                "/p?b=2&api_key=K&a=1&b=1&c=%2f&flag&e=&&",
                "/p?b=2&a=1&b=1&c=%2f&flag&e=&&",
            ),
            ("/p?api_key=K", "/p"),
            ("/p?api_key=K&", "/p?"),
            ("/p?a='\"<>\\&api_key=K", "/p?a='\"<>\\"),
        ];
        let responses = cases.map(|(_, left)| setting_path(left));
        let mesh = answering_in_turn(version, responses).await;
        for (target, left) in cases {
            let seen = mesh.send(Request::get(target)).await.seen();
            assert_eq!(seen.target, left);
            let mut values = seen.headers.iter().map(|(_, value)| value);
            assert!(values.all(|value| !value.contains("api_key")), "{seen:?}");
        }
        let log = mesh.envoy.access_log(cases.len()).await;
        for (line, (_, left)) in log.iter().zip(cases) {
            assert_eq!(line["path"], left);
        }
    })
    .await;
}

#[tokio::test]
async fn overwriting_the_path_leaves_the_route() {
    with_each_envoy(async |version| {
        let script = |_: &Call| Ok(setting_path("/there"));
        let routes = |options: EnvoyOptions| options.route("/here", &[]).route("/there", &[]);
        let mesh = Mesh::start_with(version, routes, script).await;
        let seen = mesh.send(Request::get("/here")).await.seen();
        assert_eq!(seen.target, "/there");
        assert_eq!(mesh.envoy.access_log(1).await[0]["route"], "/here");
    })
    .await;
}

#[tokio::test]
async fn query_parameters_are_removed_from_the_path_that_was_set() {
    with_each_envoy(async |version| {
        let response = OkHttpResponse {
            headers: vec![overwrite(":path", "/new?b=2&api_key=K&a=1")],
            query_parameters_to_remove: vec!["api_key".to_owned()],
            ..OkHttpResponse::default()
        };
        let mesh = answering(version, Ok(allowed(response))).await;
        let seen = mesh.send(Request::get("/old?api_key=K")).await.seen();
        assert_eq!(seen.target, "/new?a=1&b=2");
    })
    .await;
}

#[tokio::test]
async fn overwriting_the_cookie_header_replaces_every_cookie_line() {
    with_each_envoy(async |version| {
        let response = OkHttpResponse {
            headers: vec![overwrite("cookie", "a=1; b=2")],
            ..OkHttpResponse::default()
        };
        let mesh = answering(version, Ok(allowed(response))).await;
        let request = || {
            Request::get("/")
                .header("Cookie", "a=1; api_key=K")
                .header("cookie", "b=2")
        };
        for response in [mesh.send(request()).await, mesh.send_http2(request()).await] {
            assert_eq!(response.seen().values("cookie"), ["a=1; b=2"]);
        }
    })
    .await;
}

/// Envoy's two ways of saying how a header is changed, combined.
fn changes() -> impl Iterator<Item = (Option<bool>, HeaderAppendAction)> {
    let actions = [
        AppendIfExistsOrAdd,
        AddIfAbsent,
        OverwriteIfExistsOrAdd,
        OverwriteIfExists,
    ];
    [None, Some(true), Some(false)]
        .into_iter()
        .flat_map(move |append| actions.map(|action| (append, action)))
}

fn removing(query_parameter: &str) -> CheckResponse {
    allowed(OkHttpResponse {
        query_parameters_to_remove: vec![query_parameter.to_owned()],
        ..OkHttpResponse::default()
    })
}

fn setting_path(path: &str) -> CheckResponse {
    allowed(OkHttpResponse {
        headers: vec![overwrite(":path", path)],
        ..OkHttpResponse::default()
    })
}
