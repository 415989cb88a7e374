//! The errors of a snapshot file.

use std::io;

/// The content of a file is not a snapshot that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// The file does not begin as a snapshot file does.
    #[error("it is not a snapshot file")]
    NoSnapshot,
    /// The format is that of another version of relatch.
    #[error(
        "it has format {found}, and this version of relatch reads format {}",
        super::seal::FORMAT
    )]
    Format {
        /// The format of the file.
        found: u16,
    },
    /// The header cannot be read.
    #[error("its header is damaged")]
    Header,
    /// The file was sealed under another key, or its header was altered.
    #[error("it was sealed with another key than the configured one")]
    Key,
    /// A frame is not as it was written.
    #[error("it was altered: frame {frame} is not as it was written")]
    Altered {
        /// Counted from zero.
        frame: u64,
    },
    /// The state with which the file was created has no end.
    #[error("it is cut: frame {frame} of its state is missing or incomplete")]
    Cut {
        /// Counted from zero.
        frame: u64,
    },
    /// A frame is authentic, but its content is not consistent.
    #[error("frame {frame}: {problem}")]
    Contradiction {
        /// Counted from zero.
        frame: u64,
        /// The problem of the frame.
        problem: String,
    },
}

/// A file cannot be trusted, or belongs to another user or sidecar.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RefusedError {
    /// The path is a link, a directory or a pipe.
    #[error("it is not a regular file")]
    NotAFile,
    /// Other users than the owner can use the file.
    #[error("its mode is {mode:03o}: other users can use it")]
    Mode {
        /// The permissions.
        mode: u32,
    },
    /// The file belongs to another user.
    #[error("it belongs to user {owner}, but this process runs as user {user}")]
    Owner {
        /// The user id of the owner.
        owner: u32,
        /// The user id of this process.
        user: u32,
    },
    /// The file is of another sidecar.
    #[error("it is of node {node} in cluster {cluster}")]
    Node {
        /// The node id in the file.
        node: String,
        /// The cluster in the file.
        cluster: String,
    },
    /// The content of the file cannot be used.
    #[error(transparent)]
    Contents(#[from] ReadError),
}

impl From<io::Error> for RefusedError {
    fn from(error: io::Error) -> Self {
        Self::Contents(ReadError::Io(error))
    }
}
