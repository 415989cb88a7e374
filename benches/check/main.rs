//! The load comparison: a whole sidecar against two baselines, in interleaved rounds on one machine.
//!
//! Every server is a process of its own with one thread that answers checks: [`always_ok`] and [`floor`] are this
//! program under another subcommand, [`relatch`] is the binary that is deployed. [`load`] asks them, [`processor`] reads
//! what they spent, [`comparison`] says how they compare, [`report`] writes it down. `docs/performance.md` says what
//! the figures mean.

mod always_ok;
mod comparison;
mod daemon;
mod floor;
mod load;
mod machine;
mod page;
mod processor;
mod relatch;
mod report;
mod request;
mod server;

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand, ValueEnum};

use comparison::Comparison;
use load::Load;
use relatch::Deployment;
use report::Report;
use request::FramedRequest;
use server::Server;

/// Compares the cost of a Check with that of two baselines
#[derive(Debug, Parser)]
#[command(bin_name = "scripts/bench.sh")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    plan: Plan,

    /// What `cargo bench` gives to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a baseline until it is killed
    #[command(hide = true)]
    Serve { baseline: Baseline },
}

/// A server to compare with.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Baseline {
    AlwaysOk,
    Floor,
}

/// How much is measured.
#[derive(Debug, clap::Args)]
struct Plan {
    /// Rounds; each asks every server once
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Checks that a server answers in a round. Processor time is counted in hundredths of a second: 200,000 Checks of
    /// 10 µs are 200 of them
    #[arg(long, value_name = "N", default_value = "200000", value_parser = clap::value_parser!(u64).range(1_000..))]
    requests: u64,

    /// Keys in the sidecar's keyring
    #[arg(long, value_name = "N", default_value = "1000", value_parser = clap::value_parser!(u32).range(1..))]
    keys: u32,

    /// Where the figures are written as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench/check.json")]
    report: PathBuf,
}

fn main() -> Result<()> {
    // `cargo test` runs benchmarks too, with arguments of its own: only `cargo bench` and ourselves mean it.
    let is_meant = env::args()
        .skip(1)
        .any(|arg| arg == "--bench" || arg == "serve");
    if !is_meant {
        return Ok(());
    }
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Serve {
            baseline: Baseline::AlwaysOk,
        }) => always_ok::serve(),
        Some(Command::Serve {
            baseline: Baseline::Floor,
        }) => floor::serve(),
        None => cli.plan.run(),
    }
}

impl Plan {
    fn run(&self) -> Result<()> {
        let directory = tempfile::tempdir().context("cannot make a directory")?;
        let deployment = Deployment::start(directory.path(), self.keys)?;
        let request = FramedRequest::recorded(deployment.key())?;
        let load = Load::prepare(directory.path(), &request)?;
        let always_ok = Server::baseline("always-ok")?;
        let floor = Server::baseline("floor")?;
        let servers = [&always_ok, &floor, deployment.server()];
        for server in servers {
            server.assert_allows(&request)?;
        }
        let comparison = Comparison::measure(&servers, &load, self.rounds, self.requests)?;
        let report = Report::new(self.requests, self.keys, request.len(), &comparison)?;
        if let Some(parent) = self.report.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&self.report, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", self.report.display()))?;
        println!("{report}");
        println!("written to {}", self.report.display());
        Ok(())
    }
}
