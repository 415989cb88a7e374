//! Measures the control plane at scale: a real `relatch control`, many simulated sidecars, and many keys.
//!
//! Every simulated sidecar has its own stream over its own connection. It speaks the protocol of a real sidecar, but holds
//! no keys. [`control`] is the measured process, and [`seed`] fills its store. [`sidecar`] is one stream over a [`counted`]
//! connection, [`swarm`] is all of them, [`order`] is what they do next, and [`board`] is what they have reached.
//! [`writers`] are operators. [`fan_out`] and [`start`] are the measurements, and [`figures`] is the report.
//! `docs/scaling.md` says what the figures mean.

mod board;
mod control;
mod counted;
#[expect(
    dead_code,
    reason = "the comparison of a Check starts daemons that are up at once"
)]
#[path = "../check/daemon.rs"]
mod daemon;
mod fan_out;
mod figures;
#[path = "../check/machine.rs"]
mod machine;
mod order;
mod seed;
mod sidecar;
mod start;
mod swarm;
mod writers;

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Builder;

use fan_out::FanOut;
use figures::Report;
use start::Start;

/// Measure the control plane at scale
#[derive(Debug, Parser)]
#[command(bin_name = "scripts/bench.sh --swarm")]
struct Cli {
    #[command(flatten)]
    fan_out: FanOut,

    #[command(flatten)]
    start: Start,

    /// Skip the measurements with streams
    #[arg(long)]
    no_streams: bool,

    /// File for the figures, as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench/swarm.json")]
    report: PathBuf,

    /// Ignored; `cargo bench` passes it to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// The number of threads of the swarm: it shares the processor with the control plane, and more threads would only take time
/// from it.
const THREADS: usize = 2;

fn main() -> Result<()> {
    // `cargo test` also runs benchmarks, with its own arguments. Only `cargo bench` measures.
    if !env::args().skip(1).any(|arg| arg == "--bench") {
        return Ok(());
    }
    let cli = Cli::parse();
    raise_file_limit().context("the limit of open files cannot be raised")?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?;
    let report = runtime.block_on(cli.measure())?;
    if let Some(parent) = cli.report.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(&cli.report, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("cannot write {}", cli.report.display()))?;
    println!("{report}");
    println!("written to {}", cli.report.display());
    Ok(())
}

impl Cli {
    async fn measure(&self) -> Result<Report> {
        let mut report = Report::new()?;
        if !self.no_streams {
            self.fan_out.measure(&mut report).await?;
        }
        self.start.measure(&mut report).await?;
        Ok(report)
    }
}

/// Raises the limit of open files. Each stream is one open file in this process, and one in the control plane, which
/// inherits the limit.
fn raise_file_limit() -> rustix::io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )
}
