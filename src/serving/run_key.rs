//! The name of a run.

use serde::{Deserialize, Serialize};

/// Names a run. Ordered by node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RunKey {
    /// The sidecar.
    pub node: String,
    /// Its process.
    pub run_id: String,
}

impl RunKey {
    /// The first that the runs of a node may have.
    pub(super) fn first_of(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            run_id: String::new(),
        }
    }
}
