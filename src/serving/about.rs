//! What a sidecar says of itself.

use std::collections::BTreeMap;

use crate::tls::Identity;

/// What a sidecar says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Its cluster.
    pub cluster: String,
    /// The version of relatch that it runs.
    pub version: String,
    /// What its operator says of it.
    pub labels: BTreeMap<String, String>,
    /// Whom its certificate speaks for; none without one, and of those that are known from the store.
    pub(crate) identity: Option<Identity>,
}
