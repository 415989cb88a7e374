//! A Vault that refuses to write, and says so with everything that it was sent.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinSet};

use crate::support::{
    loopback::listen,
    wire::{MAX_HEADERS, Wire, malformed, owned},
};

/// An HTTP/1.1 server on a loopback port; its connections end when it is dropped.
#[derive(Debug)]
pub(super) struct EchoVault {
    addr: SocketAddr,
    refused: Refused,
    _server: JoinSet<()>,
}

/// The keys that it was to hold.
type Refused = Arc<Mutex<Vec<String>>>;

impl EchoVault {
    /// Starts it. `held` is the key that it holds already.
    pub(super) async fn start(held: &str) -> Self {
        let (listener, addr) = listen().await;
        let refused = Refused::default();
        let mut server = JoinSet::new();
        let (held, kept) = (held.to_owned(), Arc::clone(&refused));
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, held.clone(), Arc::clone(&kept)));
            }
        });
        Self {
            addr,
            refused,
            _server: server,
        }
    }

    pub(super) fn address(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The keys that it was to hold, the first first.
    pub(super) fn refused(&self) -> Vec<String> {
        self.refused.lock().expect("nobody panics with it").clone()
    }
}

/// Ends with the connection: its peer sees every failure.
async fn serve(stream: TcpStream, held: String, refused: Refused) -> io::Result<()> {
    let mut wire = Wire::new(stream);
    while let Some(head) = wire.head().await? {
        let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut lines);
        request
            .parse(&head)
            .map_err(|error| malformed(&error.to_string()))?;
        let headers = owned(request.headers);
        let is_read = request.method == Some("GET");
        let body = wire.body(&headers).await?;
        let (status, answer) = if is_read {
            let held = json!({ "key": held, "key_id": "000000000000", "version": 1 });
            let metadata = json!({ "version": 7 });
            (
                200,
                json!({ "data": { "data": held, "metadata": metadata } }),
            )
        } else {
            let sent: Value = serde_json::from_slice(&body)?;
            let key = sent["data"]["key"].as_str().unwrap_or_default();
            refused
                .lock()
                .expect("nobody panics with it")
                .push(key.to_owned());
            let said = [&body, &head].map(|bytes| String::from_utf8_lossy(bytes));
            (403, json!({ "errors": said }))
        };
        let answer = answer.to_string();
        let length = answer.len();
        let answered = format!("HTTP/1.1 {status} as told\r\ncontent-length: {length}\r\n\r\n");
        wire.write(&[answered.as_bytes(), answer.as_bytes()].concat())
            .await?;
    }
    Ok(())
}
