//! A relay that keeps every byte which a client sends to a server.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
};

use crate::support::loopback::listen;

/// A listener on a loopback port in front of a server; its connections end when it is dropped.
#[derive(Debug)]
pub(super) struct Tee {
    addr: SocketAddr,
    sent: Sent,
    _server: JoinSet<()>,
}

/// What clients sent, one connection's bytes among another's as they came.
type Sent = Arc<Mutex<Vec<u8>>>;

impl Tee {
    pub(super) async fn before(server: SocketAddr) -> Self {
        let (listener, addr) = listen().await;
        let sent = Sent::default();
        let mut task = JoinSet::new();
        task.spawn(accept(listener, server, Arc::clone(&sent)));
        Self {
            addr,
            sent,
            _server: task,
        }
    }

    /// Where clients connect.
    pub(super) const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Everything that was sent so far.
    pub(super) fn sent(&self) -> Vec<u8> {
        self.sent.lock().expect("nobody panics with it").clone()
    }
}

async fn accept(listener: TcpListener, server: SocketAddr, sent: Sent) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        connections.spawn(relay(client, server, Arc::clone(&sent)));
        while connections.try_join_next().is_some() {}
    }
}

/// Ends with the connection: its peers see every failure.
async fn relay(client: TcpStream, server: SocketAddr, sent: Sent) -> io::Result<()> {
    let server = TcpStream::connect(server).await?;
    let (from_client, mut to_client) = client.into_split();
    let (mut from_server, to_server) = server.into_split();
    let there = keep(from_client, to_server, sent);
    tokio::try_join!(there, copy(&mut from_server, &mut to_client))?;
    Ok(())
}

async fn keep(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, sent: Sent) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        let bytes = &buffer[..read];
        sent.lock().expect("nobody panics with it").extend(bytes);
        to.write_all(bytes).await?;
    }
}

#[tokio::test]
async fn it_keeps_what_it_hands_on() {
    use crate::support::{client::Request, upstream::Upstream};

    let upstream = Upstream::start().await;
    let tee = Tee::before(upstream.addr()).await;
    let answer = Request::get("/somewhere").send(tee.addr()).await;
    assert_eq!(answer.seen().target, "/somewhere");
    let sent = String::from_utf8(tee.sent()).expect("text");
    assert!(sent.starts_with("GET /somewhere HTTP/1.1\r\n"), "{sent}");
}
