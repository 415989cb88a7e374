//! A client of a connection, and a handler that echoes messages.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{
    RecvStream, SendStream,
    client::{self, ResponseFuture, SendRequest},
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex},
    sync::Notify,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, service::Routes};

use super::grpc::{
    call,
    connection::{ConnectionError, MAX_STREAMS, Services, serve},
    handler::{Answer, CheckHandler},
};
use crate::authz::{Metadata, request::RequestError};

/// Answers a check with `ANSWER` and the message. A message that starts with [`LATER`] is answered
/// later. The answer to a check that cannot be read is the error.
#[derive(Debug, Default)]
pub(super) struct Echo {
    /// Releases the answers to [`LATER`].
    pub(super) release: CancellationToken,
    /// The number of later answers that were promised.
    pub(super) promised: AtomicUsize,
    /// Notified for each promised answer that is dropped before its end.
    pub(super) dropped: Arc<Notify>,
}

/// A served connection, from the client's side.
pub(super) struct Peer {
    pub(super) handler: Arc<Echo>,
    pub(super) stop: CancellationToken,
    pub(super) served: JoinHandle<Result<(), ConnectionError>>,
    client: SendRequest<Bytes>,
    driver: JoinHandle<Result<(), h2::Error>>,
}

/// A call that was opened.
pub(super) struct Opened {
    pub(super) body: SendStream<Bytes>,
    answer: ResponseFuture,
}

/// The answer to a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answered {
    pub(super) status: StatusCode,
    /// The headers and the trailers.
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// Counts writes. Like a socket, it does not offer vectored writes.
pub(super) struct Counted<S> {
    inner: S,
    writes: Arc<AtomicUsize>,
}

/// Notifies that a future was dropped before its end.
struct Promise(Option<Arc<Notify>>);

/// The beginning of every answer.
pub(super) const ANSWER: &[u8] = b"answer to ";
/// The beginning of a message that is answered after [`Echo::release`].
pub(super) const LATER: &[u8] = b"later";
/// A deadline that only a test that hangs reaches.
const PATIENCE: Duration = Duration::from_mins(2);

impl CheckHandler for Echo {
    fn check(
        &self,
        message: Result<&[u8], RequestError>,
        _metadata: Metadata,
        answer: &mut BytesMut,
    ) -> Answer {
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                answer.put_slice(error.to_string().as_bytes());
                return Answer::Given;
            }
        };
        if message.starts_with(LATER) {
            self.promised.fetch_add(1, Ordering::Relaxed);
            let mut promise = Promise(Some(Arc::clone(&self.dropped)));
            let (release, message) = (self.release.clone(), message.to_vec());
            return Answer::Later(Box::pin(async move {
                release.cancelled().await;
                promise.keep();
                [ANSWER, &message].concat().into()
            }));
        }
        answer.put_slice(ANSWER);
        answer.put_slice(message);
        Answer::Given
    }
}

impl Promise {
    fn keep(&mut self) {
        self.0 = None;
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Some(dropped) = self.0.take() {
            dropped.notify_one();
        }
    }
}

impl Peer {
    /// Connects a client. `others` answers all calls except checks.
    pub(super) async fn connect(others: Routes) -> Self {
        let (near, far) = duplex(1 << 20);
        Self::connect_over(near, far, others).await
    }

    /// Connects a client over a connection whose writes are counted.
    pub(super) async fn counted() -> (Self, Arc<AtomicUsize>) {
        let (near, far) = duplex(1 << 20);
        let writes = Arc::default();
        let far = Counted {
            inner: far,
            writes: Arc::clone(&writes),
        };
        let peer = Self::connect_over(near, far, Routes::default()).await;
        (peer, writes)
    }

    async fn connect_over(
        near: DuplexStream,
        far: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        others: Routes,
    ) -> Self {
        let handler = Arc::new(Echo::default());
        let stop = CancellationToken::new();
        let services = Services::new(Arc::clone(&handler), others);
        let served = tokio::spawn(serve(far, services, MAX_STREAMS, stop.clone()));
        let (client, driver) = client::Builder::new()
            .initial_connection_window_size(8 << 20)
            .initial_window_size(1 << 20)
            .handshake(near)
            .await
            .expect("it speaks HTTP/2");
        Self {
            handler,
            stop,
            served,
            client,
            driver: tokio::spawn(driver),
        }
    }

    /// Opens a call with the head `request`, and ends it if `is_whole`.
    pub(super) async fn open(&mut self, request: Request<()>, is_whole: bool) -> Opened {
        poll_fn(|cx| self.client.poll_ready(cx))
            .await
            .expect("the connection takes calls");
        let (answer, body) = self
            .client
            .send_request(request, is_whole)
            .expect("the connection takes calls");
        Opened { body, answer }
    }

    /// Opens a check with these DATA frames, and ends it.
    pub(super) async fn check(&mut self, frames: impl IntoIterator<Item = Bytes>) -> Opened {
        let mut opened = self.open(check_request(), false).await;
        for frame in frames {
            opened.send(frame);
        }
        opened.end();
        opened
    }

    /// Returns the answer to a check of one frame.
    pub(super) async fn answer(&mut self, message: &[u8]) -> Answered {
        self.check([framed(message)]).await.answered().await
    }

    /// Closes the connection without a GOAWAY.
    pub(super) fn hang_up(self) -> JoinHandle<Result<(), ConnectionError>> {
        self.driver.abort();
        self.served
    }

    /// Returns whether the connection accepts new calls.
    pub(super) async fn is_open(&mut self) -> bool {
        poll_fn(|cx| self.client.poll_ready(cx)).await.is_ok()
    }
}

impl Opened {
    /// Sends a DATA frame.
    pub(super) fn send(&mut self, frame: Bytes) {
        self.body.send_data(frame, false).expect("the call is open");
    }

    /// Ends the request.
    pub(super) fn end(&mut self) {
        self.body
            .send_data(Bytes::new(), true)
            .expect("the call is open");
    }

    /// Returns the whole answer.
    pub(super) async fn answered(self) -> Answered {
        within("an answer", self.try_answered())
            .await
            .expect("the call is answered")
    }

    /// Returns the whole answer, or the failure of the call.
    pub(super) async fn try_answered(self) -> Result<Answered, h2::Error> {
        let (head, mut stream) = self.answer.await?.into_parts();
        let mut body = BytesMut::new();
        while let Some(data) = next_data(&mut stream).await? {
            body.put(data);
        }
        let mut headers = head.headers;
        headers.extend(stream.trailers().await?.unwrap_or_default());
        Ok(Answered {
            status: head.status,
            headers,
            body: body.freeze(),
        })
    }

    /// Returns the body of the answer, which can be read piece by piece.
    pub(super) async fn stream(self) -> (RecvStream, SendStream<Bytes>) {
        let answer = within("an answer", self.answer).await;
        (answer.expect("the call is answered").into_body(), self.body)
    }
}

impl Answered {
    /// Returns the answer of the handler to `message`.
    pub(super) fn to(message: &[u8]) -> Self {
        Self {
            status: StatusCode::OK,
            headers: HeaderMap::from_iter([
                (
                    header::CONTENT_TYPE,
                    HeaderValue::from_static("application/grpc"),
                ),
                (
                    HeaderName::from_static("grpc-status"),
                    HeaderValue::from_static("0"),
                ),
            ]),
            body: framed(&[ANSWER, message].concat()),
        }
    }

    /// Returns the gRPC status: code and message.
    pub(super) fn grpc(&self) -> (Code, String) {
        let status = Status::from_header_map(&self.headers).expect("a gRPC status");
        (status.code(), status.message().to_owned())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let counted = self.get_mut();
        counted.writes.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut counted.inner).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// Returns the head of a check.
pub(super) fn check_request() -> Request<()> {
    request(call::PATH)
}

/// Returns the head of a gRPC call of `path`.
pub(super) fn request(path: &str) -> Request<()> {
    Request::post(format!("http://relatch{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .expect("a request")
}

/// Returns a message with its prefix.
pub(super) fn framed(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).expect("a small message");
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(length);
    framed.put_slice(message);
    framed.freeze()
}

/// Returns the next piece of a body.
pub(super) async fn next_data(stream: &mut RecvStream) -> Result<Option<Bytes>, h2::Error> {
    let Some(data) = stream.data().await.transpose()? else {
        return Ok(None);
    };
    stream.flow_control().release_capacity(data.len())?;
    Ok(Some(data))
}

/// Waits for `work`; panics after [`PATIENCE`].
pub(super) async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(PATIENCE, work).await;
    done.unwrap_or_else(|_| panic!("there is no {what}"))
}
