//! Measures a check over HTTP beside a check over gRPC, on one sidecar.

use anyhow::Result;

use super::{Bench, Shown, Spent, grouped};
use crate::{
    deployment::{PROFILE_PATH, SidecarOptions},
    generator::Traffic,
    h2load::{H2load, Pressure},
    request::CheckTemplate,
    rounds::{figures, interleaved},
    row::{Row, Target, Unit},
};

/// One protocol in one round.
struct Round {
    spent: Spent,
    /// Checks per second.
    rate: f64,
}

type Figure = fn(&Round) -> f64;

const PART: &str = "http";
/// The headers in which Traefik describes the recorded request, beside those of the request itself.
const DESCRIPTION: [(&str, &str); 5] = [
    ("x-forwarded-method", "GET"),
    ("x-forwarded-uri", "/v1/orders?limit=10&cursor=abcdef"),
    ("x-forwarded-host", "api.example.com"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-for", "203.0.113.7"),
];

const PROCESS: Figure = |round| round.spent.process;
const CHECK_THREADS: Figure = |round| round.spent.check_threads;

/// The figures of each protocol.
const FIGURES: [(&str, Unit, Figure); 3] = [
    ("processor time", Unit::Microseconds, PROCESS),
    ("of check threads", Unit::Microseconds, CHECK_THREADS),
    ("Checks a second", Unit::PerSecond, |round| round.rate),
];

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let plan = bench.plan;
    let keys = bench.deployment.keys(plan.few)?;
    let template = CheckTemplate::recorded()?;
    let options = SidecarOptions {
        http_authz: true,
        ..SidecarOptions::default()
    };
    let relatch = bench.deployment.sidecar(plan.few, options)?;
    relatch.allow(Traffic::checks(relatch.address()?, keys, 1)?)?;

    let described = DESCRIPTION.iter().map(|(name, _)| *name);
    let described: Vec<_> = described.collect();
    let mut headers = template.headers(keys.get(0))?;
    headers.retain(|(name, _)| !described.contains(&name.as_str()));
    let description = DESCRIPTION.map(|(name, value)| (name.to_owned(), value.to_owned()));
    headers.extend(description);
    let over_http = H2load::over_http(bench.directory, PROFILE_PATH.to_owned(), headers);
    let over_grpc = H2load::prepare(bench.directory, &template.with(keys.get(0)))?;
    // Over HTTP/1.1, a connection has one check under way; over gRPC it can have many, which share reads and writes.
    let (one, many) = (Pressure::LIGHT, Pressure::SATURATING);
    let mut sides = [
        (
            "http",
            &over_http,
            relatch.daemon.address("http_authz")?,
            one,
        ),
        ("grpc", &over_grpc, relatch.address()?, one),
        ("grpc, 50 at a time", &over_grpc, relatch.address()?, many),
    ];
    let measured = interleaved(
        plan.rounds,
        &mut sides,
        |(name, ..)| (*name).to_owned(),
        |(_, load, address, pressure)| {
            let (spent, rate) = Spent::measure(&relatch, plan.checks, || {
                load.rate(*address, plan.checks, *pressure)
            })?;
            Ok(Round { spent, rate })
        },
    )?;

    let [http, grpc, batched] = [&measured[0], &measured[1], &measured[2]];
    let ratio = |name: &str, figure: Figure, other: &[Round]| {
        let [of, to] = [http, other].map(|rounds| figures(rounds, figure));
        Row::ratio(PART, name.to_owned(), &of, &to)
    };
    let mut rows = vec![
        ratio("http / grpc: processor time", PROCESS, grpc).target(Target::AtMost(1.3)),
        ratio("http / grpc: of check threads", CHECK_THREADS, grpc),
        ratio(
            "http / grpc, 50 at a time: processor time",
            PROCESS,
            batched,
        ),
    ];
    for ((name, ..), rounds) in sides.iter().zip(&measured) {
        for (what, unit, figure) in FIGURES {
            let name = format!("{name}: {what}");
            rows.push(Row::new(PART, name, unit, figures(rounds, figure)));
        }
    }
    Ok(Shown {
        plan: format!(
            "{} rounds of {} Checks from h2load on four kept connections, one sidecar that answers both protocols",
            plan.rounds,
            grouped(plan.checks),
        ),
        rows,
    })
}
