//! Steady load: requests one after another on a number of connections until it is stopped.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::task::JoinSet;

use super::{
    client::{Connection, Request, Response},
    eventually::eventually,
};

/// Consumers that send without a pause, each on its own connection.
#[derive(Debug)]
pub(crate) struct Load {
    workers: JoinSet<Totals>,
    run: Arc<Run>,
}

/// What became of every request.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    /// Answered with 200.
    pub(crate) ok: u64,
    /// Answered with anything else, or not at all.
    pub(crate) failed: u64,
    /// The first failures: status and body, or the error.
    pub(crate) samples: Vec<String>,
    /// The requests that reached the upstream by the `x-relatch-key-version` with which they came; empty without one.
    pub(crate) by_key_version: BTreeMap<String, u64>,
}

#[derive(Debug, Default)]
struct Run {
    stopping: AtomicBool,
    answered: AtomicU64,
}

/// The most failures that are kept: enough to see what goes wrong, few enough to read.
const MAX_SAMPLES: usize = 8;

impl Load {
    /// Sends what `make_request` returns to `addr` from `concurrency` connections.
    pub(crate) fn start(
        addr: SocketAddr,
        make_request: impl Fn() -> Request + Send + Sync + 'static,
        concurrency: usize,
    ) -> Self {
        let run = Arc::new(Run::default());
        let make_request = Arc::new(make_request);
        let mut workers = JoinSet::new();
        for _ in 0..concurrency {
            let (run, make_request) = (Arc::clone(&run), Arc::clone(&make_request));
            workers.spawn(async move { work(addr, &*make_request, &run).await });
        }
        Self { workers, run }
    }

    /// Waits for `count` more answers.
    pub(crate) async fn answered(&self, count: u64) {
        let wanted = self.run.answered.load(Ordering::SeqCst) + count;
        eventually("answers to the load", async || {
            (self.run.answered.load(Ordering::SeqCst) >= wanted).then_some(())
        })
        .await;
    }

    /// Ends after the requests in flight.
    pub(crate) async fn stop(self) -> Totals {
        self.run.stopping.store(true, Ordering::SeqCst);
        let mut totals = Totals::default();
        for worker in self.workers.join_all().await {
            totals.add(worker);
        }
        totals
    }
}

impl Totals {
    fn record(&mut self, outcome: io::Result<Response>) {
        match outcome {
            Ok(response) if response.status == 200 => {
                self.ok += 1;
                let seen = response.seen();
                let version = seen.values("x-relatch-key-version").join(",");
                *self.by_key_version.entry(version).or_default() += 1;
            }
            Ok(response) => self.fail(format!("{}: {}", response.status, response.text())),
            Err(error) => self.fail(error.to_string()),
        }
    }

    fn fail(&mut self, sample: String) {
        self.failed += 1;
        if self.samples.len() < MAX_SAMPLES {
            self.samples.push(sample);
        }
    }

    fn add(&mut self, other: Self) {
        self.ok += other.ok;
        self.failed += other.failed;
        self.samples.extend(other.samples);
        self.samples.truncate(MAX_SAMPLES);
        for (version, count) in other.by_key_version {
            *self.by_key_version.entry(version).or_default() += count;
        }
    }
}

async fn work(addr: SocketAddr, make_request: &impl Fn() -> Request, run: &Run) -> Totals {
    let mut totals = Totals::default();
    let mut kept = None;
    while !run.stopping.load(Ordering::SeqCst) {
        let outcome = Connection::send_kept(&mut kept, addr, &make_request()).await;
        totals.record(outcome);
        run.answered.fetch_add(1, Ordering::SeqCst);
        // An answer that was already there costs no wait; others on this thread must have their turn all the same.
        tokio::task::yield_now().await;
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::{
        super::{reserved::Reserved, upstream::Upstream},
        *,
    };

    #[tokio::test]
    async fn load_counts_what_the_upstream_counts() {
        let upstream = Upstream::start().await;
        let request = || Request::get("/").header("x-relatch-key-version", "3");
        let load = Load::start(upstream.addr(), request, 3);
        load.answered(50).await;
        let totals = load.stop().await;
        assert_eq!((totals.ok, totals.failed), (upstream.requests(), 0));
        assert_eq!(
            totals.by_key_version,
            BTreeMap::from([("3".to_owned(), totals.ok)])
        );
    }

    #[tokio::test]
    async fn load_counts_refused_connections_as_failed() {
        let nobody = Reserved::new();
        let load = Load::start(nobody.address(), || Request::get("/"), 1);
        load.answered(3).await;
        let totals = load.stop().await;
        assert_eq!(totals.ok, 0);
        assert!(totals.failed >= 3 && !totals.samples.is_empty());
    }
}
