//! One figure: its name and unit, its value in every round, and its target.

use std::fmt;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// A figure over all rounds.
///
/// Other benchmarks also write rows in this form, and `--merge` reads them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Row {
    /// The part of the benchmark.
    pub(crate) part: String,
    pub(crate) name: String,
    pub(crate) unit: Unit,
    /// The values of the rounds in their order.
    pub(crate) rounds: Vec<f64>,
    /// The target; none for a figure that only explains others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<Target>,
}

/// The unit of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Of two figures of one round.
    Ratio,
    Microseconds,
    Milliseconds,
    Seconds,
    PerSecond,
    Bytes,
    Mebibytes,
    Count,
}

/// The target for the median.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

/// The spread of a figure over all rounds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

impl Row {
    /// A figure of `part`.
    pub(crate) fn new(
        part: impl Into<String>,
        name: impl Into<String>,
        unit: Unit,
        rounds: Vec<f64>,
    ) -> Self {
        Self {
            part: part.into(),
            name: name.into(),
            unit,
            rounds,
            target: None,
        }
    }

    /// The ratio of two figures of the same rounds.
    pub(crate) fn ratio(
        part: impl Into<String>,
        name: impl Into<String>,
        of: &[f64],
        to: &[f64],
    ) -> Self {
        let rounds = of.iter().zip(to).map(|(of, to)| of / to).collect();
        Self::new(part, name, Unit::Ratio, rounds)
    }

    /// Adds a target.
    pub(crate) fn target(self, target: Target) -> Self {
        Self {
            target: Some(target),
            ..self
        }
    }

    /// The spread over the rounds.
    ///
    /// # Errors
    ///
    /// When there was no round, or a value is not a number.
    pub(crate) fn spread(&self) -> Result<Spread> {
        let mut rounds = self.rounds.clone();
        rounds.sort_unstable_by(f64::total_cmp);
        let upper = rounds.len() / 2;
        rounds
            .iter()
            .all(|figure| figure.is_finite())
            .then(|| rounds.len().checked_sub(1))
            .flatten()
            .map(|last| Spread {
                min: rounds[0],
                median: f64::midpoint(rounds[last / 2], rounds[upper]),
                max: rounds[last],
            })
            .with_context(|| format!("{} was not measured", self.name))
    }
}

impl Target {
    /// Whether a figure with this median reaches the target.
    pub(crate) fn is_met(self, median: f64) -> bool {
        match self {
            Self::AtMost(most) => median <= most,
            Self::AtLeast(least) => median >= least,
        }
    }
}

impl Unit {
    /// The number of significant digits of a figure.
    pub(crate) const fn decimals(self) -> usize {
        match self {
            Self::Ratio | Self::Seconds => 2,
            Self::Microseconds | Self::Milliseconds | Self::Mebibytes => 1,
            Self::PerSecond | Self::Bytes | Self::Count => 0,
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ratio => "ratio",
            Self::Microseconds => "µs",
            Self::Milliseconds => "ms",
            Self::Seconds => "s",
            Self::PerSecond => "1/s",
            Self::Bytes => "B",
            Self::Mebibytes => "MiB",
            Self::Count => "",
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "≤ {most}"),
            Self::AtLeast(least) => write!(f, "≥ {least}"),
        }
    }
}
