//! All simulated sidecars, and what they have reached together.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::Instant,
};

use crate::sidecar::{Held, Sidecar};

/// Sidecars that follow one keyring.
pub(crate) struct Swarm {
    board: Arc<Board>,
    orders: watch::Sender<Order>,
    sidecars: JoinSet<()>,
    size: usize,
}

/// What the sidecars are to do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Order {
    /// Counts the cuts: a sidecar breaks its stream when it grows.
    pub(crate) cuts: u64,
    /// Whether they come back with jitter, as real ones do.
    pub(crate) jitter: bool,
    /// Whether they come back with nothing, as after a restart without a snapshot file.
    pub(crate) forget: bool,
    /// Whether they are to say Goodbye.
    pub(crate) stop: bool,
}

/// What the sidecars have reached, counted by themselves.
#[derive(Debug)]
pub(crate) struct Board {
    began: Instant,
    following: AtomicUsize,
    /// Streams that followed and are broken.
    left: AtomicUsize,
    revoked: Line,
    /// The revision of each sidecar.
    applied: Vec<AtomicU64>,
    deltas: AtomicU64,
    snapshots: AtomicU64,
    failures: AtomicU64,
    /// Of deltas and revocations, without the frames around them.
    change_bytes: AtomicU64,
    /// Of chunks of snapshots.
    snapshot_bytes: AtomicU64,
    /// Of all connections.
    received: AtomicU64,
    sent: AtomicU64,
    news: Notify,
}

/// A revision that all sidecars are to reach.
#[derive(Debug, Default)]
struct Line {
    revision: AtomicU64,
    passed: AtomicUsize,
    /// When the last one passed it, in microseconds since the board began.
    last: AtomicU64,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) deltas: u64,
    pub(crate) snapshots: u64,
    pub(crate) failures: u64,
    pub(crate) change_bytes: u64,
    pub(crate) snapshot_bytes: u64,
    pub(crate) received: u64,
    pub(crate) sent: u64,
}

/// From one address come fewer connections than Linux has ephemeral ports (28,232).
const STREAMS_PER_SOURCE: usize = 20_000;
/// A swarm that has not got there by then never will.
const DEADLINE: Duration = Duration::from_mins(5);
/// How often it is looked where nothing wakes.
const LOOK: Duration = Duration::from_millis(2);

impl Swarm {
    /// Sends out `size` sidecars.
    pub(crate) fn send_out(size: usize, discovery: SocketAddr, keyring: &str) -> Self {
        let board = Arc::new(Board::new(size));
        let orders = watch::Sender::new(Order::default());
        let mut sidecars = JoinSet::new();
        for number in 0..size {
            let source = u8::try_from(1 + number / STREAMS_PER_SOURCE).unwrap_or(u8::MAX);
            let sidecar = Sidecar {
                number,
                node: format!("sidecar-{number:06}"),
                keyring: keyring.to_owned(),
                discovery,
                source: IpAddr::V4(Ipv4Addr::new(127, 0, 0, source)),
                board: Arc::clone(&board),
                orders: orders.subscribe(),
                held: Held::default(),
                streams: 0,
                beats: 0,
            };
            sidecars.spawn(sidecar.run());
        }
        Self {
            board,
            orders,
            sidecars,
            size,
        }
    }

    /// How many there are.
    pub(crate) const fn size(&self) -> usize {
        self.size
    }

    /// What has happened so far.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            deltas: self.board.deltas.load(Ordering::Relaxed),
            snapshots: self.board.snapshots.load(Ordering::Relaxed),
            failures: self.board.failures.load(Ordering::Relaxed),
            change_bytes: self.board.change_bytes.load(Ordering::Relaxed),
            snapshot_bytes: self.board.snapshot_bytes.load(Ordering::Relaxed),
            received: self.board.received.load(Ordering::Relaxed),
            sent: self.board.sent.load(Ordering::Relaxed),
        }
    }

    /// Waits until every one follows.
    ///
    /// # Errors
    ///
    /// When one never does.
    pub(crate) async fn all_follow(&self) -> Result<()> {
        self.until("follow", || self.board.following.load(Ordering::Acquire))
            .await
    }

    /// Breaks all streams at once, and returns how long it took until every sidecar follows again.
    ///
    /// # Errors
    ///
    /// When one never does.
    pub(crate) async fn cut(&self, jitter: bool, forget: bool) -> Result<Duration> {
        let left = self.board.left.load(Ordering::Acquire);
        let began = Instant::now();
        self.orders.send_modify(|order| {
            order.cuts += 1;
            (order.jitter, order.forget) = (jitter, forget);
        });
        self.until("have left", || {
            self.board.left.load(Ordering::Acquire) - left
        })
        .await?;
        self.all_follow().await?;
        Ok(began.elapsed())
    }

    /// Draws the line of revocations at `revision`, which nobody has reached.
    pub(crate) fn expect_revoked(&self, revision: u64) {
        self.board.revoked.draw(revision);
    }

    /// Waits until everybody knows the revocation, and returns when the last one did.
    ///
    /// # Errors
    ///
    /// When one never does.
    pub(crate) async fn all_revoked(&self) -> Result<Instant> {
        let line = &self.board.revoked;
        self.until("know the revocation", || {
            line.passed.load(Ordering::Acquire)
        })
        .await?;
        Ok(self.board.began + Duration::from_micros(line.last.load(Ordering::Acquire)))
    }

    /// Waits until everybody has applied `revision`.
    ///
    /// # Errors
    ///
    /// When one never does.
    pub(crate) async fn all_applied(&self, revision: u64) -> Result<()> {
        let applied = &self.board.applied;
        self.until("are up to date", || {
            let reached = applied.iter();
            let reached = reached.filter(|held| held.load(Ordering::Acquire) >= revision);
            reached.count()
        })
        .await
    }

    /// Sends everybody home with a Goodbye.
    pub(crate) async fn stop(mut self) {
        self.orders.send_modify(|order| order.stop = true);
        while self.sidecars.join_next().await.is_some() {}
    }

    async fn until(&self, what: &str, count: impl Fn() -> usize) -> Result<()> {
        let arrived = async {
            while count() < self.size {
                tokio::select! {
                    () = self.board.news.notified() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        };
        tokio::time::timeout(DEADLINE, arrived)
            .await
            .with_context(|| format!("{} of {} sidecars {what}", count(), self.size))
    }
}

impl Board {
    fn new(size: usize) -> Self {
        Self {
            began: Instant::now(),
            following: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
            revoked: Line::default(),
            applied: (0..size).map(|_| AtomicU64::new(0)).collect(),
            deltas: AtomicU64::new(0),
            snapshots: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            change_bytes: AtomicU64::new(0),
            snapshot_bytes: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            news: Notify::new(),
        }
    }

    /// A sidecar knows that it holds what the control plane holds.
    pub(crate) fn follows(&self) {
        self.following.fetch_add(1, Ordering::AcqRel);
        self.news.notify_one();
    }

    /// The stream of a sidecar that followed is broken.
    pub(crate) fn leaves(&self) {
        self.following.fetch_sub(1, Ordering::AcqRel);
        self.left.fetch_add(1, Ordering::AcqRel);
        self.news.notify_one();
    }

    /// A sidecar could not connect, or its stream broke by itself.
    pub(crate) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// A sidecar was told of a change in so many bytes.
    pub(crate) fn heard_change(&self, bytes: usize) {
        self.change_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A sidecar was sent so many bytes of a snapshot.
    pub(crate) fn heard_chunk(&self, bytes: usize) {
        self.snapshot_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// So many bytes arrived on a connection.
    pub(crate) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// So many bytes left on a connection.
    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A sidecar has taken a whole snapshot.
    pub(crate) fn took_snapshot(&self) {
        self.snapshots.fetch_add(1, Ordering::Relaxed);
    }

    /// A sidecar has taken a delta.
    pub(crate) fn took_delta(&self) {
        self.deltas.fetch_add(1, Ordering::Relaxed);
    }

    /// A sidecar is at `revision`.
    pub(crate) fn applied(&self, number: usize, revision: u64) {
        self.applied[number].store(revision, Ordering::Release);
    }

    /// A sidecar that knew every revocation up to `before` knows those up to `after`.
    pub(crate) fn revoked(&self, before: u64, after: u64) {
        let line = &self.revoked;
        let revision = line.revision.load(Ordering::Acquire);
        if before < revision && revision <= after {
            let now = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
            line.last.fetch_max(now, Ordering::AcqRel);
            line.passed.fetch_add(1, Ordering::AcqRel);
            self.news.notify_one();
        }
    }
}

impl Line {
    fn draw(&self, revision: u64) {
        self.last.store(0, Ordering::Release);
        self.passed.store(0, Ordering::Release);
        self.revision.store(revision, Ordering::Release);
    }
}
