//! What the sidecars have reached together, counted by themselves.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::{sync::Notify, time::Instant};

/// What the sidecars have reached, counted by themselves.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) began: Instant,
    pub(crate) following: AtomicUsize,
    /// Streams that followed and are broken.
    pub(crate) left: AtomicUsize,
    pub(crate) revoked: Line,
    /// The revision of each sidecar.
    pub(crate) applied: Vec<AtomicU64>,
    pub(crate) deltas: AtomicU64,
    pub(crate) snapshots: AtomicU64,
    pub(crate) failures: AtomicU64,
    /// Of deltas and revocations, without the frames around them.
    pub(crate) change_bytes: AtomicU64,
    /// Of chunks of snapshots.
    pub(crate) snapshot_bytes: AtomicU64,
    /// Of all connections.
    pub(crate) received: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) news: Notify,
}

/// A revision that all sidecars are to reach.
#[derive(Debug, Default)]
pub(crate) struct Line {
    pub(crate) revision: AtomicU64,
    pub(crate) passed: AtomicUsize,
    /// When the last one passed it, in microseconds since the board began.
    pub(crate) last: AtomicU64,
}

impl Board {
    pub(crate) fn new(size: usize) -> Self {
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
    pub(crate) fn draw(&self, revision: u64) {
        self.last.store(0, Ordering::Release);
        self.passed.store(0, Ordering::Release);
        self.revision.store(revision, Ordering::Release);
    }
}
