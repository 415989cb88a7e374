//! Measures the cost of a span for every check.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Bench, Shown, Spent, grouped, size::STREAMS};
use crate::{
    collector::Collector,
    deployment::SidecarOptions,
    generator::{Generator, Sampling, Traffic},
    page,
    patience::until,
    rounds::{figures, interleaved},
    row::{Row, Target, Unit},
    server::Server,
};

struct Side {
    sampling: Sampling,
    generator: Generator,
}

/// One kind of checks in one round.
struct Round {
    spent: Spent,
    /// The share of the created spans that reached the collector.
    arrived: f64,
}

const PART: &str = "spans";
/// The longest wait for the last spans: a batch waits for one second, and its export can take five.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let plan = bench.plan;
    let collector = Collector::start(bench.cores)?;
    let options = SidecarOptions {
        collector: Some(collector.address()?),
        ..SidecarOptions::default()
    };
    let server = bench.deployment.sidecar(plan.few, options)?;
    let keys = bench.deployment.keys(plan.few)?;
    let traffic = || Traffic::checks(server.address()?, keys, keys.len());
    server.allow(traffic()?)?;
    let mut sides = Vec::new();
    for sampling in [Sampling::Unsampled, Sampling::Sampled] {
        let traffic = traffic()?.traced(sampling);
        sides.push(Side {
            sampling,
            generator: Generator::new(server.address()?, traffic),
        });
    }
    let measured = interleaved(
        plan.rounds,
        &mut sides,
        |side| format!("{:?}", side.sampling).to_lowercase(),
        |side| side.measure(&server, &collector, plan.checks),
    )?;

    let [unsampled, sampled] = [&measured[0], &measured[1]];
    let ratio = |what: &str, figure: fn(&Round) -> f64| {
        let name = format!("sampled / unsampled: {what}");
        let [of, to] = [sampled, unsampled].map(|rounds| figures(rounds, figure));
        Row::ratio(PART, name, &of, &to)
    };
    let mut rows = vec![
        ratio("processor time", |round| round.spent.process).target(Target::AtMost(1.5)),
        ratio("of check threads", |round| round.spent.check_threads),
    ];
    for (name, rounds) in [("unsampled", unsampled), ("sampled", sampled)] {
        let row = |what: &str, figure: fn(&Round) -> f64| {
            let name = format!("{name}: {what}");
            Row::new(PART, name, Unit::Microseconds, figures(rounds, figure))
        };
        rows.extend([
            row("processor time", |round| round.spent.process),
            row("of check threads", |round| round.spent.check_threads),
        ]);
    }
    let arrived = figures(sampled, |round| round.arrived);
    rows.push(Row::new(
        PART,
        "sampled: spans received / made",
        Unit::Ratio,
        arrived,
    ));
    Ok(Shown {
        plan: format!(
            "{} rounds of {} Checks, saturated; what does not fit the queue of spans is dropped and counted",
            plan.rounds,
            grouped(plan.checks),
        ),
        rows,
    })
}

impl Side {
    /// Checks that every created span has arrived or is counted as dropped.
    fn measure(&mut self, server: &Server, collector: &Collector, count: u64) -> Result<Round> {
        let (received, dropped) = (collector.received()?, dropped(server)?);
        let expected = match self.sampling {
            Sampling::Sampled => count,
            Sampling::Unsampled => 0,
        };
        let generator = &mut self.generator;
        let (arrived, (spent, _)) = {
            let spent = Spent::measure(server, count, || generator.saturate(count, STREAMS))?;
            let arrived = until("all spans are sent or dropped", SETTLE_TIMEOUT, || {
                let arrived = collector.received()? - received;
                let lost = self::dropped(server)? - dropped;
                Ok((arrived + lost >= expected).then_some((arrived, lost)))
            })?;
            (arrived, spent)
        };
        let (arrived, lost) = arrived;
        ensure!(
            arrived + lost == expected,
            "{expected} spans were made, {arrived} have arrived and {lost} were dropped"
        );
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let arrived = arrived as f64 / expected.max(1) as f64;
        Ok(Round { spent, arrived })
    }
}

/// The number of spans that the sidecar reports as dropped.
fn dropped(server: &Server) -> Result<u64> {
    let http = server.metrics.context("a sidecar has metrics")?;
    page::value(&page::get(http, "/metrics")?, "relatch_spans_dropped_total")
}
