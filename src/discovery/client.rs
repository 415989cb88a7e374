//! The sidecar's side of the stream: keeps one open, to one control plane after the other, for as long as the sidecar
//! lives. Whatever happens to the stream, checks go on with what is held.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::{Channel, Endpoint, Uri};

use super::{
    backoff::{Backoff, random},
    receiver::{Leave, Outcome, Receiver},
    reporter::ReportProgress,
};
use crate::{
    clock::Clock,
    key::RandomError,
    proto::discovery::{
        self as wire, keyring_discovery_client::KeyringDiscoveryClient, sidecar_message::Kind,
    },
};

/// Keeps a sidecar's keyrings up to date.
#[derive(Debug)]
pub struct Client {
    node: wire::Node,
    boot_id: String,
    endpoints: Vec<Uri>,
    receiver: Receiver,
    clock: Clock,
    link: Arc<Link>,
}

/// What is known of the stream, for metrics and `/status`.
#[derive(Debug)]
pub struct Link {
    endpoints: Vec<(Uri, AtomicBool)>,
    reconnects: AtomicU64,
    clock_skew_ms: AtomicI64,
    usage_acked: AtomicU64,
    usage_unacked: AtomicUsize,
}

/// An open stream.
struct Stream {
    answers: mpsc::Sender<wire::SidecarMessage>,
    inbound: tonic::Streaming<wire::ControlMessage>,
}

/// How a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("the connection failed")]
    Transport(#[from] tonic::transport::Error),
    #[error("the control plane ended the stream: {0}")]
    Status(#[from] tonic::Status),
    #[error("the control plane closed the stream")]
    Closed,
    #[error("the control plane does not answer, though its link is alive")]
    Silent,
    #[error(transparent)]
    Left(#[from] Leave),
    #[error("the sidecar stops")]
    Shutdown,
}

/// A connection that takes longer is taken for dead and the next endpoint is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The same of a control plane that takes the connection and then does not answer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// Three times the longest interval of heartbeats: a stream without one for so long is given up.
const SILENCE: Duration = Duration::from_secs(90);
/// With the timeout below, a dead link is found within 15 seconds.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers that wait for the stream. A control plane that does not read them stops being read from.
const MAX_ANSWERS: usize = 64;
/// A chunk of a snapshot has at most 1 MiB of items; this leaves room for what surrounds them.
const MAX_MESSAGE: usize = 4 << 20;
/// How long an orderly stop waits until its last usage report is in the control plane's store, which takes a commit. One
/// that takes longer than a slow disk does is not waited for: the next reports of others show the gap.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an orderly stop waits for its Goodbye to go out.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

impl Client {
    /// A client of the control planes at `endpoints`, which are tried in turn.
    ///
    /// # Errors
    ///
    /// When the operating system's random source fails.
    pub fn new(
        node: wire::Node,
        endpoints: Vec<Uri>,
        receiver: Receiver,
        clock: Clock,
    ) -> Result<Self, RandomError> {
        let link = Arc::new(Link {
            endpoints: endpoints
                .iter()
                .map(|uri| (uri.clone(), AtomicBool::new(false)))
                .collect(),
            reconnects: AtomicU64::new(0),
            clock_skew_ms: AtomicI64::new(0),
            usage_acked: AtomicU64::new(0),
            usage_unacked: AtomicUsize::new(0),
        });
        Ok(Self {
            node,
            boot_id: crate::key::RotationId::generate()?.as_str().to_owned(),
            endpoints,
            receiver,
            clock,
            link,
        })
    }

    /// What is known of the stream.
    #[must_use]
    pub const fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Runs until `shutdown`, and on until all of `checks` have ended, so that their answers are in the last report. Then
    /// says Goodbye. Without a stream it ends at once.
    pub async fn run(mut self, shutdown: CancellationToken, checks: TaskTracker) {
        let mut backoff = Backoff::default();
        for at in (0..self.endpoints.len()).cycle() {
            let connected_at = self.clock.boot();
            let end = self.stream(at, &shutdown, &checks).await;
            self.receiver.disconnected();
            self.link.endpoints[at].1.store(false, Ordering::Relaxed);
            if matches!(end, StreamEnd::Shutdown) {
                return;
            }
            if shutdown.is_cancelled() {
                tracing::warn!(
                    endpoint = %self.endpoints[at],
                    error = &end as &dyn std::error::Error,
                    "the stream broke before the last usage report and the goodbye"
                );
                return;
            }
            self.link.reconnects.fetch_add(1, Ordering::Relaxed);
            backoff.connected_for(self.clock.boot().saturating_since(connected_at));
            let wait = match &end {
                StreamEnd::Left(Leave::Drain {
                    retry_after: Some(after),
                }) => *after + backoff.next(random()),
                StreamEnd::Transport(_)
                | StreamEnd::Status(_)
                | StreamEnd::Closed
                | StreamEnd::Silent
                | StreamEnd::Left(_)
                | StreamEnd::Shutdown => backoff.next(random()),
            };
            tracing::warn!(
                endpoint = %self.endpoints[at],
                error = &end as &dyn std::error::Error,
                retry_in_ms = wait.as_millis(),
                "no stream to the control plane; checks go on with what is held"
            );
            tokio::select! {
                () = sleep(wait) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Keeps a stream to one endpoint until it ends. At the shutdown it ends with a Goodbye.
    async fn stream(
        &mut self,
        at: usize,
        shutdown: &CancellationToken,
        checks: &TaskTracker,
    ) -> StreamEnd {
        let opened = tokio::select! {
            opened = timeout(OPEN_TIMEOUT, self.open(at)) => opened.unwrap_or(Err(StreamEnd::Silent)),
            () = shutdown.cancelled() => Err(StreamEnd::Shutdown),
        };
        match opened {
            Ok(mut stream) => match self.follow(&mut stream, shutdown, checks).await {
                Ok(()) => {
                    self.report_last(&mut stream).await;
                    goodbye(stream).await;
                    StreamEnd::Shutdown
                }
                Err(end) => end,
            },
            Err(end) => end,
        }
    }

    async fn open(&mut self, at: usize) -> Result<Stream, StreamEnd> {
        let uri = self.endpoints[at].clone();
        let channel = connect(uri.clone()).await?;
        let mut client =
            KeyringDiscoveryClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let (answers, outbound) = mpsc::channel(MAX_ANSWERS);
        let hello = wire::Hello {
            node: Some(self.node.clone()),
            boot_id: self.boot_id.clone(),
            subscriptions: self.receiver.subscriptions(),
        };
        send(&answers, Kind::Hello(hello)).await?;
        let inbound = client
            .subscribe(ReceiverStream::new(outbound))
            .await?
            .into_inner();
        self.link.endpoints[at].1.store(true, Ordering::Relaxed);
        self.receiver.connected();
        tracing::info!(endpoint = %uri, "stream to the control plane is open");
        Ok(Stream { answers, inbound })
    }

    /// Serves the stream until the sidecar stops and all checks are answered.
    async fn follow(
        &mut self,
        stream: &mut Stream,
        shutdown: &CancellationToken,
        checks: &TaskTracker,
    ) -> Result<(), StreamEnd> {
        loop {
            let message = tokio::select! {
                message = self.next(stream) => message?,
                () = drained(shutdown, checks) => return Ok(()),
            };
            self.take(message, &stream.answers).await?;
        }
    }

    /// The next message. Lookups are sent meanwhile.
    async fn next(&self, stream: &mut Stream) -> Result<wire::ControlMessage, StreamEnd> {
        let mut silence = pin!(sleep(SILENCE));
        loop {
            tokio::select! {
                message = stream.inbound.next() => {
                    return Ok(message.ok_or(StreamEnd::Closed)??);
                }
                sent = self.send_lookup(&stream.answers) => sent?,
                () = &mut silence => return Err(StreamEnd::Silent),
            }
        }
    }

    /// Sends one lookup, once there is one and the stream has room for it. None is lost when this is cancelled.
    async fn send_lookup(
        &self,
        answers: &mpsc::Sender<wire::SidecarMessage>,
    ) -> Result<(), StreamEnd> {
        let room = answers.reserve().await.map_err(|_| StreamEnd::Closed)?;
        loop {
            if let Some(lookup) = self.receiver.next_lookup() {
                room.send(lookup);
                return Ok(());
            }
            self.receiver.lookups().notified().await;
        }
    }

    /// Tells of the last uses, and waits until they are in the store.
    async fn report_last(&mut self, stream: &mut Stream) {
        let reported = async {
            loop {
                let report = self.receiver.last_report();
                let last = report.last().map_or(0, |usage| usage.sequence);
                for usage in report {
                    send(&stream.answers, Kind::Usage(usage)).await?;
                }
                while self.receiver.progress().acked < last {
                    let message = stream.inbound.next().await.ok_or(StreamEnd::Closed)??;
                    self.take(message, &stream.answers).await?;
                }
                if self.receiver.progress().unacked == 0 {
                    return Ok::<(), StreamEnd>(());
                }
            }
        };
        let problem = match timeout(REPORT_TIMEOUT, reported).await {
            Ok(Ok(())) => return,
            Ok(Err(end)) => end,
            Err(_elapsed) => StreamEnd::Silent,
        };
        tracing::warn!(
            error = &problem as &dyn std::error::Error,
            "the last usage report was not acked"
        );
    }

    /// Takes a message, and answers it.
    async fn take(
        &mut self,
        message: wire::ControlMessage,
        answers: &mpsc::Sender<wire::SidecarMessage>,
    ) -> Result<(), StreamEnd> {
        let Outcome {
            answers: replies,
            clock_skew_ms,
        } = self.receiver.receive(message)?;
        if let Some(skew) = clock_skew_ms {
            self.link.clock_skew_ms.store(skew, Ordering::Relaxed);
        }
        let ReportProgress { acked, unacked } = self.receiver.progress();
        self.link.usage_acked.store(acked, Ordering::Relaxed);
        self.link.usage_unacked.store(unacked, Ordering::Relaxed);
        for reply in replies {
            timeout(SILENCE, answers.send(reply))
                .await
                .map_err(|_| StreamEnd::Silent)?
                .map_err(|_| StreamEnd::Closed)?;
        }
        Ok(())
    }
}

impl Link {
    /// The configured endpoints, and to which the stream is open.
    pub fn endpoints(&self) -> impl Iterator<Item = (&Uri, bool)> {
        self.endpoints
            .iter()
            .map(|(uri, open)| (uri, open.load(Ordering::Relaxed)))
    }

    /// How many times a stream was lost or could not be opened.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// How far the control plane's wall clock is ahead of ours, in milliseconds, at the last heartbeat.
    #[must_use]
    pub fn clock_skew_ms(&self) -> i64 {
        self.clock_skew_ms.load(Ordering::Relaxed)
    }

    /// How far the usage reports have come.
    #[must_use]
    pub fn usage(&self) -> ReportProgress {
        ReportProgress {
            acked: self.usage_acked.load(Ordering::Relaxed),
            unacked: self.usage_unacked.load(Ordering::Relaxed),
        }
    }
}

async fn connect(uri: Uri) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect()
        .await
}

async fn send(answers: &mpsc::Sender<wire::SidecarMessage>, kind: Kind) -> Result<(), StreamEnd> {
    answers
        .send(wire::SidecarMessage { kind: Some(kind) })
        .await
        .map_err(|_| StreamEnd::Closed)
}

/// Ends when the sidecar stops and all its checks are answered.
async fn drained(shutdown: &CancellationToken, checks: &TaskTracker) {
    shutdown.cancelled().await;
    checks.wait().await;
}

/// Sends the Goodbye and waits until the control plane has closed the stream, which it does when it has read it.
async fn goodbye(
    Stream {
        answers,
        mut inbound,
    }: Stream,
) {
    let farewell = async {
        if send(&answers, Kind::Goodbye(wire::Goodbye {}))
            .await
            .is_ok()
        {
            drop(answers);
            while let Some(Ok(_)) = inbound.next().await {}
        }
    };
    let _ = timeout(GOODBYE_TIMEOUT, farewell).await;
}

#[cfg(test)]
mod tests;
