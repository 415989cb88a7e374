//! Why a snapshot file is not taken.

use std::io;

/// What a file holds is not a snapshot that can be taken.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// It begins with something else.
    #[error("it is not a snapshot file")]
    NoSnapshot,
    /// Another version of relatch wrote it.
    #[error(
        "it has format {found}, and this version of relatch reads format {}",
        super::seal::FORMAT
    )]
    Format {
        /// Which.
        found: u16,
    },
    /// Its header cannot be read.
    #[error("its header is damaged")]
    Header,
    /// It was sealed under another key, or its header was altered.
    #[error("it was sealed with another key than the configured one")]
    Key,
    /// A frame is not as it was written.
    #[error("it was altered: frame {frame} is not as it was written")]
    Altered {
        /// Counted from zero.
        frame: u64,
    },
    /// The state that it was made with does not end.
    #[error("it is cut: frame {frame} of its state is missing or incomplete")]
    Cut {
        /// Counted from zero.
        frame: u64,
    },
    /// A frame was written by us and makes no sense.
    #[error("frame {frame}: {problem}")]
    Contradiction {
        /// Counted from zero.
        frame: u64,
        /// What is wrong with it.
        problem: String,
    },
}

/// A file cannot be trusted, or is somebody else's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RefusedError {
    /// It is a link, a directory, a pipe.
    #[error("it is not a regular file")]
    NotAFile,
    /// Others than its owner may use it.
    #[error("its mode is {mode:03o}: other users can use it")]
    Mode {
        /// The permissions.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error("it belongs to user {owner}, but this process runs as user {user}")]
    Owner {
        /// Whose it is.
        owner: u32,
        /// Who we are.
        user: u32,
    },
    /// It is of another sidecar.
    #[error("it is of node {node} in cluster {cluster}")]
    Node {
        /// Which.
        node: String,
        /// Its cluster.
        cluster: String,
    },
    /// What it holds cannot be taken.
    #[error(transparent)]
    Contents(#[from] ReadError),
}

impl From<io::Error> for RefusedError {
    fn from(error: io::Error) -> Self {
        Self::Contents(ReadError::Io(error))
    }
}
