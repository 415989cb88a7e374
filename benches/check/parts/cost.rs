//! Measures the cost of a check beside the gRPC stack alone, and beside a simple server.

use std::fs;

use anyhow::Result;

use super::{Bench, Shown, Spent, grouped};
use crate::{
    deployment::SidecarOptions,
    generator::Traffic,
    h2load::{H2load, Latency, Pressure},
    request::CheckTemplate,
    rounds::{figures, interleaved},
    row::{Row, Target, Unit},
    server::{Baseline, Server},
};

/// One server in one round.
struct Round {
    spent: Spent,
    /// Checks per second under a saturating load.
    rate: f64,
    /// The latencies under light load.
    latency: Latency,
}

type Figure = fn(&Round) -> f64;

const PART: &str = "cost";
/// The divisor of the number of saturating checks for those under light load, and for those before the first round.
const LIGHT_SHARE: u64 = 10;

const PROCESS: Figure = |round| round.spent.process;
const CHECK_THREADS: Figure = |round| round.spent.check_threads;
const P99: Figure = |round| round.latency.p99;

/// The comparisons: two servers, a figure and its target.
const RATIOS: [(&str, &str, &str, Figure, Option<Target>); 7] = [
    (
        "relatch",
        "always-ok",
        "processor time",
        PROCESS,
        Some(Target::AtMost(0.75)),
    ),
    (
        "relatch",
        "floor",
        "processor time",
        PROCESS,
        Some(Target::AtMost(1.4)),
    ),
    (
        "relatch",
        "floor, same answer",
        "processor time",
        PROCESS,
        None,
    ),
    (
        "relatch",
        "always-ok",
        "of check threads",
        CHECK_THREADS,
        None,
    ),
    ("relatch", "floor", "of check threads", CHECK_THREADS, None),
    ("always-ok", "floor", "processor time", PROCESS, None),
    ("relatch", "floor", "p99, light load", P99, None),
];

/// The figures of each server.
const FIGURES: [(&str, Unit, Figure); 5] = [
    ("processor time", Unit::Microseconds, PROCESS),
    ("of check threads", Unit::Microseconds, CHECK_THREADS),
    ("Checks a second", Unit::PerSecond, |round| round.rate),
    ("p50, light load", Unit::Microseconds, |round| {
        round.latency.p50
    }),
    ("p99, light load", Unit::Microseconds, P99),
];

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let (plan, cores) = (bench.plan, bench.cores);
    let keys = bench.deployment.keys(plan.few)?;
    let template = CheckTemplate::recorded()?;
    let load = H2load::prepare(bench.directory, &template.with(keys.get(0)))?;
    let checks = |server: &Server| Traffic::checks(server.address()?, keys, 1);

    let relatch = bench
        .deployment
        .sidecar(plan.few, SidecarOptions::default())?;
    let answer = bench.directory.join("answer.bin");
    fs::write(&answer, relatch.allow(checks(&relatch)?)?)?;
    let mut servers = [
        Server::baseline(cores, &Baseline::AlwaysOk)?,
        Server::baseline(cores, &Baseline::Floor)?,
        Server::baseline(cores, &Baseline::FloorWith(answer))?,
        relatch,
    ];
    let mut rows = Vec::new();
    for server in &servers {
        let bytes = server.allow(checks(server)?)?.len();
        let bytes = f64::from(u32::try_from(bytes)?);
        let name = format!("{}: answer", server.name);
        rows.push(Row::new(PART, name, Unit::Bytes, vec![bytes]));
        load.rate(
            server.address()?,
            plan.checks / LIGHT_SHARE,
            Pressure::SATURATING,
        )?;
    }
    let measured = interleaved(
        plan.rounds,
        &mut servers,
        |server| server.name.to_owned(),
        |server| Round::measure(server, &load, plan.checks),
    )?;

    let of = |name: &str, figure: Figure| {
        let at = servers.iter().position(|server| server.name == name);
        at.map_or(Vec::new(), |at| figures(&measured[at], figure))
    };
    let mut shown = Vec::new();
    for (one, other, what, figure, target) in RATIOS {
        let name = format!("{one} / {other}: {what}");
        let row = Row::ratio(PART, name, &of(one, figure), &of(other, figure));
        shown.push(Row { target, ..row });
    }
    for server in &servers {
        for (what, unit, figure) in FIGURES {
            let name = format!("{}: {what}", server.name);
            shown.push(Row::new(PART, name, unit, of(server.name, figure)));
        }
    }
    shown.append(&mut rows);
    Ok(Shown {
        plan: format!(
            "{} rounds of {} Checks of {} bytes from h2load, {} keys, one of them presented",
            plan.rounds,
            grouped(plan.checks),
            template.len(),
            grouped(plan.few),
        ),
        rows: shown,
    })
}

impl Round {
    fn measure(server: &Server, load: &H2load, count: u64) -> Result<Self> {
        let address = server.address()?;
        let (spent, rate) = Spent::measure(server, count, || {
            load.rate(address, count, Pressure::SATURATING)
        })?;
        let latency = load.latency(address, count / LIGHT_SHARE, Pressure::LIGHT)?;
        Ok(Self {
            spent,
            rate,
            latency,
        })
    }
}
