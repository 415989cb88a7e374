//! A thread that answers checks and does nothing else.

use std::{io, thread, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::task::TaskTracker;
use tonic::{service::Routes, transport::Server};

use super::listener::Accepted;
use crate::shutdown::{Shutdown, unless_left_behind};

/// Connections on their way to a worker. Envoy opens one or a few; the accept loop waits when a worker does not keep up.
const MAX_WAITING: usize = 64;
/// Envoy multiplexes all checks of a worker thread over one connection and opens another when this many are under way.
const MAX_STREAMS: u32 = 1_024;
/// A check carries its headers in its message. What comes beside it are gRPC's own and a trace context.
const MAX_HEADERS: u32 = 16 << 10;
/// An Envoy that cancels every check under way at once, at its deadline, is honest: the limit on resets lies above the
/// number of streams.
const MAX_RESETS: usize = 4 * MAX_STREAMS as usize;
/// Bytes that a client may send on a connection before they are read: a few hundred checks.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// The same of one stream: the largest message.
const STREAM_WINDOW: u32 = 256 << 10;
/// With the timeout below, a dead Envoy is found within a minute; it costs nothing to keep its connection until then.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(45);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts worker number `index`, which serves `routes` on the connections that it is sent. It belongs to `shutdown`. It is
/// among `checks` for as long as it answers any.
///
/// # Errors
///
/// When the system gives no thread or no runtime.
pub(super) fn start(
    index: usize,
    routes: Routes,
    checks: &TaskTracker,
    shutdown: &Shutdown,
) -> io::Result<mpsc::Sender<Accepted>> {
    let (connections, accepted) = mpsc::channel(MAX_WAITING);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let stop = shutdown.token();
    let name = format!("check-{index}");
    let serve = async move {
        let incoming = ReceiverStream::new(accepted).map(Accepted::register);
        let drained = stop.clone().cancelled_owned();
        let serving = Server::builder()
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .http2_max_header_list_size(MAX_HEADERS)
            .http2_max_local_error_reset_streams(Some(MAX_RESETS))
            .http2_max_pending_accept_reset_streams(Some(MAX_RESETS))
            .max_concurrent_streams(MAX_STREAMS)
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, drained);
        let ended = unless_left_behind("checks", stop, serving).await;
        ended.unwrap_or(Ok(()))
    };
    // A check is answered without a pause on the thread that polls this: none is under way when it has ended.
    let task = shutdown.supervise(name.as_str(), checks.track_future(serve));
    thread::Builder::new()
        .name(name)
        .spawn(move || runtime.block_on(task))?;
    Ok(connections)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use tonic_health::server::health_reporter;

    use super::*;
    use crate::shutdown::Signals;

    /// Longer than any stop takes, so that a task that is not left behind is cut off, which is an error.
    const DRAIN: Duration = Duration::from_secs(20);
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

    #[tokio::test]
    async fn a_client_that_is_frozen_does_not_hold_a_stop_up() {
        let shutdown = Shutdown::new();
        let (_reporter, health) = health_reporter();
        let checks = TaskTracker::new();
        let connections = start(0, Routes::new(health), &checks, &shutdown).expect("a thread");
        let (mut client, server) = std::os::unix::net::UnixStream::pair().expect("two sockets");
        server.set_nonblocking(true).expect("a socket");
        let sent = connections.send(Accepted::Unix(server)).await;
        sent.expect("the worker runs");
        client.write_all(PREFACE).expect("writable");
        client.write_all(EMPTY_SETTINGS).expect("writable");
        // The worker's settings: it has taken the connection. From here on the client answers nothing.
        client.read_exact(&mut [0; 9]).expect("readable");
        shutdown.trigger();
        let signals = Signals::listen().expect("signals can be heard");
        let ended = shutdown.run(signals, DRAIN).await;
        ended.expect("an orderly end");
        assert!(checks.is_empty());
    }
}
