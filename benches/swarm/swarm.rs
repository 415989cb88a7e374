//! All simulated sidecars, and their common progress.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{sync::watch, task::JoinSet, time::Instant};

use crate::{
    board::Board,
    order::Order,
    sidecar::{Held, Sidecar},
};

/// Sidecars that follow one keyring.
pub(crate) struct Swarm {
    board: Arc<Board>,
    orders: watch::Sender<Order>,
    sidecars: JoinSet<()>,
    size: usize,
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

/// The most connections from one address: fewer than Linux has ephemeral ports (28,232).
const STREAMS_PER_SOURCE: usize = 20_000;
/// The longest wait for the swarm.
const DEADLINE: Duration = Duration::from_mins(5);
/// The interval of polling where there is no notification.
const LOOK: Duration = Duration::from_millis(2);

impl Swarm {
    /// Starts `size` sidecars.
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

    /// The number of sidecars.
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

    /// Waits until every sidecar follows.
    ///
    /// # Errors
    ///
    /// When one does not follow in time.
    pub(crate) async fn all_follow(&self) -> Result<()> {
        self.until("follow", || self.board.following.load(Ordering::Acquire))
            .await
    }

    /// Breaks all streams at the same time, and returns the time until every sidecar follows again.
    ///
    /// # Errors
    ///
    /// When one does not follow in time.
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

    /// Sets `revision`, which no sidecar has reached, as the next revocation that all have to know.
    pub(crate) fn expect_revoked(&self, revision: u64) {
        self.board.revoked.draw(revision);
    }

    /// Waits until every sidecar knows the revocation, and returns the time of the last one.
    ///
    /// # Errors
    ///
    /// When one does not know it in time.
    pub(crate) async fn all_revoked(&self) -> Result<Instant> {
        let line = &self.board.revoked;
        self.until("know the revocation", || {
            line.passed.load(Ordering::Acquire)
        })
        .await?;
        Ok(self.board.began + Duration::from_micros(line.last.load(Ordering::Acquire)))
    }

    /// Waits until every sidecar has applied `revision`.
    ///
    /// # Errors
    ///
    /// When one has not applied it in time.
    pub(crate) async fn all_applied(&self, revision: u64) -> Result<()> {
        let applied = &self.board.applied;
        self.until("are up to date", || {
            let reached = applied.iter();
            let reached = reached.filter(|held| held.load(Ordering::Acquire) >= revision);
            reached.count()
        })
        .await
    }

    /// Stops all sidecars with a Goodbye.
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
