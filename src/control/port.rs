//! Where gRPC is served: takes connections, over TLS where that is configured, and answers the calls that come on them.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::Request;
use hyper::{body::Incoming as Body, server::conn::http2, service::Service};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::{ServiceExt as _, util::Oneshot};

use crate::{
    seldom::Seldom,
    tls::{
        Peer, TlsServer,
        incoming::{Incoming, Listening},
    },
};

/// A bound port that does not accept yet.
#[derive(Debug)]
pub(super) struct Port {
    /// Names it in the log.
    what: &'static str,
    listener: TcpListener,
    address: SocketAddr,
    limits: Limits,
}

/// What a port bears.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// At once. A sidecar has one, and a process of the control plane bears some thousands of them.
    connections: usize,
    /// Who connects calls at once: a connection without a call for so long is nobody's.
    first_call: Duration,
}

/// What is done on a connection: calls go to the routes, which find in each who its caller is.
#[derive(Clone, Debug)]
struct Calls {
    routes: Routes,
    peer: Peer,
    /// A call has come.
    has_begun: Arc<AtomicBool>,
}

/// Who is refused tries again: a line for each would only fill the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// With the timeout below, a dead sidecar is found within 15 seconds.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// A ping goes behind what is on its way to the sidecar, and to one that takes a snapshot that is as much as its window: on
/// a slow link the answer comes late, while what is sent is read all the same.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A sidecar has one stream, an operator a few calls at once.
const MAX_STREAMS: u32 = 100;
/// Headers of our own callers are a token and what gRPC adds.
const MAX_HEADERS: u32 = 16 << 10;
/// Resets that a caller may cause before its connection is closed. Nobody cancels calls here in numbers.
const MAX_RESETS: usize = 100;
/// What a stream may send ahead of what was read: the largest message of a sidecar.
const STREAM_WINDOW: u32 = 256 << 10;
/// What all streams of a connection may.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// HTTP/2's least (RFC 9113, section 4.2), which fits almost all messages.
const MAX_FRAME: u32 = 16 << 10;
/// What waits to be sent on a stream, beside the message that is being made: a revocation goes behind it.
const MAX_SEND_BUFFER: usize = 16 << 10;
/// What the system holds of a connection and has not sent, for the same reason. Enough that a fast link never waits for us.
const MAX_UNSENT: u32 = 16 << 10;

impl Port {
    /// Binds; port 0 lets the system choose.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound.
    pub(super) async fn bind(what: &'static str, address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        Ok(Self {
            what,
            address: listener.local_addr()?,
            listener,
            limits: Limits::default(),
        })
    }

    /// The bound address.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves `routes` until `stop`, and then the calls that are under way to their ends.
    pub(super) async fn serve(
        self,
        tls: Option<TlsServer>,
        routes: Routes,
        stop: CancellationToken,
    ) {
        let limits = self.limits;
        let mut listening =
            Listening::new(self.what, self.listener, tls).with_max_unsent(MAX_UNSENT);
        let mut connections = JoinSet::new();
        let mut told = Seldom::new(LOG_INTERVAL);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(ended) = connections.join_next() => note(self.what, ended),
                stream = listening.next() => {
                    if connections.len() < limits.connections {
                        let routes = routes.clone();
                        connections.spawn(serve_on(stream, routes, limits.first_call, stop.clone()));
                    } else if told.is_due() {
                        tracing::warn!(
                            listener = self.what,
                            max = limits.connections,
                            "a connection was closed: too many are open"
                        );
                    }
                }
            }
        }
        drop(listening);
        while let Some(ended) = connections.join_next().await {
            note(self.what, ended);
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            first_call: Duration::from_secs(10),
        }
    }
}

impl Service<Request<Body>> for Calls {
    type Response = http::Response<tonic::body::Body>;
    type Error = <Routes as tower::Service<Request<Body>>>::Error;
    type Future = Oneshot<Routes, Request<Body>>;

    fn call(&self, mut request: Request<Body>) -> Self::Future {
        self.has_begun.store(true, Ordering::Relaxed);
        request.extensions_mut().insert(self.peer.clone());
        self.routes.clone().oneshot(request)
    }
}

/// Serves one connection, until its end or that of its calls after `stop`.
fn serve_on(
    stream: Incoming,
    routes: Routes,
    first_call: Duration,
    stop: CancellationToken,
) -> impl Future<Output = Result<(), hyper::Error>> + Send {
    let has_begun = Arc::new(AtomicBool::new(false));
    let calls = Calls {
        routes,
        peer: stream.peer().clone(),
        has_begun: Arc::clone(&has_begun),
    };
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_local_error_reset_streams(MAX_RESETS)
        .max_pending_accept_reset_streams(MAX_RESETS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(MAX_SEND_BUFFER)
        .serve_connection(TokioIo::new(stream), calls);
    async move {
        let mut connection = pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = stop.cancelled() => {}
            () = tokio::time::sleep(first_call) => {
                if !has_begun.load(Ordering::Relaxed) {
                    return Ok(());
                }
            }
        }
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        connection.await
    }
}

fn note(what: &str, ended: Result<Result<(), hyper::Error>, tokio::task::JoinError>) {
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(
            listener = what,
            error = &error as &dyn std::error::Error,
            "a connection has failed"
        ),
        Err(error) => tracing::error!(
            listener = what,
            error = &error as &dyn std::error::Error,
            "a connection has panicked"
        ),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpSocket, TcpStream},
        task::JoinHandle,
    };
    use tonic::transport::Endpoint;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;
    use crate::{
        proto::discovery::{
            keyring_discovery_client::KeyringDiscoveryClient,
            keyring_discovery_server::KeyringDiscoveryServer,
        },
        wire::testing::Torrent,
    };

    /// Longer than anything here takes, so that only a hung test meets it.
    const DEADLINE: Duration = Duration::from_mins(2);
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

    struct Served {
        address: SocketAddr,
        stop: CancellationToken,
        serving: JoinHandle<()>,
    }

    async fn serve(limits: Limits) -> Served {
        let (_reporter, health) = tonic_health::server::health_reporter();
        serve_routes(limits, Routes::new(health)).await
    }

    async fn serve_routes(limits: Limits, routes: Routes) -> Served {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let port = Port::bind("test", any).await.expect("a port is free");
        let port = Port { limits, ..port };
        let (address, stop) = (port.address(), CancellationToken::new());
        let serving = port.serve(None, routes, stop.clone());
        Served {
            address,
            stop,
            serving: tokio::spawn(serving),
        }
    }

    async fn call(address: SocketAddr) -> HealthClient<tonic::transport::Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let channel = endpoint.connect().await.expect("it listens");
        let mut client = HealthClient::new(channel);
        ask(&mut client).await;
        client
    }

    async fn ask(client: &mut HealthClient<tonic::transport::Channel>) {
        let answer = client.check(HealthCheckRequest::default()).await;
        assert_eq!(answer.expect("an answer").into_inner().status, 1);
    }

    /// Reads to the end of a connection.
    async fn ends(mut socket: TcpStream) {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = tokio::time::timeout(DEADLINE, socket.read_to_end(&mut rest))
            .await
            .expect("it was closed");
    }

    #[tokio::test]
    async fn a_connection_without_a_call_is_closed_and_others_stay() {
        let served = serve(Limits {
            first_call: Duration::from_millis(50),
            ..Limits::default()
        })
        .await;
        let mut client = call(served.address).await;
        let silent = TcpStream::connect(served.address)
            .await
            .expect("it listens");
        let mut opened = TcpStream::connect(served.address)
            .await
            .expect("it listens");
        opened.write_all(PREFACE).await.expect("it is open");
        ends(silent).await;
        ends(opened).await;
        // Its own first call lies further back than that of those.
        ask(&mut client).await;
    }

    #[tokio::test]
    async fn there_are_no_more_connections_than_are_allowed() {
        let served = serve(Limits {
            connections: 1,
            ..Limits::default()
        })
        .await;
        let mut client = call(served.address).await;
        let refused = TcpStream::connect(served.address)
            .await
            .expect("it listens");
        ends(refused).await;
        ask(&mut client).await;
        drop(client);
        // As soon as the place is free.
        let again = async {
            let endpoint = Endpoint::from_shared(format!("http://{}", served.address));
            let endpoint = endpoint.expect("an address");
            loop {
                let Ok(channel) = endpoint.connect().await else {
                    continue;
                };
                let answer = HealthClient::new(channel)
                    .check(HealthCheckRequest::default())
                    .await;
                if answer.is_ok() {
                    return;
                }
            }
        };
        tokio::time::timeout(DEADLINE, again)
            .await
            .expect("a place is free again");
    }

    #[tokio::test]
    async fn a_stop_ends_connections_on_which_nothing_is_under_way() {
        let served = serve(Limits::default()).await;
        let _client = call(served.address).await;
        let silent = TcpStream::connect(served.address)
            .await
            .expect("it listens");
        served.stop.cancel();
        drop(silent);
        tokio::time::timeout(DEADLINE, served.serving)
            .await
            .expect("it ends")
            .expect("without a panic");
    }

    /// A way to a server that stops after so many bytes from it, and holds as few as it can.
    async fn stop_after(bytes: usize, server: SocketAddr) -> SocketAddr {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = TcpListener::bind(any).await.expect("a port is free");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            let (client, _) = listener.accept().await.expect("a client");
            let socket = TcpSocket::new_v4().expect("a socket");
            socket.set_recv_buffer_size(4 << 10).expect("a size");
            let server = socket.connect(server).await.expect("it listens");
            let (mut from_client, mut to_client) = client.into_split();
            let (from_server, mut to_server) = server.into_split();
            let mut from_server = from_server.take(bytes as u64);
            let up = tokio::io::copy(&mut from_client, &mut to_server);
            let down = async {
                let copied = tokio::io::copy(&mut from_server, &mut to_client).await;
                copied.expect("both are open");
                // The connections stay open.
                std::future::pending::<()>().await;
            };
            let _ = tokio::join!(up, down);
        });
        address
    }

    #[tokio::test]
    async fn little_waits_for_a_link_that_has_stopped_whatever_the_window_of_the_sidecar() {
        const CARRIED: usize = 64 << 10;
        const WINDOW: u32 = 16 << 20;
        let torrent = Torrent::default();
        let routes = Routes::new(KeyringDiscoveryServer::new(torrent.clone()));
        let served = serve_routes(Limits::default(), routes).await;
        let address = stop_after(CARRIED, served.address).await;
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let channel = endpoint
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .connect()
            .await
            .expect("it listens");
        let opened = KeyringDiscoveryClient::new(channel)
            .subscribe(tokio_stream::pending())
            .await;
        let _unread = opened.expect("it is open");

        let waits = torrent.has_sent().await - CARRIED;

        // What the other end's system holds, one piece of ours for it, and what was gathered for one write.
        assert!(waits <= 256 << 10, "{waits} bytes wait");
        served.stop.cancel();
    }
}
