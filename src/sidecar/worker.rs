//! A thread that answers checks and does nothing else.

use std::{io, thread, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{service::Routes, transport::Server};

use super::listener::Accepted;
use crate::shutdown::Shutdown;

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

/// Starts worker number `index`, which serves `routes` on the connections that it is sent. It belongs to `shutdown`.
///
/// # Errors
///
/// When the system gives no thread or no runtime.
pub(super) fn start(
    index: usize,
    routes: Routes,
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
        Server::builder()
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .http2_max_header_list_size(MAX_HEADERS)
            .http2_max_local_error_reset_streams(Some(MAX_RESETS))
            .http2_max_pending_accept_reset_streams(Some(MAX_RESETS))
            .max_concurrent_streams(MAX_STREAMS)
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await
    };
    let task = shutdown.supervise(name.as_str(), serve);
    thread::Builder::new()
        .name(name)
        .spawn(move || runtime.block_on(task))?;
    Ok(connections)
}
