//! Requests of any size get a decision: a gRPC error would be a failure, which an Envoy may let pass.

use super::{Mesh, reason_of};
use crate::support::{client::Request, envoy::EnvoyOptions, otlp::OtlpReceiver};

const KIB: usize = 1 << 10;

#[tokio::test]
async fn a_body_of_any_size_may_be_passed_along() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let body = vec![b'\xff'; 900 * KIB];
    for as_bytes in [false, true] {
        let setup =
            |options: EnvoyOptions| options.with_body(1 << 20, as_bytes).failure_mode_allow();
        mesh.through_each_version(setup, async |gate| {
            let upload = || Request::post("/", &body);
            let seen = gate
                .send(upload().header("x-api-key", &key.secret))
                .await
                .seen();
            assert_eq!(seen.body, body.len());
            assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
            key.assert_hidden_from(&seen);
            let forged = upload().header("x-relatch-consumer", "root");
            assert_eq!(reason_of(&gate.send(forged).await), "missing_credential");
        })
        .await;
    }
}

#[tokio::test]
async fn headers_that_are_too_large_are_denied_and_never_pass() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let setup = |options: EnvoyOptions| options.max_headers_kb(1_024).failure_mode_allow();
    mesh.through_each_version(setup, async |gate| {
        for size in [200 * KIB, 300 * KIB, 700 * KIB] {
            let large = key.get("/").header("x-large", "a".repeat(size));
            let response = gate.send(large.header("x-relatch-consumer", "root")).await;
            assert_eq!(response.status, 431);
            assert_eq!(reason_of(&response), "request_too_large");
        }
        let cookie = format!("a={}; api_key={}", "b".repeat(100 * KIB), key.secret);
        let seen = gate
            .send(Request::get("/").header("cookie", cookie))
            .await
            .seen();
        key.assert_hidden_from(&seen);
    })
    .await;
    let page = mesh.sidecar.get("/metrics").await.text();
    assert!(page.contains("reason=\"request_too_large\""), "{page}");
}

/// An Envoy that traces copies `tracestate` to the headers of its call.
#[tokio::test]
async fn a_long_tracestate_does_not_let_a_request_pass() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let collector = OtlpReceiver::start().await;
    let setup = |options: EnvoyOptions| {
        let options = options.max_headers_kb(1_024).failure_mode_allow();
        options.tracing(collector.addr())
    };
    mesh.through_each_version(setup, async |gate| {
        for size in [15 * KIB, 20 * KIB, 150 * KIB, 180 * KIB] {
            let traced = |request: Request| {
                let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
                let state = format!("a={}", "b".repeat(size));
                let request = request.header("traceparent", parent);
                request.header("tracestate", state)
            };
            let seen = gate.send(traced(key.get("/"))).await.seen();
            assert_eq!(seen.values("x-relatch-key-id"), [&key.id]);
            let denied = gate.send(traced(Request::get("/"))).await;
            assert_eq!(reason_of(&denied), "missing_credential", "{size}");
        }
        let state = "b".repeat(700 * KIB);
        let large = key.get("/").header("tracestate", state);
        assert_eq!(reason_of(&gate.send(large).await), "request_too_large");
    })
    .await;
}
