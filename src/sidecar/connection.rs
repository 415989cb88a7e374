//! A connection of Envoy: HTTP/2, driven on the thread of its worker.
//!
//! What one read brings is answered in one write. A connection first takes all calls that have arrived, then answers them,
//! and only then has HTTP/2 write: of the cost of a check, reads and writes are the larger part.

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

/// What connections serve; cheap to clone.
pub(super) struct Services<H> {
    /// Answers checks.
    pub(super) checks: Arc<H>,
    /// Everything else.
    pub(super) others: Routes,
    /// For calls that wait, on all connections.
    places: Arc<Semaphore>,
}

/// A connection has ended otherwise than by the client's will.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// The runtime does not take it.
    #[error("the runtime does not accept the connection")]
    Register(#[source] io::Error),
    /// There is no TLS, which was told of.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// It does not begin as HTTP/2 does.
    #[error("the client does not start HTTP/2")]
    Silent,
    /// Its client is dead, or frozen.
    #[error(
        "the client does not answer a ping within {}",
        written(keepalive::TIMEOUT)
    )]
    Dead,
    /// It broke, or what it brings is not HTTP/2.
    #[error("HTTP/2")]
    Http2(#[from] h2::Error),
}

/// A connection whose handshake is done.
struct Connection<S, H> {
    http2: server::Connection<S, Bytes>,
    services: Services<H>,
    keepalive: Keepalive,
    /// Calls that were taken and not answered yet; empty between two polls.
    batch: Vec<(Request<RecvStream>, SendResponse<Bytes>)>,
    /// Calls that wait: no more than [`MAX_STREAMS`], since each has its stream.
    waiting: FuturesUnordered<Waiting>,
    /// Room for answers, used again when they are written.
    arena: BytesMut,
}

/// Calls that a connection may have under way at a time, whatever its client is told: as many as Envoy opens on one at most
/// (`http2_protocol_options.max_concurrent_streams`, by default), which it may do before it is told anything.
pub(super) const MAX_STREAMS: u32 = 1_024;
/// Calls that wait, for the rest of their message or for a lookup, on all connections: four times as many as lookups have
/// room for, so that who opens calls on every connection and does not go on takes 270 MiB of headers at most.
const MAX_WAITING: usize = 4 * on_demand::MAX_WAITING;
/// A check carries its headers in its message. What comes beside it are gRPC's own and a trace context.
const MAX_HEADERS: u32 = 16 << 10;
/// An Envoy that cancels every check under way at once, at its deadline, is honest: the limit on resets lies above the
/// number of streams.
const MAX_RESETS: usize = 4 * MAX_STREAMS as usize;
/// Streams that we reset and remember for a second, so that what is on its way for them is no error: all may be refused.
const MAX_REFUSED: usize = MAX_STREAMS as usize;
/// Bytes that a client may send on a connection before they are read: a few hundred checks.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// The same of one stream: the largest message.
const STREAM_WINDOW: u32 = 256 << 10;
/// The smallest that HTTP/2 allows. Nearly every check fits, and a larger one is put together.
const MAX_FRAME: u32 = 16 << 10;
/// Bytes of DATA frames below 256 bytes that may wait, counting each as 256: two for each stream.
const SMALL_FRAMES: usize = 2 * 256 * MAX_STREAMS as usize;
/// What a stream may keep for a client that does not read. Answers are below it, and health is told in a few bytes.
const MAX_UNSENT: usize = 64 << 10;
/// Calls that are answered before the connection writes. Their answers fill a write several times, so that more would only
/// make the first wait for the last.
const MAX_BATCH: usize = 64;
/// What HTTP/2 writes at once.
const ARENA: usize = 16 << 10;
/// A client speaks first, at once.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The same while the sidecar stops: a client that has not spoken yet may have its first checks on the way, and one that
/// will never speak holds nobody up.
const HANDSHAKE_GRACE: Duration = Duration::from_millis(500);

/// Serves a connection until the client ends it, which is told to have at most `streams` calls under way at a time. After
/// `stop` it is told to open no more calls, and those under way are answered.
///
/// # Errors
///
/// When it ends otherwise.
pub(super) async fn serve<S, H>(
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

/// The same over TLS. The handshake has a deadline of its own.
///
/// # Errors
///
/// When there is no TLS, or the connection ends otherwise than by the client's will.
pub(super) async fn serve_tls<S, H>(
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
            // An idle connection needs no room for it.
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
            // Writes what was answered, too.
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

    /// Takes calls until none has arrived; ready when the connection is closed.
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
            // Without a place for it, it is reset as it is dropped.
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
    pub(super) fn new(checks: Arc<H>, others: Routes) -> Self {
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

/// Whether the client has closed the connection, as one does that has no calls under way.
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

/// Ends when whoever has not spoken yet is not waited for any longer.
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
