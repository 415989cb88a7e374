//! The choice of a worker for each connection: the worker with the fewest connections.
//!
//! Envoy keeps a connection for its own lifetime. If workers only took turns, connections that end
//! would leave the shares uneven for good.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;

use super::socket::Accepted;
use crate::seldom::Seldom;

/// Spreads the connections of one listener over workers.
#[derive(Debug)]
pub(super) struct Spread {
    protocol: Protocol,
    intakes: Vec<Intake>,
    /// The index of the worker that is next among those with equally few connections.
    turn: usize,
    /// The maximum number of connections in all.
    max: usize,
    refused: Counter,
    /// Limits how often a refusal is logged.
    told: Seldom,
}

/// The queue of connections for one worker. It is cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Intake {
    arrivals: mpsc::Sender<Arrival>,
    open: Arc<AtomicUsize>,
}

/// A connection for a worker.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) socket: Accepted,
    pub(super) protocol: Protocol,
    /// The limit on concurrent calls that is announced to its client.
    pub(super) streams: u32,
    pub(super) seat: Seat,
}

/// The protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// Envoy's external authorization.
    Grpc,
    /// The questions of proxies that ask over HTTP.
    Http,
}

/// Counts a connection of a worker until it is dropped.
#[derive(Debug)]
pub(super) struct Seat(Arc<AtomicUsize>);

/// A worker has ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ended;

/// The maximum number of connections in all. Envoy opens one for each of its threads, twice as many
/// while one Envoy replaces another, and more only if a thread has as many checks under way as a
/// connection announces. So 512 connections are enough for two Envoys of 128 threads. A process may
/// often have 1,024 files, and the other half is for everything else.
pub(super) const MAX_CONNECTIONS: usize = 512;
/// The maximum number of connections in all above which no further connection of a proxy that asks
/// over HTTP is accepted. Such a proxy opens a connection for each check under way. The rest is for
/// Envoy, which needs only a few.
pub(super) const MAX_HTTP_CONNECTIONS: usize = 384;
/// The number of concurrent calls that the connections of a worker share. At 7 µs for each call
/// they are 14 ms of work. With all connections on one worker there may be 13,000 calls, which are
/// 90 ms of work. By default, Envoy cancels a check after 200 ms. So calls that a worker cannot
/// answer in time wait in Envoy, which immediately refuses calls above its own limits. A denial
/// would cost the worker nearly as much as an answer.
const CALLS: u32 = 2_048;
/// The maximum share of a connection. It is about as many calls as arrive in one turn of the
/// connection. With a larger share, the last calls would wait for the turns of all other
/// connections. Envoy opens another connection when that many checks are under way.
const MAX_SHARE: u32 = 128;
/// The minimum share of a connection, so that an Envoy that connects late does not open hundreds of
/// connections.
const MIN_SHARE: u32 = 16;
/// The maximum number of connections that wait for one worker. The accept loop waits for a worker
/// whose queue is full.
const MAX_WAITING: usize = 64;
/// The minimum time between two log lines about refusals. A client that is refused tries again: a
/// line for each refusal would only fill the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

impl Spread {
    /// Creates a spread over the workers of `intakes`, which has at least one, with at most `max`
    /// connections in all. `refused` counts the connections above `max`.
    pub(super) const fn new(
        protocol: Protocol,
        intakes: Vec<Intake>,
        max: usize,
        refused: Counter,
    ) -> Self {
        Self {
            protocol,
            intakes,
            turn: 0,
            max,
            refused,
            told: Seldom::new(LOG_INTERVAL),
        }
    }

    pub(super) const fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Gives a connection to the worker with the fewest connections. If `max` connections are open,
    /// the new one is closed. Cancellation safe: the connection is then closed.
    ///
    /// # Errors
    ///
    /// When the chosen worker has ended.
    pub(super) async fn give(&mut self, socket: Accepted) -> Result<(), Ended> {
        let open: Vec<usize> = self.intakes.iter().map(Intake::open).collect();
        if open.iter().sum::<usize>() >= self.max {
            self.refuse();
            return Ok(());
        }
        let chosen = fewest(&open, self.turn);
        self.turn = chosen + 1;
        let intake = &self.intakes[chosen];
        let arrival = Arrival {
            socket,
            protocol: self.protocol,
            streams: share(open[chosen]),
            seat: Seat::take(&intake.open),
        };
        let given = intake.arrivals.send(arrival).await;
        given.map_err(|_| Ended)
    }

    fn refuse(&mut self) {
        self.refused.inc();
        if self.told.is_due() {
            tracing::warn!(
                max = self.max,
                listener = self.protocol.as_str(),
                refused = self.refused.get(),
                "a connection was closed: too many are open"
            );
        }
    }
}

impl Intake {
    /// Creates an intake and the receiving end of its queue.
    pub(super) fn new() -> (Self, mpsc::Receiver<Arrival>) {
        let (arrivals, received) = mpsc::channel(MAX_WAITING);
        let open = Arc::default();
        (Self { arrivals, open }, received)
    }

    fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

impl Protocol {
    /// Returns the name of the listener in logs.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "ext_authz",
            Self::Http => "http_authz",
        }
    }
}

impl Seat {
    fn take(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Returns the limit on concurrent calls that the next connection of a worker announces; `open` is
/// the number of its other connections.
fn share(open: usize) -> u32 {
    let connections = u32::try_from(open + 1).unwrap_or(u32::MAX);
    (CALLS / connections).clamp(MIN_SHARE, MAX_SHARE)
}

/// Returns the index of the smallest number; of equal ones, the first from `turn` on, cyclically.
fn fewest(open: &[usize], turn: usize) -> usize {
    let count = open.len();
    (0..count)
        .map(|step| (turn + step) % count)
        .min_by_key(|&index| open[index])
        .expect("there is a worker")
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::net::UnixStream};

    use super::*;

    /// A spread, and the queues of its workers.
    struct World {
        spread: Spread,
        workers: Vec<mpsc::Receiver<Arrival>>,
        refused: Counter,
    }

    impl World {
        fn new(workers: usize, max: usize) -> Self {
            let (intakes, workers) = (0..workers).map(|_| Intake::new()).unzip();
            let refused = Counter::default();
            Self {
                spread: Spread::new(Protocol::Grpc, intakes, max, refused.clone()),
                workers,
                refused,
            }
        }

        /// Gives a connection. Returns the index of the worker that received it, and the seat; none
        /// if it was closed.
        async fn give(&mut self) -> Option<(usize, Seat)> {
            let (mut client, server) = UnixStream::pair().expect("two sockets");
            let given = self.spread.give(Accepted::Unix(server)).await;
            given.expect("the workers run");
            let found = self
                .workers
                .iter_mut()
                .enumerate()
                .find_map(|(index, worker)| {
                    let arrival = worker.try_recv().ok()?;
                    Some((index, arrival.seat))
                });
            if found.is_none() {
                let read = client.read(&mut [0]).expect("it is closed in order");
                assert_eq!(read, 0, "it is closed");
            }
            found
        }
    }

    #[tokio::test]
    async fn workers_with_equally_few_connections_take_turns() {
        let mut world = World::new(3, 100);
        let mut seats = Vec::new();
        for expected in [0, 1, 2, 0, 1, 2, 0] {
            let (index, seat) = world.give().await.expect("there is room");
            assert_eq!(index, expected);
            seats.push(seat);
        }
    }

    #[tokio::test]
    async fn connections_that_end_at_once_are_spread_too() {
        let mut world = World::new(3, 100);
        for expected in [0, 1, 2, 0] {
            let (index, _seat) = world.give().await.expect("there is room");
            assert_eq!(index, expected);
        }
    }

    #[tokio::test]
    async fn a_connection_that_ends_makes_its_worker_the_next() {
        let mut world = World::new(3, 100);
        let mut seats = Vec::new();
        for _ in 0..9 {
            seats.push(world.give().await.expect("there is room"));
        }
        // It is the turn of another worker.
        seats.retain(|(index, _)| *index != 2);
        for _ in 0..3 {
            let (index, seat) = world.give().await.expect("there is room");
            assert_eq!(index, 2);
            seats.push((index, seat));
        }
        let (index, _seat) = world.give().await.expect("there is room");
        assert_eq!(index, 0, "all have three, and the turn goes on");
    }

    #[tokio::test]
    async fn connections_above_the_limit_are_closed_and_counted() {
        let mut world = World::new(2, 3);
        let mut seats = Vec::new();
        for _ in 0..3 {
            seats.push(world.give().await.expect("there is room"));
        }
        assert!(world.give().await.is_none());
        assert!(world.give().await.is_none());
        assert_eq!(world.refused.get(), 2);

        seats.pop();
        assert!(world.give().await.is_some(), "there is room again");
        assert_eq!(world.refused.get(), 2);
    }

    #[test]
    fn the_more_connections_a_worker_has_the_fewer_calls_is_the_next_told_of() {
        let shares = [0, 15, 16, 63, 127, MAX_CONNECTIONS - 1].map(share);
        assert_eq!(shares, [128, 128, 120, 32, 16, 16]);
        let all: u32 = (0..MAX_CONNECTIONS).map(share).sum();
        assert!(all <= 13_000, "{all}");
    }

    #[tokio::test]
    async fn a_worker_that_has_ended_is_told_of() {
        let mut world = World::new(1, 100);
        world.workers.clear();
        let (_client, server) = UnixStream::pair().expect("two sockets");
        let given = world.spread.give(Accepted::Unix(server)).await;
        assert_eq!(given, Err(Ended));
    }
}
