//! The figures as a table for people and as JSON for programs.

use std::{fmt, time::Duration};

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::machine::Machine;

/// The report.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    figures: Vec<Row>,
}

/// One figure.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    spread: Spread,
    /// The number of measurements.
    count: usize,
}

/// The spread of a figure over its repetitions.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Report {
    /// An empty report of this machine.
    ///
    /// # Errors
    ///
    /// When the facts of the machine cannot be read.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            machine: Machine::look()?,
            figures: Vec::new(),
        })
    }

    /// Adds a figure with all its measurements `values`, and prints its median immediately.
    ///
    /// # Errors
    ///
    /// When `values` is empty.
    pub(crate) fn add(&mut self, name: impl Into<String>, values: &[f64]) -> Result<()> {
        let name = name.into();
        let spread = Spread::of(values).with_context(|| format!("{name} was not measured"))?;
        eprintln!("{name}: {:.1}", spread.median);
        self.figures.push(Row {
            name,
            spread,
            count: values.len(),
        });
        Ok(())
    }

    /// Adds the 99th percentile of `values`.
    ///
    /// # Errors
    ///
    /// When `values` is empty.
    pub(crate) fn add_p99(&mut self, name: impl Into<String>, values: &[f64]) -> Result<()> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = (sorted.len() * 99).div_ceil(100).saturating_sub(1);
        self.add(name, sorted.get(at..=at).unwrap_or_default())
    }
}

impl Spread {
    /// None if `values` is empty.
    fn of(values: &[f64]) -> Option<Self> {
        let mut values = values.to_vec();
        values.sort_unstable_by(f64::total_cmp);
        let upper = values.len() / 2;
        let lower = values.len().checked_sub(1)? / 2;
        Some(Self {
            min: values[0],
            median: f64::midpoint(values[lower], values[upper]),
            max: values[values.len() - 1],
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        writeln!(
            f,
            "{}, {} cores, Linux {}, {}, commit {}, {}\n",
            machine.cpu, machine.cores, machine.kernel, machine.rustc, machine.commit, machine.at
        )?;
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["FIGURE", "MIN", "MEDIAN", "MAX", "TIMES"]);
        for Row {
            name,
            spread,
            count,
        } in &self.figures
        {
            let cell = |value: f64| format!("{value:.1}");
            table.add_row([
                name.clone(),
                cell(spread.min),
                cell(spread.median),
                cell(spread.max),
                count.to_string(),
            ]);
        }
        write!(f, "{table}")
    }
}

/// In milliseconds.
pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// In mebibytes.
pub(crate) fn mebibytes(bytes: u64) -> f64 {
    kibibytes(bytes) / 1024.0
}

/// In kibibytes.
#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of memory are far below 2^52"
)]
pub(crate) fn kibibytes(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}
