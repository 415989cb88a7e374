//! The measurements of a start: the time until a control plane with many keys listens, and its memory.

use std::{fs, path::Path, time::Duration};

use ::relatch::{
    key::KeyringName,
    store::{LogName, SqliteOptions, SqliteStore, Store},
};
use anyhow::{Result, ensure};
use tokio::time::Instant;

use crate::{
    control::{Control, Home},
    figures::{Report, mebibytes},
    seed::Seed,
    writers,
};

/// The size of the measurements of starts.
#[derive(Debug, clap::Args)]
pub(crate) struct Start {
    /// Number of keys in the keyring of a control plane that starts; may be repeated
    #[arg(long, value_name = "N", default_values_t = [1_000_000])]
    start_keys: Vec<u64>,

    /// Number of keys of each consumer
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
    keys_per_consumer: u64,
}

const KEYRING: &str = "large";
/// The longest time to save a state: ten million keys are written within minutes.
const SAVE_TIMEOUT: Duration = Duration::from_mins(20);
const LOOK: Duration = Duration::from_millis(100);
/// The time for which one writer commits, while the state is saved and while it is not.
const COMMIT_FOR: Duration = Duration::from_secs(3);

impl Start {
    /// Measures, and adds the figures to `report`.
    ///
    /// # Errors
    ///
    /// When something fails.
    pub(crate) async fn measure(&self, report: &mut Report) -> Result<()> {
        for keys in &self.start_keys {
            self.measure_with(*keys, report).await?;
        }
        Ok(())
    }

    async fn measure_with(&self, keys: u64, report: &mut Report) -> Result<()> {
        let directory = tempfile::tempdir()?;
        let home = Home::make(directory.path())?;
        let seed = Seed {
            keys,
            keys_per_consumer: self.keys_per_consumer,
        };
        let began = Instant::now();
        seed.fill(&home.store(), &home.pepper()?, KEYRING).await?;
        report.add(
            format!("{keys} keys: filling the store, s"),
            &[began.elapsed().as_secs_f64()],
        )?;
        report.add(
            format!("{keys} keys: the store's file, MiB"),
            &[mebibytes(fs::metadata(home.store())?.len())],
        )?;

        let control = start(&home, keys, "from the log", report)?;
        let began = Instant::now();
        until_saved(&home.store()).await?;
        report.add(
            format!("{keys} keys: from the start until the state was saved, s"),
            &[began.elapsed().as_secs_f64()],
        )?;
        report.add(
            format!("{keys} keys: peak memory after that, MiB"),
            &[mebibytes(control.memory()?.peak)],
        )?;
        drop(control);

        let control = start(&home, keys, "from the saved state", report)?;
        let written = writers::make_keys(&control, KEYRING, 1, COMMIT_FOR).await?;
        report.add(
            format!("{keys} keys: commits a second, 1 writer"),
            &[written.rate()],
        )?;
        Ok(())
    }
}

fn start(home: &Home, keys: u64, from: &str, report: &mut Report) -> Result<Control> {
    let began = Instant::now();
    let control = home.start()?;
    let took = began.elapsed().as_secs_f64();
    let memory = control.memory()?;
    report.add(format!("{keys} keys: start {from}, s"), &[took])?;
    report.add(
        format!("{keys} keys: resident after a start {from}, MiB"),
        &[mebibytes(memory.resident)],
    )?;
    #[expect(clippy::cast_precision_loss, reason = "both are far below 2^52")]
    let per_key = memory.resident as f64 / keys as f64;
    report.add(
        format!("{keys} keys: bytes a key after a start {from}"),
        &[per_key],
    )?;
    report.add(
        format!("{keys} keys: peak memory of a start {from}, MiB"),
        &[mebibytes(memory.peak)],
    )?;
    Ok(control)
}

/// Waits until the store has a state.
async fn until_saved(path: &Path) -> Result<()> {
    let store = SqliteStore::open(path, SqliteOptions::default()).await?;
    let log = LogName::Keyring(KEYRING.parse::<KeyringName>()?);
    let began = Instant::now();
    while store.load_state(&log).await?.is_none() {
        ensure!(began.elapsed() < SAVE_TIMEOUT, "no state was saved");
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}
