//! The API's consumer: sends exactly the bytes that a test asks for.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use bytes::Bytes;
use h2::client::SendRequest;
use serde::de::DeserializeOwned;
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
};

use super::{
    eventually::{DEADLINE, within},
    upstream::{SEEN, Seen},
    wire::{Headers, MAX_HEADERS, Wire, malformed, owned},
};

/// Why there is no answer over HTTP/2.
type Http2Error = Box<dyn std::error::Error>;

/// A request as it will stand on the wire: nothing is added but `host` and the length of a body.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    method: String,
    target: String,
    headers: Vec<(Vec<u8>, Vec<u8>)>,
    body: Vec<u8>,
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    pub(crate) body: Vec<u8>,
}

/// A connection that is kept alive between requests.
#[derive(Debug)]
pub(crate) struct Connection(Wire);

impl Request {
    /// A `GET` of `target`, which may hold any bytes that fit a request line.
    pub(crate) fn get(target: &str) -> Self {
        Self {
            method: "GET".to_owned(),
            target: target.to_owned(),
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// A `CONNECT` to `authority`, over HTTP/1.1.
    pub(crate) fn connect(authority: &str) -> Self {
        Self {
            method: "CONNECT".to_owned(),
            ..Self::get(authority)
        }
    }

    /// The question of a browser whether a script of `origin` may send `method`.
    pub(crate) fn preflight(target: &str, origin: &str, method: &str) -> Self {
        let preflight = Self {
            method: "OPTIONS".to_owned(),
            ..Self::get(target)
        };
        preflight
            .header("origin", origin)
            .header("access-control-request-method", method)
            .header("access-control-request-headers", "x-api-key")
    }

    /// A `POST` of `body`.
    pub(crate) fn post(target: &str, body: &[u8]) -> Self {
        Self {
            method: "POST".to_owned(),
            body: body.to_vec(),
            ..Self::get(target)
        }
    }

    /// Adds a header line, also where one of that name stands already.
    pub(crate) fn header(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        let line = (name.as_ref().to_vec(), value.as_ref().to_vec());
        self.headers.push(line);
        self
    }

    /// Sends it over HTTP/1.1 on a connection of its own.
    pub(crate) async fn send(&self, addr: SocketAddr) -> Response {
        let answer = async { Connection::open(addr).await?.send(self).await };
        answer
            .await
            .unwrap_or_else(|error| panic!("{} {}: {error}", self.method, self.target))
    }

    /// As [`Self::send`], from another address of this machine.
    pub(crate) async fn send_from(&self, source: IpAddr, addr: SocketAddr) -> Response {
        let answer = async { Connection::open_from(source, addr).await?.send(self).await };
        answer
            .await
            .unwrap_or_else(|error| panic!("{} {}: {error}", self.method, self.target))
    }

    /// Sends it over HTTP/2 with prior knowledge on a connection of its own; names are sent in lower case.
    pub(crate) async fn send_http2(&self, addr: SocketAddr) -> Response {
        within(DEADLINE, "an HTTP/2 response", self.try_send_http2(addr))
            .await
            .unwrap_or_else(|error| panic!("{} {}: {error}", self.method, self.target))
    }

    /// Sends it `count` times at once, over HTTP/2 with prior knowledge on one connection.
    pub(crate) async fn send_http2_at_once(&self, addr: SocketAddr, count: usize) -> Vec<Response> {
        let sent = async {
            let (client, connection) = connect_http2(addr, count).await?;
            let requests = (0..count).map(|_| self.exchange_http2(client.clone(), addr));
            let responses = futures_util::future::try_join_all(requests).await;
            connection.abort();
            responses
        };
        within(DEADLINE, "HTTP/2 responses", sent)
            .await
            .unwrap_or_else(|error| panic!("{} {}: {error}", self.method, self.target))
    }

    async fn try_send_http2(&self, addr: SocketAddr) -> Result<Response, Http2Error> {
        let (client, connection) = connect_http2(addr, 1).await?;
        let response = self.exchange_http2(client, addr).await;
        connection.abort();
        response
    }

    async fn exchange_http2(
        &self,
        client: SendRequest<Bytes>,
        addr: SocketAddr,
    ) -> Result<Response, Http2Error> {
        let mut request = http::Request::builder()
            .method(self.method.as_str())
            .uri(format!("http://{addr}{}", self.target));
        for (name, value) in &self.headers {
            request = request.header(name.as_slice(), value.as_slice());
        }
        let (response, mut stream) = client
            .ready()
            .await?
            .send_request(request.body(())?, self.body.is_empty())?;
        if !self.body.is_empty() {
            stream.send_data(self.body.clone().into(), true)?;
        }
        let (head, mut incoming) = response.await?.into_parts();
        let mut body = Vec::new();
        while let Some(data) = incoming.data().await {
            let data = data?;
            incoming.flow_control().release_capacity(data.len())?;
            body.extend_from_slice(&data);
        }
        let line = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
            (name.as_str().to_owned(), value.as_bytes().to_vec())
        };
        Ok(Response {
            status: head.status.as_u16(),
            headers: head.headers.iter().map(line).collect(),
            body,
        })
    }

    fn bytes(&self, addr: SocketAddr) -> Vec<u8> {
        let mut bytes = format!("{} {} HTTP/1.1\r\n", self.method, self.target).into_bytes();
        let mut line = |name: &[u8], value: &[u8]| {
            bytes.extend([name, b": ", value, b"\r\n"].concat());
        };
        let has_host = self
            .headers
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case(b"host"));
        if !has_host {
            line(b"host", addr.to_string().as_bytes());
        }
        for (name, value) in &self.headers {
            line(name, value);
        }
        if !self.body.is_empty() {
            line(b"content-length", self.body.len().to_string().as_bytes());
        }
        bytes.extend(b"\r\n");
        bytes.extend(&self.body);
        bytes
    }
}

/// Connects with HTTP/2 for `streams` requests at once.
async fn connect_http2(
    addr: SocketAddr,
    streams: usize,
) -> Result<(SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>), Http2Error> {
    let stream = TcpStream::connect(addr).await?;
    let (client, connection) = h2::client::Builder::new()
        .initial_max_send_streams(streams)
        .handshake(stream)
        .await?;
    Ok((client, tokio::spawn(connection)))
}

impl Response {
    /// The value of the first header line called `name`, in any case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.headers.iter();
        let (_, value) = lines.find(|(other, _)| other.eq_ignore_ascii_case(name))?;
        str::from_utf8(value).ok()
    }

    /// The body as text; bytes that are no UTF-8 are replaced.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}: {}", self.status, self.text()))
    }

    /// What the upstream saw; panics when the answer is not the upstream's.
    pub(crate) fn seen(&self) -> Seen {
        if self.status == 101 {
            let seen = self.header(SEEN).expect("the upstream accepts a WebSocket");
            return serde_json::from_str(seen).expect("a description");
        }
        assert_eq!(self.status, 200, "not the upstream's: {}", self.text());
        self.json()
    }

    /// Whether the server closes the connection after this answer.
    pub(crate) fn is_last(&self) -> bool {
        self.header("connection")
            .is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

impl Connection {
    pub(crate) async fn open(addr: SocketAddr) -> io::Result<Self> {
        Self::on(TcpStream::connect(addr).await?)
    }

    /// Connects from an address of this machine.
    async fn open_from(source: IpAddr, addr: SocketAddr) -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((source, 0).into())?;
        Self::on(socket.connect(addr).await?)
    }

    fn on(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self(Wire::new(stream)))
    }

    /// Sends `request` and waits for the answer, at most [`DEADLINE`]. After an error the connection is of no more use.
    pub(crate) async fn send(&mut self, request: &Request) -> io::Result<Response> {
        tokio::time::timeout(DEADLINE, self.exchange(request)).await?
    }

    /// Sends `request` on the connection that is kept, or on a new one, and keeps it while the server does.
    pub(crate) async fn send_kept(
        kept: &mut Option<Self>,
        addr: SocketAddr,
        request: &Request,
    ) -> io::Result<Response> {
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => Self::open(addr).await?,
        };
        let response = connection.send(request).await?;
        if !response.is_last() {
            *kept = Some(connection);
        }
        Ok(response)
    }

    async fn exchange(&mut self, request: &Request) -> io::Result<Response> {
        let Self(wire) = self;
        wire.write(&request.bytes(wire.peer()?)).await?;
        let head = wire.head().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut lines);
        response
            .parse(&head)
            .map_err(|error| malformed(&error.to_string()))?;
        let headers = owned(response.headers);
        let status = response.code.unwrap_or_default();
        let body = wire.body(&headers).await?;
        Ok(Response {
            status,
            headers,
            body,
        })
    }
}
