//! The machine on which figures were measured, and without which they mean nothing.

use std::{fs, process::Command, thread};

use ::relatch::{clock::Clock, key::Timestamp};
use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

/// The facts on which figures depend.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) rustc: String,
    /// The commit; it ends with `-dirty` if files differ from it.
    pub(crate) commit: String,
    pub(crate) at: Timestamp,
}

impl Machine {
    /// Reads the facts of this machine.
    ///
    /// # Errors
    ///
    /// When it is not Linux, or the tools of the build are missing.
    pub(crate) fn look() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let cpu = cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.trim() == "model name")
            .map_or("unknown", |(_, model)| model.trim());
        Ok(Self {
            cpu: cpu.to_owned(),
            cores: thread::available_parallelism()?.get(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            rustc: first_line(Command::new("rustc").arg("--version"))?,
            commit: first_line(Command::new("git").args([
                "describe",
                "--always",
                "--dirty",
                "--abbrev=12",
                "--match=",
            ]))?,
            at: Clock::system().wall(),
        })
    }
}

fn first_line(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    ensure!(output.status.success(), "{name} has failed");
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
