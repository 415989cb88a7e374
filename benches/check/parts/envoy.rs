//! Measures requests through a real Envoy.
//!
//! Envoy and the server share one core, as the containers of a pod with one processor do, so that the time of both reduces
//! the rate of requests. The load has the other core.

use anyhow::Result;

use super::{Bench, Shown, grouped, micros_each};
use crate::{
    deployment::SidecarOptions,
    envoy::{Envoy, Filter},
    generator::{Generator, Traffic},
    processor::ProcessorTime,
    rounds::{figures, interleaved},
    row::{Row, Target, Unit},
    server::{Baseline, Server},
};

/// An Envoy and its authorization server.
struct Side<'a> {
    name: &'static str,
    envoy: Envoy,
    server: Option<&'a Server>,
    generator: Generator,
}

/// One side in one round.
struct Round {
    /// Requests per second.
    rate: f64,
    /// Processor time of a request, in microseconds.
    envoy: f64,
    server: f64,
}

const PART: &str = "envoy";
/// The requests at the same time on each connection: together enough that Envoy always has one, and few enough for the
/// caches of the processor.
const STREAMS: usize = 8;
/// A request through Envoy needs several times the time of a check.
const SHARE: u64 = 4;

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let plan = bench.plan;
    let keys = bench.deployment.keys(plan.few)?;
    let always_ok = Server::baseline(bench.cores, &Baseline::AlwaysOk)?;
    let tcp = bench
        .deployment
        .sidecar(plan.few, SidecarOptions::default())?;
    let unix = SidecarOptions {
        unix: true,
        ..SidecarOptions::default()
    };
    let unix = bench.deployment.sidecar(plan.few, unix)?;
    let start = |name: &'static str, filter: &Filter<'_>, server| {
        let file = name.replace([' ', ','], "-");
        let envoy = Envoy::start(bench.cores, bench.directory, &file, filter)?;
        let traffic = Traffic::gets(envoy.address, keys);
        Ok::<_, anyhow::Error>(Side {
            name,
            generator: Generator::new(envoy.address, traffic),
            envoy,
            server,
        })
    };
    let ext_authz = |server: &'_ Server| server.place.clone();
    let mut sides = [
        start("none", &Filter::None, None)?,
        start("in-process", &Filter::ApiKeyAuth(keys), None)?,
        start(
            "always-ok",
            &Filter::ExtAuthz(&ext_authz(&always_ok)),
            Some(&always_ok),
        )?,
        start(
            "relatch, TCP",
            &Filter::ExtAuthz(&ext_authz(&tcp)),
            Some(&tcp),
        )?,
        start(
            "relatch, Unix socket",
            &Filter::ExtAuthz(&ext_authz(&unix)),
            Some(&unix),
        )?,
    ];
    let count = plan.checks / SHARE;
    for side in &mut sides {
        side.generator.saturate(count / SHARE, STREAMS)?;
    }
    let measured = interleaved(
        plan.rounds,
        &mut sides,
        |side| side.name.to_owned(),
        |side| side.measure(count),
    )?;

    let ratio = |of: usize, to: usize| {
        let name = format!("{} / {}: requests a second", sides[of].name, sides[to].name);
        let [of, to] = [&measured[of], &measured[to]].map(|rounds| figures(rounds, |r| r.rate));
        Row::ratio(PART, name, &of, &to)
    };
    let mut rows = vec![
        ratio(3, 2).target(Target::AtLeast(0.98)),
        ratio(4, 2).target(Target::AtLeast(0.98)),
        ratio(3, 1),
        ratio(4, 1),
        ratio(1, 0),
    ];
    for (side, rounds) in sides.iter().zip(&measured) {
        let row = |what: &str, unit, figure: fn(&Round) -> f64| {
            let name = format!("{}: {what}", side.name);
            Row::new(PART, name, unit, figures(rounds, figure))
        };
        rows.extend([
            row("requests a second", Unit::PerSecond, |round| round.rate),
            row("processor time, all", Unit::Microseconds, |round| {
                round.envoy + round.server
            }),
            row("of Envoy", Unit::Microseconds, |round| round.envoy),
        ]);
    }
    Ok(Shown {
        plan: format!(
            "{} rounds of {} requests, HTTP/2, {} keys in turn",
            plan.rounds,
            grouped(count),
            grouped(plan.few),
        ),
        rows,
    })
}

impl Side<'_> {
    fn measure(&mut self, count: u64) -> Result<Round> {
        let ids = [
            Some(self.envoy.id()),
            self.server.map(|server| server.daemon.id()),
        ];
        let read = || -> Result<Vec<ProcessorTime>> {
            ids.into_iter().flatten().map(ProcessorTime::read).collect()
        };
        let generator = &mut self.generator;
        let before = read()?;
        let mut work = || generator.saturate(count, STREAMS);
        let rate = match self.server {
            Some(server) => server.allowing(count, work)?,
            None => work()?,
        };
        let mut spent = read()?
            .into_iter()
            .zip(before)
            .map(|(after, before)| micros_each(after.since(before).process, count));
        Ok(Round {
            rate,
            envoy: spent.next().unwrap_or_default(),
            server: spent.next().unwrap_or_default(),
        })
    }
}
