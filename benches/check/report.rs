//! The figures as a table for people and as JSON for programs.

use std::{fmt, fs, path::Path};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::{
    machine::Machine,
    row::{Row, Spread, Target, Unit},
};

/// All that is told.
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
    /// How much was measured.
    pub(crate) plan: String,
    pub(crate) seconds: f64,
}

/// A row and what is seen in it at once.
#[derive(Debug, Serialize)]
struct SpreadRow {
    part: String,
    name: String,
    /// None where the name has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<Unit>,
    /// In their order; empty where they were not told.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rounds: Vec<f64>,
    #[serde(flatten)]
    spread: Spread,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

/// What another benchmark has measured.
#[derive(Debug, Deserialize)]
struct Merged {
    /// Of `benches/inside.rs`.
    #[serde(default)]
    rows: Vec<Row>,
    /// Of `benches/swarm`.
    #[serde(default)]
    figures: Vec<Figure>,
}

/// A figure of which only the spread is told.
#[derive(Debug, Deserialize)]
struct Figure {
    name: String,
    spread: Spread,
}

/// The part to which figures belong of which only the spread is told.
const SWARM: &str = "swarm";
/// What figures of the swarm shall be, by what their names contain and how they end.
const SWARM_TARGETS: [(&str, &str, Target); 2] = [
    (
        "from the call of revoke until it was known to",
        "p99, ms",
        Target::AtMost(250.0),
    ),
    ("memory of a stream", "KiB", Target::AtMost(64.0)),
];

impl Report {
    /// A report of nothing yet.
    pub(crate) const fn new(machine: Machine) -> Self {
        Self {
            machine,
            parts: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Takes in what a part has measured.
    ///
    /// # Errors
    ///
    /// When a row has no figure.
    pub(crate) fn add(&mut self, part: Part, rows: Vec<Row>) -> Result<()> {
        self.parts.push(part);
        self.extend(rows)
    }

    /// Takes in the rows that another benchmark wrote to `file`.
    ///
    /// # Errors
    ///
    /// When the file is not there or something else.
    pub(crate) fn merge(&mut self, file: &Path) -> Result<()> {
        let read = || -> Result<Merged> { Ok(serde_json::from_slice(&fs::read(file)?)?) };
        let merged = read().with_context(|| format!("cannot take in {}", file.display()))?;
        let figures = merged.figures.into_iter();
        self.rows.extend(figures.map(SpreadRow::of_swarm));
        self.extend(merged.rows)
    }

    /// Writes it as JSON.
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
