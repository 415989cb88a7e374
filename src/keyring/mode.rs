//! How much of a keyring a sidecar holds.

use super::on_demand::CacheSettings;

/// How much of a keyring a sidecar holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Every key.
    #[default]
    Full,
    /// Only the keys that the sidecar has looked up.
    OnDemand(CacheSettings),
}
