//! Measures what is not visible from outside a sidecar: the allocations of a check, and the time of a change to many keys.
//!
//! The program writes rows in the form that `benches/check` reads. Allocations are counted only for the figures about them,
//! and not while changes are timed.

mod held;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use bytes::BytesMut;
use clap::Parser;
use relatch::{authz::Metadata, clock::Clock};
use serde_json::{Value, json};

use held::{Held, OnDemand, assert_allowed, pepper};

/// Count the allocations of a check, and time a change to many keys
#[derive(Debug, Parser)]
#[command(bin_name = "scripts/bench.sh")]
struct Cli {
    /// Number of rounds of changes
    #[arg(long, value_name = "N", default_value = "5")]
    rounds: u32,

    /// Number of keys in the keyring that changes
    #[arg(long, value_name = "N", default_value = "1000000")]
    keys: u64,

    /// File for the figures, as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench/inside.json")]
    report: PathBuf,

    /// Ignored; `cargo bench` passes it to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

const PART: &str = "inside";
/// The number of changes in a round: enough for a 99th percentile.
const CHANGES: usize = 1_000;
/// The number of checks before allocations are counted: the first use of a key creates its counters.
const WARM_UP: usize = 100;
/// The number of checks whose allocations are counted.
const CHECKS: u32 = 1_000;
/// The size of the buffer for an answer, which has a few hundred bytes.
const ANSWER: usize = 4 << 10;

fn main() -> Result<()> {
    // `cargo test` also runs benchmarks, with its own arguments. Only `cargo bench` measures.
    if !env::args().skip(1).any(|arg| arg == "--bench") {
        return Ok(());
    }
    let cli = Cli::parse();
    let [tails, medians] = changes(cli.rounds, cli.keys);
    let change = |what: &str| format!("one change to {} keys: {what}", cli.keys);
    let rows = json!({ "rows": [
        row("allocations of an allow", "count", &[allocations()], Some(0.0)),
        row("allocations of a find on demand", "count", &[allocations_on_demand()], None),
        row(&change("p99"), "microseconds", &tails, Some(1_000.0)),
        row(&change("median"), "microseconds", &medians, None),
    ] });
    write(&cli.report, &rows)
}

/// The allocations of relatch's own code for an allow, from the bytes of the request to the bytes of the answer. Those of the
/// transport are not included.
fn allocations() -> f64 {
    let held = Held::new(1_000);
    let authorizer = held.authorizer();
    let message = held.request();
    let mut answer = BytesMut::with_capacity(ANSWER);
    let mut check = || {
        answer.clear();
        assert!(
            authorizer
                .answer(Ok(&message), Metadata::default(), &mut answer)
                .is_none()
        );
    };
    for _ in 0..WARM_UP {
        check();
    }
    let counted = allocation_counter::measure(|| {
        for _ in 0..CHECKS {
            check();
        }
    });
    assert_allowed(&answer);
    let total = u32::try_from(counted.count_total).expect("a Check makes few allocations");
    f64::from(total) / f64::from(CHECKS)
}

/// The allocations to find the version of a key on demand, including the maintenance of the cache.
fn allocations_on_demand() -> f64 {
    const KEYS: usize = 1_000;
    let held = OnDemand::new(KEYS);
    let peppers = [pepper()];
    let find = |number: u32| {
        let number = usize::try_from(number).expect("it fits");
        assert!(held.finds(number % KEYS, &peppers));
    };
    (0..CHECKS).for_each(find);
    let counted = allocation_counter::measure(|| (0..CHECKS).for_each(find));
    let total = u32::try_from(counted.count_total).expect("a find makes few allocations");
    f64::from(total) / f64::from(CHECKS)
}

/// The times from a delta to the next view, in microseconds: the 99th percentile and the median of each round.
fn changes(rounds: u32, keys: u64) -> [Vec<f64>; 2] {
    let clock = Clock::system();
    let mut held = Held::new(keys);
    let mut shown = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        let mut micros = Vec::with_capacity(CHANGES);
        for _ in 0..CHANGES {
            let began = clock.boot();
            held.change();
            let took = clock.boot().saturating_since(began);
            micros.push(took.as_secs_f64() * 1e6);
        }
        micros.sort_unstable_by(f64::total_cmp);
        shown[0].push(micros[CHANGES - 1 - CHANGES / 100]);
        shown[1].push(micros[CHANGES / 2]);
    }
    shown
}

fn row(name: &str, unit: &str, rounds: &[f64], at_most: Option<f64>) -> Value {
    let mut row = json!({ "part": PART, "name": name, "unit": unit, "rounds": rounds });
    if let Some(at_most) = at_most {
        row["target"] = json!({ "at_most": at_most });
    }
    row
}

fn write(file: &Path, rows: &Value) -> Result<()> {
    if let Some(parent) = file.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(file, serde_json::to_vec_pretty(rows)?)
        .with_context(|| format!("cannot write {}", file.display()))
}
