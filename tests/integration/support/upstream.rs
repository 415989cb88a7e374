//! The API behind Envoy: answers every request with a description of that request, and with the header lines that the
//! request asks for.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{
    loopback::listen,
    wire::{MAX_HEADERS, Wire, malformed, owned},
};

/// An HTTP/1.1 server on a loopback port; its connections end when it is dropped.
#[derive(Debug)]
pub(crate) struct Upstream {
    addr: SocketAddr,
    requests: Arc<AtomicU64>,
    _server: JoinSet<()>,
}

/// A request's header whose value is a header line of the answer, such as `sunset: never`.
pub(crate) const ANSWER_WITH: &str = "x-answer-with";

/// The target that has moved to [`LANDING`].
pub(crate) const MOVED: &str = "/moved";
/// Where a request for [`MOVED`] is sent on.
pub(crate) const LANDING: &str = "/landing";

/// The header with what the upstream got, of an answer that accepts a WebSocket.
pub(crate) const SEEN: &str = "x-seen";

/// What the upstream got, as it says in its answer's body, or in [`SEEN`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// The request target with its query, undecoded.
    pub(crate) target: String,
    /// In the order in which they stood. A value's byte is the character of the same number, so that all survive.
    pub(crate) headers: Vec<(String, String)>,
    /// The length of the body, in bytes.
    pub(crate) body: usize,
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        let (listener, addr) = listen().await;
        let requests = Arc::new(AtomicU64::new(0));
        let mut server = JoinSet::new();
        server.spawn(accept(listener, Arc::clone(&requests)));
        Self {
            addr,
            requests,
            _server: server,
        }
    }

    pub(crate) const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many requests have come so far.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }
}

impl Seen {
    /// The values of every header line called `name`, whose case counts.
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        let lines = self.headers.iter().filter(|(other, _)| other == name);
        lines.map(|(_, value)| value.as_str()).collect()
    }
}

async fn accept(listener: TcpListener, requests: Arc<AtomicU64>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(serve(stream, Arc::clone(&requests)));
        while connections.try_join_next().is_some() {}
    }
}

/// Ends with the connection: its peer sees every failure.
async fn serve(stream: TcpStream, requests: Arc<AtomicU64>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut wire = Wire::new(stream);
    while let Some(head) = wire.head().await? {
        let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut lines);
        request
            .parse(&head)
            .map_err(|error| malformed(&error.to_string()))?;
        let headers = owned(request.headers);
        let body = wire.body(&headers).await?;
        let seen = Seen {
            method: request.method.unwrap_or_default().to_owned(),
            target: request.path.unwrap_or_default().to_owned(),
            headers: headers
                .iter()
                .map(|(name, value)| (name.clone(), latin_1(value)))
                .collect(),
            body: body.len(),
        };
        requests.fetch_add(1, Ordering::SeqCst);
        let body = serde_json::to_string(&seen)?;
        if seen.values("upgrade") == ["websocket"] {
            let upgraded = format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n{SEEN}: {body}\r\n\r\n"
            );
            return wire.write(upgraded.as_bytes()).await;
        }
        let length = format!("content-length: {}", body.len());
        let host = seen.values("host").concat();
        let location = format!("location: http://{host}{LANDING}");
        let mut lines = if seen.target.starts_with(MOVED) {
            vec!["HTTP/1.1 302 Found", &location]
        } else {
            vec!["HTTP/1.1 200 OK"]
        };
        lines.extend(["content-type: application/json", &length]);
        lines.extend(seen.values(ANSWER_WITH));
        let head = lines.join("\r\n") + "\r\n\r\n";
        wire.write(&[head.as_bytes(), body.as_bytes()].concat())
            .await?;
    }
    Ok(())
}

fn latin_1(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}
