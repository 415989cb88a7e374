//! The sidecar's side of the stream. It keeps one stream open, to one control plane after the
//! other, as long as the sidecar runs. Checks continue with the loaded keyrings, whatever happens
//! to the stream.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _, Stream as AnyStream,
    stream::{PollNext, select_with_strategy},
};
use http::header::AUTHORIZATION;
use tokio::{
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Request,
    transport::{Channel, Endpoint, Uri},
};

mod beating;

use super::{
    receiver::{BeatNews, DrainReason, Leave, Listed, Received, Receiver},
    reporter::ReportProgress,
};
use beating::{Beating, Turn};

use crate::{
    causes,
    key::RandomError,
    proto::discovery::{
        self, control_message, keyring_discovery_client::KeyringDiscoveryClient,
        sidecar_message::Kind,
    },
    snapshot::{closer::Closer, disk::FileEnd},
    tls::{TlsClient, connector::Connector},
    wire::{
        backoff::{Backoff, drawn, random},
        token::{SidecarToken, TokenFileError},
    },
};

/// Keeps a sidecar's keyrings up to date.
#[derive(Debug)]
pub(crate) struct Client {
    node: discovery::Node,
    run_id: String,
    /// The number of the newest stream.
    streams: u64,
    endpoints: Vec<Uri>,
    /// The connector for endpoints with `https://`.
    connector: Option<Connector>,
    /// The file of the token that the client sends, where it has no certificate.
    token_file: Option<PathBuf>,
    receiver: Receiver,
    link: Arc<Link>,
    hold: Hold,
}

/// The lock and the snapshot file of a run, as its Hello announces them.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    /// The lock that the run holds until it has answered its last check; none if it holds none.
    pub(crate) lock: Option<discovery::Lock>,
    /// The snapshot file; none if the run keeps none.
    pub(crate) snapshot_file: Option<discovery::SnapshotFile>,
    /// Closes the snapshot file at an orderly stop; none if there is none.
    pub(crate) closer: Option<Closer>,
}

/// The state of the stream, for metrics and `/status`.
#[derive(Debug)]
pub(crate) struct Link {
    endpoints: Vec<EndpointLink>,
    /// The reasons why the control plane does not serve keyrings, by keyring.
    not_served: Mutex<BTreeMap<String, String>>,
    /// What the newest list of keyrings came to; none before the first one.
    listed: Mutex<Option<Listed>>,
    reconnects: AtomicU64,
    clock_skew_ms: AtomicI64,
    usage_acked: AtomicU64,
    usage_unacked: AtomicUsize,
    /// Notified when a message of the control plane was applied.
    applied: Notify,
}

/// The state of one endpoint.
#[derive(Debug)]
pub(crate) struct EndpointLink {
    pub(crate) uri: Uri,
    open: AtomicBool,
    problem: Mutex<Option<String>>,
}

/// An open stream.
struct Stream {
    answers: mpsc::Sender<discovery::SidecarMessage>,
    /// Usage messages, which wait until there are no answers to send.
    usage: mpsc::Sender<discovery::SidecarMessage>,
    inbound: tonic::Streaming<discovery::ControlMessage>,
    beating: Beating,
}

/// The reason for the end of a stream.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("the connection failed")]
    Transport(#[from] tonic::transport::Error),
    #[error("the control plane ended the stream: {0}")]
    Status(#[from] tonic::Status),
    #[error("the control plane closed the stream")]
    Closed,
    #[error("the control plane does not answer, although the connection works")]
    Silent,
    #[error("control.tls.token_file")]
    Token(#[from] TokenFileError),
    #[error(transparent)]
    Left(#[from] Leave),
    #[error("the sidecar is stopping")]
    Shutdown,
}

/// The next step after the end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Next {
    wait: Duration,
    /// Whether the next stream goes to the control plane that ended this one.
    is_same_endpoint: bool,
}

/// The limit for a connection: then the client regards the endpoint as dead and tries the next one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The limit for a stream: a control plane can accept the connection and then not answer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// The limit for sending an answer: the client leaves a control plane that does not read for this
/// time.
const SEND_TIMEOUT: Duration = Duration::from_secs(90);
/// With the timeout below, the client finds a dead link within 15 seconds. It sends a ping when
/// nothing has arrived for this interval. A link that delivers data gets no ping.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// The answer to a ping arrives after the data that is on its way, [`WINDOW`] at most: a link of 8
/// kB/s is slow, and not dead.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The bytes that the control plane may send before the sidecar has read them, on the one stream of
/// the connection. A revocation arrives after all of them: at 150 kB/s within half a second. A
/// snapshot is slower than the link only if the round trip is long: 1.3 MB/s at 50 ms.
const WINDOW: u32 = 64 << 10;
/// The most answers that wait for the stream. If the control plane does not read them, the client
/// reads nothing more from it.
const MAX_ANSWERS: usize = 64;
/// The most messages of usage that wait for the stream; the others of a report wait in the
/// receiver.
const MAX_USAGE: usize = 1;
/// The largest message that a sidecar reads, in bytes. A chunk of a snapshot has at most 7,680 bytes of items.
const MAX_MESSAGE: usize = 4 << 20;
/// The most keyrings that are remembered as not served: as many as a sidecar may hold.
const MAX_NOT_SERVED: usize = 256;
/// The time for which an orderly stop waits until its last usage report is in the control plane's
/// store, which needs a commit. It allows for a slow disk, but does not wait longer: the next
/// reports of other sidecars show the gap.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);
/// The time for which an orderly stop sends its Goodbye and waits until the control plane closes
/// the stream.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

impl Client {
    /// Returns a client of the control planes at `endpoints`, which it tries in turn.
    ///
    /// # Errors
    ///
    /// When the operating system's random source fails.
    pub(crate) fn new(
        node: discovery::Node,
        endpoints: Vec<Uri>,
        receiver: Receiver,
    ) -> Result<Self, RandomError> {
        let link = Arc::new(Link {
            endpoints: endpoints.iter().map(EndpointLink::new).collect(),
            not_served: Mutex::default(),
            listed: Mutex::default(),
            reconnects: AtomicU64::new(0),
            clock_skew_ms: AtomicI64::new(0),
            usage_acked: AtomicU64::new(0),
            usage_unacked: AtomicUsize::new(0),
            applied: Notify::new(),
        });
        Ok(Self {
            node,
            run_id: crate::key::RotationId::generate()?.as_str().to_owned(),
            streams: 0,
            endpoints,
            connector: None,
            token_file: None,
            receiver,
            link,
            hold: Hold::default(),
        })
    }

    /// Connects over TLS to endpoints with `https://`.
    #[must_use]
    pub(crate) fn with_tls(self, tls: TlsClient) -> Self {
        Self {
            connector: Some(Connector::new(tls)),
            ..self
        }
    }

    /// Sends the token in a file, which is read for every stream.
    #[must_use]
    pub(crate) fn with_token_file(self, token_file: PathBuf) -> Self {
        Self {
            token_file: Some(token_file),
            ..self
        }
    }

    /// Announces the lock and the snapshot file of the run.
    #[must_use]
    pub(crate) fn with_hold(self, hold: Hold) -> Self {
        Self { hold, ..self }
    }

    /// Returns the state of the stream.
    #[must_use]
    pub(crate) const fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Runs until `shutdown`, and then until all of `checks` have ended, so that their answers are
    /// in the last report. Then sends Goodbye. Without a stream it returns at once.
    pub(crate) async fn run(mut self, shutdown: CancellationToken, checks: TaskTracker) {
        let mut backoff = Backoff::default();
        let mut at = 0;
        while at < self.endpoints.len() {
            let end = self.stream(at, &shutdown, &checks).await;
            let was_of_use = self.receiver.is_answered();
            self.receiver.disconnected();
            self.link.closed(at, &end);
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
            let Next {
                wait,
                is_same_endpoint,
            } = end.next(was_of_use, &mut backoff, random());
            if let StreamEnd::Left(reason @ Leave::Drain { .. }) = &end {
                tracing::info!(
                    endpoint = %self.endpoints[at],
                    %reason,
                    retry_in_ms = wait.as_millis(),
                    "the stream to the control plane ended as planned; checks continue with the loaded keyrings"
                );
            } else {
                self.link.reconnects.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    endpoint = %self.endpoints[at],
                    error = &end as &dyn std::error::Error,
                    retry_in_ms = wait.as_millis(),
                    "no stream to the control plane; checks continue with the loaded keyrings"
                );
            }
            if !is_same_endpoint {
                at = (at + 1) % self.endpoints.len();
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Keeps a stream to one endpoint open until it ends. At the shutdown it ends with a Goodbye.
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
                    let farewell = self.close_file().await;
                    goodbye(stream, farewell).await;
                    StreamEnd::Shutdown
                }
                Err(end) => end,
            },
            Err(end) => end,
        }
    }

    /// Writes the snapshot file for the last time, or erases it; returns the Goodbye that reports
    /// what is left.
    async fn close_file(&self) -> discovery::Goodbye {
        let end = match &self.hold.closer {
            Some(closer) => closer.close().await,
            None => FileEnd::Unknown,
        };
        discovery::Goodbye {
            has_erased_file: end == FileEnd::Erased,
            last_write: match end {
                FileEnd::Kept { last_write } => last_write,
                FileEnd::Erased | FileEnd::Unknown => 0,
            },
        }
    }

    async fn connect(&self, uri: Uri) -> Result<Channel, tonic::transport::Error> {
        let has_tls = uri.scheme_str() == Some("https");
        let endpoint = endpoint(uri);
        match &self.connector {
            Some(connector) if has_tls => connector.open(&endpoint).await,
            Some(_) | None => endpoint.connect().await,
        }
    }

    async fn open(&mut self, at: usize) -> Result<Stream, StreamEnd> {
        let uri = self.endpoints[at].clone();
        let token = self.token_file.as_deref().map(SidecarToken::read);
        let bearer = token
            .transpose()?
            .map(|token| (AUTHORIZATION, token.bearer()));
        let channel = self.connect(uri.clone()).await?;
        let mut client =
            KeyringDiscoveryClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let (answers, outbound) = mpsc::channel(MAX_ANSWERS);
        let (usage, reports) = mpsc::channel(MAX_USAGE);
        self.streams += 1;
        let hello = discovery::Hello {
            protocol: discovery::PROTOCOL,
            stream: self.streams,
            node: Some(self.node.clone()),
            run_id: self.run_id.clone(),
            subscriptions: self.receiver.subscriptions(),
            lock: self.hold.lock.clone(),
            snapshot_file: self.hold.snapshot_file.clone(),
        };
        send(&answers, Kind::Hello(hello)).await?;
        if let Some(find) = self.receiver.find() {
            send_message(&answers, find).await?;
        }
        let beating = Beating::new(self.receiver.clock(), self.receiver.beat_every());
        send_message(&answers, self.receiver.next_beat()).await?;
        let mut call = Request::new(answers_first(outbound, reports));
        call.metadata_mut().as_mut().extend(bearer);
        let inbound = client.subscribe(call).await?.into_inner();
        self.link.opened(at);
        self.receiver.connected();
        tracing::info!(endpoint = %uri, "stream to the control plane is open");
        Ok(Stream {
            answers,
            usage,
            inbound,
            beating,
        })
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
            self.take(message, stream).await?;
        }
    }

    /// Returns the next message. Until it arrives, sends beats, lookups, usage, and acks for what
    /// is on the disk now.
    async fn next(&mut self, stream: &mut Stream) -> Result<discovery::ControlMessage, StreamEnd> {
        loop {
            tokio::select! {
                message = stream.inbound.next() => {
                    return Ok(message.ok_or(StreamEnd::Closed)??);
                }
                sent = self.send_lookup(&stream.answers) => sent?,
                sent = self.send_durable(&stream.answers) => sent?,
                () = self.receiver.reconfigured() => {
                    for message in self.receiver.reconfigure() {
                        send_in_time(&stream.answers, message).await?;
                    }
                }
                room = stream.usage.reserve(), if self.receiver.has_usage() => {
                    let room = room.map_err(|_| StreamEnd::Closed)?;
                    if let Some(usage) = self.receiver.next_usage() {
                        room.send(usage);
                    }
                }
                room = stream.answers.reserve(), if stream.beating.is_due() => {
                    room.map_err(|_| StreamEnd::Closed)?.send(self.receiver.next_beat());
                    stream.beating.sent();
                }
                turn = stream.beating.turn() => match turn {
                    Turn::Due => {}
                    // Messages that arrived while this process was stopped are read first.
                    Turn::Silent => match stream.inbound.next().now_or_never() {
                        Some(message) => return Ok(message.ok_or(StreamEnd::Closed)??),
                        None => return Err(StreamEnd::Silent),
                    }
                },
            }
        }
    }

    /// Sends one lookup, once there is one and the stream has room for it. No lookup is lost if
    /// this is cancelled.
    async fn send_lookup(
        &self,
        answers: &mpsc::Sender<discovery::SidecarMessage>,
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

    /// Sends one ack for a keyring of which more is on the disk, once the stream has room. If there
    /// is none, waits for news of the disk, and returns without an ack. Nothing is lost if this is
    /// cancelled.
    async fn send_durable(
        &self,
        answers: &mpsc::Sender<discovery::SidecarMessage>,
    ) -> Result<(), StreamEnd> {
        let Some(disk) = self.receiver.disk() else {
            return std::future::pending().await;
        };
        let room = answers.reserve().await.map_err(|_| StreamEnd::Closed)?;
        if let Some(ack) = self.receiver.next_durable() {
            room.send(ack);
        } else {
            drop(room);
            disk.news().notified().await;
        }
        Ok(())
    }

    /// Reports the last uses, and waits until they are in the store, for [`REPORT_TIMEOUT`] at
    /// most.
    async fn report_last(&mut self, stream: &mut Stream) {
        let reported = async {
            loop {
                let last = self.receiver.make_last_report();
                while self.receiver.progress().acked < last {
                    let message = self.next(stream).await?;
                    self.take(message, stream).await?;
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
            "the control plane did not confirm the last usage report"
        );
    }

    /// Applies a message, and sends the answers.
    async fn take(
        &mut self,
        message: discovery::ControlMessage,
        stream: &mut Stream,
    ) -> Result<(), StreamEnd> {
        self.link.note(&message);
        let Received {
            answers,
            clock_skew_ms,
            beat,
            listed,
        } = self.receiver.receive(message)?;
        match beat {
            Some(BeatNews::Due) => stream.beating.hurry(),
            Some(BeatNews::Answered) => stream.beating.answered(self.receiver.beat_every()),
            None => {}
        }
        if let Some(skew) = clock_skew_ms {
            self.link.clock_skew_ms.store(skew, Ordering::Relaxed);
        }
        if listed.is_some() {
            *locked(&self.link.listed) = listed;
        }
        let ReportProgress { acked, unacked } = self.receiver.progress();
        self.link.usage_acked.store(acked, Ordering::Relaxed);
        self.link.usage_unacked.store(unacked, Ordering::Relaxed);
        self.link.applied.notify_waiters();
        for answer in answers {
            send_in_time(&stream.answers, answer).await?;
        }
        Ok(())
    }
}

impl StreamEnd {
    /// Returns the next step after this end. A stream that was of use ends the series of failures,
    /// however long it lived. A stream that was not continues the series, so that a control plane
    /// that accepts streams and then fails is not flooded with them. `random` is uniformly
    /// distributed.
    fn next(&self, was_of_use: bool, backoff: &mut Backoff, random: u32) -> Next {
        if was_of_use {
            backoff.reset();
        }
        let elsewhere = |wait| Next {
            wait,
            is_same_endpoint: false,
        };
        match self {
            Self::Left(Leave::Drain {
                reason: DrainReason::CertificateExpired,
                ..
            }) => Next {
                wait: drawn(Backoff::PLANNED, random),
                is_same_endpoint: true,
            },
            Self::Left(Leave::Drain {
                reason: DrainReason::Stopping | DrainReason::Unspecified,
                retry_after,
            }) => elsewhere(retry_after.unwrap_or_default() + backoff.next(random)),
            Self::Transport(_)
            | Self::Status(_)
            | Self::Closed
            | Self::Silent
            | Self::Token(_)
            | Self::Left(Leave::Lagging { .. } | Leave::Protocol(_))
            | Self::Shutdown => elsewhere(backoff.next(random)),
        }
    }
}

impl Link {
    /// Returns the configured endpoints, and whether the stream is open to each.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = (&Uri, bool)> {
        self.endpoints
            .iter()
            .map(|endpoint| (&endpoint.uri, endpoint.open.load(Ordering::Relaxed)))
    }

    /// Returns why there is no stream to an endpoint, if a stream to it has ended or failed to
    /// open; for each of [`Link::endpoints`].
    pub(crate) fn problems(&self) -> impl Iterator<Item = Option<String>> {
        self.endpoints
            .iter()
            .map(|endpoint| locked(&endpoint.problem).clone())
    }

    /// Returns why the control plane does not serve a keyring; none if it serves it, or has not
    /// answered yet.
    #[must_use]
    pub(crate) fn not_served(&self, keyring: &str) -> Option<String> {
        locked(&self.not_served).get(keyring).cloned()
    }

    /// Returns what the newest list of keyrings that patterns match came to; none before the first
    /// one.
    #[must_use]
    pub(crate) fn listed(&self) -> Option<Listed> {
        *locked(&self.listed)
    }

    /// Notifies its waiters after each message of the control plane that was applied.
    pub(crate) const fn applied(&self) -> &Notify {
        &self.applied
    }

    fn opened(&self, at: usize) {
        self.endpoints[at].open.store(true, Ordering::Relaxed);
        *locked(&self.endpoints[at].problem) = None;
        locked(&self.not_served).clear();
    }

    fn closed(&self, at: usize, end: &StreamEnd) {
        self.endpoints[at].open.store(false, Ordering::Relaxed);
        *locked(&self.endpoints[at].problem) = Some(causes::in_one_line(end));
    }

    /// Notes which keyrings are not served, and which are served again.
    fn note(&self, message: &discovery::ControlMessage) {
        match &message.kind {
            Some(control_message::Kind::NotServed(refusal)) => {
                let mut not_served = locked(&self.not_served);
                if not_served.len() < MAX_NOT_SERVED {
                    not_served.insert(refusal.keyring.clone(), refusal.reason.clone());
                }
            }
            Some(control_message::Kind::Settings(settings)) => {
                locked(&self.not_served).remove(&settings.keyring);
            }
            Some(
                control_message::Kind::Snapshot(_)
                | control_message::Kind::Delta(_)
                | control_message::Kind::Revocations(_)
                | control_message::Kind::BeatAnswer(_)
                | control_message::Kind::Drain(_)
                | control_message::Kind::UsageAck(_)
                | control_message::Kind::Start(_)
                | control_message::Kind::LookupResult(_)
                | control_message::Kind::Listing(_),
            )
            | None => {}
        }
    }

    /// Returns how many times a stream was lost or could not be opened. Planned ends do not count.
    #[must_use]
    pub(crate) fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// Returns the milliseconds by which the control plane's wall clock was ahead of ours at the
    /// last answer to a beat; negative if it was behind.
    #[must_use]
    pub(crate) fn clock_skew_ms(&self) -> i64 {
        self.clock_skew_ms.load(Ordering::Relaxed)
    }

    /// Returns the progress of the usage reports.
    #[must_use]
    pub(crate) fn usage(&self) -> ReportProgress {
        ReportProgress {
            acked: self.usage_acked.load(Ordering::Relaxed),
            unacked: self.usage_unacked.load(Ordering::Relaxed),
        }
    }
}

/// Returns the settings of a connection to a control plane.
fn endpoint(uri: Uri) -> Endpoint {
    Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

impl EndpointLink {
    fn new(uri: &Uri) -> Self {
        Self {
            uri: uri.clone(),
            open: AtomicBool::new(false),
            problem: Mutex::default(),
        }
    }
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Merges the messages to send: usage is sent only if no answer waits.
fn answers_first(
    answers: mpsc::Receiver<discovery::SidecarMessage>,
    usage: mpsc::Receiver<discovery::SidecarMessage>,
) -> impl AnyStream<Item = discovery::SidecarMessage> {
    let (answers, usage) = (ReceiverStream::new(answers), ReceiverStream::new(usage));
    select_with_strategy(answers, usage, |(): &mut ()| PollNext::Left)
}

async fn send(
    answers: &mpsc::Sender<discovery::SidecarMessage>,
    kind: Kind,
) -> Result<(), StreamEnd> {
    send_message(answers, discovery::SidecarMessage { kind: Some(kind) }).await
}

async fn send_message(
    answers: &mpsc::Sender<discovery::SidecarMessage>,
    message: discovery::SidecarMessage,
) -> Result<(), StreamEnd> {
    answers.send(message).await.map_err(|_| StreamEnd::Closed)
}

/// Sends a message on an open stream, within [`SEND_TIMEOUT`].
async fn send_in_time(
    answers: &mpsc::Sender<discovery::SidecarMessage>,
    message: discovery::SidecarMessage,
) -> Result<(), StreamEnd> {
    timeout(SEND_TIMEOUT, answers.send(message))
        .await
        .map_err(|_| StreamEnd::Silent)?
        .map_err(|_| StreamEnd::Closed)
}

/// Waits until the sidecar stops and all its checks are answered.
async fn drained(shutdown: &CancellationToken, checks: &TaskTracker) {
    shutdown.cancelled().await;
    checks.wait().await;
}

/// Sends the Goodbye and waits until the control plane has read it and closes the stream, for
/// [`GOODBYE_TIMEOUT`] at most.
async fn goodbye(
    Stream {
        answers,
        usage,
        mut inbound,
        beating: _,
    }: Stream,
    goodbye: discovery::Goodbye,
) {
    let farewell = async {
        if send(&answers, Kind::Goodbye(goodbye)).await.is_ok() {
            drop((answers, usage));
            while let Some(Ok(_)) = inbound.next().await {}
        }
    };
    let _ = timeout(GOODBYE_TIMEOUT, farewell).await;
}

#[cfg(test)]
mod tests;
