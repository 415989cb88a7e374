//! What a Check tells about a request.

use std::net::{IpAddr, UdpSocket};

use envoy_types::pb::envoy::{
    config::core::v3::address::Address, service::auth::v3::AttributeContext,
};

use super::{EnvoyVersion, Mesh, allow, with_each_envoy};
use crate::support::{
    client::Request,
    envoy::{Envoy, EnvoyOptions},
    otlp::OtlpReceiver,
    reserved::own_address,
    scripted_authz::{Call, ScriptedAuthz},
    upstream::Upstream,
};

#[tokio::test]
async fn header_names_are_in_lower_case_and_duplicates_are_joined_with_a_comma() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        let request = Request::get("/")
            .header("X-API-Key", "one")
            .header("x-api-key", " two ");
        mesh.send(request).await;
        let call = mesh.authz.last_call();
        assert_eq!(call.header("x-api-key"), Some("one,two"));
        assert_eq!(call.http().header_map, None);
    })
    .await;
}

#[tokio::test]
async fn bytes_that_are_no_utf_8_are_replaced_by_an_exclamation_mark() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        mesh.send(Request::get("/").header("x-api-key", b"a\xffb\xc3\xbcc"))
            .await;
        assert_eq!(mesh.authz.last_call().header("x-api-key"), Some("a!büc"));
    })
    .await;
}

#[tokio::test]
async fn with_raw_headers_each_line_stands_apart_and_the_map_is_empty() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start_with(version, EnvoyOptions::raw_headers, allow).await;
        let request = Request::get("/")
            .header("X-API-Key", "one,two")
            .header("x-api-key", b"a\xffb");
        mesh.send(request).await;
        let call = mesh.authz.last_call();
        let lines: [&[u8]; 2] = [b"one,two", b"a\xffb"];
        assert_eq!(call.raw_header("x-api-key"), lines);
        assert_eq!(call.http().headers.len(), 0);
        let headers = call.http().header_map.iter().flat_map(|map| &map.headers);
        assert!(headers.into_iter().all(|header| header.value.is_empty()));
    })
    .await;
}

#[tokio::test]
async fn the_lines_of_authorization_are_joined_even_when_raw() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start_with(version, EnvoyOptions::raw_headers, allow).await;
        let request = Request::get("/")
            .header("authorization", "Basic dTpw")
            .header("authorization", "Bearer K");
        mesh.send(request.clone()).await;
        mesh.send_http2(request).await;
        for call in mesh.authz.calls() {
            let line: &[u8] = b"Basic dTpw,Bearer K";
            assert_eq!(call.raw_header("authorization"), [line]);
        }
    })
    .await;
}

#[tokio::test]
async fn cookie_lines_of_http_1_are_joined_with_a_comma_and_stand_apart_when_raw() {
    with_each_envoy(async |version| {
        let request = || {
            Request::get("/")
                .header("cookie", "a=1; api_key=K")
                .header("cookie", "b=2")
        };
        let mesh = Mesh::start(version, allow).await;
        mesh.send(request()).await;
        let call = mesh.authz.last_call();
        assert_eq!(call.header("cookie"), Some("a=1; api_key=K,b=2"));

        let mesh = Mesh::start_with(version, EnvoyOptions::raw_headers, allow).await;
        mesh.send(request()).await;
        let lines: [&[u8]; 2] = [b"a=1; api_key=K", b"b=2"];
        assert_eq!(mesh.authz.last_call().raw_header("cookie"), lines);
    })
    .await;
}

#[tokio::test]
async fn cookie_crumbs_of_http_2_are_one_line_joined_with_a_semicolon() {
    with_each_envoy(async |version| {
        let request = || {
            Request::get("/")
                .header("cookie", "a=1")
                .header("cookie", "api_key=K")
                .header("cookie", "b=2")
        };
        let mesh = Mesh::start(version, allow).await;
        mesh.send_http2(request()).await;
        let call = mesh.authz.last_call();
        assert_eq!(call.header("cookie"), Some("a=1; api_key=K; b=2"));

        let mesh = Mesh::start_with(version, EnvoyOptions::raw_headers, allow).await;
        mesh.send_http2(request()).await;
        let lines: [&[u8]; 1] = [b"a=1; api_key=K; b=2"];
        assert_eq!(mesh.authz.last_call().raw_header("cookie"), lines);
    })
    .await;
}

#[tokio::test]
async fn spellings_that_a_framework_folds_together_are_told_apart_and_reach_the_upstream() {
    const SPELLINGS: [&str; 5] = [
        "x_relatch_consumer",
        "x.relatch.consumer",
        "x-relatch_consumer",
        "x~relatch~consumer",
        "x-relatch-consumer",
    ];
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        let request = SPELLINGS
            .iter()
            .fold(Request::get("/"), |request, spelling| {
                request.header(spelling.to_uppercase(), "forged")
            });
        let seen = mesh.send(request).await.seen();
        for spelling in SPELLINGS {
            assert_eq!(mesh.authz.last_call().header(spelling), Some("forged"));
            assert_eq!(seen.values(spelling), ["forged"]);
        }
    })
    .await;
}

#[tokio::test]
async fn a_name_with_a_space_before_its_colon_is_refused_unasked() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        let response = mesh
            .send(Request::get("/").header("x-relatch-consumer ", "forged"))
            .await;
        assert_eq!(response.status, 400);
        assert_eq!(mesh.authz.calls().len(), 0);
    })
    .await;
}

#[tokio::test]
async fn headers_that_connection_names_reach_neither_the_check_nor_the_upstream() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        let request = Request::get("/")
            .header("connection", "x-api-key")
            .header("x-api-key", "K");
        let seen = mesh.send(request).await.seen();
        assert_eq!(mesh.authz.last_call().header("x-api-key"), None);
        assert_eq!(mesh.authz.last_call().header("connection"), None);
        assert_eq!(seen.values("x-api-key").len(), 0);
    })
    .await;
}

#[tokio::test]
async fn the_path_carries_the_undecoded_query_and_the_query_field_is_empty() {
    const TARGET: &str = "/a//../p%2F?b=2&api%5Fkey=K&c=%2f&flag&e=&x='\"<>\\";
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        let seen = mesh.send(Request::get(TARGET)).await.seen();
        let call = mesh.authz.last_call();
        assert_eq!(call.http().path, TARGET);
        assert_eq!(call.header(":path"), Some(TARGET));
        assert_eq!(call.http().query, "");
        assert_eq!(seen.target, TARGET);
    })
    .await;
}

#[tokio::test]
async fn a_path_beyond_ascii_is_refused_over_http_1_and_passes_over_http_2() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        let request = || Request::get("/p?name=ü");
        assert_eq!(mesh.send(request()).await.status, 400);
        assert_eq!(mesh.authz.calls().len(), 0);
        assert_eq!(mesh.send_http2(request()).await.seen().target, "/p?name=ü");
        assert_eq!(mesh.authz.last_call().http().path, "/p?name=ü");
    })
    .await;
}

#[tokio::test]
async fn a_fragment_is_refused_unasked() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        let response = mesh.send(Request::get("/p?a=1#api_key=K")).await;
        assert_eq!(response.status, 400);
        assert_eq!(mesh.authz.calls().len(), 0);
    })
    .await;
}

#[tokio::test]
async fn the_body_stays_with_envoy() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        mesh.send(Request::post("/", b"api_key=K")).await.seen();
        let call = mesh.authz.last_call();
        assert_eq!(call.http().method, "POST");
        assert_eq!((call.http().body.len(), call.http().raw_body.len()), (0, 0));
    })
    .await;
}

#[tokio::test]
async fn the_source_address_is_the_peers_whatever_x_forwarded_for_says() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        mesh.send(Request::get("/").header("x-forwarded-for", "203.0.113.9"))
            .await;
        let call = mesh.authz.last_call();
        assert_eq!(source(&call), "127.0.0.1");
        assert_eq!(call.header("x-forwarded-for"), Some("203.0.113.9"));
    })
    .await;
}

#[tokio::test]
async fn with_use_remote_address_the_peer_is_appended_to_x_forwarded_for() {
    with_each_envoy(async |version| {
        let (mesh, peer) = (remote(version).await, own_address());
        for (lines, expected) in [
            (&[][..], vec![peer.to_string()]),
            (
                &["203.0.113.9, _hidden"],
                vec![
                    "203.0.113.9".to_owned(),
                    "_hidden".to_owned(),
                    peer.to_string(),
                ],
            ),
            (
                &["203.0.113.9", "203.0.113.8"],
                vec![
                    "203.0.113.9".to_owned(),
                    "203.0.113.8".to_owned(),
                    peer.to_string(),
                ],
            ),
        ] {
            let request = lines.iter().fold(Request::get("/"), |request, line| {
                request.header("x-forwarded-for", line)
            });
            request.send_from(peer.into(), mesh.envoy.addr()).await;
            let call = mesh.authz.last_call();
            assert_eq!(forwarded_for(&call), expected);
            assert_eq!(source(&call), peer.to_string());
        }
    })
    .await;
}

#[tokio::test]
async fn for_a_peer_on_its_own_machine_an_address_of_this_machine_is_appended() {
    with_each_envoy(async |version| {
        let mesh = remote(version).await;
        let request = Request::get("/").header("x-forwarded-for", "203.0.113.9");
        mesh.send(request).await;
        let call = mesh.authz.last_call();
        assert_eq!(source(&call), "127.0.0.1");
        let addresses = forwarded_for(&call);
        let [client, own] = &addresses[..] else {
            panic!("not two addresses: {addresses:?}");
        };
        assert_eq!(client, "203.0.113.9");
        // It is an address of this machine, and not loopback if there is another one.
        let own: IpAddr = own.parse().expect("an address");
        assert!(UdpSocket::bind((own, 0)).is_ok(), "{own}");
    })
    .await;
}

#[tokio::test]
async fn the_external_address_is_set_for_external_requests_only_and_else_the_clients() {
    const NAME: &str = "x-envoy-external-address";
    with_each_envoy(async |version| {
        let [internal, external] = [own_address(), own_address()];
        let options =
            |options: EnvoyOptions| options.use_remote_address().internal(internal.into());
        let mesh = Mesh::start_with(version, options, allow).await;
        for (peer, expected) in [
            (external, external.to_string()),
            (internal, "203.0.113.66".to_owned()),
        ] {
            let forged = Request::get("/").header(NAME, "203.0.113.66");
            forged.send_from(peer.into(), mesh.envoy.addr()).await;
            let call = mesh.authz.last_call();
            assert_eq!(call.header(NAME), Some(expected.as_str()));
        }
    })
    .await;
}

#[tokio::test]
async fn context_extensions_are_those_of_the_route() {
    with_each_envoy(async |version| {
        let routes = |options: EnvoyOptions| {
            options
                .route("/partners", &[("relatch.keyring", "partners")])
                .route(
                    "/payments",
                    &[("relatch.keyring", "payments"), ("relatch.scopes", "a b")],
                )
        };
        let mesh = Mesh::start_with(version, routes, allow).await;
        for (path, expected) in [
            ("/partners/1", vec![("relatch.keyring", "partners")]),
            (
                "/payments",
                vec![("relatch.keyring", "payments"), ("relatch.scopes", "a b")],
            ),
            ("/", vec![]),
        ] {
            mesh.send(Request::get(path)).await;
            let extensions = attributes(&mesh.authz.last_call()).context_extensions;
            let mut extensions: Vec<_> = extensions
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()))
                .collect();
            extensions.sort_unstable();
            assert_eq!(extensions, expected, "{path}");
        }
    })
    .await;
}

#[tokio::test]
async fn the_trace_context_of_the_check_is_in_the_metadata_and_the_callers_in_the_request() {
    const CALLER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    with_each_envoy(async |version| {
        let collector = OtlpReceiver::start().await;
        let tracing = |options: EnvoyOptions| options.tracing(collector.addr());
        let mesh = Mesh::start_with(version, tracing, allow).await;
        let request = Request::get("/")
            .header("traceparent", CALLER)
            .header("tracestate", "vendor=1");
        mesh.send(request).await;
        let call = mesh.authz.last_call();
        assert_eq!(call.header("traceparent"), Some(CALLER));
        assert_eq!(call.metadata("tracestate"), Some("vendor=1"));

        // Envoy has a span of its own around the Check, and that is the one to be the parent of ours.
        let check = collector
            .span(|span| span.text("ext_authz_status") == Some("ext_authz_ok"))
            .await;
        assert_eq!(check.service, "envoy");
        let parent = call.metadata("traceparent").expect("Envoy traces");
        let (trace_id, span_id) = (hex(&check.span.trace_id), hex(&check.span.span_id));
        assert_eq!(parent, format!("00-{trace_id}-{span_id}-01"));
        assert_eq!(trace_id, "0af7651916cd43dd8448eb211c80319c");
        assert_ne!(span_id, "b7ad6b7169203331");
    })
    .await;
}

#[tokio::test]
async fn a_callers_decision_not_to_sample_reaches_the_check() {
    with_each_envoy(async |version| {
        let collector = OtlpReceiver::start().await;
        let tracing = |options: EnvoyOptions| options.tracing(collector.addr());
        let mesh = Mesh::start_with(version, tracing, allow).await;
        let caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
        mesh.send(Request::get("/").header("traceparent", caller))
            .await;
        let call = mesh.authz.last_call();
        let parent = call.metadata("traceparent").expect("Envoy traces");
        assert!(
            parent.starts_with("00-0af7651916cd43dd8448eb211c80319c-"),
            "{parent}"
        );
        assert!(parent.ends_with("-00"), "{parent}");
    })
    .await;
}

#[tokio::test]
async fn envoys_own_trace_begins_with_an_empty_tracestate_and_nothing_in_the_request() {
    with_each_envoy(async |version| {
        let collector = OtlpReceiver::start().await;
        let tracing = |options: EnvoyOptions| options.tracing(collector.addr());
        let mesh = Mesh::start_with(version, tracing, allow).await;
        mesh.send(Request::get("/")).await;
        let call = mesh.authz.last_call();
        assert!(call.metadata("traceparent").is_some());
        assert_eq!(call.metadata("tracestate"), Some(""));
        assert_eq!(call.header("traceparent"), None);
    })
    .await;
}

#[tokio::test]
async fn without_tracing_only_the_request_has_a_trace_context() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        let caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        mesh.send(Request::get("/").header("traceparent", caller))
            .await;
        let call = mesh.authz.last_call();
        assert_eq!(call.metadata("traceparent"), None);
        assert_eq!(call.header("traceparent"), Some(caller));
    })
    .await;
}

#[tokio::test]
async fn the_deadline_of_the_check_is_in_its_metadata() {
    with_each_envoy(async |version| {
        let mesh = Mesh::start(version, allow).await;
        mesh.send(Request::get("/")).await;
        let call = mesh.authz.last_call();
        assert_eq!(call.metadata("grpc-timeout"), Some("30000m"));
        assert_eq!(
            call.metadata("x-envoy-expected-rq-timeout-ms"),
            Some("30000")
        );
        assert_eq!(call.header("x-envoy-expected-rq-timeout-ms"), None);
    })
    .await;
}

#[tokio::test]
async fn a_check_comes_over_a_unix_socket_as_well() {
    with_each_envoy(async |version| {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let socket = directory.path().join("authz.sock");
        let upstream = Upstream::start().await;
        let authz = ScriptedAuthz::start_on_unix_socket(&socket, allow);
        let options = EnvoyOptions::new(socket, upstream.addr()).version(version);
        let envoy = Envoy::start(options).await;
        Request::get("/").send(envoy.addr()).await.seen();
        assert_eq!(authz.calls().len(), 1);
    })
    .await;
}

/// An Envoy that appends its peer to `x-forwarded-for`.
async fn remote(version: EnvoyVersion) -> Mesh {
    Mesh::start_with(version, EnvoyOptions::use_remote_address, allow).await
}

/// The peer of Envoy, as the Check tells it.
fn source(call: &Call) -> String {
    let address = attributes(call)
        .source
        .and_then(|peer| peer.address?.address);
    let Some(Address::SocketAddress(address)) = address else {
        panic!("not a socket address: {address:?}");
    };
    address.address
}

/// The elements of `x-forwarded-for`.
fn forwarded_for(call: &Call) -> Vec<String> {
    let header = call.header("x-forwarded-for").unwrap_or_default();
    let elements = header.split(',').map(str::trim);
    elements.map(str::to_owned).collect()
}

fn attributes(call: &Call) -> AttributeContext {
    call.request
        .attributes
        .clone()
        .expect("Envoy sends attributes")
}

fn hex(id: &[u8]) -> String {
    let digit = |nibble| char::from_digit(u32::from(nibble), 16).expect("half a byte is a digit");
    id.iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)])
        .collect()
}
