//! How a cache of keys is bounded.

use std::time::Duration;

use crate::budget::Rate;

/// The bounds of a keyring that is held on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    /// In bytes, everything about an entry included; 1 MiB to 64 GiB. Default: 64 MiB.
    pub max_size: u64,
    /// How long an entry is used before it is looked up again; one minute to one day. Default: 10 minutes. Changes come by
    /// the stream: this bounds what a loss that nobody notices could do. Where nobody answers, an entry is used for longer.
    pub ttl: Duration,
    /// How long a key that the control plane does not know is denied without asking again; 1 second to 5 minutes. Default:
    /// 10 seconds.
    pub negative_ttl: Duration,
    /// How long a check waits for a lookup before it is denied; 5 milliseconds to 10 seconds. Default: 150 milliseconds,
    /// so that the denial comes before the 200 milliseconds after which Envoy gives up by default.
    pub lookup_timeout: Duration,
    /// How many lookups may come to nothing. Default: 100 a second, which a thousand sidecars under attack at once make a
    /// load that one control plane bears; 1,000 at once. That bounds the lookups that are under way at a time, too: one is
    /// charged until its key turns out to exist.
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
