//! A connection of Envoy: HTTP/2, driven on the thread of its worker.
//!
//! One write answers all calls of one read. A connection first accepts all calls that have arrived,
//! then answers them, and then lets HTTP/2 write. The reason is that reads and writes are the
//! larger part of the cost of a check.

use std::{
    future::poll_fn,
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use h2::{
    RecvStream,
    server::{self, SendResponse},
};
use http::Request;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::{
    advertised::Advertised,
    call::{self, Call, Waiting},
    handler::CheckHandler,
    keepalive::{self, Keepalive},
    relay::relay,
};
use crate::{
    duration::written,
    keyring::on_demand,
    tls::{HandshakeError, TlsServer},
};

/// The services of all connections. It is cheap to clone.
pub(in crate::sidecar) struct Services<H> {
    /// Answers calls of `Check`.
    pub(super) checks: Arc<H>,
    /// Answers calls of all other methods.
    pub(super) others: Routes,
    /// The places for calls that wait, [`MAX_WAITING`] on all connections together.
    places: Arc<Semaphore>,
}

/// The reason why a connection has ended although the client did not close it.
#[derive(Debug, thiserror::Error)]
pub(in crate::sidecar) enum ConnectionError {
    /// The runtime does not accept it.
    #[error("the runtime does not accept the connection")]
    Register(#[source] io::Error),
    /// The TLS handshake failed. The TLS server has already reported it.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The client does not start HTTP/2 within [`HANDSHAKE_TIMEOUT`], or within [`HANDSHAKE_GRACE`]
    /// after a stop.
    #[error("the client does not start HTTP/2")]
    Silent,
    /// The client is dead or frozen.
    #[error(
        "the client does not answer a ping within {}",
        written(keepalive::TIMEOUT)
    )]
    Dead,
    /// The connection broke, or its bytes are not valid HTTP/2.
    #[error("HTTP/2")]
    Http2(#[from] h2::Error),
    /// A connection of a proxy that asks over HTTP broke, was idle for too long, or its bytes are
    /// not valid HTTP/1.1.
    #[error("HTTP/1.1")]
    Http1(#[from] hyper::Error),
}

/// A connection after its handshake.
struct Connection<S, H> {
    http2: server::Connection<S, Bytes>,
    services: Services<H>,
    keepalive: Keepalive,
    /// Calls that are accepted and not answered yet. It is empty between two polls.
    batch: Vec<(Request<RecvStream>, SendResponse<Bytes>)>,
    /// Calls that wait: at most [`MAX_STREAMS`], because each has a stream.
    waiting: FuturesUnordered<Waiting>,
    /// The buffer for answers. Its space is reused after they are written.
    arena: BytesMut,
}

/// The maximum number of concurrent calls on a connection, whatever limit is announced. By default,
/// Envoy opens as many on one connection (`http2_protocol_options.max_concurrent_streams`), and it
/// may do so before it reads the announced limit.
pub(in crate::sidecar) const MAX_STREAMS: u32 = 1_024;
/// The maximum number of calls that wait, for the rest of their message or for a lookup, on all
/// connections. It is four times the limit on waiting lookups. A call that waits keeps little more
/// than what has arrived of its message.
const MAX_WAITING: usize = 4 * on_demand::MAX_WAITING;
/// The maximum size of the headers of a call, in bytes. An Envoy that traces copies `tracestate` of
/// the request there. A call with larger headers fails, and Envoy may let its request pass, so this
/// is more than relatch accepts as the headers of a request. Headers are kept until their call is
/// complete: a client that leaves the headers of one call on each connection unfinished occupies at
/// most 128 MiB.
const MAX_HEADERS: u32 = 256 << 10;
/// The maximum number of resets. An Envoy that cancels all checks under way at once, at their
/// deadline, is honest: so the limit is above the number of streams.
const MAX_RESETS: usize = 4 * MAX_STREAMS as usize;
/// The maximum number of streams that relatch has reset and remembers for one second, so that
/// frames that are already sent for them are not an error. All streams may be refused.
const MAX_REFUSED: usize = MAX_STREAMS as usize;
/// The bytes that a client may send on a connection before they are read: a few hundred checks.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// The bytes that a client may send on a stream before they are read: the largest message.
const STREAM_WINDOW: u32 = 256 << 10;
/// The maximum frame, in bytes: the smallest value that HTTP/2 allows. Nearly every check fits, and
/// a larger one arrives in several frames.
const MAX_FRAME: u32 = 16 << 10;
/// The maximum size of the DATA frames below 256 bytes that wait, in bytes. Each counts as 256
/// bytes: two frames for each stream.
const SMALL_FRAMES: usize = 2 * 256 * MAX_STREAMS as usize;
/// The bytes that a stream may buffer for a client that does not read. Answers are smaller, and a
/// health status has a few bytes.
const MAX_UNSENT: usize = 64 << 10;
/// The maximum number of calls that are answered before the connection writes. Their answers fill a
/// write several times: with more calls, the first answer would only wait for the last one.
const MAX_BATCH: usize = 64;
/// The initial size of the buffer for answers, in bytes: as much as HTTP/2 writes at once.
const ARENA: usize = 16 << 10;
/// The time within which a client must start HTTP/2. An honest client starts immediately.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The time within which a client must start HTTP/2 after the sidecar begins to stop. Its first
/// checks may already be on the way. A client that stays silent does not delay the stop for longer.
const HANDSHAKE_GRACE: Duration = Duration::from_millis(500);

/// Serves a connection until the client closes it. It announces a limit of `streams` concurrent
/// calls. After `stop` it asks the client to open no more calls, and answers those that are under
/// way.
///
/// # Errors
///
/// When the connection ends for another reason; see [`ConnectionError`].
pub(in crate::sidecar) async fn serve<S, H>(
    socket: S,
    services: Services<H>,
    streams: u32,
    stop: CancellationToken,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: CheckHandler,
{
    let silent = async {
        tokio::select! {
            () = tokio::time::sleep(HANDSHAKE_TIMEOUT) => {}
            () = stopped(&stop) => {}
        }
    };
    let http2 = tokio::select! {
        biased;
        http2 = limits().handshake(Advertised::new(socket, streams)) => http2?,
        () = silent => return Err(ConnectionError::Silent),
    };
    let mut connection = Connection::new(http2, services);
    tokio::select! {
        biased;
        ended = connection.run() => return ended,
        () = stop.cancelled() => {}
    }
    connection.http2.graceful_shutdown();
    connection.run().await
}

/// Serves a connection over TLS, as [`serve`] does. The TLS handshake has a deadline of its own.
///
/// # Errors
///
/// When the TLS handshake fails, or the connection ends although the client did not close it.
pub(in crate::sidecar) async fn serve_tls<S, H>(
    socket: S,
    tls: TlsServer,
    services: Services<H>,
    streams: u32,
    stop: CancellationToken,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: CheckHandler,
{
    let (stream, _peer) = tokio::select! {
        accepted = tls.accept(socket, None) => accepted?,
        () = stopped(&stop) => return Err(ConnectionError::Silent),
    };
    serve(stream, services, streams, stop).await
}

impl<S, H> Connection<S, H>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: CheckHandler,
{
    fn new(mut http2: server::Connection<S, Bytes>, services: Services<H>) -> Self {
        let pings = http2.ping_pong().expect("they are taken once");
        Self {
            http2,
            services,
            keepalive: Keepalive::new(pings),
            // An idle connection needs no memory for it.
            batch: Vec::new(),
            waiting: FuturesUnordered::new(),
            arena: BytesMut::with_capacity(ARENA),
        }
    }

    /// Runs until the connection is closed. Cancellation safe.
    async fn run(&mut self) -> Result<(), ConnectionError> {
        match poll_fn(|cx| self.poll(cx)).await {
            Err(ConnectionError::Http2(error)) if is_hang_up(&error) => Ok(()),
            end => end,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        loop {
            // This also writes the answers.
            if self.poll_batch(cx)?.is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut has_answered = !self.batch.is_empty();
            self.answer_batch(cx);
            while let Poll::Ready(Some(())) = self.waiting.poll_next_unpin(cx) {
                has_answered = true;
            }
            if !has_answered {
                break;
            }
        }
        self.keepalive
            .poll_dead(cx)
            .map(|()| Err(ConnectionError::Dead))
    }

    /// Accepts the calls that have arrived, up to [`MAX_BATCH`]. Ready if the connection is closed.
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        while self.batch.len() < MAX_BATCH {
            match self.http2.poll_accept(cx)? {
                Poll::Ready(Some(call)) => self.batch.push(call),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
        }
        Poll::Pending
    }

    fn answer_batch(&mut self, cx: &mut Context<'_>) {
        for (request, reply) in self.batch.drain(..) {
            let waiting: Option<Waiting> = if request.uri().path() == call::PATH {
                Call::take(&self.services.checks, request, reply)
                    .and_then(|call| call.answer(cx, &mut self.arena))
            } else {
                Some(Box::pin(relay(
                    self.services.others.clone(),
                    request,
                    reply,
                )))
            };
            // If there is no place for it, the call is dropped, which resets its stream.
            if let Some(waiting) = waiting
                && let Ok(place) = Arc::clone(&self.services.places).try_acquire_owned()
            {
                self.waiting.push(Box::pin(async move {
                    waiting.await;
                    drop(place);
                }));
            }
        }
    }
}

impl<H> Services<H> {
    pub(in crate::sidecar) fn new(checks: Arc<H>, others: Routes) -> Self {
        Self {
            checks,
            others,
            places: Arc::new(Semaphore::new(MAX_WAITING)),
        }
    }
}

impl<H> Clone for Services<H> {
    fn clone(&self) -> Self {
        Self {
            checks: Arc::clone(&self.checks),
            others: self.others.clone(),
            places: Arc::clone(&self.places),
        }
    }
}

/// Returns whether the error only means that the client has closed the connection, as it does when
/// no calls are under way.
fn is_hang_up(error: &h2::Error) -> bool {
    let kind = error.get_io().map(io::Error::kind);
    matches!(
        kind,
        Some(
            io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::UnexpectedEof
        )
    )
}

/// Waits for `stop`, and then for [`HANDSHAKE_GRACE`]: the time until a silent client is dropped.
async fn stopped(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(HANDSHAKE_GRACE).await;
}

fn limits() -> server::Builder {
    let mut builder = server::Builder::new();
    builder
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_local_error_reset_streams(Some(MAX_RESETS))
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_concurrent_reset_streams(MAX_REFUSED)
        .reset_stream_duration(Duration::from_secs(1))
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_window_size(STREAM_WINDOW)
        .max_frame_size(MAX_FRAME)
        .data_frame_budget(SMALL_FRAMES)
        .max_send_buffer_size(MAX_UNSENT);
    builder
}

#[cfg(test)]
mod tests;
