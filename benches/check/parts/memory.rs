//! Measures the memory of a key in a sidecar, and the time until a sidecar is ready.

use std::{fs, time::Duration};

use ::relatch::clock::Clock;
use anyhow::{Context as _, Result};

use super::{Bench, Plan, Shown, grouped};
use crate::{
    deployment::SidecarOptions,
    patience::until,
    rounds::{figures, interleaved},
    row::{Row, Target, Unit},
};

/// A sidecar in one round.
struct Round {
    /// The time from its start until it is ready, in seconds.
    ready: f64,
    /// The resident memory, in bytes.
    resident: f64,
    /// The resident memory that is no unchanged page of a file, in bytes: nobody else can use it.
    private: f64,
}

const PART: &str = "memory";
/// The tolerance of settled memory: below the differences that matter, above those of idle timers.
const SETTLED_BY: f64 = 0.001;
/// The time within which a sidecar returns memory after a start.
const SETTLES_WITHIN: Duration = Duration::from_secs(2);
const SETTLE_TIMEOUT: Duration = Duration::from_mins(1);
/// The number of keys with which the others are compared.
const EMPTY: u32 = 0;
/// The factor from the large keyring to the largest one.
const LARGE: u32 = 10;

/// The measured sizes, in ascending order.
pub(super) fn sizes(plan: Plan) -> Vec<u32> {
    let mut sizes = vec![EMPTY, plan.few, plan.many / 10, plan.many];
    if plan.large {
        sizes.push(plan.many * LARGE);
    }
    sizes
}

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let plan = bench.plan;
    let mut sizes = sizes(plan);
    let measured = interleaved(
        plan.rounds,
        &mut sizes,
        |size| format!("{} keys", grouped(*size)),
        |size| Round::measure(bench, *size),
    )?;
    let empty = figures(&measured[0], |round| round.resident);
    let mut rows = Vec::new();
    for (size, rounds) in sizes.iter().zip(&measured).skip(1) {
        let resident = figures(rounds, |round| round.resident);
        let each = resident.iter().zip(&empty);
        let each = each.map(|(full, empty)| (full - empty) / f64::from(*size));
        let name = format!("{} keys: of each key", grouped(*size));
        let row = Row::new(PART, name, Unit::Bytes, each.collect());
        rows.push(if *size == plan.many {
            row.target(Target::AtMost(120.0))
        } else {
            row
        });
    }
    for (size, rounds) in sizes.iter().zip(&measured) {
        let mebibytes = figures(rounds, |round| round.resident / f64::from(1 << 20));
        let name = format!("{} keys: resident", grouped(*size));
        let row = Row::new(PART, name, Unit::Mebibytes, mebibytes);
        rows.push(if *size == plan.few {
            row.target(Target::AtMost(16.0))
        } else {
            row
        });
    }
    for (size, rounds) in sizes.iter().zip(&measured) {
        let mebibytes = figures(rounds, |round| round.private / f64::from(1 << 20));
        let name = format!("{} keys: private", grouped(*size));
        let row = Row::new(PART, name, Unit::Mebibytes, mebibytes);
        rows.push(if *size == plan.few {
            row.target(Target::AtMost(4.0))
        } else {
            row
        });
    }
    for (size, rounds) in sizes.iter().zip(&measured) {
        let ready = figures(rounds, |round| round.ready);
        let name = format!("{} keys: start to ready", grouped(*size));
        rows.push(Row::new(PART, name, Unit::Seconds, ready));
    }
    let name = format!("{} keys: start to ready, from its file", grouped(plan.many));
    let from_file = from_file(bench)?;
    rows.push(Row::new(PART, name, Unit::Seconds, from_file).target(Target::AtMost(1.0)));
    Ok(Shown {
        plan: format!(
            "{} rounds, a new sidecar for every figure, keys received from the control plane but for the last",
            plan.rounds
        ),
        rows,
    })
}

/// The time until a sidecar with a snapshot file, but without a control plane, is ready.
fn from_file(bench: Bench<'_>) -> Result<Vec<f64>> {
    let kept = bench.deployment.kept(bench.plan.many)?;
    let clock = Clock::system();
    let rounds = (0..bench.plan.rounds).map(|_| {
        let began = clock.boot();
        kept.start()?;
        Ok(clock.boot().saturating_since(began).as_secs_f64())
    });
    rounds.collect()
}

impl Round {
    fn measure(bench: Bench<'_>, size: u32) -> Result<Self> {
        let clock = Clock::system();
        let began = clock.boot();
        let sidecar = bench.deployment.sidecar(size, SidecarOptions::default())?;
        let ready = clock.boot().saturating_since(began).as_secs_f64();
        let id = sidecar.daemon.id();
        let (mut last, mut since) = (resident(id)?, clock.boot());
        let resident = until("memory settles", SETTLE_TIMEOUT, || {
            let now = resident(id)?;
            if (now - last).abs() > last * SETTLED_BY {
                (last, since) = (now, clock.boot());
            }
            let stood = clock.boot().saturating_since(since);
            Ok((stood >= SETTLES_WITHIN).then_some(now))
        })?;
        let private = bytes(&format!("/proc/{id}/smaps_rollup"), "Private_Dirty:")?;
        Ok(Self {
            ready,
            resident,
            private,
        })
    }
}

/// The resident memory of a process, in bytes (`VmRSS`, proc(5)).
fn resident(id: u32) -> Result<f64> {
    bytes(&format!("/proc/{id}/status"), "VmRSS:")
}

/// The value of a line of a file of proc(5) that counts KiB, in bytes.
fn bytes(file: &str, line: &str) -> Result<f64> {
    let text = fs::read_to_string(file)?;
    let kibibytes = text
        .lines()
        .find_map(|found| found.strip_prefix(line)?.strip_suffix("kB"))
        .with_context(|| format!("{file} has no {line}"))?;
    Ok(kibibytes.trim().parse::<f64>()? * 1024.0)
}
