//! The name of a run.

use serde::{Deserialize, Serialize};

/// The name of a run. Names are ordered by node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RunKey {
    /// The node id of the sidecar.
    pub node: String,
    /// The id of its process.
    pub run_id: String,
}

impl RunKey {
    /// Returns the smallest name that a run of a node may have.
    pub(super) fn first_of(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            run_id: String::new(),
        }
    }
}
