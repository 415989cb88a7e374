//! `relatch config`: looks at configuration files.

use std::path::PathBuf;

use clap::Subcommand;
use serde::Serialize;

use super::{Failure, Session, daemon, output::View};
use crate::{config, key::Timestamp};

/// What can be done with a configuration file.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say whether a daemon would take a file; every problem is named with its line and field
    Check {
        /// The file of a sidecar or of a control plane
        file: PathBuf,
    },
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
        }
    }
}

impl View for CheckedView {
    fn render(&self, _now: Timestamp) -> String {
        format!("{}: ok: {}\n", self.file, self.summary)
    }
}
