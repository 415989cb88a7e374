//! `relatch config`: looks at configuration files, and makes the key of a snapshot file.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use rustix::process::geteuid;
use serde::Serialize;

use super::{Exit, Failure, Session, daemon, output::View, words};
use crate::{
    clock::Clock,
    config::{self, CheckedFile, Places},
    key::Timestamp,
    preflight::{self, Finding, Weight},
    snapshot::{KeyFileError, SnapshotKey},
};

/// The weight of a finding that stops nothing.
const WARNING: &str = "warning";

/// What can be done with a configuration file.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Find what would stop a daemon from starting with a file; every problem is named with its line and field
    ///
    /// Beside the file itself it looks at what the file names on this machine: files that are missing, unreadable or open
    /// to others, certificates that cannot be read or do not match their keys, directories that cannot be written to,
    /// addresses that are in use. Nothing is created, changed or deleted; each address is bound, and the lock of a store
    /// tried, for a moment. Whether the pepper is that of the store is checked while no process uses the store, and not while
    /// its write-ahead log (`-wal`) has content, as after a kill; damage within the store shows at the start only. Run it as the user of the daemon: root can read and write what that user cannot.
    ///
    /// The exit code is 0 when a daemon would start, 1 when something on this machine would stop it, and 2 when the file
    /// itself is not valid.
    Check {
        /// The file of a sidecar or of a control plane
        file: PathBuf,

        /// Check only what the file itself says: for another machine, or while the daemon runs
        #[arg(long)]
        offline: bool,
    },
    /// Make the key under which a sidecar seals its snapshot file, in a file that only its owner can read
    ///
    /// The key is not shown. `snapshot.key_file` in the sidecar's file names it. Each sidecar may have one of its own;
    /// without it a snapshot file cannot be opened, and the sidecar takes its keyrings anew.
    SnapshotKey {
        /// The file to make; one that exists is left as it is
        file: PathBuf,
    },
}

/// A key that was made. It is not shown.
#[derive(Debug, Serialize)]
struct MadeKeyView {
    file: String,
}

/// A file that is valid, and what of this machine is not as it says.
#[derive(Debug, Serialize)]
struct CheckedView {
    file: String,
    summary: String,
    /// The id of the user who looked at this machine; null: nobody did.
    checked_as: Option<u32>,
    findings: Vec<FindingView>,
}

/// Something that is not as the file says.
#[derive(Debug, Serialize)]
struct FindingView {
    line: u64,
    column: u64,
    field: String,
    message: String,
    /// `problem`: it stops a start, or what the field is for; `warning`: the daemon starts all the same.
    weight: &'static str,
}

impl ConfigCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the file is not right.
    pub fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::Check { file, offline } => check(&file, offline, session),
            Self::SnapshotKey { file } => {
                SnapshotKey::make(&file).map_err(refused)?;
                session.show(&MadeKeyView {
                    file: file.display().to_string(),
                })?;
                Ok(Exit::Done)
            }
        }
    }
}

fn check(path: &Path, offline: bool, session: &Session) -> Result<Exit, Failure> {
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
    session.show(&CheckedView {
        file: path.display().to_string(),
        summary: settings.to_string(),
        checked_as: (!offline).then(|| user.as_raw()),
        findings: found
            .into_iter()
            .map(|finding| FindingView::new(finding, &places))
            .collect(),
    })?;
    if !offline && user.is_root() {
        session.output.note(
            "checked as root, who can read and write what others cannot: run it as the user of the daemon as well",
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
        format!("{}: made\n", self.file)
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
            || "checked without looking at this machine".to_owned(),
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
