//! Measures a whole sidecar beside baselines, in interleaved rounds on one machine.
//!
//! Each side of a comparison is a process with one thread that answers: [`always_ok`] and [`floor`] are this program with
//! another subcommand, [`deployment`] runs the deployed binary, and [`envoy`] a real Envoy. [`h2load`] and [`generator`] send
//! the load, and [`processor`] reads the processor time. Each file of [`parts`] is one measurement, a [`row`] is one figure
//! over all rounds, and [`report`] writes them. `docs/performance.md` says what they mean.

mod always_ok;
mod collector;
mod cores;
mod daemon;
mod deployment;
mod envoy;
mod floor;
mod generator;
mod h2load;
mod keys;
mod machine;
mod page;
mod parts;
mod patience;
mod population;
mod processor;
mod report;
mod request;
mod rounds;
mod row;
mod server;

use std::{collections::BTreeSet, env, path::PathBuf, time::Duration};

use ::relatch::clock::Clock;
use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand, ValueEnum};

use cores::{Core, Cores};
use deployment::Deployment;
use machine::Machine;
use parts::{Bench, Part, Plan};
use report::Report;

/// Measure the cost of a check beside baselines
#[derive(Debug, Parser)]
#[command(bin_name = "scripts/bench.sh")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "flags of a command line are independent of each other"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    /// Measure only this part; may be repeated [default: all parts]
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,

    /// Number of rounds; each measures every side of a comparison once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,

    /// Trial: one round, few checks, a tenth of the keys
    #[arg(long)]
    quick: bool,

    /// Also measure the memory of 10,000,000 keys
    #[arg(long)]
    large: bool,

    /// File of another benchmark whose figures to add; may be repeated
    #[arg(long, value_name = "FILE")]
    merge: Vec<PathBuf>,

    /// Measure nothing, only add the figures of --merge
    #[arg(long, conflicts_with = "only")]
    merge_only: bool,

    /// File for the figures, as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench/check.json")]
    report: PathBuf,

    /// Ignored; `cargo bench` passes it to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a server of the benchmark until it is killed
    #[command(hide = true)]
    Serve {
        what: Served,
        /// File with the message that `floor` answers
        #[arg(long)]
        answer: Option<PathBuf>,
    },
    /// Fill the store of a control plane
    #[command(hide = true)]
    Fill { data_dir: PathBuf, sizes: Vec<u32> },
}

/// The servers that this program can be.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Served {
    AlwaysOk,
    Floor,
    Collector,
}

fn main() -> Result<()> {
    // `cargo test` also runs benchmarks, with its own arguments. Only `cargo bench` and this program measure or serve.
    let is_meant = env::args()
        .skip(1)
        .any(|arg| ["--bench", "serve", "fill"].contains(&arg.as_str()));
    if !is_meant {
        return Ok(());
    }
    let cli = Cli::parse();
    match &cli.command {
        Some(Command::Serve { what, answer }) => match what {
            Served::AlwaysOk => always_ok::serve(),
            Served::Floor => floor::serve(answer.as_deref()),
            Served::Collector => collector::serve(),
        },
        Some(Command::Fill { data_dir, sizes }) => population::fill(data_dir, sizes),
        None => cli.measure(),
    }
}

impl Cli {
    fn measure(&self) -> Result<()> {
        // The machine is inspected before this process restricts itself to one core.
        let machine = Machine::look()?;
        let cores = Cores::look()?;
        cores.pin(Core::Load)?;
        let mut report = Report::new(machine);
        if !self.merge_only {
            self.measure_parts(&cores, &mut report)?;
        }
        for file in &self.merge {
            report.merge(file)?;
        }
        report.write(&self.report)?;
        println!("{report}");
        println!("written to {}", self.report.display());
        Ok(())
    }

    fn measure_parts(&self, cores: &Cores, report: &mut Report) -> Result<()> {
        let (plan, parts) = (self.plan(), self.parts());
        let directory = tempfile::tempdir().context("cannot make a directory")?;
        let sizes: BTreeSet<u32> = parts.iter().flat_map(|part| part.sizes(plan)).collect();
        let sizes: Vec<u32> = sizes.into_iter().collect();
        let clock = Clock::system();
        let began = clock.boot();
        let deployment = Deployment::start(directory.path(), cores, &sizes)?;
        let took = clock.boot().saturating_since(began).as_secs();
        eprintln!("keyrings of {sizes:?} keys: {took} s");
        let bench = Bench {
            plan,
            cores,
            deployment: &deployment,
            directory: directory.path(),
        };
        for part in parts {
            let began = clock.boot();
            let shown = part
                .measure(bench)
                .with_context(|| format!("{} cannot be measured", part.name()))?;
            let took = clock.boot().saturating_since(began);
            eprintln!("{}: {} s", part.name(), took.as_secs());
            let part = report::Part {
                name: part.name().to_owned(),
                plan: shown.plan,
                seconds: took.as_secs_f64(),
            };
            report.add(part, shown.rows)?;
        }
        Ok(())
    }

    fn plan(&self) -> Plan {
        let (rounds, checks, paced, many) = if self.quick {
            (1, 20_000, Duration::from_secs(1), 100_000)
        } else {
            (5, 200_000, Duration::from_secs(4), 1_000_000)
        };
        Plan {
            rounds: self.rounds.unwrap_or(rounds),
            checks,
            paced,
            few: 1_000,
            many,
            large: self.large,
        }
    }

    /// The order of the measurements. Changes come last, because they add keys.
    fn parts(&self) -> Vec<Part> {
        let all = Part::value_variants().iter().copied();
        all.filter(|part| self.only.is_empty() || self.only.contains(part))
            .collect()
    }
}
