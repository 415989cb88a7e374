//! gRPC health through a connection.

use std::{convert::Infallible, future::pending, sync::Arc};

use http::{HeaderName, HeaderValue};
use prost::Message as _;
use tokio::sync::Notify;
use tonic::{Code, Status, server::NamedService};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, HealthCheckResponse},
    server::{HealthReporter, health_reporter},
};
use tower::Service;

use super::*;
use crate::sidecar::testing::{Answered, Opened, Peer, framed, next_data, request, within};

/// A service that does what the path says, and notifies `ended` when an endless call has ended.
#[derive(Clone, Default)]
struct Endless {
    ended: Arc<Notify>,
}

/// The body of its answers.
struct Answer {
    data: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    /// Dropped with the body of an endless call.
    guard: Option<Guard>,
}

/// Sends a notification when it is dropped.
struct Guard(Arc<Notify>);

/// More than the windows of a stream and of a connection, on either side.
const LARGE: usize = 12 << 20;
const SERVICE: &str = "envoy.service.auth.v3.Authorization";

impl NamedService for Endless {
    const NAME: &'static str = "test.Endless";
}

impl Service<Request<tonic::body::Body>> for Endless {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let guard = Guard(Arc::clone(&self.ended));
        Box::pin(async move {
            let status = HeaderMap::from_iter([(
                HeaderName::from_static("grpc-status"),
                HeaderValue::from_static("0"),
            )]);
            let mut answer = Answer {
                data: Vec::new(),
                trailers: Some(status),
                guard: None,
            };
            match request.uri().path() {
                "/test.Endless/body" => answer.guard = Some(guard),
                "/test.Endless/large" => answer.data.push(vec![b'a'; LARGE].into()),
                "/test.Endless/echo" => {
                    let mut body = request.into_body();
                    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                        match frame.expect("the call goes on").into_data() {
                            Ok(data) => answer.data.push(data),
                            Err(frame) => answer.trailers = frame.into_trailers().ok(),
                        }
                    }
                }
                _ => {
                    let _guard = guard;
                    pending::<()>().await;
                }
            }
            Ok(Response::new(tonic::body::Body::new(answer)))
        })
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.guard.is_some() {
            return Poll::Pending;
        }
        let frame = self.data.pop().map(Frame::data);
        let frame = frame.or_else(|| self.trailers.take().map(Frame::trailers));
        Poll::Ready(frame.map(Ok))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

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
async fn a_call_that_is_taken_back_is_forgotten() {
    let endless = Endless::default();
    let ended = Arc::clone(&endless.ended);
    let mut peer = Peer::connect(Routes::new(endless)).await;
    for path in ["/test.Endless/body", "/test.Endless/answer"] {
        let mut opened = peer.open(request(path), true).await;
        peer.answer(b"it has arrived").await;
        opened.body.send_reset(Reason::CANCEL);
        within("end", ended.notified()).await;
    }
}

#[tokio::test]
async fn a_body_waits_for_the_clients_window() {
    let mut peer = Peer::connect(Routes::new(Endless::default())).await;
    let opened = peer.open(request("/test.Endless/large"), true).await;
    // The client's window opens as this is read.
    let answered = opened.answered().await;
    assert_eq!(answered.body.len(), LARGE);
    assert_eq!(answered.headers["grpc-status"], "0");
}

#[tokio::test]
async fn the_body_of_a_request_arrives_whole() {
    let mut peer = Peer::connect(Routes::new(Endless::default())).await;
    let mut opened = peer.open(request("/test.Endless/echo"), false).await;
    let piece = vec![b'a'; LARGE / 4];
    for _ in 0..4 {
        opened.send(piece.clone().into());
    }
    let trailers = HeaderMap::from_iter([(
        HeaderName::from_static("x-end"),
        "yes".parse().expect("a value"),
    )]);
    opened
        .body
        .send_trailers(trailers)
        .expect("the call is open");
    let answered = opened.answered().await;
    assert_eq!(answered.body.len(), LARGE);
    assert_eq!(answered.headers["x-end"], "yes");
}
