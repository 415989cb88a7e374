//! Rounds of measurements, and how the servers compare in them.

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::{
    load::{Latency, Load, Pressure},
    processor::ProcessorTime,
    server::{Answered, Server},
};

/// What every server showed in every round.
#[derive(Debug)]
pub(crate) struct Comparison {
    pub(crate) servers: Vec<Measured>,
}

/// One server, the rounds in their order.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) name: &'static str,
    pub(crate) rounds: Vec<Round>,
}

/// One server in one round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// Processor time of the process for a Check, in microseconds, saturated.
    pub(crate) process_micros: f64,
    /// The same of the threads that answer checks.
    pub(crate) check_micros: f64,
    /// Requests per second, saturated.
    pub(crate) rate: f64,
    /// Under light load.
    pub(crate) latency: Latency,
}

/// Of a figure over all rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// Of the saturating requests, so many are sent under light load, and before the first round.
const LIGHT_SHARE: u64 = 10;

impl Comparison {
    /// Asks each server `count` times in each of `rounds` rounds. Every round begins with another server.
    ///
    /// # Errors
    ///
    /// When a request fails, or a server counts other answers than were asked for.
    pub(crate) fn measure(
        servers: &[&Server],
        load: &Load,
        rounds: u32,
        count: u64,
    ) -> Result<Self> {
        let mut measured: Vec<Measured> = servers
            .iter()
            .map(|server| Measured {
                name: server.name,
                rounds: Vec::new(),
            })
            .collect();
        for server in servers {
            load.rate(server.address, count / LIGHT_SHARE, Pressure::SATURATING)?;
        }
        let mut order: Vec<usize> = (0..servers.len()).collect();
        for round in 1..=rounds {
            for &at in &order {
                eprintln!("round {round} of {rounds}: {}", servers[at].name);
                measured[at]
                    .rounds
                    .push(Round::measure(servers[at], load, count)?);
            }
            order.rotate_left(1);
        }
        Ok(Self { servers: measured })
    }

    /// `figure` of one server against another's, round by round.
    pub(crate) fn ratio(
        &self,
        of: &str,
        to: &str,
        figure: impl Fn(&Round) -> f64,
    ) -> Option<Spread> {
        let rounds = |name| {
            let mut servers = self.servers.iter();
            servers
                .find(|server| server.name == name)
                .map(|server| &server.rounds)
        };
        let pairs = rounds(of)?.iter().zip(rounds(to)?);
        Spread::of(pairs.map(|(one, other)| figure(one) / figure(other)))
    }
}

impl Measured {
    /// `figure` over the rounds.
    pub(crate) fn spread(&self, figure: impl Fn(&Round) -> f64) -> Option<Spread> {
        Spread::of(self.rounds.iter().map(figure))
    }
}

impl Round {
    fn measure(server: &Server, load: &Load, count: u64) -> Result<Self> {
        let answered = server.answered()?;
        let before = ProcessorTime::read(server.daemon.id())?;
        let rate = load.rate(server.address, count, Pressure::SATURATING)?;
        let spent = ProcessorTime::read(server.daemon.id())?.since(before);
        assert_counted(server, answered, count)?;
        let latency = load.latency(server.address, count / LIGHT_SHARE, Pressure::LIGHT)?;
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let micros = |time: std::time::Duration| time.as_secs_f64() * 1e6 / count as f64;
        Ok(Self {
            process_micros: micros(spent.process),
            check_micros: micros(spent.check_threads),
            rate,
            latency,
        })
    }
}

impl Spread {
    /// None of no values.
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_unstable_by(f64::total_cmp);
        let upper = values.len() / 2;
        let lower = values.len().checked_sub(1)? / 2;
        Some(Self {
            min: values[0],
            median: f64::midpoint(values[lower], values[upper]),
            max: values[values.len() - 1],
        })
    }
}

/// `h2load` sees HTTP statuses only. Where the server counts, its own count says that every answer was an allow.
fn assert_counted(server: &Server, before: Option<Answered>, count: u64) -> Result<()> {
    let Some(before) = before else {
        return Ok(());
    };
    let after = server.answered()?;
    let expected = Answered {
        allowed: before.allowed + count,
        denied: before.denied,
    };
    ensure!(
        after == Some(expected),
        "{} was asked {count} times and counts {after:?} after {before:?}",
        server.name
    );
    Ok(())
}
