//! The `keyrings` and the `staleness` in the configuration file of a sidecar.

use std::time::Duration;

use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::{
    cache::{self, RawCache},
    enforcement::enforcement,
    reader::{Findings, Text},
};
use crate::{
    authz::Enforcements,
    duration::written,
    key::{KeyringName, KeyringPattern},
    keyring::{MAX_KEYRINGS, Mode, PatternRule, Staleness},
};

/// A keyring of the sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SidecarKeyringSettings {
    pub(crate) name: KeyringName,
    /// Whether the sidecar holds the whole keyring, or keys on demand. Default: the whole keyring.
    pub(crate) mode: Mode,
    /// The limits of the keyring, or else those of the file.
    pub(crate) staleness: Staleness,
}

/// The keyrings of the sidecar.
#[derive(Clone, Debug, Default)]
pub(crate) struct SidecarKeyrings {
    /// The keyrings that the file names.
    pub(super) named: Vec<SidecarKeyringSettings>,
    /// The patterns, in the order of the file.
    pub(super) patterns: Vec<PatternRule>,
    /// Whether the denials of each are enforced. Default: they are.
    pub(super) enforcements: Enforcements,
}

/// The field of the list.
const FIELD: &str = "keyrings";

/// The bounds of both limits of staleness. Below a second, no answer arrives in time. After a month without a confirmation,
/// nothing is known about the keyring.
const STALENESS_BOUNDS: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_hours(30 * 24));

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawKeyring {
    name: Option<Text>,
    r#match: Option<Text>,
    mode: Option<Text>,
    cache: Option<Spanned<RawCache>>,
    staleness: Option<RawStaleness>,
    enforce: Option<Text>,
    remove: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawStaleness {
    warn_after: Option<Text>,
    deny_after: Option<Text>,
}

impl SidecarKeyrings {
    /// Reads the list. A keyring without limits of its own has those of `staleness`.
    pub(super) fn from_raw(
        raw: Option<Spanned<Vec<Spanned<RawKeyring>>>>,
        staleness: Staleness,
        found: &mut Findings,
    ) -> Self {
        let place = raw.as_ref().map_or(Location::UNKNOWN, |raw| raw.referenced);
        let Some(raw) = raw.filter(|raw| !raw.value.is_empty()) else {
            found.note(
                place,
                FIELD,
                "is missing, name a keyring, such as [{ name: payments }]",
            );
            return Self::default();
        };
        found.bound(FIELD, &raw, MAX_KEYRINGS);
        let mut keyrings = Self::default();
        let mut places = Vec::new();
        for (at, raw) in raw.value.into_iter().enumerate().take(MAX_KEYRINGS) {
            keyrings.add(at, raw, staleness, &mut places, found);
        }
        keyrings
    }

    /// Returns whether the sidecar may hold a keyring of this name.
    pub(super) fn has(&self, name: &KeyringName) -> bool {
        self.named.iter().any(|keyring| keyring.name == *name)
            || PatternRule::of(&self.patterns, name).is_some()
    }

    /// Adds the entry at index `at`. `places` are the indexes of the patterns before it.
    fn add(
        &mut self,
        at: usize,
        raw: Spanned<RawKeyring>,
        staleness: Staleness,
        places: &mut Vec<usize>,
        found: &mut Findings,
    ) {
        let field = |name: &str| format!("{FIELD}[{at}].{name}");
        let Spanned {
            value: raw,
            referenced,
            ..
        } = raw;
        let mode = cache::mode(field, raw.mode.as_ref(), raw.cache, found);
        let staleness = raw.staleness.map_or(staleness, |raw| {
            raw.into_limits(&field("staleness"), staleness, found)
        });
        let enforcement = enforcement(field, raw.enforce.as_ref(), raw.remove.as_ref(), found);
        let enforcement = enforcement.unwrap_or_default();
        match (&raw.name, &raw.r#match) {
            (None, None) => found.note(
                referenced,
                field("name"),
                "is missing, name the keyring, or find keyrings by a pattern with `match`",
            ),
            (Some(_), Some(text)) => found.note(
                text.referenced,
                field("match"),
                "has no place beside `name`, remove one of the two",
            ),
            (Some(text), None) => {
                let Some(name) = found.parse(field("name"), Some(text), str::parse) else {
                    return;
                };
                if self.named.iter().any(|other| other.name == name) {
                    found.note(
                        text.referenced,
                        field("name"),
                        "is in the list already, remove one of the two",
                    );
                }
                let enforcements = &mut self.enforcements.named;
                enforcements.push((name.clone(), enforcement));
                self.named.push(SidecarKeyringSettings {
                    name,
                    mode,
                    staleness,
                });
            }
            (None, Some(text)) => {
                let pattern = found.parse(field("match"), Some(text), str::parse);
                let Some(pattern): Option<KeyringPattern> = pattern else {
                    return;
                };
                let earlier = places.iter().zip(&self.patterns);
                if let Some((other, _)) = earlier
                    .into_iter()
                    .find(|(_, rule)| rule.pattern.covers(&pattern))
                {
                    found.note(
                        text.referenced,
                        field("match"),
                        format_args!(
                            "never applies, because {FIELD}[{other}].match matches the same keyrings: move it before that entry, or remove it"
                        ),
                    );
                }
                places.push(at);
                let enforcements = &mut self.enforcements.patterns;
                enforcements.push((pattern.clone(), enforcement));
                self.patterns.push(PatternRule {
                    pattern,
                    mode,
                    staleness,
                });
            }
        }
    }
}

impl RawStaleness {
    /// The limits, each with `default` where it is not given.
    pub(super) fn into_limits(
        self,
        field: &str,
        default: Staleness,
        found: &mut Findings,
    ) -> Staleness {
        let mut limit = |name: &str, text: Option<&Text>, default| {
            found
                .duration(format_args!("{field}.{name}"), text, STALENESS_BOUNDS)
                .unwrap_or(default)
        };
        let limits = Staleness {
            warn_after: limit("warn_after", self.warn_after.as_ref(), default.warn_after),
            deny_after: limit("deny_after", self.deny_after.as_ref(), default.deny_after),
        };
        if limits.warn_after >= limits.deny_after {
            let place = self
                .warn_after
                .or(self.deny_after)
                .map_or(Location::UNKNOWN, |text| text.referenced);
            let deny_after = written(limits.deny_after);
            found.note(
                place,
                format_args!("{field}.warn_after"),
                format_args!("use less than `deny_after`, which is {deny_after}"),
            );
        }
        limits
    }
}
