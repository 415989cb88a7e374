//! One simulated sidecar: it follows a keyring by its revision, without its keys.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ::relatch::{
    proto::discovery::{
        Ack, Beat, ControlMessage, Goodbye, Hello, Node, PROTOCOL, SidecarMessage, Subscription,
        Usage, control_message, keyring_discovery_client::KeyringDiscoveryClient,
        sidecar_message::Kind,
    },
    wire::backoff,
};
use anyhow::{Result, ensure};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use tokio::{
    net::TcpSocket,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use crate::{board::Board, counted::Counted, order::Order};

/// A sidecar, from its first connection to its Goodbye.
pub(crate) struct Sidecar {
    pub(crate) number: usize,
    pub(crate) node: String,
    pub(crate) keyring: String,
    pub(crate) discovery: SocketAddr,
    /// The local address of its connections.
    pub(crate) source: IpAddr,
    pub(crate) board: Arc<Board>,
    pub(crate) orders: watch::Receiver<Order>,
    /// Its state of the keyring.
    pub(crate) held: Held,
    /// The number of streams that it has opened.
    pub(crate) streams: u64,
    /// The number of beats that it has sent.
    pub(crate) beats: u64,
}

/// A point in the history of a keyring.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Held {
    epoch: u64,
    revision: u64,
    /// Every revocation up to this revision is known.
    revoked_through: u64,
    /// The digest of the set at `revision`; 0 if it is not known.
    set_digest: u64,
    /// The sequence of the last report of use.
    sequence: u64,
}

/// The fields of a `SnapshotChunk` that a sidecar without keys needs; the items are skipped.
#[derive(Clone, PartialEq, prost::Message)]
struct Chunk {
    #[prost(uint64, tag = "3")]
    revision: u64,
    #[prost(uint64, tag = "4")]
    nonce: u64,
    #[prost(bool, tag = "6")]
    last: bool,
    #[prost(fixed64, tag = "8")]
    set_digest: u64,
}

/// The same of a `Delta`.
#[derive(Clone, PartialEq, prost::Message)]
struct Step {
    #[prost(uint64, tag = "3")]
    prev_revision: u64,
    #[prost(uint64, tag = "4")]
    revision: u64,
    #[prost(uint64, tag = "5")]
    nonce: u64,
}

/// The same of `Revocations`.
#[derive(Clone, PartialEq, prost::Message)]
struct Revoked {
    #[prost(uint64, tag = "3")]
    revision: u64,
    #[prost(uint64, tag = "4")]
    nonce: u64,
}

/// The reason of the end of a stream.
enum End {
    /// The swarm has cut it; the sidecar connects again.
    Cut,
    /// The swarm has stopped the sidecar.
    Stopped,
}

/// The length of the queue to the control plane: an ack for each message of a burst.
const MAX_SAID: usize = 64;
/// The largest message, in bytes: a chunk of a snapshot, with a margin.
const MAX_MESSAGE: usize = 4 << 20;
/// The default heartbeat of the control plane.
const BEAT_EVERY: Duration = Duration::from_secs(5);
/// The keepalive of a real sidecar for a silent connection.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// The `deny_after` of the sidecar.
const DENY_AFTER_MS: u64 = 3_600_000;
/// The wait after a failure without jitter.
const RETRY: Duration = Duration::from_millis(20);

impl Sidecar {
    /// Connects and follows until the swarm stops it.
    pub(crate) async fn run(mut self) {
        let mut backoff = backoff::Backoff::default();
        loop {
            let ended = self.follow().await;
            let jitter = self.orders.borrow().jitter;
            match ended {
                Ok(End::Stopped) => return,
                Ok(End::Cut) => {
                    if self.orders.borrow().forget {
                        let sequence = self.held.sequence;
                        self.held = Held {
                            sequence,
                            ..Held::default()
                        };
                    }
                    if jitter {
                        let wait = backoff::Backoff::FIRST;
                        tokio::time::sleep(backoff::drawn(wait, backoff::random())).await;
                    }
                }
                Err(_) => {
                    self.board.failed();
                    let wait = if jitter {
                        backoff.next(backoff::random())
                    } else {
                        RETRY
                    };
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    /// One stream.
    async fn follow(&mut self) -> Result<End> {
        self.orders.mark_unchanged();
        if self.orders.borrow().stop {
            return Ok(End::Stopped);
        }
        let (say, mut heard) = self.connect().await?;
        let mut following = Following {
            board: Arc::clone(&self.board),
            counted: false,
        };
        // The first tick is immediate: it is the beat after the hello.
        let mut beats = tokio::time::interval(BEAT_EVERY);
        loop {
            let told = tokio::select! {
                told = heard.message() => told?,
                _ = beats.tick() => {
                    say.send(message(self.beat())).await?;
                    continue;
                }
                changed = self.orders.changed() => {
                    changed?;
                    if self.orders.borrow().stop {
                        say.send(message(Kind::Goodbye(Goodbye { ..Default::default() }))).await?;
                        return Ok(End::Stopped);
                    }
                    return Ok(End::Cut);
                }
            };
            let Some(kind) = told.and_then(|told| told.kind) else {
                anyhow::bail!("the stream has ended");
            };
            let is_new = matches!(&kind, control_message::Kind::Snapshot(_));
            let revision = self.held.revision;
            if let Some(answer) = self.take(kind, &mut following)? {
                say.send(message(answer)).await?;
            }
            if is_new && self.held.revision != revision {
                beats.reset_immediately();
            }
        }
    }

    async fn connect(
        &mut self,
    ) -> Result<(mpsc::Sender<SidecarMessage>, Streaming<ControlMessage>)> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.discovery))?
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_while_idle(true);
        let (source, discovery) = (SocketAddr::new(self.source, 0), self.discovery);
        let board = Arc::clone(&self.board);
        let connect = tower::service_fn(move |_| {
            let board = Arc::clone(&board);
            async move {
                let socket = TcpSocket::new_v4()?;
                socket.bind(source)?;
                let stream = socket.connect(discovery).await?;
                stream.set_nodelay(true)?;
                io::Result::Ok(TokioIo::new(Counted::new(stream, board)))
            }
        });
        let channel = endpoint.connect_with_connector(connect).await?;
        let (say, said) = mpsc::channel(MAX_SAID);
        self.streams += 1;
        let hello = Hello {
            node: Some(Node {
                id: self.node.clone(),
                cluster: "swarm".to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                ..Node::default()
            }),
            run_id: self.node.clone(),
            subscriptions: vec![Subscription {
                keyring: self.keyring.clone(),
                epoch: self.held.epoch,
                revision: self.held.revision,
                set_digest: self.held.set_digest,
                revoked_through: self.held.revoked_through,
                deny_after_ms: DENY_AFTER_MS,
                ..Subscription::default()
            }],
            protocol: PROTOCOL,
            stream: self.streams,
            ..Default::default()
        };
        say.send(message(Kind::Hello(hello))).await?;
        let client = KeyringDiscoveryClient::new(channel);
        let mut client = client.max_decoding_message_size(MAX_MESSAGE);
        let heard = client.subscribe(ReceiverStream::new(said)).await?;
        Ok((say, heard.into_inner()))
    }

    /// Handles a message, and returns the answers to it.
    fn take(
        &mut self,
        kind: control_message::Kind,
        following: &mut Following,
    ) -> Result<Option<Kind>> {
        use control_message::Kind as Heard;
        match kind {
            Heard::Settings(settings) => {
                if settings.epoch != self.held.epoch {
                    self.held = Held {
                        epoch: settings.epoch,
                        sequence: self.held.sequence,
                        ..Held::default()
                    };
                }
                Ok(None)
            }
            Heard::Snapshot(chunk) => {
                self.board.heard_chunk(chunk.len());
                let chunk = Chunk::decode(chunk)?;
                if !chunk.last {
                    return Ok(None);
                }
                ensure!(chunk.revision >= self.held.revision, "a snapshot goes back");
                self.board.took_snapshot();
                self.held.set_digest = chunk.set_digest;
                self.reach(chunk.revision);
                Ok(Some(self.ack(chunk.nonce, true)))
            }
            Heard::Delta(delta) => {
                self.board.heard_change(delta.len());
                let delta = Step::decode(delta)?;
                ensure!(
                    delta.prev_revision == self.held.revision,
                    "a delta leads on from {}, and {} is held",
                    delta.prev_revision,
                    self.held.revision
                );
                self.board.took_delta();
                self.held.set_digest = 0;
                self.reach(delta.revision);
                Ok(Some(self.ack(delta.nonce, false)))
            }
            Heard::Revocations(revocations) => {
                self.board.heard_change(revocations.len());
                let revocations = Revoked::decode(revocations)?;
                self.know_revoked(revocations.revision);
                Ok(Some(self.ack(revocations.nonce, false)))
            }
            Heard::BeatAnswer(answer) => {
                for pulse in answer.keyrings {
                    if pulse.revision == self.held.revision {
                        self.held.set_digest = pulse.set_digest;
                        following.count();
                    }
                }
                self.held.sequence += 1;
                Ok(Some(Kind::Usage(Usage {
                    sequence: self.held.sequence,
                    complete_until_beat: answer.beat,
                    ..Usage::default()
                })))
            }
            Heard::NotServed(told) => anyhow::bail!("{}", told.reason),
            Heard::Drain(_) => anyhow::bail!("the control plane stops"),
            Heard::UsageAck(_) => Ok(None),
            Heard::Start(_) | Heard::LookupResult(_) | Heard::Listing(_) => {
                anyhow::bail!("the keyring is held in full")
            }
        }
    }

    fn beat(&mut self) -> Kind {
        self.beats += 1;
        Kind::Beat(Beat { number: self.beats })
    }

    fn reach(&mut self, revision: u64) {
        self.board.applied(self.number, revision);
        self.held.revision = revision;
        self.know_revoked(revision);
    }

    fn know_revoked(&mut self, revision: u64) {
        self.board.revoked(self.held.revoked_through, revision);
        self.held.revoked_through = self.held.revoked_through.max(revision);
    }

    fn ack(&self, nonce: u64, is_whole: bool) -> Kind {
        Kind::Ack(Ack {
            keyring: self.keyring.clone(),
            epoch: self.held.epoch,
            nonce,
            applied_revision: self.held.revision,
            durable_revision: 0,
            revoked_through: self.held.revoked_through,
            is_whole,
            ..Default::default()
        })
    }
}

/// Counts a stream as following until it is dropped.
struct Following {
    board: Arc<Board>,
    counted: bool,
}

impl Following {
    fn count(&mut self) {
        if !self.counted {
            self.counted = true;
            self.board.follows();
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        if self.counted {
            self.board.leaves();
        }
    }
}

fn message(kind: Kind) -> SidecarMessage {
    SidecarMessage { kind: Some(kind) }
}
