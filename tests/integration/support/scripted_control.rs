//! A control plane of one keyring with one key, whose answers, acks and ends are the test's.

use std::{net::SocketAddr, pin::Pin};

use futures_util::Stream;
use prost::Message as _;
use relatch::{
    clock::Clock,
    key::{
        AllowedSources, KeyId, KeyRecord, KeyState, Pepper, PepperId, Prefix, Scopes, Secret,
        VersionNumber, Window,
    },
    proto::discovery::{
        self,
        control_message::Kind as Tell,
        keyring_discovery_server::{KeyringDiscovery, KeyringDiscoveryServer},
        sidecar_message::Kind,
    },
    wire::item,
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{
    eventually::{DEADLINE, within},
    loopback::listen,
};

/// The server; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct ScriptedControl {
    address: SocketAddr,
    secret: Secret,
    opened: mpsc::UnboundedReceiver<SidecarStream>,
    _server: JoinSet<()>,
}

/// The stream of a sidecar.
#[derive(Debug)]
pub(crate) struct SidecarStream {
    said: Streaming<discovery::SidecarMessage>,
    tell: mpsc::UnboundedSender<Result<discovery::ControlMessage, Status>>,
    keyring: discovery::KeyringPulse,
    /// The newest beat that was read, and the newest that was answered.
    beat: u64,
    answered: u64,
}

#[derive(Debug)]
struct Service(mpsc::UnboundedSender<SidecarStream>);

/// Often, so that no test waits for a beat.
const BEAT_EVERY_MS: u32 = 50;
const KEYRING: &str = "payments";
const PEPPER: [u8; Pepper::LEN] = [7; Pepper::LEN];

impl ScriptedControl {
    pub(crate) async fn start() -> Self {
        let (listener, address) = listen().await;
        let (streams, opened) = mpsc::unbounded_channel();
        let serving = Server::builder()
            .add_service(KeyringDiscoveryServer::new(Service(streams)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let mut server = JoinSet::new();
        server.spawn(async move { serving.await.expect("it serves") });
        let id = KeyId::generate().expect("the random source works");
        let secret = Secret::generate(&Prefix::default(), id);
        Self {
            address,
            secret: secret.expect("the random source works"),
            opened,
            _server: server,
        }
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The key, version 1.
    pub(crate) fn key(&self) -> &str {
        self.secret.expose()
    }

    /// The next stream that a sidecar opens, after it has been told of the key in `state` at `revision`.
    pub(crate) async fn stream(&mut self, revision: u64, state: KeyState) -> SidecarStream {
        let opened = within(DEADLINE, "a stream", self.opened.recv()).await;
        let mut stream = opened.expect("the server runs");
        let hello = stream.next().await;
        assert!(matches!(hello, Some(Kind::Hello(_))), "{hello:?}");
        let pepper = Pepper::new(PepperId::new(1), &PEPPER).expect("32 bytes");
        stream.tell(Tell::Settings(discovery::KeyringSettings {
            keyring: KEYRING.to_owned(),
            epoch: 1,
            prefix: Prefix::default().to_string(),
            issued_only: true,
            peppers: vec![discovery::Pepper {
                id: 1,
                secret: PEPPER.to_vec().into(),
            }],
            help_url: String::new(),
        }));
        let presented = self.secret.presented();
        let item = item::encode(&KeyRecord {
            digest: pepper.digest(&presented),
            pepper: pepper.id(),
            key_id: presented.parse(&Prefix::default()).expect("a token"),
            version: VersionNumber::FIRST,
            consumer: "acme".parse().expect("a valid id"),
            state,
            window: Window::default(),
            retiring_since: None,
            retires_at: None,
            scopes: Scopes::default(),
            allowed_sources: AllowedSources::default(),
            replaced_by: None,
            rotation: None,
        });
        stream.keyring.revision = revision;
        stream.keyring.set_digest = item::hash(&item);
        let chunk = discovery::SnapshotChunk {
            keyring: KEYRING.to_owned(),
            epoch: 1,
            revision,
            nonce: 1,
            last: true,
            total_items: 1,
            set_digest: item::hash(&item),
            items: vec![item],
            ..discovery::SnapshotChunk::default()
        };
        stream.tell(Tell::Snapshot(chunk.encode_to_vec().into()));
        let ack = stream.next().await;
        assert!(matches!(ack, Some(Kind::Ack(_))), "{ack:?}");
        stream
    }
}

impl SidecarStream {
    /// What the sidecar says next but for beats; none at its end.
    pub(crate) async fn next(&mut self) -> Option<Kind> {
        loop {
            match self.heard().await? {
                Kind::Beat(beat) => self.beat = beat.number,
                other => return Some(other),
            }
        }
    }

    async fn heard(&mut self) -> Option<Kind> {
        let said = within(DEADLINE, "a message", self.said.message()).await;
        said.ok().flatten()?.kind
    }

    /// The usage report that comes next, in one message.
    pub(crate) async fn usage(&mut self) -> discovery::Usage {
        match self.next().await {
            Some(Kind::Usage(usage)) => usage,
            other => panic!("no usage: {other:?}"),
        }
    }

    /// Answers the next beat; the report that replies to it.
    pub(crate) async fn report(&mut self) -> discovery::Usage {
        while self.beat <= self.answered {
            match self.heard().await {
                Some(Kind::Beat(beat)) => self.beat = beat.number,
                other => panic!("no beat: {other:?}"),
            }
        }
        self.answered = self.beat;
        self.tell(Tell::BeatAnswer(discovery::BeatAnswer {
            beat: self.beat,
            sent_at: Some(Clock::system().wall().to_wire()),
            beat_every_ms: BEAT_EVERY_MS,
            keyrings: vec![self.keyring.clone()],
        }));
        self.usage().await
    }

    pub(crate) fn ack(&self, usage: &discovery::Usage) {
        let sequence = usage.sequence;
        self.tell(Tell::UsageAck(discovery::UsageAck { sequence }));
    }

    fn tell(&self, kind: Tell) {
        let message = discovery::ControlMessage { kind: Some(kind) };
        // A sidecar that has gone shows in what it does not say.
        let _ = self.tell.send(Ok(message));
    }
}

#[tonic::async_trait]
impl KeyringDiscovery for Service {
    type SubscribeStream =
        Pin<Box<dyn Stream<Item = Result<discovery::ControlMessage, Status>> + Send>>;

    async fn subscribe(
        &self,
        request: Request<Streaming<discovery::SidecarMessage>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let (tell, told) = mpsc::unbounded_channel();
        let opened = SidecarStream {
            said: request.into_inner(),
            tell,
            keyring: discovery::KeyringPulse {
                keyring: KEYRING.to_owned(),
                epoch: 1,
                serve_for_ms: 3_600_000,
                ..discovery::KeyringPulse::default()
            },
            beat: 0,
            answered: 0,
        };
        self.0.send(opened).expect("the test listens");
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(told))))
    }
}
