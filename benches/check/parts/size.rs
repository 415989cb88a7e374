//! Measures the cost of a check if the keyring does not fit into the caches of the processor.

use anyhow::Result;

use super::{Bench, Shown, Spent, grouped};
use crate::{
    deployment::SidecarOptions,
    generator::{Generator, Traffic},
    rounds::{figures, interleaved},
    row::{Row, Target, Unit},
    server::Server,
};

/// A sidecar and its load.
struct Side {
    size: u32,
    server: Server,
    generator: Generator,
}

const PART: &str = "size";
/// The requests at the same time on each connection: together more than one thread can answer, and as many as `h2load` has in
/// other parts.
pub(super) const STREAMS: usize = 50;
/// The number of different keys. Their records alone are many times larger than the second-level cache.
pub(super) const PRESENTED: u64 = 100_000;

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let plan = bench.plan;
    let mut sides = [
        Side::start(bench, plan.few)?,
        Side::start(bench, plan.many)?,
    ];
    for side in &mut sides {
        // Each key is used once, so that no round includes a first use.
        side.generator.saturate(PRESENTED, STREAMS)?;
    }
    let measured = interleaved(
        plan.rounds,
        &mut sides,
        |side| format!("{} keys", grouped(side.size)),
        |side| {
            let generator = &mut side.generator;
            Spent::measure(&side.server, plan.checks, || {
                generator.saturate(plan.checks, STREAMS)
            })
        },
    )?;

    let name = |what: &str| {
        format!(
            "{} / {} keys: {what}",
            grouped(plan.many),
            grouped(plan.few)
        )
    };
    let ratio = |what: &str, figure: fn(&(Spent, f64)) -> f64| {
        let [few, many] = [&measured[0], &measured[1]].map(|rounds| figures(rounds, figure));
        Row::ratio(PART, name(what), &many, &few)
    };
    let mut rows = vec![
        ratio("processor time", |(spent, _)| spent.process).target(Target::AtMost(1.15)),
        ratio("of check threads", |(spent, _)| spent.check_threads),
    ];
    for (side, rounds) in sides.iter().zip(&measured) {
        let row = |what: &str, unit, figure: fn(&(Spent, f64)) -> f64| {
            let name = format!("{} keys: {what}", grouped(side.size));
            Row::new(PART, name, unit, figures(rounds, figure))
        };
        rows.extend([
            row("processor time", Unit::Microseconds, |(spent, _)| {
                spent.process
            }),
            row("of check threads", Unit::Microseconds, |(spent, _)| {
                spent.check_threads
            }),
            row("Checks a second", Unit::PerSecond, |(_, rate)| *rate),
        ]);
    }
    Ok(Shown {
        plan: format!(
            "{} rounds of {} Checks, {} different keys presented",
            plan.rounds,
            grouped(plan.checks),
            grouped(PRESENTED.min(plan.many.into())),
        ),
        rows,
    })
}

impl Side {
    fn start(bench: Bench<'_>, size: u32) -> Result<Self> {
        let keys = bench.deployment.keys(size)?;
        let server = bench.deployment.sidecar(size, SidecarOptions::default())?;
        let traffic = || Traffic::checks(server.address()?, keys, PRESENTED);
        server.allow(traffic()?)?;
        Ok(Self {
            size,
            generator: Generator::new(server.address()?, traffic()?),
            server,
        })
    }
}
