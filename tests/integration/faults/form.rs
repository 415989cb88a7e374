//! How long scenarios run, with which dice, and what is written of them.

use std::{env, fs, path::PathBuf, time::Duration};

use relatch::clock::Clock;
use serde_json::json;

use super::world::{Plan, Report, World};

/// Chooses what happens next; the same choices for the same seed.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

/// Runs a scenario once, or again and again with other dice for as long as `RELATCH_FAULTS_SECONDS` says; the first seed is
/// `RELATCH_FAULTS_SEED`. What it came to is written into the directory `RELATCH_FAULTS_OUT`, if that is set.
pub(super) async fn run(row: &str, plan: Plan, scenario: impl AsyncFn(&mut World, &mut Dice)) {
    run_each(row, |_seed| plan.clone(), scenario).await;
}

/// As [`run`], in a world of its own for each seed.
pub(super) async fn run_each(
    row: &str,
    plan: impl Fn(u64) -> Plan,
    scenario: impl AsyncFn(&mut World, &mut Dice),
) {
    let length = length();
    let first = number("RELATCH_FAULTS_SEED").unwrap_or(1);
    let clock = Clock::system();
    let begun = clock.boot();
    let mut reports = Vec::new();
    for seed in first.. {
        eprintln!("{row}: seed {seed}");
        let mut world = World::start(plan(seed)).await;
        scenario(&mut world, &mut Dice::new(seed)).await;
        reports.push(world.finish().await);
        write(row, first, clock.boot().saturating_since(begun), &reports);
        if clock.boot().saturating_since(begun) >= length {
            break;
        }
    }
    for (seed, report) in (first..).zip(&reports) {
        eprintln!("{row}: seed {seed}: {}", report.judgement);
        if let Some(note) = &report.note {
            eprintln!("{row}: seed {seed}: {note}");
        }
        report.assert_right();
    }
}

/// For how long a scenario is to run; zero when once is enough.
pub(super) fn length() -> Duration {
    Duration::from_secs(number("RELATCH_FAULTS_SECONDS").unwrap_or(0))
}

impl Dice {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Dice of somebody else, which roll what these would have.
    pub(super) fn split(&mut self) -> Self {
        self.roll(2);
        Self(self.0.rotate_left(32))
    }

    /// A number below `bound` (Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
    pub(super) fn roll(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let below = (mixed ^ (mixed >> 31)) % u64::try_from(bound).expect("a small bound");
        usize::try_from(below).expect("below a small bound")
    }

    /// A number of milliseconds up to `most`.
    pub(super) fn millis(&mut self, least: usize, most: usize) -> u64 {
        let millis = least + self.roll(most - least + 1);
        u64::try_from(millis).expect("a short time")
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test has no command line of its own"
)]
fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name} is {value:?} and has to be a number")))
}

fn write(row: &str, seed: u64, took: Duration, reports: &[Report]) {
    let Some(out) = env::var_os("RELATCH_FAULTS_OUT").map(PathBuf::from) else {
        return;
    };
    let sum = |of: fn(&Report) -> usize| reports.iter().map(of).sum::<usize>();
    let recovery = reports.iter().map(|report| report.recovery).max();
    let written = json!({
        "row": row,
        "seed": seed,
        "rounds": reports.len(),
        "seconds": took.as_secs(),
        "injections": sum(|report| report.injections),
        "must_allow": sum(|report| report.judgement.must_allow),
        "must_deny": sum(|report| report.judgement.must_deny),
        "either": sum(|report| report.judgement.either),
        "wrong": sum(|report| report.judgement.wrong.len()),
        "recovery_ms": recovery.unwrap_or_default().as_millis(),
        "note": reports.iter().rev().find_map(|report| report.note.as_deref()),
    });
    let name: String = row
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    fs::create_dir_all(&out).expect("the results can be written");
    let text = written.to_string() + "\n";
    fs::write(out.join(format!("{name}.json")), text).expect("the results can be written");
}

mod tests {
    use super::*;

    #[test]
    fn the_same_seed_rolls_the_same() {
        let rolls = |seed| {
            let mut dice = Dice::new(seed);
            [(); 20].map(|()| dice.roll(6))
        };
        assert_eq!(rolls(7), rolls(7));
        assert_ne!(rolls(7), rolls(8));
        let all = (1..100).flat_map(rolls).collect::<Vec<_>>();
        assert!((0..6).all(|number| all.contains(&number)));
    }
}
