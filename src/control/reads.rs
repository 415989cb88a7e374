//! Reads of the store, and the requests that wait for them.
//!
//! A sidecar is current only as of a read that began after the sidecar asked. Many sidecars ask at
//! the same time, and share a read.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::sync::{Notify, watch};

/// The reads of a store, numbered from 1 in the order in which they begin.
#[derive(Debug)]
pub(crate) struct Reads {
    begun: AtomicU64,
    /// The number of the newest read that succeeded.
    done: watch::Sender<u64>,
    wanted: Notify,
}

/// A read that has begun.
#[derive(Debug)]
pub(crate) struct Read(u64);

/// A request for a read that begins after the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadRequest {
    /// The number of reads that had begun before the request.
    begun: u64,
}

/// The pause between two requested reads. An answer waits at most this long, in addition to the
/// read itself; so does a sidecar that starts, until it may serve. A read is one small query.
pub(crate) const READ_PAUSE: Duration = Duration::from_millis(20);
/// The pause after a failed read.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_secs(1);

impl Reads {
    /// Begins a read. The caller has read nothing for it before this call.
    pub(crate) fn begin(&self) -> Read {
        Read(self.begun.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Records that the read returned everything that the store held when the read began.
    pub(crate) fn succeeded(&self, Read(number): Read) {
        self.done.send_if_modified(|done| {
            let is_news = *done < number;
            *done = number.max(*done);
            is_news
        });
    }

    /// Requests a read that begins after this call.
    pub(crate) fn ask(&self) -> ReadRequest {
        let begun = self.begun.load(Ordering::SeqCst);
        self.wanted.notify_one();
        ReadRequest { begun }
    }

    /// Requests another read after a failed one, for the requests that still wait.
    pub(super) fn ask_again(&self) {
        self.wanted.notify_one();
    }

    /// Waits until a read has been requested since this last returned.
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Returns a receiver that wakes with each read that succeeds. Its value shows whether a
    /// [`ReadRequest`] is served.
    #[must_use]
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.done.subscribe()
    }
}

impl ReadRequest {
    /// Returns whether the request is served once the read with the number `done` has succeeded.
    #[must_use]
    pub(crate) const fn is_served_by(self, done: u64) -> bool {
        done > self.begun
    }
}

impl Default for Reads {
    fn default() -> Self {
        Self {
            begun: AtomicU64::new(0),
            done: watch::Sender::new(0),
            wanted: Notify::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_read_that_had_begun_serves_nobody_who_asks_later() {
        let reads = Reads::default();
        let done = reads.watch();
        let is_served = |request: ReadRequest| request.is_served_by(*done.borrow());
        let first = reads.ask();
        let under_way = reads.begin();
        let second = reads.ask();
        assert!(!is_served(first) && !is_served(second));
        reads.succeeded(under_way);
        assert!(is_served(first));
        assert!(!is_served(second), "it was read before");
        let _failed = reads.begin();
        assert!(!is_served(second), "nothing was read");
        let next = reads.begin();
        reads.succeeded(next);
        assert!(is_served(second));
    }

    #[test]
    fn a_read_that_ends_late_takes_nothing_back() {
        let reads = Reads::default();
        let mut done = reads.watch();
        let (slow, quick) = (reads.begin(), reads.begin());
        reads.succeeded(quick);
        assert!(done.has_changed().expect("it is there"));
        done.mark_unchanged();
        reads.succeeded(slow);
        assert!(!done.has_changed().expect("it is there"));
        assert_eq!(*done.borrow(), 2);
    }

    #[test]
    fn those_who_ask_together_are_served_together() {
        let reads = Reads::default();
        for _ in 0..100 {
            reads.ask();
        }
        assert!(reads.wanted().now_or_never().is_some());
        assert!(reads.wanted().now_or_never().is_none());
    }
}
