//! The common progress of the sidecars, which they count.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::{sync::Notify, time::Instant};

/// The progress of the sidecars, which they count.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) began: Instant,
    pub(crate) following: AtomicUsize,
    /// The number of streams that followed and then broke.
    pub(crate) left: AtomicUsize,
    pub(crate) revoked: Line,
    /// The revision of each sidecar.
    pub(crate) applied: Vec<AtomicU64>,
    pub(crate) deltas: AtomicU64,
    pub(crate) snapshots: AtomicU64,
    pub(crate) failures: AtomicU64,
    /// The bytes of deltas and revocations, without frames.
    pub(crate) change_bytes: AtomicU64,
    /// The bytes of chunks of snapshots.
    pub(crate) snapshot_bytes: AtomicU64,
    /// The bytes of all connections.
    pub(crate) received: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) news: Notify,
}

/// A revision that all sidecars have to reach.
#[derive(Debug, Default)]
pub(crate) struct Line {
    pub(crate) revision: AtomicU64,
    pub(crate) passed: AtomicUsize,
    /// The time at which the last sidecar reached it, in microseconds since the board was created.
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

    /// Records that a sidecar has the same state as the control plane.
    pub(crate) fn follows(&self) {
        self.following.fetch_add(1, Ordering::AcqRel);
        self.news.notify_one();
    }

    /// Records that the stream of a sidecar that followed broke.
    pub(crate) fn leaves(&self) {
        self.following.fetch_sub(1, Ordering::AcqRel);
        self.left.fetch_add(1, Ordering::AcqRel);
        self.news.notify_one();
    }

    /// Records that a sidecar could not connect, or that its stream broke without a cut.
    pub(crate) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Records the bytes of a change that was sent to a sidecar.
    pub(crate) fn heard_change(&self, bytes: usize) {
        self.change_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Records the bytes of a snapshot that were sent to a sidecar.
    pub(crate) fn heard_chunk(&self, bytes: usize) {
        self.snapshot_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Records the bytes that arrived on a connection.
    pub(crate) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Records the bytes that were sent on a connection.
    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Records that a sidecar has received a whole snapshot.
    pub(crate) fn took_snapshot(&self) {
        self.snapshots.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a sidecar has received a delta.
    pub(crate) fn took_delta(&self) {
        self.deltas.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a sidecar is at `revision`.
    pub(crate) fn applied(&self, number: usize, revision: u64) {
        self.applied[number].store(revision, Ordering::Release);
    }

    /// Records that a sidecar that knew every revocation up to `before` knows those up to `after`.
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
