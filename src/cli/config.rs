//! `relatch config`: looks at configuration files, and makes the key of a snapshot file.

use std::path::PathBuf;

use clap::Subcommand;
use serde::Serialize;

use super::{Exit, Failure, Session, daemon, output::View};
use crate::{
    config,
    key::Timestamp,
    snapshot::{KeyFileError, SnapshotKey},
};

/// What can be done with a configuration file.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say whether a daemon would take a file; every problem is named with its line and field
    Check {
        /// The file of a sidecar or of a control plane
        file: PathBuf,
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

/// A file that a daemon would take.
#[derive(Debug, Serialize)]
struct CheckedView {
    file: String,
    summary: String,
}

impl ConfigCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the file is not right.
    pub fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Check { file } => {
                let checked = config::check(&file).map_err(daemon::misconfigured)?;
                session.show(&CheckedView {
                    file: file.display().to_string(),
                    summary: checked.to_string(),
                })
            }
            Self::SnapshotKey { file } => {
                SnapshotKey::make(&file).map_err(refused)?;
                session.show(&MadeKeyView {
                    file: file.display().to_string(),
                })
            }
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
        format!("{}: ok: {}\n", self.file, self.summary)
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
