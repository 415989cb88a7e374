//! The errors of a configuration file.

use std::{fmt, io, path::PathBuf};

/// A configuration file that cannot be used. The text is for the operator: it names the file, and for each problem the
/// line, the column, the field and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: cannot be read, check the path and its permissions", file.display())]
    Unreadable {
        /// The path as given.
        file: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The file is larger than the limit.
    #[error("{}: is larger than {limit} bytes, the most for a configuration; check the path", file.display())]
    TooLarge {
        /// The path as given.
        file: PathBuf,
        /// The largest file that is read, in bytes.
        limit: u64,
    },
    /// The content is not valid. The text has one line for each problem, in the order of the file.
    #[error("{}", Lines { file, problems })]
    Invalid {
        /// The path as given.
        file: String,
        /// All problems, at least one.
        problems: Vec<Problem>,
    },
    /// The file has no field that only one of the daemons has.
    #[error(
        "{file}: is not the configuration of a sidecar, which has `keyrings`, or of a control plane, which has `data_dir`"
    )]
    UnknownKind {
        /// The path as given.
        file: String,
    },
}

/// One problem of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line, counted from 1.
    pub line: u64,
    /// The column in characters, counted from 1.
    pub column: u64,
    /// The path of the field, such as `keyrings[0].mode`; empty for the file as a whole.
    pub(crate) field: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl ConfigError {
    /// The problems of the content; empty if the content was not checked.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Invalid { problems, .. } => problems,
            Self::Unreadable { .. } | Self::TooLarge { .. } | Self::UnknownKind { .. } => &[],
        }
    }
}

/// `line:column: field: message`, for use after the name of the file.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.line, self.column)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

struct Lines<'a> {
    file: &'a str,
    problems: &'a [Problem],
}

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.problems.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}:{problem}", self.file)?;
        }
        Ok(())
    }
}
