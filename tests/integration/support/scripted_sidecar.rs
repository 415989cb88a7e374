//! A sidecar of discovery that says what the test says.

use std::net::SocketAddr;

use relatch::{
    clock::Clock,
    key::Timestamp,
    proto::discovery::{
        Beat, Caller, ControlMessage, Goodbye, Hello, KeyringUsage, Lock, Node, PROTOCOL,
        SidecarMessage, SocketLock, Subscription, Usage, VersionUsage, control_message,
        keyring_discovery_client::KeyringDiscoveryClient, lock::Place, sidecar_message::Kind,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::eventually::{DEADLINE, eventually, within};

/// A process of a sidecar. It holds the lock of its node, and a later one of the same node has witnessed its end.
#[derive(Debug)]
pub(crate) struct ScriptedRun {
    node: String,
    run_id: String,
    lock: Lock,
    streams: u64,
}

/// One stream of a sidecar of one keyring. Dropping it breaks the stream.
#[derive(Debug)]
pub(crate) struct ScriptedSidecar {
    keyring: String,
    /// The number of the last beat.
    beat: u64,
    say: mpsc::Sender<SidecarMessage>,
    heard: Streaming<ControlMessage>,
}

/// What a report ends with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    /// More is to come.
    Open,
    /// The answer to a beat.
    Beat(u64),
    /// The end of the process.
    End,
}

/// `deny_after` of the sidecar.
const DENY_AFTER_MS: u64 = 3_600_000;
/// More than a test ever says before the other end has read it.
const MAX_SAID: usize = 16;

impl ScriptedRun {
    /// Starts the process `run_id` of `node`.
    pub(crate) fn new(node: &str, run_id: &str) -> Self {
        Self {
            node: node.to_owned(),
            run_id: run_id.to_owned(),
            lock: Lock {
                boot_id: "scripted".to_owned(),
                time_namespace: 1,
                place: Some(Place::Socket(SocketLock {
                    network_namespace: 1,
                })),
                acquired_ns: Clock::system().boot().as_nanos(),
            },
            streams: 0,
        }
    }

    fn hello(&mut self, subscription: Subscription) -> Hello {
        self.streams += 1;
        Hello {
            node: Some(Node {
                id: self.node.clone(),
                ..Node::default()
            }),
            run_id: self.run_id.clone(),
            subscriptions: vec![subscription],
            stream: self.streams,
            lock: Some(self.lock.clone()),
            snapshot_file: None,
            protocol: PROTOCOL,
        }
    }
}

impl ScriptedSidecar {
    /// Opens the next stream of a process, as soon as a control plane listens.
    pub(crate) async fn connect(
        discovery: SocketAddr,
        run: &mut ScriptedRun,
        keyring: &str,
    ) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{discovery}"));
        let endpoint = endpoint.expect("a URL");
        let channel = eventually("the control plane listens", async || {
            endpoint.connect().await.ok()
        })
        .await;
        let (say, said) = mpsc::channel(MAX_SAID);
        let hello = run.hello(Subscription {
            keyring: keyring.to_owned(),
            deny_after_ms: DENY_AFTER_MS,
            ..Subscription::default()
        });
        let hello = SidecarMessage {
            kind: Some(Kind::Hello(hello)),
        };
        say.send(hello).await.expect("the other end is here");
        let mut client = KeyringDiscoveryClient::new(channel);
        let heard = client.subscribe(ReceiverStream::new(said)).await;
        Self {
            keyring: keyring.to_owned(),
            beat: 0,
            say,
            heard: heard.expect("the stream opens").into_inner(),
        }
    }

    /// Sends a beat and waits for its answer; its number, and when it was answered.
    pub(crate) async fn beat(&mut self) -> (u64, Timestamp) {
        self.beat += 1;
        let number = self.beat;
        self.say(Kind::Beat(Beat { number })).await;
        let answered = async {
            loop {
                let message = self.heard.message().await.expect("the stream is open");
                let kind = message.expect("the stream goes on").kind;
                if let Some(control_message::Kind::BeatAnswer(answer)) = kind
                    && answer.beat == number
                {
                    let sent_at = answer.sent_at.expect("it has a time");
                    break std::time::SystemTime::try_from(sent_at).expect("a time");
                }
            }
        };
        let sent_at = within(DEADLINE, "the answer to a beat", answered).await;
        (number, sent_at.into())
    }

    /// Reports the requests of version 1 of a key, and that this is all until then. The sidecar's clock is far behind.
    pub(crate) async fn report(&self, sequence: u64, key_id: &str, requests: u64, until: Until) {
        let version = VersionUsage {
            key_id: key_id.to_owned(),
            version: 1,
            requests,
            denied: 0,
            first_used_ms: 1_000,
            last_used_ms: 1_000,
            callers: vec![Caller {
                source: "10.0.0.1".to_owned(),
                ..Caller::default()
            }],
        };
        let usage = Usage {
            sequence,
            keyrings: vec![KeyringUsage {
                keyring: self.keyring.clone(),
                versions: vec![version],
            }],
            complete_until_beat: match until {
                Until::Beat(number) => number,
                Until::Open | Until::End => 0,
            },
            is_final: matches!(until, Until::End),
        };
        self.say(Kind::Usage(usage)).await;
    }

    /// Waits until usage up to `sequence` is acked.
    pub(crate) async fn until_acked(&mut self, sequence: u64) {
        let acked = async {
            loop {
                let message = self.heard.message().await.expect("the stream is open");
                let kind = message.expect("the stream goes on").kind;
                if let Some(control_message::Kind::UsageAck(ack)) = kind
                    && ack.sequence >= sequence
                {
                    break;
                }
            }
        };
        within(DEADLINE, "the ack of usage", acked).await;
    }

    /// Says Goodbye and waits for the end of the stream.
    pub(crate) async fn goodbye(mut self) {
        self.say(Kind::Goodbye(Goodbye {
            ..Default::default()
        }))
        .await;
        let ended = async { while let Ok(Some(_)) = self.heard.message().await {} };
        within(DEADLINE, "the end of the stream", ended).await;
    }

    async fn say(&self, kind: Kind) {
        let message = SidecarMessage { kind: Some(kind) };
        let said = self.say.send(message).await;
        said.expect("the stream is open");
    }
}
