//! The load generator. It sends requests over HTTP/2 at so low a cost that one thread of it saturates any server here.
//!
//! Unlike `h2load`, it can present another key with every request ([`traffic`]), and it can pace: requests leave at evenly
//! spaced times, even if earlier ones are not answered, and a latency counts from the time at which the request was due. The
//! figures of a server that stalls therefore include every request that had to wait, not only one ("coordinated omission").
//!
//! It verifies the answers: the status must be 200, and a gRPC answer must have a message.

mod connection;
mod frame;
mod traffic;

use std::{net::SocketAddr, time::Duration};

use ::relatch::clock::{BootTime, Clock};
use anyhow::{Result, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use connection::Connection;

pub(crate) use traffic::{Sampling, Traffic};

/// A load: its traffic, the address of the server, and the number of connections.
#[derive(Debug)]
pub(crate) struct Generator {
    address: SocketAddr,
    traffic: Traffic,
    clock: Clock,
    /// The number of the next request, so that no run begins with the keys of the last one.
    next: u64,
}

/// The times from the moment at which a request was due to the last byte of its answer, in microseconds, in ascending order.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Vec<f64>);

/// The number of connections: as of an Envoy with four worker threads.
const CONNECTIONS: usize = 4;
/// The time without an answer after which a server counts as failed.
const PATIENCE: Duration = Duration::from_secs(10);

impl Generator {
    /// Creates a generator of `traffic` for the server at `address`.
    pub(crate) fn new(address: SocketAddr, traffic: Traffic) -> Self {
        Self {
            address,
            traffic,
            clock: Clock::system(),
            next: 0,
        }
    }

    /// The DATA of the answer to one request, frames of gRPC included.
    ///
    /// # Errors
    ///
    /// When the answer is not 200.
    pub(crate) fn ask_once(&mut self) -> Result<Vec<u8>> {
        let mut connection = Connection::open(self.address, self.traffic.reply())?;
        connection.keep();
        connection.ask(&self.traffic, self.next, 0);
        self.next += 1;
        let mut connections = [connection];
        while connections[0].under_way() > 0 {
            wait(&connections)?;
            advance(&mut connections, |_, _| {})?;
        }
        let [connection] = connections;
        Ok(connection.kept())
    }

    /// Sends `count` requests, with `streams` at the same time on each connection. Returns the rate in requests per second.
    ///
    /// # Errors
    ///
    /// When one is not answered as it should be.
    pub(crate) fn saturate(&mut self, count: u64, streams: usize) -> Result<f64> {
        let mut connections = self.connect()?;
        let began = self.clock.boot();
        let end = self.next + count;
        let mut answered = 0;
        while answered < count {
            for connection in &mut connections {
                while self.next < end
                    && connection.under_way() < streams
                    && connection.has_room(&self.traffic)
                {
                    connection.ask(&self.traffic, self.next, 0);
                    self.next += 1;
                }
                connection.flush()?;
            }
            wait(&connections)?;
            advance(&mut connections, |_, _| answered += 1)?;
        }
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let count = count as f64;
        Ok(count / self.since(began).as_secs_f64())
    }

    /// Sends `count` requests at `rate` per second, evenly spaced. Returns the latencies.
    ///
    /// It never sleeps, so that a request leaves when it is due, and an answer is seen when it arrives.
    ///
    /// # Errors
    ///
    /// When one is not answered as it should be.
    pub(crate) fn pace(&mut self, count: u64, rate: f64) -> Result<Latencies> {
        let mut connections = self.connect()?;
        let began = self.clock.boot();
        let spacing = 1e9 / rate;
        let mut nanos = Vec::with_capacity(usize::try_from(count)?);
        let mut sent = 0;
        while (nanos.len() as u64) < count {
            let now = self.nanos_since(began);
            while sent < count {
                let due = due(sent, spacing);
                let at = usize::try_from(sent)? % connections.len();
                let connection = &mut connections[at];
                if due > now || !connection.has_room(&self.traffic) {
                    break;
                }
                connection.ask(&self.traffic, self.next, due);
                self.next += 1;
                sent += 1;
            }
            let clock = &self.clock;
            advance(&mut connections, |now, due| {
                let now = *now.get_or_insert_with(|| nanos_between(began, clock.boot()));
                nanos.push(now.saturating_sub(due));
            })?;
            let late = now.saturating_sub(due(count, spacing));
            ensure!(
                Duration::from_nanos(late) < PATIENCE,
                "{} of {count} requests are not answered",
                count - nanos.len() as u64
            );
        }
        Ok(Latencies::of(nanos))
    }

    fn connect(&self) -> Result<Vec<Connection>> {
        (0..CONNECTIONS)
            .map(|_| Connection::open(self.address, self.traffic.reply()))
            .collect()
    }

    fn since(&self, began: BootTime) -> Duration {
        self.clock.boot().saturating_since(began)
    }

    fn nanos_since(&self, began: BootTime) -> u64 {
        nanos_between(began, self.clock.boot())
    }
}

impl Latencies {
    fn of(nanos: Vec<u64>) -> Self {
        #[expect(
            clippy::cast_precision_loss,
            reason = "runs are far shorter than 2^52 ns"
        )]
        let mut micros: Vec<f64> = nanos.into_iter().map(|nanos| nanos as f64 / 1e3).collect();
        micros.sort_unstable_by(f64::total_cmp);
        Self(micros)
    }

    /// The latency that the share `1 - 1 / one_in` of the requests does not exceed.
    pub(crate) fn all_but_one_in(&self, one_in: usize) -> f64 {
        let beyond = self.0.len() / one_in;
        self.0[self.0.len() - 1 - beyond.min(self.0.len() - 1)]
    }

    /// The median.
    pub(crate) fn median(&self) -> f64 {
        self.all_but_one_in(2)
    }

    /// The 99th percentile.
    pub(crate) fn p99(&self) -> f64 {
        self.all_but_one_in(100)
    }

    /// The maximum.
    pub(crate) fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or_default()
    }
}

/// Writes and reads as much as is possible now. `answered` receives a place for the time of one read, which all answers of
/// that read share.
fn advance(
    connections: &mut [Connection],
    mut answered: impl FnMut(&mut Option<u64>, u64),
) -> Result<()> {
    for connection in connections {
        connection.flush()?;
        if connection.under_way() > 0 {
            let mut read_at = None;
            connection.receive(|due| answered(&mut read_at, due))?;
            connection.flush()?;
        }
    }
    Ok(())
}

/// Waits until something can be read, or until pending bytes can be written.
fn wait(connections: &[Connection]) -> Result<()> {
    let mut polled: Vec<PollFd<'_>> = connections
        .iter()
        .map(|connection| {
            let mut interest = PollFlags::IN;
            if connection.is_writing() {
                interest |= PollFlags::OUT;
            }
            PollFd::new(connection, interest)
        })
        .collect();
    let patience = Timespec::try_from(PATIENCE)?;
    match poll(&mut polled, Some(&patience)) {
        Ok(0) => anyhow::bail!("the server answers no more"),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The time at which request `number` of a run is due, in nanoseconds after its start.
fn due(number: u64, spacing: f64) -> u64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "runs are far shorter than 2^52 ns"
    )]
    let nanos = (number as f64 * spacing) as u64;
    nanos
}

fn nanos_between(began: BootTime, now: BootTime) -> u64 {
    u64::try_from(now.saturating_since(began).as_nanos()).unwrap_or(u64::MAX)
}
