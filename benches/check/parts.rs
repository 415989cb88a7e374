//! The parts of the benchmark, which can be run alone.

mod change;
mod cost;
mod envoy;
mod http;
mod memory;
mod overload;
mod size;
mod spans;
mod tail;

use std::{collections::BTreeSet, path::Path, time::Duration};

use anyhow::Result;
use clap::ValueEnum;

use crate::{
    cores::Cores, deployment::Deployment, processor::ProcessorTime, row::Row, server::Server,
};

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Processor time of a check beside the baselines
    Cost,
    /// Processor time of a check over HTTP beside one over gRPC
    Http,
    /// Processor time of a check with many keys
    Size,
    /// Processor time of a check with a span
    Spans,
    /// Latency at half of the saturation rate
    Tail,
    /// Checks when clients ask for more than the sidecar can answer
    Overload,
    /// Requests through Envoy
    Envoy,
    /// Memory of a key, and the time until a sidecar is ready
    Memory,
    /// Latency while keys change
    Change,
}

/// The size of the measurements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// The number of rounds, in each of which every side of a comparison is measured once.
    pub(crate) rounds: u32,
    /// The number of checks that saturate a server, in a round. Processor time is counted in hundredths of a second: 200,000
    /// checks of 10 µs are 200 of them.
    pub(crate) checks: u64,
    /// The duration of a paced load, in a round.
    pub(crate) paced: Duration,
    /// The number of keys in the small keyring.
    pub(crate) few: u32,
    /// The number of keys in the large keyring.
    pub(crate) many: u32,
    /// Whether the memory of ten times as many keys is measured too.
    pub(crate) large: bool,
}

/// The environment of a part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bench<'a> {
    pub(crate) plan: Plan,
    pub(crate) cores: &'a Cores,
    pub(crate) deployment: &'a Deployment,
    /// The directory for files that exist as long as the benchmark.
    pub(crate) directory: &'a Path,
}

/// The result of a part.
#[derive(Debug)]
pub(crate) struct Shown {
    /// The measurement, in words.
    pub(crate) plan: String,
    pub(crate) rows: Vec<Row>,
}

/// The processor time of a server for a check, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Spent {
    /// The time of the whole process.
    process: f64,
    /// The time of the threads that answer checks.
    check_threads: f64,
}

impl Part {
    /// The sizes of the keyrings that the part needs.
    pub(crate) fn sizes(self, plan: Plan) -> BTreeSet<u32> {
        match self {
            Self::Cost | Self::Http | Self::Spans | Self::Tail | Self::Overload | Self::Envoy => {
                [plan.few].into()
            }
            Self::Size | Self::Change => [plan.few, plan.many].into(),
            Self::Memory => memory::sizes(plan).into_iter().collect(),
        }
    }

    /// Measures the part.
    ///
    /// # Errors
    ///
    /// When something cannot be measured.
    pub(crate) fn measure(self, bench: Bench<'_>) -> Result<Shown> {
        match self {
            Self::Cost => cost::measure(bench),
            Self::Http => http::measure(bench),
            Self::Size => size::measure(bench),
            Self::Spans => spans::measure(bench),
            Self::Tail => tail::measure(bench),
            Self::Overload => overload::measure(bench),
            Self::Envoy => envoy::measure(bench),
            Self::Memory => memory::measure(bench),
            Self::Change => change::measure(bench),
        }
    }

    /// The name on the command line and in the table.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Cost => "cost",
            Self::Http => "http",
            Self::Size => "size",
            Self::Spans => "spans",
            Self::Tail => "tail",
            Self::Overload => "overload",
            Self::Envoy => "envoy",
            Self::Memory => "memory",
            Self::Change => "change",
        }
    }
}

impl Spent {
    /// Measures what `server` spends on each of the `count` checks that `work` sends.
    fn measure<T>(
        server: &Server,
        count: u64,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(Self, T)> {
        let before = ProcessorTime::read(server.daemon.id())?;
        let done = server.allowing(count, work)?;
        let spent = ProcessorTime::read(server.daemon.id())?.since(before);
        Ok((
            Self {
                process: micros_each(spent.process, count),
                check_threads: micros_each(spent.check_threads, count),
            },
            done,
        ))
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn micros_each(time: Duration, count: u64) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

/// A number with separators: 1,000,000.
fn grouped(number: impl Into<u64>) -> String {
    let digits = number.into().to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
