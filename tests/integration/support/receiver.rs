//! A receiver of webhooks: believes what is signed, keeps it, and answers as a test tells it.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU16, Ordering},
    },
};

use base64::{Engine, prelude::BASE64_STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;
use sha2::Sha256;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{
    loopback::listen,
    wire::{Headers, MAX_HEADERS, Wire, malformed, owned},
};

/// An HTTP/1.1 server on a loopback port; its connections end when it is dropped.
#[derive(Debug)]
pub(crate) struct Receiver {
    addr: SocketAddr,
    shared: Arc<Shared>,
    _server: JoinSet<()>,
}

/// One request that was signed with the webhook's secret.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// Its `webhook-id`.
    pub(crate) id: String,
    /// Its body.
    pub(crate) event: Value,
    /// With which status it was answered.
    pub(crate) status: u16,
}

#[derive(Debug)]
struct Shared {
    secret: OnceLock<Vec<u8>>,
    status: AtomicU16,
    received: Mutex<Vec<Received>>,
    /// What was not believed, and why.
    refused: Mutex<Vec<String>>,
}

impl Receiver {
    /// Starts it; it answers with 204.
    pub(crate) async fn start() -> Self {
        let (listener, addr) = listen().await;
        let shared = Arc::new(Shared {
            secret: OnceLock::new(),
            status: AtomicU16::new(204),
            received: Mutex::default(),
            refused: Mutex::default(),
        });
        let mut server = JoinSet::new();
        server.spawn(accept(listener, Arc::clone(&shared)));
        Self {
            addr,
            shared,
            _server: server,
        }
    }

    /// Its address.
    pub(crate) const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where it takes events.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/events", self.addr)
    }

    /// Takes the secret that the webhook's maker was shown. What comes before is refused.
    pub(crate) fn believe(&self, secret: &str) {
        let encoded = secret.strip_prefix("whsec_").expect("a signing secret");
        let key = BASE64_STANDARD.decode(encoded).expect("base64");
        self.shared.secret.set(key).expect("it is set once");
    }

    /// Answers with `status` from now on.
    pub(crate) fn answer_with(&self, status: u16) {
        self.shared.status.store(status, Ordering::SeqCst);
    }

    /// What was signed, the first first.
    pub(crate) fn received(&self) -> Vec<Received> {
        let received = self.shared.received.lock();
        received.expect("nobody panics with it").clone()
    }

    /// What was not.
    pub(crate) fn refused(&self) -> Vec<String> {
        let refused = self.shared.refused.lock();
        refused.expect("nobody panics with it").clone()
    }
}

impl Shared {
    fn take(&self, headers: &Headers, body: &[u8]) -> u16 {
        let status = self.status.load(Ordering::SeqCst);
        match self.verify(headers, body) {
            Ok((id, event)) => {
                let mut received = self.received.lock().expect("nobody panics with it");
                received.push(Received { id, event, status });
                status
            }
            Err(why) => {
                let mut refused = self.refused.lock().expect("nobody panics with it");
                refused.push(why.to_owned());
                401
            }
        }
    }

    fn verify(&self, headers: &Headers, body: &[u8]) -> Result<(String, Value), &'static str> {
        let header = |name: &str| {
            let mut lines = headers.iter();
            let line = lines.find(|(other, _)| other.eq_ignore_ascii_case(name));
            line.and_then(|(_, value)| str::from_utf8(value).ok())
        };
        let id = header("webhook-id").ok_or("no id")?;
        let timestamp = header("webhook-timestamp").ok_or("no time")?;
        let signature = header("webhook-signature").ok_or("no signature")?;
        let signature = signature.strip_prefix("v1,").ok_or("another signature")?;
        let signature = BASE64_STANDARD.decode(signature).map_err(|_| "no base64")?;
        let secret = self.secret.get().ok_or("it came before its secret")?;
        let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("any length will do");
        for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
            mac.update(part);
        }
        mac.verify_slice(&signature)
            .map_err(|_| "a wrong signature")?;
        let event = serde_json::from_slice(body).map_err(|_| "no JSON")?;
        Ok((id.to_owned(), event))
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(serve(stream, Arc::clone(&shared)));
        while connections.try_join_next().is_some() {}
    }
}

/// Ends with the connection: its peer sees every failure.
async fn serve(stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    let mut wire = Wire::new(stream);
    while let Some(head) = wire.head().await? {
        let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut lines);
        request
            .parse(&head)
            .map_err(|error| malformed(&error.to_string()))?;
        let headers = owned(request.headers);
        let body = wire.body(&headers).await?;
        let status = shared.take(&headers, &body);
        let length = if status == 204 {
            ""
        } else {
            "content-length: 0\r\n"
        };
        wire.write(format!("HTTP/1.1 {status} as told\r\n{length}\r\n").as_bytes())
            .await?;
    }
    Ok(())
}

#[tokio::test]
async fn it_believes_nothing_that_is_not_signed() {
    use super::client::Request;

    let receiver = Receiver::start().await;
    receiver.believe("whsec_c2VjcmV0");
    let mut mac = Hmac::<Sha256>::new_from_slice(b"secret").expect("any length will do");
    mac.update(b"a.1.{}");
    let signature = BASE64_STANDARD.encode(mac.finalize().into_bytes());
    for (body, status) in [("{}", 204), ("[]", 401)] {
        let request = Request::post("/events", body.as_bytes())
            .header("webhook-id", "a")
            .header("webhook-timestamp", "1")
            .header("webhook-signature", format!("v1,{signature}"));
        assert_eq!(request.send(receiver.addr).await.status, status);
    }
    assert_eq!(receiver.received().len(), 1);
    assert_eq!(receiver.refused(), ["a wrong signature"]);
}
