//! The bounds of a cache of keys.

use std::time::Duration;

use crate::budget::Rate;

/// The bounds of a keyring that is held on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    /// The most memory of the entries in bytes, including everything that belongs to an entry; 1
    /// MiB to 64 GiB. Default: 64 MiB.
    pub max_size: u64,
    /// The time for which an entry is used before it is looked up again; one minute to one day.
    /// Default: 10 minutes. Changes arrive on the stream, so this bounds the effect of a lost
    /// change that is not noticed. Without an answer, an entry is used for longer.
    pub ttl: Duration,
    /// The time for which a key that the control plane does not know is denied without another
    /// lookup; 1 second to 5 minutes. Default: 10 seconds.
    pub negative_ttl: Duration,
    /// The time for which a check waits for a lookup before it is denied; 5 milliseconds to 10
    /// seconds. Default: 150 milliseconds, so that the denial arrives before the default timeout of
    /// Envoy, 200 milliseconds.
    pub lookup_timeout: Duration,
    /// The rate of lookups of keys that do not exist. Default: 100 a second and 1,000 at once. With
    /// 100 a second, a thousand sidecars under attack at once cause a load that one control plane
    /// can serve. The number at once also bounds the lookups that are in progress at a time: a
    /// lookup is charged until its key turns out to exist.
    pub unknown_budget: Rate,
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self {
            max_size: 64 << 20,
            ttl: Duration::from_mins(10),
            negative_ttl: Duration::from_secs(10),
            lookup_timeout: Duration::from_millis(150),
            unknown_budget: Rate {
                per_second: 100,
                burst: 1_000,
            },
        }
    }
}
