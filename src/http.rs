//! The HTTP endpoint for monitoring: metrics, liveness, readiness and status. HTTP/1, plaintext.

use std::{fmt, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use ::http::{StatusCode, header};
use axum::{
    Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use prometheus_client::{encoding::text, registry::Registry};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{accept::Acceptor, readiness::Readiness};

/// A bound endpoint that does not answer yet.
#[derive(Debug)]
pub(crate) struct HttpServer {
    listener: TcpListener,
    local_addr: SocketAddr,
    router: Router,
}

/// The pages of the endpoint.
#[derive(Clone)]
pub(crate) struct Pages {
    /// The metrics on `/metrics`.
    pub(crate) registry: Arc<Registry>,
    /// The state on `/readyz`.
    pub(crate) readiness: Readiness,
    /// The notes on `/readyz` of a process that is ready; none: no notes.
    pub(crate) notes: Option<Arc<dyn NoteSource>>,
    /// The status on `/status`; none: the page does not exist.
    pub(crate) status: Option<Arc<dyn StatusSource>>,
}

/// Reports faults in a part of a process that is ready, because the rest of it works. The notes
/// contain no secrets.
pub(crate) trait NoteSource: Send + Sync {
    /// Returns a line for each present fault. It is called on the runtime of the endpoint and must
    /// not block.
    fn notes(&self) -> Vec<String>;
}

/// Describes the process for an operator, as JSON without secrets.
pub(crate) trait StatusSource: Send + Sync {
    /// Returns the present status. It is called on the runtime of the endpoint and must not block.
    fn status(&self) -> serde_json::Value;
}

/// `application/openmetrics-text`, version 1.0.0 (its specification, section "Overall Structure").
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The maximum number of connections at once: some scrapers, probes and people. More connections
/// wait in the queue of the system.
const MAX_CONNECTIONS: usize = 64;

/// The time limit for the head of a request: all clients of this endpoint are near and fast.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum size of a request head in bytes, the smallest that hyper allows: clients send one
/// line and a few headers.
const MAX_HEAD: usize = 8 * 1024;

/// The maximum age of a connection: a client that does not read holds its place no longer.
const MAX_AGE: Duration = Duration::from_mins(5);

/// The time limit for the answer in progress when this side closes a connection.
const GRACE: Duration = Duration::from_secs(2);

impl HttpServer {
    /// Binds `address`; port 0 lets the system choose.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound.
    pub(crate) async fn bind(address: SocketAddr, pages: Pages) -> io::Result<Self> {
        Self::on(TcpListener::bind(address).await?, pages)
    }

    /// Answers on a bound listener.
    ///
    /// # Errors
    ///
    /// When the system does not say where it listens.
    pub(crate) fn on(listener: TcpListener, pages: Pages) -> io::Result<Self> {
        Ok(Self {
            local_addr: listener.local_addr()?,
            listener,
            router: router(pages),
        })
    }

    /// Returns the bound address.
    #[must_use]
    pub(crate) const fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Answers until `stop` is cancelled, then finishes the answers in progress.
    pub(crate) async fn serve(self, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let connections = TaskTracker::new();
        let mut acceptor = Acceptor::new("http");
        loop {
            let (place, stream) = tokio::select! {
                () = stop.cancelled() => break,
                accepted = async {
                    let place = places.clone().acquire_owned().await;
                    let (stream, _peer) = acceptor.next(|| self.listener.accept()).await;
                    (place.expect("it is never closed"), stream)
                } => accepted,
            };
            let connection = serve_connection(stream, self.router.clone(), stop.clone());
            connections.spawn(async move {
                let _place = place;
                connection.await;
            });
        }
        connections.close();
        connections.wait().await;
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages")
            .field("readiness", &self.readiness)
            .finish_non_exhaustive()
    }
}

impl<F> StatusSource for F
where
    F: Fn() -> serde_json::Value + Send + Sync,
{
    fn status(&self) -> serde_json::Value {
        self()
    }
}

fn router(pages: Pages) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .with_state(pages)
}

/// Serves one connection until it ends, is too old, or `stop` is cancelled.
async fn serve_connection(stream: TcpStream, router: Router, stop: CancellationToken) {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = stop.cancelled() => None,
        () = tokio::time::sleep(MAX_AGE) => None,
    };
    let ended = if let Some(ended) = ended {
        ended
    } else {
        connection.as_mut().graceful_shutdown();
        match tokio::time::timeout(GRACE, connection).await {
            Ok(ended) => ended,
            Err(_late) => return,
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection to the HTTP endpoint failed");
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let mut page = String::new();
    if let Err(error) = text::encode(&mut page, &pages.registry) {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "a metric cannot be written"
        );
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    ([(header::CONTENT_TYPE, OPENMETRICS)], page).into_response()
}

async fn readyz(State(pages): State<Pages>) -> Response {
    if pages.readiness.is_ready() {
        let mut page = "ok\n".to_owned();
        for note in pages.notes.iter().flat_map(|source| source.notes()) {
            page.push_str(&note);
            page.push('\n');
        }
        return page.into_response();
    }
    let mut page = String::new();
    for name in pages.readiness.blocked_by() {
        page.push_str("not ready: ");
        page.push_str(&name);
        page.push('\n');
    }
    (StatusCode::SERVICE_UNAVAILABLE, page).into_response()
}

async fn status(State(pages): State<Pages>) -> Response {
    match &pages.status {
        Some(source) => {
            let page = source.status().to_string();
            ([(header::CONTENT_TYPE, "application/json")], page).into_response()
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use prometheus_client::metrics::counter::Counter;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        task::JoinHandle,
    };

    use super::*;

    struct Running {
        address: SocketAddr,
        readiness: Readiness,
        stop: CancellationToken,
        served: JoinHandle<()>,
    }

    struct OneNote;

    impl NoteSource for OneNote {
        fn notes(&self) -> Vec<String> {
            vec!["keyring partners cannot be read".to_owned()]
        }
    }

    async fn start(status: Option<Arc<dyn StatusSource>>) -> Running {
        let checks = Counter::<u64>::default();
        checks.inc();
        let mut registry = Registry::with_prefix("relatch");
        registry.register("checks", "Checks that were answered", checks);
        let readiness = Readiness::default();
        let server = HttpServer::bind(
            (Ipv4Addr::LOCALHOST, 0).into(),
            Pages {
                registry: Arc::new(registry),
                readiness: readiness.clone(),
                notes: Some(Arc::new(OneNote)),
                status,
            },
        )
        .await
        .expect("a free port");
        let stop = CancellationToken::new();
        Running {
            address: server.local_addr(),
            readiness,
            served: tokio::spawn(server.serve(stop.clone())),
            stop,
        }
    }

    impl Running {
        /// Returns the whole answer to `head`, with `Connection: close`.
        async fn ask(&self, head: &str) -> String {
            let mut stream = TcpStream::connect(self.address).await.expect("it listens");
            let request = format!("{head} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.expect("sent");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("an answer");
            answer
        }
    }

    #[tokio::test]
    async fn metrics_are_openmetrics() {
        let running = start(None).await;
        let answer = running.ask("GET /metrics").await;
        let (head, page) = answer.split_once("\r\n\r\n").expect("a head and a page");
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
        assert!(
            head.contains(
                "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"
            ),
            "{head}"
        );
        assert_eq!(
            page,
            "# HELP relatch_checks Checks that were answered.\n\
             # TYPE relatch_checks counter\n\
             relatch_checks_total 1\n\
             # EOF\n"
        );
    }

    #[tokio::test]
    async fn readiness_names_what_blocks_it() {
        let running = start(None).await;
        let guard = running.readiness.block("keyring payments");
        let answer = running.ask("GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(
            answer.ends_with("\r\n\r\nnot ready: keyring payments\n"),
            "{answer}"
        );
        assert!(running.ask("GET /livez").await.starts_with("HTTP/1.1 200 "));
        drop(guard);
        let answer = running.ask("GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let page = "\r\n\r\nok\nkeyring partners cannot be read\n";
        assert!(answer.ends_with(page), "{answer}");
    }

    #[tokio::test]
    async fn status_is_json_where_there_is_one() {
        let source = || serde_json::json!({ "node": "edge-1" });
        let running = start(Some(Arc::new(source))).await;
        let answer = running.ask("GET /status").await;
        assert!(
            answer.contains("content-type: application/json"),
            "{answer}"
        );
        assert!(answer.ends_with("{\"node\":\"edge-1\"}"), "{answer}");
        assert!(
            start(None)
                .await
                .ask("GET /status")
                .await
                .starts_with("HTTP/1.1 404 ")
        );
    }

    #[tokio::test]
    async fn what_is_not_asked_for_right_is_refused() {
        let running = start(None).await;
        assert!(
            running
                .ask("POST /metrics")
                .await
                .starts_with("HTTP/1.1 405 ")
        );
        assert!(running.ask("GET /else").await.starts_with("HTTP/1.1 404 "));
        let long = format!("GET /{}", "a".repeat(MAX_HEAD - 5));
        let mut stream = TcpStream::connect(running.address)
            .await
            .expect("it listens");
        stream.write_all(long.as_bytes()).await.expect("sent");
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer, b"HTTP/1.1 431");
    }

    #[tokio::test]
    async fn stopping_closes_idle_connections() {
        let running = start(None).await;
        let mut idle = TcpStream::connect(running.address)
            .await
            .expect("it listens");
        idle.write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .expect("sent");
        let mut answer = [0; 12];
        idle.read_exact(&mut answer).await.expect("an answer");
        running.stop.cancel();
        running.served.await.expect("the server does not panic");
        let mut rest = Vec::new();
        idle.read_to_end(&mut rest).await.expect("closed in order");
        assert!(TcpStream::connect(running.address).await.is_err());
    }
}
