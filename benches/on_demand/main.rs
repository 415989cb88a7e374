//! Measures a keyring on demand that is too large for its sidecar, under traffic that prefers some keys: the hit rate of the
//! cache, the latency of checks, and the memory of a full cache.
//!
//! `cargo bench --bench on_demand -- --keys 1000000 --skew 1.0 --skew 0.8`
//!
//! The control plane and the sidecar are processes of the deployed binary. Checks are sent at a fixed rate, so that a late
//! answer does not delay the next check.

mod deployment;
mod memory;
mod store;
mod traffic;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

use deployment::Deployment;
use traffic::{Plan, Zipf};

#[derive(Debug, Parser)]
struct Options {
    /// Number of keys in the store of the control plane
    #[arg(long, default_value_t = 1_000_000)]
    keys: u32,

    /// Size of the cache in the sidecar
    #[arg(long, default_value = "64MiB")]
    max_size: String,

    /// Skew of the traffic: the exponent of Zipf's law; may be repeated
    #[arg(long, default_values_t = [1.0, 0.8])]
    skew: Vec<f64>,

    /// Number of checks before the measurement
    #[arg(long, default_value_t = 1_000_000)]
    warm_up: u64,

    /// Number of measured checks
    #[arg(long, default_value_t = 300_000)]
    checks: u64,

    /// Measured checks per second
    #[arg(long, default_value_t = 5_000)]
    rate: u64,

    /// Only fill a cache with keys that have this number of versions each, and report its memory
    #[arg(long)]
    memory_of: Option<u64>,

    /// Ignored; `cargo bench` passes it to every benchmark
    #[arg(long, hide = true)]
    bench: bool,

    /// Fill the store of this data directory, in a process of its own that then frees its memory
    #[arg(long, hide = true)]
    fill: Option<PathBuf>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    if let Some(data_dir) = &options.fill {
        return runtime.block_on(store::fill(data_dir, options.keys));
    }
    if let Some(versions) = options.memory_of {
        println!("{}", memory::of_a_full_cache(versions)?);
        return Ok(());
    }
    println!("{}", memory::of_a_full_cache(1)?);
    runtime.block_on(measure(&options))
}

async fn measure(options: &Options) -> Result<()> {
    let deployment = Deployment::prepare(options.keys)?;
    for &skew in &options.skew {
        let zipf = Zipf::new(options.keys, skew);
        let control = deployment.control()?;
        let sidecar = deployment.sidecar(&control, &options.max_size).await?;
        let keys = deployment.keys()?;
        let idle = sidecar.resident()?;
        println!(
            "{} keys, {} in the sidecar, Zipf {skew}; control plane {} MiB",
            options.keys,
            options.max_size,
            control.resident()? >> 20,
        );
        let warm_up = Plan {
            checks: options.warm_up,
            rate: None,
        };
        let warmed = traffic::run(&sidecar, &keys, &zipf, warm_up).await?;
        println!("  warm-up: {warmed}");
        let before = sidecar.counters().await?;
        let plan = Plan {
            checks: options.checks,
            rate: Some(options.rate),
        };
        let measured = traffic::run(&sidecar, &keys, &zipf, plan).await?;
        let counted = sidecar.counters().await?.since(&before);
        println!("  measured: {measured}");
        println!("  {counted}");
        println!(
            "  sidecar: {} MiB resident, {} MiB before the first check",
            sidecar.resident()? >> 20,
            idle >> 20
        );
    }
    Ok(())
}
