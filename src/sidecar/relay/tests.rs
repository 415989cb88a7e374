//! gRPC health through a connection.

use prost::Message as _;
use tonic::Code;
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, HealthCheckResponse},
    server::{HealthReporter, health_reporter},
};

use super::*;
use crate::sidecar::testing::{Answered, Opened, Peer, framed, next_data, request, within};

const SERVICE: &str = "envoy.service.auth.v3.Authorization";

async fn peer() -> (Peer, HealthReporter) {
    let (reporter, health) = health_reporter();
    reporter
        .set_service_status(SERVICE, ServingStatus::Serving)
        .await;
    (Peer::connect(Routes::new(health)).await, reporter)
}

async fn call(peer: &mut Peer, method: &str, service: &str) -> Opened {
    let question = HealthCheckRequest {
        service: service.to_owned(),
    };
    let path = format!("/grpc.health.v1.Health/{method}");
    let mut opened = peer.open(request(&path), false).await;
    opened.send(framed(&question.encode_to_vec()));
    opened.end();
    opened
}

fn status(framed: &[u8]) -> i32 {
    let answer = HealthCheckResponse::decode(&framed[5..]).expect("an answer");
    answer.status
}

#[tokio::test]
async fn health_is_told() {
    let (mut peer, reporter) = peer().await;
    let answered = call(&mut peer, "Check", SERVICE).await.answered().await;
    assert_eq!(answered.grpc().0, Code::Ok);
    assert_eq!(status(&answered.body), ServingStatus::Serving as i32);

    reporter
        .set_service_status(SERVICE, ServingStatus::NotServing)
        .await;
    let answered = call(&mut peer, "Check", SERVICE).await.answered().await;
    assert_eq!(status(&answered.body), ServingStatus::NotServing as i32);

    let answered = call(&mut peer, "Check", "nobody").await.answered().await;
    assert_eq!(answered.grpc().0, Code::NotFound);
    assert_eq!(peer.answer(b"a check").await, Answered::to(b"a check"));
}

#[tokio::test]
async fn health_is_told_as_it_changes() {
    let (mut peer, mut reporter) = peer().await;
    let (mut answers, _call) = call(&mut peer, "Watch", SERVICE).await.stream().await;
    let mut serving = ServingStatus::Serving;
    for next in [
        Some(ServingStatus::NotServing),
        Some(ServingStatus::Serving),
        None,
    ] {
        let told = within("news", next_data(&mut answers)).await;
        let told = told.expect("the stream is open").expect("it goes on");
        assert_eq!(status(&told), serving as i32);
        assert_eq!(peer.answer(b"a check").await, Answered::to(b"a check"));
        if let Some(next) = next {
            serving = next;
            reporter.set_service_status(SERVICE, serving).await;
        }
    }

    reporter.clear_service_status(SERVICE).await;
    let end = within("an end", next_data(&mut answers)).await;
    assert_eq!(end.expect("the stream is open"), None);
    let trailers = answers.trailers().await.expect("the stream is open");
    assert_eq!(trailers.expect("a status")["grpc-status"], "0");
}

#[tokio::test]
async fn a_watch_that_is_taken_back_does_not_hold_a_stop_up() {
    let (mut peer, _reporter) = peer().await;
    let (mut answers, mut watch) = call(&mut peer, "Watch", SERVICE).await.stream().await;
    let told = within("news", next_data(&mut answers)).await;
    assert!(told.expect("the stream is open").is_some());

    peer.stop.cancel();
    // The client answers the ping of the GOAWAY: only the watch is left.
    while peer.is_open().await {
        tokio::task::yield_now().await;
    }
    assert!(!peer.served.is_finished());
    watch.send_reset(Reason::CANCEL);
    let served = within("end", &mut peer.served).await;
    served.expect("no panic").expect("an orderly end");
}
