//! `relatch config`: checks configuration files, and creates the key of a snapshot file.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use rustix::process::geteuid;
use serde::Serialize;

use super::{Console, Exit, Failure, daemon, output::View, words};
use crate::{
    clock::Clock,
    config::{self, CheckedFile, Places},
    key::Timestamp,
    preflight::{self, Finding, Weight},
    snapshot::{KeyFileError, SnapshotKey},
};

/// The weight of a finding that does not prevent a start.
const WARNING: &str = "warning";

/// The commands of `config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check whether a daemon would start with a file; report each problem with its line and field
    ///
    /// The command also checks what the file refers to on this machine: files that are missing, unreadable or open to
    /// others, certificates that cannot be read or do not match their keys, directories that are not writable, and
    /// addresses that are in use. It creates, changes and deletes nothing. It binds each address and locks the store for
    /// a moment. It checks that the pepper belongs to the store only while no process uses the store, and not while the
    /// write-ahead log (`-wal`) of the store has content, as after a kill. It does not find damage within the store: only
    /// a start does. Run it as the user of the daemon: root can read and write files that this user cannot.
    ///
    /// The exit code is 0 if a daemon would start, 1 if something on this machine would stop it, and 2 if the file itself
    /// is not valid.
    Check {
        /// Configuration file of a sidecar or of a control plane
        file: PathBuf,

        /// Check only the file itself: use it for another machine, or while the daemon runs
        #[arg(long)]
        offline: bool,
    },
    /// Create the key that encrypts a sidecar's snapshot file, in a file that only its owner can read
    ///
    /// The key is not shown. Name the file in `snapshot.key_file` of the sidecar's configuration. Each sidecar may have
    /// its own key. If the key is lost, the snapshot file cannot be opened, and the sidecar loads its keyrings again from
    /// the control plane.
    SnapshotKey {
        /// File to create; an existing file is not changed
        file: PathBuf,
    },
}

/// A key that was created. It is not shown.
#[derive(Debug, Serialize)]
struct MadeKeyView {
    file: String,
}

/// A valid file, and the findings on this machine.
#[derive(Debug, Serialize)]
struct CheckedView {
    file: String,
    summary: String,
    /// The id of the user who checked this machine; null: this machine was not checked.
    checked_as: Option<u32>,
    findings: Vec<FindingView>,
}

/// A difference between the file and this machine.
#[derive(Debug, Serialize)]
struct FindingView {
    line: u64,
    column: u64,
    field: String,
    message: String,
    /// `problem`: the start fails, or the purpose of the field does not work; `warning`: the daemon starts.
    weight: &'static str,
}

impl ConfigCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the file is not valid, or the key cannot be created.
    pub fn run(self, console: &Console) -> Result<Exit, Failure> {
        match self {
            Self::Check { file, offline } => check(&file, offline, console),
            Self::SnapshotKey { file } => {
                SnapshotKey::make(&file).map_err(refused)?;
                console.show(&MadeKeyView {
                    file: file.display().to_string(),
                })?;
                Ok(Exit::Done)
            }
        }
    }
}

fn check(path: &Path, offline: bool, console: &Console) -> Result<Exit, Failure> {
    let CheckedFile { settings, places } = config::check(path).map_err(daemon::misconfigured)?;
    let found = if offline {
        Vec::new()
    } else {
        preflight::look(&settings, Clock::system())
    };
    let would_start = found
        .iter()
        .all(|finding| finding.weight == Weight::Warning);
    let user = geteuid();
    console.show(&CheckedView {
        file: path.display().to_string(),
        summary: settings.to_string(),
        checked_as: (!offline).then(|| user.as_raw()),
        findings: found
            .into_iter()
            .map(|finding| FindingView::new(finding, &places))
            .collect(),
    })?;
    if !offline && user.is_root() {
        console.output.note(
            "checked as root, which can read and write files that others cannot: also run this as the user of the daemon",
        );
    }
    Ok(if would_start {
        Exit::Done
    } else {
        Exit::Failed
    })
}

impl FindingView {
    fn new(finding: Finding, places: &Places) -> Self {
        let (line, column) = places.of(&[&finding.field, finding.near]);
        Self {
            line,
            column,
            field: finding.field,
            message: finding.message,
            weight: match finding.weight {
                Weight::Problem => "problem",
                Weight::Warning => WARNING,
            },
        }
    }
}

impl View for MadeKeyView {
    fn render(&self, _now: Timestamp) -> String {
        format!("{}: created\n", self.file)
    }
}

impl View for CheckedView {
    fn render(&self, _now: Timestamp) -> String {
        let Self {
            file,
            summary,
            checked_as,
            findings,
        } = self;
        let mut text = String::new();
        for finding in findings {
            let FindingView {
                line,
                column,
                field,
                message,
                weight,
            } = finding;
            let warning = if *weight == WARNING { "warning: " } else { "" };
            let message = words::printable(message);
            let _ = writeln!(text, "{file}:{line}:{column}: {field}: {warning}{message}");
        }
        let problems = findings.iter().filter(|finding| finding.weight != WARNING);
        let verdict = match problems.count() {
            0 => format!("ok: {summary}"),
            count => words::count(count as u64, "problem"),
        };
        let whose = checked_as.map_or_else(
            || "this machine was not checked".to_owned(),
            |user| format!("checked as user {user}"),
        );
        let _ = writeln!(text, "{file}: {verdict}; {whose}");
        text
    }
}

fn refused(error: KeyFileError) -> Failure {
    let exit = match error {
        KeyFileError::Exists { .. } => Exit::Refused,
        KeyFileError::Unusable(_)
        | KeyFileError::Missing { .. }
        | KeyFileError::Malformed { .. }
        | KeyFileError::Make { .. }
        | KeyFileError::Random(_) => Exit::Failed,
    };
    Failure::new(exit, error)
}
