//! A thread that answers checks and does nothing else.

use std::{convert::Infallible, io, thread};

use prometheus_client::metrics::histogram::Histogram;
use tokio::{
    sync::mpsc,
    task::{JoinError, JoinSet},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    delay::DelayProbe,
    grpc::{
        connection::{ConnectionError, Services, serve, serve_tls},
        handler::CheckHandler,
    },
    http_authz::{self, HttpAuthz},
    lock::RunLock,
    spread::{Arrival, Intake, Protocol},
};
use crate::{
    shutdown::{Shutdown, unless_left_behind},
    tls::TlsServer,
};

/// The result of the task of a connection.
type End = Result<Result<(), ConnectionError>, JoinError>;

/// What each worker serves.
pub(super) struct Served<H> {
    /// What it serves to Envoy.
    pub(super) grpc: Services<H>,
    /// The TLS of connections of Envoy; none if they are in plaintext.
    pub(super) grpc_tls: Option<TlsServer>,
    /// What it serves to proxies that ask over HTTP; none if there is no listener for them.
    pub(super) http: Option<HttpAuthz>,
}

/// What the life of all workers depends on, and what depends on it.
#[derive(Clone)]
pub(super) struct Life {
    /// Tells the workers to end. It comes after the stop of the shutdown that they belong to.
    pub(super) stop: CancellationToken,
    /// Counts each worker while it answers checks.
    pub(super) checks: TaskTracker,
    /// The lock of the run, which each worker holds while it answers checks.
    pub(super) lock: Option<RunLock>,
}

/// Starts worker number `index`. It serves `served` on the connections of the returned intake, and
/// observes its own scheduling delay in `delays`, in seconds. The worker belongs to `shutdown`.
///
/// # Errors
///
/// When the system creates no thread or no runtime.
pub(super) fn start<H: CheckHandler>(
    index: usize,
    served: Served<H>,
    delays: Histogram,
    life: &Life,
    shutdown: &Shutdown,
) -> io::Result<Intake> {
    let Life { stop, checks, lock } = life.clone();
    let (intake, arrivals) = Intake::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Each worker has a token of its own, so that the threads do not contend for one lock whenever
    // they check it.
    let stop = stop.child_token();
    let name = format!("check-{index}");
    let work = async move {
        let served = serve_all(arrivals, served, stop.clone());
        tokio::select! {
            _all_ended = unless_left_behind("checks", stop, served) => {}
            never = DelayProbe::new(index, delays).run() => match never {},
        }
        Ok::<(), Infallible>(())
    };
    // All tasks that answer checks belong to the tracked future: when it has ended, no check is
    // under way.
    let task = shutdown.supervise(name.as_str(), checks.track_future(work));
    thread::Builder::new().name(name).spawn(move || {
        runtime.block_on(task);
        // The drop of the runtime ends all tasks that were cut off.
        drop(runtime);
        drop(lock);
    })?;
    Ok(intake)
}

/// Serves the connections that arrive before `stop`, until they end.
async fn serve_all<H: CheckHandler>(
    mut arrivals: mpsc::Receiver<Arrival>,
    served: Served<H>,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(end) = connections.join_next() => note(end),
            arrival = arrivals.recv() => match arrival {
                Some(arrival) => {
                    connections.spawn(attend(arrival, served.clone(), stop.clone()));
                }
                None => break,
            },
            () = stop.cancelled(), if !arrivals.is_closed() => arrivals.close(),
        }
    }
    while let Some(end) = connections.join_next().await {
        note(end);
    }
}

async fn attend<H: CheckHandler>(
    arrival: Arrival,
    served: Served<H>,
    stop: CancellationToken,
) -> Result<(), ConnectionError> {
    let Arrival {
        socket,
        protocol,
        streams,
        seat: _seat,
    } = arrival;
    let Served {
        grpc,
        grpc_tls,
        http,
    } = served;
    let socket = socket.register();
    let socket = socket.map_err(ConnectionError::Register)?;
    // All other futures are boxed, so that the task of a plain connection of Envoy needs no memory
    // for them.
    match (protocol, grpc_tls) {
        (Protocol::Grpc, None) => serve(socket, grpc, streams, stop).await,
        (Protocol::Grpc, Some(tls)) => Box::pin(serve_tls(socket, tls, grpc, streams, stop)).await,
        (Protocol::Http, _) => {
            let http = http.expect("only a configured listener accepts connections");
            Box::pin(http_authz::serve(socket, http, stop)).await
        }
    }
}

impl<H> Clone for Served<H> {
    fn clone(&self) -> Self {
        Self {
            grpc: self.grpc.clone(),
            grpc_tls: self.grpc_tls.clone(),
            http: self.http.clone(),
        }
    }
}

/// Logs the end of a connection. It does not affect other connections.
fn note(end: End) {
    match end {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "a connection has ended"
            );
        }
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a connection has failed"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::UnixStream,
        sync::Arc,
        time::Duration,
    };

    use prometheus_client::metrics::counter::Counter;
    use tonic::service::Routes;

    use super::*;
    use crate::{
        shutdown::Signals,
        sidecar::{
            socket::Accepted,
            spread::{MAX_CONNECTIONS, Spread},
            testing::Echo,
        },
        tls::{
            TlsUse,
            testing::{Authority, Files, Leaf},
        },
    };

    /// Longer than any orderly stop. A task that still runs then is cut off, which is an error.
    const DRAIN: Duration = Duration::from_secs(20);
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

    fn plain(grpc: Services<Echo>) -> Served<Echo> {
        Served {
            grpc,
            grpc_tls: None,
            http: None,
        }
    }

    fn delays() -> Histogram {
        Histogram::new([])
    }

    fn life(shutdown: &Shutdown, lock: Option<RunLock>) -> Life {
        Life {
            stop: shutdown.token(),
            checks: TaskTracker::new(),
            lock,
        }
    }

    #[tokio::test]
    async fn a_handshake_that_is_not_finished_does_not_hold_a_stop_up() {
        let (authority, files) = (Authority::new("CA"), Files::new());
        let pair = authority.issue(&Leaf::server(&["localhost"]));
        let credentials = files.credentials(TlsUse::ExtAuthzServer, Some(&pair), None);
        let shutdown = Shutdown::new();
        let life = life(&shutdown, None);
        let services = Services::new(Arc::<Echo>::default(), Routes::default());
        let over_tls = Served {
            grpc_tls: Some(TlsServer::new(credentials)),
            ..plain(services)
        };
        let intake = start(0, over_tls, delays(), &life, &shutdown).expect("a thread");
        let mut workers = Spread::new(
            Protocol::Grpc,
            vec![intake],
            MAX_CONNECTIONS,
            Counter::default(),
        );
        let (mut client, server) = UnixStream::pair().expect("two sockets");
        server.set_nonblocking(true).expect("a socket");
        let given = workers.give(Accepted::Unix(server)).await;
        given.expect("the worker runs");
        // The start of a TLS record whose handshake never arrives.
        client.write_all(&[22, 3, 1, 1, 0]).expect("writable");
        shutdown.trigger();
        let signals = Signals::listen().expect("signals can be heard");
        let ended = shutdown.run(signals, DRAIN).await;
        ended.expect("an orderly end");
        let read = client.read(&mut [0]);
        assert!(matches!(read, Ok(0)), "it was closed: {read:?}");
    }

    #[tokio::test]
    async fn what_a_run_holds_is_released_with_the_last_worker() {
        let id = crate::key::RotationId::generate().expect("the random source works");
        let node = format!("node-{}", id.as_str().to_lowercase());
        let node = node.parse().expect("a name");
        let clock = crate::clock::Clock::system();
        let bind = || RunLock::of_node(&node, &clock);
        let shutdown = Shutdown::new();
        let services = Services::new(Arc::<Echo>::default(), Routes::default());
        let lock = bind();
        assert!(lock.is_some(), "nobody else has this node");
        let life = life(&shutdown, lock);
        let intake = start(0, plain(services), delays(), &life, &shutdown);
        drop(life);
        let intake = intake.expect("a thread");
        let mut workers = Spread::new(
            Protocol::Grpc,
            vec![intake],
            MAX_CONNECTIONS,
            Counter::default(),
        );
        let (mut client, server) = UnixStream::pair().expect("two sockets");
        server.set_nonblocking(true).expect("a socket");
        let given = workers.give(Accepted::Unix(server)).await;
        given.expect("the worker runs");
        client.write_all(PREFACE).expect("writable");
        client.write_all(EMPTY_SETTINGS).expect("writable");
        // The client reads the worker's SETTINGS: the worker answers.
        client.read_exact(&mut [0; 9]).expect("readable");
        assert!(bind().is_none(), "the worker holds it");
        shutdown.trigger();
        let signals = Signals::listen().expect("signals can be heard");
        let ended = shutdown.run(signals, DRAIN).await;
        ended.expect("an orderly end");
        // The thread ends directly after its task.
        let released = async {
            while bind().is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let released = tokio::time::timeout(DRAIN, released).await;
        released.expect("the lock is released");
    }

    #[tokio::test]
    async fn a_client_that_is_frozen_does_not_hold_a_stop_up() {
        let shutdown = Shutdown::new();
        let life = life(&shutdown, None);
        let services = Services::new(Arc::<Echo>::default(), Routes::default());
        let intake = start(0, plain(services), delays(), &life, &shutdown).expect("a thread");
        let mut workers = Spread::new(
            Protocol::Grpc,
            vec![intake],
            MAX_CONNECTIONS,
            Counter::default(),
        );
        let (mut client, server) = UnixStream::pair().expect("two sockets");
        server.set_nonblocking(true).expect("a socket");
        let given = workers.give(Accepted::Unix(server)).await;
        given.expect("the worker runs");
        client.write_all(PREFACE).expect("writable");
        client.write_all(EMPTY_SETTINGS).expect("writable");
        // The client reads the worker's SETTINGS: the worker has accepted the connection. From now
        // on the client answers nothing.
        client.read_exact(&mut [0; 9]).expect("readable");
        shutdown.trigger();
        let signals = Signals::listen().expect("signals can be heard");
        let ended = shutdown.run(signals, DRAIN).await;
        ended.expect("an orderly end");
        assert!(life.checks.is_empty());
    }
}
