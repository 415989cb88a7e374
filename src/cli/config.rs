//! `relatch config`: looks at configuration files.

use std::path::PathBuf;

use clap::Subcommand;

use super::{Failure, Session, daemon};
use crate::config;

/// What can be done with a configuration file.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say whether a daemon would take a file; every problem is named with its line and field
    Check {
        /// The file of a sidecar or of a control plane
        file: PathBuf,
    },
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
                session
                    .output
                    .note(&format!("{}: right: {checked}", file.display()));
                Ok(())
            }
        }
    }
}
