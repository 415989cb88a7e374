//! Compares the messages of relatch with Envoy's own declaration of them.

use envoy_types::pb::envoy::{
    config::core::v3::{
        Address as EnvoyAddress, HeaderMap as EnvoyHeaderMap, HeaderValue as EnvoyHeaderValue,
        SocketAddress as EnvoySocketAddress, address,
        header_value_option::HeaderAppendAction as EnvoyAppendAction,
    },
    service::auth::v3::{
        AttributeContext as EnvoyAttributes, CheckRequest as EnvoyRequest,
        CheckResponse as EnvoyResponse,
        attribute_context::{HttpRequest, Peer, Request},
        check_response::HttpResponse as EnvoyHttpResponse,
    },
};
use prost::Message as _;

use super::{
    Outcome,
    question::Question,
    request::CheckInput,
    testing::{CONFIRMED_AT, Message, judge, keyrings, settings},
};
use crate::{
    key::{KeyId, KeyState, Timestamp, testing},
    proto::auth::CheckResponse,
};

/// A check as Envoy 1.40 sent it for a GET with twelve headers, behind the five bytes that precede
/// a gRPC message.
const RECORDED: &[u8] = include_bytes!("../../tests/data/check-request.grpc");

fn reencoded(response: &CheckResponse) -> EnvoyResponse {
    EnvoyResponse::decode(response.encode_to_vec().as_slice()).expect("the same message")
}

fn envoy_request(http: HttpRequest) -> EnvoyRequest {
    let address = EnvoyAddress {
        address: Some(address::Address::SocketAddress(EnvoySocketAddress {
            address: "2001:db8::7".to_owned(),
            ..EnvoySocketAddress::default()
        })),
    };
    let extensions = [("relatch.keyring", "payments"), ("relatch.scopes", "read")];
    EnvoyRequest {
        attributes: Some(EnvoyAttributes {
            source: Some(Peer {
                address: Some(address),
                principal: "spiffe://unread".to_owned(),
                ..Peer::default()
            }),
            request: Some(Request {
                time: None,
                http: Some(http),
            }),
            context_extensions: extensions
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            ..EnvoyAttributes::default()
        }),
    }
}

fn http_request() -> HttpRequest {
    HttpRequest {
        id: "unread".to_owned(),
        method: "POST".to_owned(),
        path: "/a?b=c".to_owned(),
        host: "api.example.com:443".to_owned(),
        scheme: "https".to_owned(),
        protocol: "HTTP/2".to_owned(),
        body: "unread".to_owned(),
        size: -1,
        ..HttpRequest::default()
    }
}

#[test]
fn the_recorded_request_is_read() {
    let request = &RECORDED[5..];
    let input = CheckInput::read(request).expect("a request");
    assert!(input.joins_duplicates());
    let keys: Vec<&[u8]> = input.values("x-api-key").collect();
    assert_eq!(keys, [b"ak_live_0123456789abcdef0123456789abcdef"]);
    assert_eq!(input.method(), b"GET");
    assert!(input.source().is_some_and(|source| source.is_loopback()));
    let settings = settings();
    let question = Question::read(&settings, request).expect("a question");
    assert_eq!(question.keyring(), Some("payments"));

    let same = EnvoyRequest::decode(&RECORDED[5..]).expect("a request");
    let http = same.attributes.and_then(|a| a.request).and_then(|r| r.http);
    let http = http.expect("an HTTP request");
    assert_eq!(input.path(), http.path.as_bytes());
    assert_eq!(input.host(), http.host.as_bytes());
    assert_eq!(input.headers().count(), http.headers.len());
}

#[test]
fn a_request_with_joined_headers_decodes() {
    let headers = [("x-api-key", "K"), ("accept", "*/*")];
    let request = envoy_request(HttpRequest {
        headers: headers
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..http_request()
    })
    .encode_to_vec();
    let input = CheckInput::read(&request).expect("a request");
    assert_eq!(input.values("x-api-key").collect::<Vec<_>>(), [b"K"]);
    assert_eq!(input.headers().count(), 2);
    assert_eq!(input.path(), b"/a?b=c");
    assert_eq!(input.host(), b"api.example.com:443");
    assert_eq!(input.method(), b"POST");
    assert_eq!(
        input.source().map(|source| source.to_string()).as_deref(),
        Some("2001:db8::7")
    );
    let mut extensions: Vec<_> = input.extensions().collect();
    extensions.sort_unstable();
    let expected: [(&[u8], &[u8]); 2] = [
        (b"relatch.keyring", b"payments"),
        (b"relatch.scopes", b"read"),
    ];
    assert_eq!(extensions, expected);
}

#[test]
fn a_request_with_raw_headers_decodes() {
    let header = |value: &[u8]| EnvoyHeaderValue {
        key: "x-api-key".to_owned(),
        raw_value: value.to_vec(),
        ..EnvoyHeaderValue::default()
    };
    let request = envoy_request(HttpRequest {
        header_map: Some(EnvoyHeaderMap {
            headers: vec![header(b"K"), header(b"\xff")],
        }),
        ..http_request()
    })
    .encode_to_vec();
    let input = CheckInput::read(&request).expect("a request");
    assert!(!input.joins_duplicates());
    let values: Vec<&[u8]> = input.values("x-api-key").collect();
    assert_eq!(values, [&b"K"[..], b"\xff"]);
}

#[test]
fn answers_mean_the_same_to_envoy() {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let mut record = testing::record_of(&secret);
    record.state = KeyState::Retiring;
    record.retires_at = Some(Timestamp::from_millis(9_000));
    let keyrings = keyrings(vec![record], true);
    let answer = |key: &str| {
        let request = Message::get(format!("/?api_key={key}&b")).raw();
        let now = Timestamp::from_millis(5_000);
        let (judged, response) = judge(&settings(), &keyrings, &request, now, CONFIRMED_AT);
        (judged.outcome, reencoded(&response))
    };

    let (outcome, allowed) = answer(secret.expose());
    assert_eq!(outcome, Outcome::Allowed);
    assert_eq!(allowed.status.map(|status| status.code), Some(0));
    let Some(EnvoyHttpResponse::OkResponse(ok)) = allowed.http_response else {
        panic!("not allowed");
    };
    let consumer = &ok.headers[0];
    let header = consumer.header.as_ref().expect("a header");
    assert_eq!(
        (&*header.key, &*header.value),
        ("x-relatch-consumer", "checkout")
    );
    assert_eq!(
        consumer.append_action(),
        EnvoyAppendAction::OverwriteIfExistsOrAdd
    );
    #[expect(deprecated, reason = "it is what older versions of Envoy obey")]
    let append = consumer.append.map(|append| append.value);
    assert_eq!(append, Some(false));
    assert_eq!(ok.headers_to_remove, ["x-relatch-scopes", "x-api-key"]);
    let target = ok.headers.last().and_then(|option| option.header.as_ref());
    let target = target.map(|header| (&*header.key, &*header.value));
    assert_eq!(target, Some((":path", "/?b")));
    let added = ok.response_headers_to_add[0].header.as_ref();
    assert_eq!(
        added.map(|header| &*header.value),
        Some("version=1, state=retiring, sunset=@9")
    );
    let metadata = allowed.dynamic_metadata.expect("metadata");
    assert!(metadata.fields.contains_key("key_version"));

    let (_, denied) = answer("wrong");
    assert_eq!(denied.status.map(|status| status.code), Some(16));
    let Some(EnvoyHttpResponse::DeniedResponse(denied)) = denied.http_response else {
        panic!("not denied");
    };
    assert_eq!(denied.status.map(|status| status.code), Some(401));
    assert!(denied.body.contains("\"reason\":\"malformed_credential\""));
    let names = denied
        .headers
        .iter()
        .filter_map(|option| option.header.as_ref());
    assert!(
        names
            .map(|header| &*header.key)
            .any(|name| name == "www-authenticate")
    );
}
