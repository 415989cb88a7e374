//! The `mode` and the `cache` of an entry of `keyrings` in the configuration file of a sidecar.

use std::time::Duration;

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::{
    reader::{Findings, Text},
    value,
};
use crate::{
    budget::Rate,
    keyring::{Mode, on_demand::CacheSettings},
};

/// The limits of a keyring on demand.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCache {
    max_size: Option<Text>,
    ttl: Option<Text>,
    negative_ttl: Option<Text>,
    lookup_timeout: Option<Text>,
    unknown_per_second: Option<Text>,
    unknown_burst: Option<Text>,
}

/// The bounds of `max_size`, in bytes. A cache below 1 MiB holds too few keys to be useful. No sidecar has more than 64 GiB.
const MAX_SIZE_BOUNDS: (u64, u64) = (1 << 20, 64 << 30);

/// The bounds of `ttl`. Below a minute, nearly every check of a seldom used key needs a lookup. The upper bound of a day
/// limits for how long a record that was never corrected can be wrong.
const TTL_BOUNDS: (Duration, Duration) = (Duration::from_mins(1), Duration::from_hours(24));

/// The bounds of `negative_ttl`. Below a second, a client that repeats a wrong key causes load. The upper bound of 5 minutes
/// is for a key that a sidecar has denied before it was created: it is accepted within minutes, whatever happens to the
/// stream.
const NEGATIVE_TTL_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(5));

/// The bounds of `lookup_timeout`. Below 5 ms, no answer of a control plane in another zone arrives in time. No proxy waits
/// for more than 10 s.
const LOOKUP_TIMEOUT_BOUNDS: (Duration, Duration) =
    (Duration::from_millis(5), Duration::from_secs(10));

/// The mode of a keyring, with its limits if it is on demand.
pub(super) fn mode(
    field: impl Fn(&str) -> String,
    mode: Option<&Text>,
    cache: Option<Spanned<RawCache>>,
    found: &mut Findings,
) -> Mode {
    let is_on_demand = found
        .parse(field("mode"), mode, parse_mode)
        .unwrap_or(false);
    match (is_on_demand, cache) {
        (true, cache) => {
            let cache = cache.map_or_else(RawCache::default, |cache| cache.value);
            Mode::OnDemand(cache.into_settings(&field("cache"), found))
        }
        (false, None) => Mode::Full,
        (false, Some(cache)) => {
            found.note(
                cache.referenced,
                field("cache"),
                "has an effect only with `mode: on_demand`, remove it or set the mode",
            );
            Mode::Full
        }
    }
}

impl RawCache {
    fn into_settings(self, field: &str, found: &mut Findings) -> CacheSettings {
        let default = CacheSettings::default();
        let max_size = found.parse(
            format_args!("{field}.max_size"),
            self.max_size.as_ref(),
            |text| value::size(text, MAX_SIZE_BOUNDS),
        );
        let mut duration = |name: &str, text: Option<Text>, bounds| {
            found.duration(format_args!("{field}.{name}"), text.as_ref(), bounds)
        };
        let ttl = duration("ttl", self.ttl, TTL_BOUNDS);
        let negative_ttl = duration("negative_ttl", self.negative_ttl, NEGATIVE_TTL_BOUNDS);
        let lookup_timeout = duration("lookup_timeout", self.lookup_timeout, LOOKUP_TIMEOUT_BOUNDS);
        let mut number = |name: &str, text: Option<Text>| {
            found.parse(format_args!("{field}.{name}"), text.as_ref(), value::rate)
        };
        let per_second = number("unknown_per_second", self.unknown_per_second);
        let burst = number("unknown_burst", self.unknown_burst);
        let budget = default.unknown_budget;
        CacheSettings {
            max_size: max_size.unwrap_or(default.max_size),
            ttl: ttl.unwrap_or(default.ttl),
            negative_ttl: negative_ttl.unwrap_or(default.negative_ttl),
            lookup_timeout: lookup_timeout.unwrap_or(default.lookup_timeout),
            unknown_budget: Rate {
                per_second: per_second.unwrap_or(budget.per_second),
                burst: burst.unwrap_or(budget.burst),
            },
        }
    }
}

/// Whether the mode is `on_demand`.
fn parse_mode(text: &str) -> Result<bool, &'static str> {
    match text {
        "full" => Ok(false),
        "on_demand" => Ok(true),
        _ => Err("use full or on_demand"),
    }
}
