//! A connection of a proxy that asks over HTTP: HTTP/1.1, driven on the thread of its worker.
//!
//! A proxy asks at `/authz/<profile>`. The rest of its request describes the original request, and
//! is the matter of [`ForwardAuth`]. A connection has one check under way.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Body as _;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::grpc::connection::ConnectionError;
use crate::{authz::forward::ForwardAuth, tls::TlsServer};

/// What is served to proxies that ask over HTTP. It is cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct HttpAuthz {
    profiles: Arc<[Profile]>,
    /// The TLS of the connections; none if they are in plaintext.
    tls: Option<TlsServer>,
}

/// What answers the requests of one connection.
struct Answers {
    profiles: Arc<[Profile]>,
    /// After it, an answer ends the connection.
    stop: CancellationToken,
    /// The number of requests so far.
    asked: AtomicU64,
}

/// What a proxy asks for at one path.
#[derive(Debug)]
pub(super) struct Profile {
    /// The last segment of the path.
    pub(super) name: String,
    pub(super) checks: ForwardAuth,
}

/// The beginning of the path of every profile.
pub(super) const PREFIX: &str = "/authz/";
/// The maximum size of the head of a request, in bytes: as much as a check may have.
const MAX_HEAD: usize = 256 << 10;
/// The maximum size of a body that is read, in bytes. A proxy sends none, unless it is configured to
/// pass on the body of the original request. After a larger body, the connection is closed.
const MAX_BODY: usize = 64 << 10;
/// The time within which a body must arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);
/// The interval in which a connection must bring a request: an idle one is closed after one to two
/// intervals. Proxies close idle connections before: by default nginx after 60 s, Traefik after 90 s
/// and Caddy after 2 minutes. A request on a connection that relatch closes would have to be sent
/// again. The connection has one timer, because a timer for each request would be a good part of
/// the cost of a check.
const IDLE_TIMEOUT: Duration = Duration::from_mins(5);
/// The time in which a connection may still bring a request after the sidecar begins to stop. The
/// answer tells the proxy to close the connection; an idle connection is closed after this time.
const LAST_REQUEST: Duration = Duration::from_millis(50);
/// The time within which the last answers must be sent after that. A proxy that sends half a
/// request does not delay the stop for longer.
const GRACE: Duration = Duration::from_secs(2);

impl HttpAuthz {
    /// Serves `profiles`, of which there is at least one, over TLS if `tls` is set.
    pub(super) fn new(profiles: Vec<Profile>, tls: Option<TlsServer>) -> Self {
        Self {
            profiles: profiles.into(),
            tls,
        }
    }
}

impl Answers {
    fn profile(&self, path: &str) -> Option<&ForwardAuth> {
        let name = path.strip_prefix(PREFIX)?;
        let mut profiles = self.profiles.iter();
        let found = profiles.find(|profile| profile.name == name);
        found.map(|profile| &profile.checks)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<String> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let (head, body) = request.into_parts();
        let checks = self.profile(head.uri.path());
        let asked = checks.map(|checks| (checks, checks.ask(&head.headers)));
        let is_whole = body.is_end_stream() || skip(body).await;
        let mut response = match asked {
            None => {
                let mut response = Response::new(String::new());
                *response.status_mut() = StatusCode::NOT_FOUND;
                response
            }
            Some((checks, asked)) => {
                let answer = match asked.later {
                    None => asked.answer.freeze(),
                    Some(later) => later.await,
                };
                checks.respond(&asked.settings, &head.headers, &answer)
            }
        };
        if !is_whole || self.stop.is_cancelled() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }

    /// Waits until the connection has brought no request for [`IDLE_TIMEOUT`].
    async fn idle(&self) {
        let mut before = 0;
        loop {
            tokio::time::sleep(IDLE_TIMEOUT).await;
            let asked = self.asked.load(Ordering::Relaxed);
            if asked == before {
                return;
            }
            before = asked;
        }
    }

    /// Counts a request that was refused because of its size.
    fn note(&self, ended: Result<(), hyper::Error>) -> Result<(), ConnectionError> {
        if let Err(error) = &ended
            && error.is_parse_too_large()
            && let Some(profile) = self.profiles.first()
        {
            profile.checks.refuse_too_large();
        }
        ended.map_err(ConnectionError::from)
    }
}

/// Serves a connection until the proxy closes it. After `stop`, it answers the requests that are
/// under way, and those that arrive within a moment.
///
/// # Errors
///
/// When the connection ends for another reason; see [`ConnectionError`].
pub(super) async fn serve<S>(
    socket: S,
    service: HttpAuthz,
    stop: CancellationToken,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    match service.tls.clone() {
        None => serve_plain(socket, service, stop).await,
        Some(tls) => {
            let (stream, _peer) = tokio::select! {
                accepted = tls.accept(socket, None) => accepted?,
                () = stop.cancelled() => return Err(ConnectionError::Silent),
            };
            serve_plain(stream, service, stop).await
        }
    }
}

async fn serve_plain<S>(
    socket: S,
    service: HttpAuthz,
    stop: CancellationToken,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let answers = Arc::new(Answers {
        profiles: service.profiles,
        stop: stop.clone(),
        asked: AtomicU64::new(0),
    });
    let service = service_fn(|request| {
        let answers = Arc::clone(&answers);
        async move { Ok::<_, Infallible>(answers.answer(request).await) }
    });
    let mut connection = pin!(limits().serve_connection(TokioIo::new(socket), service));
    let is_idle = tokio::select! {
        biased;
        ended = connection.as_mut() => return answers.note(ended),
        () = stop.cancelled() => false,
        () = answers.idle() => true,
    };
    if !is_idle && let Ok(ended) = timeout(LAST_REQUEST, connection.as_mut()).await {
        return answers.note(ended);
    }
    connection.as_mut().graceful_shutdown();
    match timeout(GRACE, connection).await {
        Ok(ended) => answers.note(ended),
        Err(_late) => Err(ConnectionError::Silent),
    }
}

/// Reads the rest of a request. Returns whether its end was reached.
async fn skip(mut body: Incoming) -> bool {
    let whole = async {
        let mut left = MAX_BODY;
        loop {
            match poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                None => return true,
                Some(Ok(frame)) => match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                    Some(rest) => left = rest,
                    None => return false,
                },
                Some(Err(_)) => return false,
            }
        }
    };
    timeout(BODY_TIMEOUT, whole).await.unwrap_or(false)
}

fn limits() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD)
        // The proxy adds its own to what it passes on.
        .auto_date_header(false);
    builder
}

#[cfg(test)]
mod tests;
