//! A gRPC port: accepts connections, over TLS where it is configured, and answers the calls on
//! them.

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

/// A bound port that does not accept connections yet.
#[derive(Debug)]
pub(super) struct Port {
    /// The name of the port in the log.
    what: &'static str,
    listener: TcpListener,
    address: SocketAddr,
    limits: Limits,
}

/// The limits of a port.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// The most connections at the same time. A sidecar has one, and a process of the control plane
    /// serves some thousands of them.
    connections: usize,
    /// The longest time to the first call of a connection. Every client of this port calls
    /// immediately: a connection without a call after this time has no user.
    first_call: Duration,
}

/// The calls of one connection: passes each to the routes, with the identity of its caller.
#[derive(Clone, Debug)]
struct Calls {
    routes: Routes,
    peer: Peer,
    /// Whether a call has arrived.
    has_begun: Arc<AtomicBool>,
}

/// The shortest time between two log lines about closed connections. A refused client tries again:
/// a line for each attempt would fill the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Together with [`KEEPALIVE_TIMEOUT`], finds a dead sidecar within 15 seconds.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long to wait for the answer to a ping. A ping waits behind all bytes on their way to the
/// sidecar: during a snapshot, as many as the sidecar's window. On a slow link the answer is late,
/// although the sidecar still reads.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The most streams of a connection: a sidecar has one, and an operator has a few calls at the same
/// time.
const MAX_STREAMS: u32 = 100;
/// The most bytes of headers: our callers send a token and the fields that gRPC adds.
const MAX_HEADERS: u32 = 16 << 10;
/// Resets that a caller may cause before its connection is closed. No caller of this port cancels
/// many calls.
const MAX_RESETS: usize = 100;
/// Bytes that a caller may send on a stream before they are read: the largest message of a sidecar.
const STREAM_WINDOW: u32 = 256 << 10;
/// Bytes that a caller may send on all streams of a connection before they are read.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// The smallest limit that HTTP/2 allows (RFC 9113, section 4.2). Almost all messages fit into one
/// frame.
const MAX_FRAME: u32 = 16 << 10;
/// Bytes that may wait to be sent on a stream, in addition to the message that is being encoded.
/// The limit is low because a revocation waits behind them.
const MAX_SEND_BUFFER: usize = 16 << 10;
/// Bytes of a connection that the operating system holds and has not sent. The limit is low for the
/// same reason, and high enough that a fast link never waits for this process.
const MAX_UNSENT: u32 = 16 << 10;

impl Port {
    /// Binds the port. With port 0, the system chooses one.
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

    /// Returns the bound address.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves `routes` until `stop`, and then completes the calls in progress.
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

/// Serves one connection until it closes, or after `stop` until its calls are complete. Closes it
/// when no call arrives within `first_call`.
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

    /// Longer than every wait in these tests: only a hung test reaches it.
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

    /// Reads until the connection closes.
    async fn ends(mut socket: TcpStream) {
        let mut rest = Vec::new();
        // A reset also closes it.
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
        // The client has been connected longer than the limit, but its first call was in time.
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
        // A connection is accepted as soon as the place is free.
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

    /// Starts a relay to a server. It stops after `bytes` bytes from the server, and its receive
    /// buffer is as small as possible.
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

        // The bytes that the other end's system holds, one piece that ours holds for it, and the
        // bytes gathered for one write.
        assert!(waits <= 256 << 10, "{waits} bytes wait");
        served.stop.cancel();
    }
}
