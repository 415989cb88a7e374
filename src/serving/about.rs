//! The description that a sidecar sends of itself.

use std::collections::BTreeMap;

use crate::tls::Identity;

/// The description that a sidecar sends of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// The cluster of its node.
    pub cluster: String,
    /// The version of relatch that it runs.
    pub version: String,
    /// The labels that its operator configured.
    pub labels: BTreeMap<String, String>,
    /// The identity for which its certificate or its token stands; none without one, and for a run
    /// that is only known from the store.
    pub(crate) identity: Option<Identity>,
}
