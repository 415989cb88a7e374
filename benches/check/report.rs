//! The figures as a table for people and as JSON for programs.

use std::{fmt, fs, path::Path};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::{
    machine::Machine,
    row::{Row, Spread, Target, Unit},
};

/// The report.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    parts: Vec<Part>,
    rows: Vec<SpreadRow>,
}

/// A part of the benchmark that was run.
#[derive(Debug, Serialize)]
pub(crate) struct Part {
    pub(crate) name: String,
    /// The size of the measurement.
    pub(crate) plan: String,
    pub(crate) seconds: f64,
}

/// A row with its spread and its verdict.
#[derive(Debug, Serialize)]
struct SpreadRow {
    part: String,
    name: String,
    /// The unit; none if the name contains it.
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<Unit>,
    /// The rounds in their order; empty if they were not reported.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rounds: Vec<f64>,
    #[serde(flatten)]
    spread: Spread,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

/// The figures of another benchmark.
#[derive(Debug, Deserialize)]
struct Merged {
    /// Of `benches/inside.rs`.
    #[serde(default)]
    rows: Vec<Row>,
    /// Of `benches/swarm`.
    #[serde(default)]
    figures: Vec<Figure>,
}

/// A figure that is reported only with its spread.
#[derive(Debug, Deserialize)]
struct Figure {
    name: String,
    spread: Spread,
}

/// The part of figures that are reported only with their spread.
const SWARM: &str = "swarm";
/// The targets for figures of the swarm, by a part and the end of their names.
const SWARM_TARGETS: [(&str, &str, Target); 2] = [
    (
        "from the call of revoke until it was known to",
        "p99, ms",
        Target::AtMost(250.0),
    ),
    ("memory of a stream", "KiB", Target::AtMost(64.0)),
];

impl Report {
    /// An empty report.
    pub(crate) const fn new(machine: Machine) -> Self {
        Self {
            machine,
            parts: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Adds the figures of a part.
    ///
    /// # Errors
    ///
    /// When a row has no figure.
    pub(crate) fn add(&mut self, part: Part, rows: Vec<Row>) -> Result<()> {
        self.parts.push(part);
        self.extend(rows)
    }

    /// Adds the rows that another benchmark wrote to `file`.
    ///
    /// # Errors
    ///
    /// When the file does not exist, or has another content.
    pub(crate) fn merge(&mut self, file: &Path) -> Result<()> {
        let read = || -> Result<Merged> { Ok(serde_json::from_slice(&fs::read(file)?)?) };
        let merged = read().with_context(|| format!("cannot take in {}", file.display()))?;
        let figures = merged.figures.into_iter();
        self.rows.extend(figures.map(SpreadRow::of_swarm));
        self.extend(merged.rows)
    }

    /// Writes the report as JSON.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub(crate) fn write(&self, file: &Path) -> Result<()> {
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(file, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", file.display()))
    }

    fn extend(&mut self, rows: Vec<Row>) -> Result<()> {
        for row in rows {
            self.rows.push(SpreadRow::new(row)?);
        }
        Ok(())
    }
}

impl SpreadRow {
    fn new(row: Row) -> Result<Self> {
        let spread = row.spread()?;
        Ok(Self {
            met: row.target.map(|target| target.is_met(spread.median)),
            part: row.part,
            name: row.name,
            unit: Some(row.unit),
            rounds: row.rounds,
            spread,
            target: row.target,
        })
    }

    fn of_swarm(Figure { name, spread }: Figure) -> Self {
        let target = SWARM_TARGETS
            .into_iter()
            .find(|(what, end, _)| name.contains(what) && name.ends_with(end))
            .map(|(_, _, target)| target);
        Self {
            part: SWARM.to_owned(),
            unit: None,
            rounds: Vec::new(),
            spread,
            met: target.map(|target| target.is_met(spread.median)),
            target,
            name,
        }
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
        for part in &self.parts {
            writeln!(f, "{}: {}; {:.0} s", part.name, part.plan, part.seconds)?;
        }
        write!(f, "\n{}", self.table())
    }
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "PART", "FIGURE", "UNIT", "MIN", "MEDIAN", "MAX", "TARGET", "MET",
        ]);
        for column in [3, 4, 5] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for row in &self.rows {
            let decimals = row.unit.map_or(1, Unit::decimals);
            let cell = |value: f64| format!("{value:.decimals$}");
            table.add_row([
                row.part.clone(),
                row.name.clone(),
                row.unit.map_or(String::new(), |unit| unit.to_string()),
                cell(row.spread.min),
                cell(row.spread.median),
                cell(row.spread.max),
                row.target
                    .map_or(String::new(), |target| target.to_string()),
                match row.met {
                    Some(true) => "met".to_owned(),
                    Some(false) => "missed".to_owned(),
                    None => String::new(),
                },
            ]);
        }
        table
    }
}
