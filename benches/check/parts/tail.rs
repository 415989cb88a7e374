//! Measures the latency of checks at half of the rate that saturates a sidecar.
//!
//! `floor` gets the same rate as relatch, which is half of what relatch can answer: the measurement is the wait of a caller,
//! whose rate does not depend on the server.

use anyhow::Result;

use super::{Bench, Shown, grouped, size::STREAMS};
use crate::{
    deployment::SidecarOptions,
    generator::{Generator, Latencies, Traffic},
    rounds::{figures, interleaved},
    row::{Row, Target, Unit},
    server::{Baseline, Server},
};

struct Side {
    server: Server,
    generator: Generator,
}

const PART: &str = "tail";

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let plan = bench.plan;
    let relatch = bench
        .deployment
        .sidecar(plan.few, SidecarOptions::default())?;
    let floor = Server::baseline(bench.cores, &Baseline::Floor)?;
    let mut sides = [Side::new(bench, relatch)?, Side::new(bench, floor)?];
    let mut rates = Vec::new();
    for _ in 0..plan.rounds {
        rates.push(sides[0].saturate(plan.checks)?);
    }
    let saturation = Row::new(PART, "relatch: saturated", Unit::PerSecond, rates);
    let rate = saturation.spread()?.median / 2.0;
    let count = count(rate, plan.paced.as_secs_f64());
    let measured = interleaved(
        plan.rounds,
        &mut sides,
        |side| side.server.name.to_owned(),
        |side| {
            let Side { server, generator } = side;
            server.allowing(count, || generator.pace(count, rate))
        },
    )?;

    let ratio = |what: &str, figure: fn(&Latencies) -> f64| {
        let [relatch, floor] = [&measured[0], &measured[1]].map(|rounds| figures(rounds, figure));
        Row::ratio(PART, format!("relatch / floor: {what}"), &relatch, &floor)
    };
    let mut rows = vec![
        ratio("p99", Latencies::p99).target(Target::AtMost(1.3)),
        ratio("p50", Latencies::median),
    ];
    for (side, rounds) in sides.iter().zip(&measured) {
        let row = |what: &str, figure: fn(&Latencies) -> f64| {
            let name = format!("{}: {what}", side.server.name);
            Row::new(PART, name, Unit::Microseconds, figures(rounds, figure))
        };
        rows.extend([
            row("p50", Latencies::median),
            row("p99", Latencies::p99),
            row("p99.9", |latencies| latencies.all_but_one_in(1_000)),
        ]);
    }
    rows.push(saturation);
    Ok(Shown {
        plan: format!(
            "{} rounds of {} Checks, evenly spaced at {} a second, half of what saturates relatch",
            plan.rounds,
            grouped(count),
            grouped(whole(rate)),
        ),
        rows,
    })
}

impl Side {
    fn new(bench: Bench<'_>, server: Server) -> Result<Self> {
        let keys = bench.deployment.keys(bench.plan.few)?;
        let traffic = || Traffic::checks(server.address()?, keys, keys.len());
        server.allow(traffic()?)?;
        Ok(Self {
            generator: Generator::new(server.address()?, traffic()?),
            server,
        })
    }

    fn saturate(&mut self, count: u64) -> Result<f64> {
        let Self { server, generator } = self;
        server.allowing(count, || generator.saturate(count, STREAMS))
    }
}

/// The number of requests in `seconds` at `rate` per second.
pub(super) fn count(rate: f64, seconds: f64) -> u64 {
    whole(rate * seconds).max(1)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are positive and far below 2^52"
)]
fn whole(number: f64) -> u64 {
    number.round() as u64
}
