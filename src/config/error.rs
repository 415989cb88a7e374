//! What can be wrong with a configuration file.

use std::{fmt, io, path::PathBuf};

/// A configuration file that cannot be used. Its text is for the operator: it names the file, and for each problem the
/// place, the field and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: cannot be read, check the path and its permissions", file.display())]
    Unreadable {
        /// The file as it was named.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is larger than any configuration is.
    #[error("{}: is larger than {limit} bytes, which no configuration is; check the path", file.display())]
    TooLarge {
        /// The file as it was named.
        file: PathBuf,
        /// The most bytes that are read.
        limit: u64,
    },
    /// Its content is wrong; one line for each problem, in the order of the file.
    #[error("{}", Lines { file, problems })]
    Invalid {
        /// The file as it was named.
        file: String,
        /// At least one.
        problems: Vec<Problem>,
    },
    /// Nothing in the file tells for which daemon it is.
    #[error(
        "{file}: is neither a sidecar's nor a control plane's configuration; \
         the first has `keyrings`, the second `data_dir`"
    )]
    UnknownKind {
        /// The file as it was named.
        file: String,
    },
}

/// One thing that is wrong in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its line, counted from 1.
    pub line: u64,
    /// Its column in characters, counted from 1.
    pub column: u64,
    /// The path of the field, such as `keyrings[0].mode`; empty for the file as a whole.
    pub(crate) field: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl ConfigError {
    /// What is wrong with the content; empty when that was not reached.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Invalid { problems, .. } => problems,
            Self::Unreadable { .. } | Self::TooLarge { .. } | Self::UnknownKind { .. } => &[],
        }
    }
}

/// `line:column: field: message`, to be read behind the name of the file.
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
