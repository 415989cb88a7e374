//! Measures checks when clients ask for more than a sidecar can answer.
//!
//! In one load, clients on many connections have as many requests at the same time as the sidecar allows. The other load only
//! saturates the sidecar. Further requests wait in the client, as they do in Envoy, which refuses those above its own limits.

use anyhow::Result;

use super::{Bench, Shown, grouped};
use crate::{
    deployment::SidecarOptions,
    generator::Traffic,
    h2load::{H2load, Latency, Pressure},
    request::CheckTemplate,
    rounds::{figures, interleaved},
    row::{Row, Unit},
    server::Server,
};

/// A kind of load.
struct Side {
    name: &'static str,
    pressure: Pressure,
}

/// One kind in one round.
struct Round {
    /// Checks per second.
    rate: f64,
    latency: Latency,
}

const PART: &str = "overload";
const SIDES: [Side; 2] = [
    Side {
        name: "saturated",
        pressure: Pressure::SATURATING,
    },
    Side {
        name: "overloaded",
        pressure: Pressure::EXCESSIVE,
    },
];

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let plan = bench.plan;
    let keys = bench.deployment.keys(plan.few)?;
    let template = CheckTemplate::recorded()?;
    let load = H2load::prepare(bench.directory, &template.with(keys.get(0)))?;
    let server = bench
        .deployment
        .sidecar(plan.few, SidecarOptions::default())?;
    server.allow(Traffic::checks(server.address()?, keys, 1)?)?;
    let mut sides = SIDES;
    let measured = interleaved(
        plan.rounds,
        &mut sides,
        |side| side.name.to_owned(),
        |side| Round::measure(&server, &load, plan.checks, side.pressure),
    )?;

    let [saturated, overloaded] = [0, 1].map(|at| figures(&measured[at], |round| round.rate));
    let name = "overloaded / saturated: Checks a second";
    let mut rows = vec![Row::ratio(PART, name, &overloaded, &saturated)];
    for (side, rounds) in sides.iter().zip(&measured) {
        let row = |what: &str, unit, figure: fn(&Round) -> f64| {
            let name = format!("{}: {what}", side.name);
            Row::new(PART, name, unit, figures(rounds, figure))
        };
        rows.extend([
            row("Checks a second", Unit::PerSecond, |round| round.rate),
            row("p50", Unit::Microseconds, |round| round.latency.p50),
            row("p99", Unit::Microseconds, |round| round.latency.p99),
        ]);
    }
    Ok(Shown {
        plan: format!(
            "{} rounds of {} Checks from h2load, {} and {}",
            plan.rounds,
            grouped(plan.checks),
            Pressure::SATURATING,
            Pressure::EXCESSIVE,
        ),
        rows,
    })
}

impl Round {
    fn measure(server: &Server, load: &H2load, count: u64, pressure: Pressure) -> Result<Self> {
        let address = server.address()?;
        let rate = server.allowing(count, || load.rate(address, count, pressure))?;
        let latency = server.allowing(count, || load.latency(address, count, pressure))?;
        Ok(Self { rate, latency })
    }
}
