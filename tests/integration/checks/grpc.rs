//! Denials that clients of gRPC and gRPC-Web understand, and that do not make them retry.

use super::{Mesh, reason_of};
use crate::support::{
    client::{Request, Response},
    envoy::EnvoyOptions,
};

const GRPC: &str = "application/grpc+proto";

/// The status and the message of an answer without a message.
fn status(response: &Response) -> (Option<&str>, Option<&str>) {
    let header = |name| response.header(name);
    (header("grpc-status"), header("grpc-message"))
}

/// A call with an empty message.
fn call(target: &str, content_type: &str) -> Request {
    let message: &[u8] = if content_type.starts_with("application/grpc-web-text") {
        b"AAAAAAA="
    } else {
        b"\0\0\0\0\0"
    };
    Request::post(target, message)
        .header("content-type", content_type)
        .header("accept", content_type)
}

#[tokio::test]
async fn a_denied_call_gets_a_status_of_grpc() {
    let mesh = Mesh::start_with("failed_credentials: { per_second: 1, burst: 1 }\n").await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        let send = async |request: Request| {
            let response = gate.send_http2(request).await;
            assert_eq!(response.status, 200, "{}", response.text());
            assert_eq!(response.header("content-type"), Some("application/grpc"));
            assert!(response.body.is_empty());
            response
        };
        let keyed = |target| call(target, GRPC).header("x-api-key", &key.secret);
        for (request, code, message) in [
            (call("/a.B/C", GRPC), "16", "An API key is required"),
            (
                keyed("/orders"),
                "7",
                "The API key does not hold the scopes that this route needs",
            ),
            (keyed("/odd"), "3", "The request cannot be understood"),
            (keyed("/elsewhere"), "14", "No keyring serves this route"),
        ] {
            let response = send(request).await;
            assert_eq!(status(&response), (Some(code), Some(message)));
        }
        let challenged = send(call("/a.B/C", GRPC)).await;
        let challenge = challenged.header("www-authenticate");
        assert_eq!(challenge, Some("Bearer realm=\"payments\""));
        let wrong = || call("/a.B/C", GRPC).header("x-api-key", "wrong");
        let mut codes = Vec::new();
        for _ in 0..5 {
            let response = send(wrong()).await;
            codes.extend(status(&response).0.map(ToOwned::to_owned));
        }
        assert!(codes.iter().any(|code| code == "8"), "{codes:?}");
        assert!(
            codes.iter().all(|code| code == "8" || code == "16"),
            "{codes:?}"
        );
        let seen = gate.send_http2(keyed("/a.B/C")).await.seen();
        assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
    })
    .await;
}

#[tokio::test]
async fn a_denied_call_of_grpc_web_gets_it_too() {
    let mesh = Mesh::start().await;
    let setup = |options: EnvoyOptions| options.grpc_web();
    mesh.through_each_version(setup, async |gate| {
        for (content_type, answer) in [
            ("application/grpc-web+proto", "application/grpc-web+proto"),
            (
                "application/grpc-web-text",
                "application/grpc-web-text+proto",
            ),
        ] {
            let response = gate.send(call("/a.B/C", content_type)).await;
            assert_eq!(response.status, 200, "{}", response.text());
            assert_eq!(response.header("content-type"), Some(answer));
            let expected = (Some("16"), Some("An API key is required"));
            assert_eq!(status(&response), expected);
        }
    })
    .await;
    // Without the filter, Envoy sees no gRPC, and changes nothing.
    let gate = mesh.newest().await;
    let response = gate.send(call("/a.B/C", "application/grpc-web")).await;
    assert_eq!(response.status, 401);
    assert_eq!(reason_of(&response), "missing_credential");
    assert_eq!(status(&response).0, Some("16"));
}
