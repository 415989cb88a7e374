//! The answer to a call.

use std::{future::poll_fn, sync::LazyLock};

use bytes::Bytes;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use tonic::Status;

/// The sending half of a call. Everything that is sent waits in the connection until the connection
/// is polled. A client that has cancelled the call receives nothing.
#[derive(Debug)]
pub(super) struct Reply(SendResponse<Bytes>);

/// The maximum payload of a DATA frame, in bytes. HTTP/2 gathers HEADERS frames and DATA frames of
/// less than 1 KiB in one write. A larger DATA frame would cost two writes of its own, which is far
/// more than the nine bytes before each further frame.
const MAX_FRAME: usize = 1_023;

/// The headers before every message. A copy is cheaper than a new map.
static HEADERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let grpc = HeaderValue::from_static("application/grpc");
    HeaderMap::from_iter([(header::CONTENT_TYPE, grpc)])
});

/// The trailers after every message.
static TRAILERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let status = HeaderName::from_static("grpc-status");
    HeaderMap::from_iter([(status, HeaderValue::from_static("0"))])
});

impl Reply {
    pub(super) const fn new(stream: SendResponse<Bytes>) -> Self {
        Self(stream)
    }

    /// Sends a message with its prefix.
    pub(super) fn message(mut self, mut framed: Bytes) {
        let mut head = Response::new(());
        head.headers_mut().clone_from(&HEADERS);
        let sent = self.0.send_response(head, false).and_then(|mut stream| {
            while framed.len() > MAX_FRAME {
                stream.send_data(framed.split_to(MAX_FRAME), false)?;
            }
            stream.send_data(framed, false)?;
            stream.send_trailers(TRAILERS.clone())
        });
        note(sent);
    }

    /// Sends a gRPC status without a message.
    pub(super) fn status(self, status: Status) {
        self.end(status.into_http());
    }

    /// Refuses a request that is not a gRPC call.
    pub(super) fn refuse(self, status: StatusCode) {
        let mut head = Response::new(());
        *head.status_mut() = status;
        self.end(head);
    }

    /// Waits until the client cancels the call.
    pub(super) async fn taken_back(&mut self) {
        let _reason = poll_fn(|cx| self.0.poll_reset(cx)).await;
    }

    fn end(mut self, head: Response<()>) {
        note(self.0.send_response(head, true).map(drop));
    }
}

/// Logs an answer that could not be sent. No client waits for it any more.
fn note(sent: Result<(), h2::Error>) {
    if let Err(error) = sent {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "a call was cancelled before its answer"
        );
    }
}
