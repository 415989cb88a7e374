//! The figures as a table for people and as JSON for programs.

use std::fmt;

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::{
    comparison::{Comparison, Round, Spread},
    machine::Machine,
};

/// All that is told.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    requests: u64,
    keys: u32,
    request_bytes: usize,
    /// Of processor time for a Check.
    ratios: Vec<Row>,
    figures: Vec<Row>,
}

/// One line.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    spread: Spread,
}

type Figure = fn(&Round) -> f64;

const PROCESS: Figure = |round| round.process_micros;
const CHECK_THREADS: Figure = |round| round.check_micros;
const P99: Figure = |round| round.latency.p99;

/// Which server against which, in what.
const RATIOS: [(&str, &str, &str, Figure); 6] = [
    ("relatch", "always-ok", "processor time", PROCESS),
    ("relatch", "floor", "processor time", PROCESS),
    ("relatch", "always-ok", "of check threads", CHECK_THREADS),
    ("relatch", "floor", "of check threads", CHECK_THREADS),
    ("always-ok", "floor", "processor time", PROCESS),
    ("relatch", "floor", "p99, light load", P99),
];

/// What each server shows.
const FIGURES: [(&str, Figure); 5] = [
    ("processor time, µs", PROCESS),
    ("of check threads, µs", CHECK_THREADS),
    ("Checks a second", |round| round.rate),
    ("p50, light load, µs", |round| round.latency.p50),
    ("p99, light load, µs", P99),
];

impl Report {
    /// Sums up a comparison of `requests` Checks a round against `keys` keys.
    ///
    /// # Errors
    ///
    /// When the machine cannot be looked at.
    pub(crate) fn new(
        requests: u64,
        keys: u32,
        request_bytes: usize,
        comparison: &Comparison,
    ) -> Result<Self> {
        let ratios = RATIOS.map(|(of, to, what, figure)| {
            let spread = comparison.ratio(of, to, figure);
            (format!("{of} / {to}: {what}"), spread)
        });
        let figures = comparison.servers.iter().flat_map(|server| {
            FIGURES
                .map(|(what, figure)| (format!("{}: {what}", server.name), server.spread(figure)))
        });
        Ok(Self {
            machine: Machine::look()?,
            requests,
            keys,
            request_bytes,
            ratios: rows(ratios)?,
            figures: rows(figures)?,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        writeln!(
            f,
            "{}, {} cores, Linux {}, {}, commit {}, {}",
            machine.cpu, machine.cores, machine.kernel, machine.rustc, machine.commit, machine.at
        )?;
        writeln!(
            f,
            "{} Checks of {} bytes a round, {} keys\n",
            self.requests, self.request_bytes, self.keys
        )?;
        writeln!(f, "{}\n", table("RATIO", &self.ratios, 2))?;
        write!(f, "{}", table("FIGURE", &self.figures, 1))
    }
}

fn rows(spreads: impl IntoIterator<Item = (String, Option<Spread>)>) -> Result<Vec<Row>> {
    spreads
        .into_iter()
        .map(|(name, spread)| {
            let spread = spread.with_context(|| format!("{name} was not measured"))?;
            Ok(Row { name, spread })
        })
        .collect()
}

fn table(title: &str, rows: &[Row], decimals: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([title, "MIN", "MEDIAN", "MAX"]);
    for Row { name, spread } in rows {
        let cell = |value: f64| format!("{value:.decimals$}");
        table.add_row([
            name.clone(),
            cell(spread.min),
            cell(spread.median),
            cell(spread.max),
        ]);
    }
    table
}
