//! Rotation policies: each keyring has one, and a key can override parts of it.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    sink_name::SinkName,
    time::Timestamp,
    version::{KeyVersion, VersionState},
};
use crate::duration::written;

/// The rotation policy of a keyring. Stored as JSON, with durations as text such as `7d`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotationPolicy {
    /// How long a version is active before the next rotation is due, at least 1 s; none: people
    /// start rotations. Default: none.
    #[serde(default, with = "optional_duration")]
    pub(crate) rotate_every: Option<Duration>,
    /// How long an old version stays accepted at least after the hand-over: the promise to its
    /// consumer. Less than `rotate_every`. Default: 7 days.
    #[serde(with = "duration")]
    pub(crate) overlap: Duration,
    /// How long an old version has to be unused before it retires, at most `overlap` and at most 30
    /// days. Default: 1 day.
    #[serde(with = "duration")]
    pub(crate) idle_for: Duration,
    /// The action when the overlap of an old version is over and the evidence is not complete.
    /// Default: hold.
    pub(crate) on_deadline: OnDeadline,
    /// How long after its retirement a version can become active again by a roll-back. Default: 7
    /// days.
    #[serde(with = "duration")]
    pub(crate) rollback_for: Duration,
    /// How long before the end of an overlap, or before the active version expires, its consumer is
    /// reminded. Default: 2 days.
    #[serde(with = "duration")]
    pub(crate) remind_before: Duration,
    /// The maximum number of versions of a key that are accepted at the same time, 2 to 10.
    /// Default: 3.
    pub(crate) max_versions: u32,
    /// The sink for the secrets of scheduled rotations; none: due rotations are reported but not
    /// started. Default: none.
    #[serde(default)]
    pub(crate) sink: Option<SinkName>,
}

/// The parts of a policy that are set. The other parts do not change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyOverrides {
    /// [`RotationPolicy::rotate_every`]; zero: no schedule.
    #[serde(with = "optional_duration", skip_serializing_if = "Option::is_none")]
    pub(crate) rotate_every: Option<Duration>,
    /// [`RotationPolicy::overlap`]
    #[serde(with = "optional_duration", skip_serializing_if = "Option::is_none")]
    pub(crate) overlap: Option<Duration>,
    /// [`RotationPolicy::idle_for`]
    #[serde(with = "optional_duration", skip_serializing_if = "Option::is_none")]
    pub(crate) idle_for: Option<Duration>,
    /// [`RotationPolicy::on_deadline`]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) on_deadline: Option<OnDeadline>,
    /// [`RotationPolicy::rollback_for`]
    #[serde(with = "optional_duration", skip_serializing_if = "Option::is_none")]
    pub(crate) rollback_for: Option<Duration>,
    /// [`RotationPolicy::remind_before`]
    #[serde(with = "optional_duration", skip_serializing_if = "Option::is_none")]
    pub(crate) remind_before: Option<Duration>,
    /// [`RotationPolicy::max_versions`]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_versions: Option<u32>,
    /// [`RotationPolicy::sink`]; the empty name: no sink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sink: Option<Arc<str>>,
}

/// The action when the overlap of an old version is over and the evidence is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnDeadline {
    /// The version retires, even if it is still used.
    Retire,
    /// The overlap is extended by [`RotationPolicy::idle_for`] from now, or by 1 s if that is
    /// longer, but at most until the version expires.
    Extend,
    /// The version stays accepted until the evidence is complete, an operator decides, or it
    /// expires.
    Hold,
}

/// A text that is not an [`OnDeadline`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid action: use retire, extend or hold")]
pub(crate) struct ParseOnDeadlineError;

/// A policy that contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub(crate) struct PolicyError {
    /// The part that is not valid.
    pub(crate) field: &'static str,
    /// The problem, or what to use instead.
    pub(crate) problem: String,
}

const DAY: Duration = Duration::from_hours(24);
/// The maximum of all durations: five years of 366 days. A longer duration was most likely written
/// in the wrong unit.
const MAX_DURATION: Duration = Duration::from_hours(24 * 366 * 5);
/// The minimum of `rotate_every`. A rotation lasts seconds: with less, a key would always be in a
/// rotation.
const MIN_ROTATE_EVERY: Duration = Duration::from_secs(1);
/// The bounds of `max_versions`. An overlap needs two versions; each further version is one more
/// secret that works.
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=10;

impl PolicyOverrides {
    /// No overrides.
    pub(crate) const NONE: Self = Self {
        rotate_every: None,
        overlap: None,
        idle_for: None,
        on_deadline: None,
        rollback_for: None,
        remind_before: None,
        max_versions: None,
        sink: None,
    };
}

impl RotationPolicy {
    /// The maximum of `idle_for`. Evidence for a longer time would need gaps in the reports of uses
    /// that relatch does not remember any more.
    pub(crate) const MAX_IDLE_FOR: Duration = Duration::from_hours(30 * 24);

    /// Returns the policy with the parts that `overrides` sets.
    #[must_use]
    pub(crate) fn with(&self, overrides: &PolicyOverrides) -> Self {
        let given = overrides.clone();
        Self {
            rotate_every: match given.rotate_every {
                Some(Duration::ZERO) => None,
                Some(every) => Some(every),
                None => self.rotate_every,
            },
            overlap: given.overlap.unwrap_or(self.overlap),
            idle_for: given.idle_for.unwrap_or(self.idle_for),
            on_deadline: given.on_deadline.unwrap_or(self.on_deadline),
            rollback_for: given.rollback_for.unwrap_or(self.rollback_for),
            remind_before: given.remind_before.unwrap_or(self.remind_before),
            max_versions: given.max_versions.unwrap_or(self.max_versions),
            sink: match given.sink {
                Some(name) => name.parse().ok(),
                None => self.sink.clone(),
            },
        }
    }

    /// Checks that each part is within its bounds and that the parts fit together.
    ///
    /// # Errors
    ///
    /// With the first part that is not valid.
    pub(crate) fn check(&self) -> Result<(), PolicyError> {
        let bounded = [
            ("overlap", Some(self.overlap)),
            ("idle_for", Some(self.idle_for)),
            ("rollback_for", Some(self.rollback_for)),
            ("remind_before", Some(self.remind_before)),
            ("rotate_every", self.rotate_every),
        ];
        for (field, duration) in bounded {
            if duration.is_some_and(|duration| duration > MAX_DURATION) {
                return Err(invalid(field, "use at most five years"));
            }
        }
        if let Some(every) = self.rotate_every {
            if every < MIN_ROTATE_EVERY {
                return Err(invalid("rotate_every", "use at least one second"));
            }
            if self.overlap >= every {
                let overlap = written(self.overlap);
                let every = written(every);
                return Err(PolicyError {
                    field: "overlap",
                    problem: format!(
                        "{overlap} is not less than rotate_every, which is {every}: the next rotation would begin before the overlap of the last one is over; use less"
                    ),
                });
            }
        }
        if self.idle_for > self.overlap {
            let idle_for = written(self.idle_for);
            let overlap = written(self.overlap);
            return Err(PolicyError {
                field: "idle_for",
                problem: format!(
                    "{idle_for} is more than overlap, which is {overlap}: the evidence could not be complete when the overlap is over; use at most the overlap"
                ),
            });
        }
        if self.idle_for > Self::MAX_IDLE_FOR {
            return Err(invalid(
                "idle_for",
                "use at most 30 days: relatch remembers for 30 days that a sidecar ended without its last report of uses",
            ));
        }
        if !VERSIONS.contains(&self.max_versions) {
            return Err(PolicyError {
                field: "max_versions",
                problem: format!("use {} to {}", VERSIONS.start(), VERSIONS.end()),
            });
        }
        Ok(())
    }
}

impl Default for RotationPolicy {
    fn default() -> Self {
        Self {
            rotate_every: None,
            overlap: 7 * DAY,
            idle_for: DAY,
            on_deadline: OnDeadline::Hold,
            rollback_for: 7 * DAY,
            remind_before: 2 * DAY,
            max_versions: 3,
            sink: None,
        }
    }
}

impl PolicyOverrides {
    /// Returns these overrides, and those of `former` for the parts that these do not set.
    #[must_use]
    pub(crate) fn over(self, former: &Self) -> Self {
        let former = former.clone();
        Self {
            rotate_every: self.rotate_every.or(former.rotate_every),
            overlap: self.overlap.or(former.overlap),
            idle_for: self.idle_for.or(former.idle_for),
            on_deadline: self.on_deadline.or(former.on_deadline),
            rollback_for: self.rollback_for.or(former.rollback_for),
            remind_before: self.remind_before.or(former.remind_before),
            max_versions: self.max_versions.or(former.max_versions),
            sink: self.sink.or(former.sink),
        }
    }

    /// Returns whether no part is set.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl OnDeadline {
    /// Returns the name of the action in commands and in JSON.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Retire => "retire",
            Self::Extend => "extend",
            Self::Hold => "hold",
        }
    }
}

impl FromStr for OnDeadline {
    type Err = ParseOnDeadlineError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Retire, Self::Extend, Self::Hold]
            .into_iter()
            .find(|answer| answer.as_str() == text)
            .ok_or(ParseOnDeadlineError)
    }
}

impl fmt::Display for OnDeadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

fn invalid(field: &'static str, problem: &str) -> PolicyError {
    PolicyError {
        field,
        problem: problem.to_owned(),
    }
}

/// Serializes a duration as people write it.
mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::written;

    pub(super) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&written(*duration))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map_err(D::Error::custom)
    }
}

/// Serializes a duration as people write it, or null for none.
mod optional_duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(
        clippy::ref_option,
        reason = "the signature that serde gives to `with`"
    )]
    pub(super) fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => super::duration::serialize(duration, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Option::<String>::deserialize(deserializer)?
            .map(|text| humantime::parse_duration(&text).map_err(D::Error::custom))
            .transpose()
    }
}

impl RotationPolicy {
    /// Returns when the next thing will be due for an active version; none for other states.
    pub(super) fn due_at(&self, version: &KeyVersion) -> Option<Timestamp> {
        match version.state {
            VersionState::Active { .. } => [
                self.expiring_at(version),
                self.rotation_due_at(version).filter(|_| {
                    // Without a sink, the due rotation is reported once. With one, it stays due
                    // until it is done.
                    self.sink.is_some() || !version.told.rotation_due
                }),
            ]
            .into_iter()
            .flatten()
            .min(),
            VersionState::Pending { .. }
            | VersionState::Retiring { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => None,
        }
    }

    /// Returns when it will be reported that an active version expires soon; none if it does not
    /// expire, or if that was reported.
    pub(super) fn expiring_at(&self, version: &KeyVersion) -> Option<Timestamp> {
        let expires_at = version.window.expires_at?;
        (!version.told.expiring).then(|| expires_at.saturating_sub(self.remind_before))
    }

    /// Returns when the next rotation of an active version is due; none for other states, and
    /// without `rotate_every`.
    pub(super) fn rotation_due_at(&self, version: &KeyVersion) -> Option<Timestamp> {
        let VersionState::Active { since } = version.state else {
            return None;
        };
        self.rotate_every.map(|every| since.saturating_add(every))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hours(hours: u64) -> Duration {
        Duration::from_hours(hours)
    }

    fn problem(overrides: &PolicyOverrides) -> Option<&'static str> {
        let policy = RotationPolicy::default().with(overrides);
        policy.check().err().map(|error| error.field)
    }

    #[test]
    fn the_default_fits_itself() {
        assert_eq!(RotationPolicy::default().check(), Ok(()));
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        let day = PolicyOverrides {
            overlap: Some(hours(24)),
            ..PolicyOverrides::default()
        };
        assert_eq!(problem(&day), None);
        for (overrides, field) in [
            (
                PolicyOverrides {
                    rotate_every: Some(hours(24)),
                    ..day.clone()
                },
                "overlap",
            ),
            (
                PolicyOverrides {
                    idle_for: Some(hours(25)),
                    ..day.clone()
                },
                "idle_for",
            ),
            (
                PolicyOverrides {
                    overlap: Some(hours(60 * 24)),
                    idle_for: Some(RotationPolicy::MAX_IDLE_FOR + Duration::from_millis(1)),
                    ..day.clone()
                },
                "idle_for",
            ),
            (
                PolicyOverrides {
                    max_versions: Some(1),
                    ..day.clone()
                },
                "max_versions",
            ),
            (
                PolicyOverrides {
                    rollback_for: Some(Duration::MAX),
                    ..day.clone()
                },
                "rollback_for",
            ),
            (
                PolicyOverrides {
                    rotate_every: Some(Duration::from_millis(1)),
                    ..day
                },
                "rotate_every",
            ),
        ] {
            assert_eq!(problem(&overrides), Some(field), "{overrides:?}");
        }
    }

    #[test]
    fn an_override_can_take_away() {
        let keyring = RotationPolicy::default().with(&PolicyOverrides {
            rotate_every: Some(hours(1_000)),
            sink: Some("files".into()),
            ..PolicyOverrides::default()
        });
        assert_eq!(keyring.sink, "files".parse().ok());
        let key = keyring.with(&PolicyOverrides {
            rotate_every: Some(Duration::ZERO),
            sink: Some("".into()),
            ..PolicyOverrides::default()
        });
        assert_eq!((key.rotate_every, key.sink), (None, None));
        assert_eq!(key.overlap, keyring.overlap);
    }

    #[test]
    fn policies_survive_their_json() {
        let policy = RotationPolicy {
            rotate_every: Some(hours(24 * 90)),
            ..RotationPolicy::default()
        };
        let json = serde_json::to_value(&policy).expect("a policy is JSON");
        assert_eq!(json["overlap"], "7d");
        assert_eq!(
            serde_json::from_value::<RotationPolicy>(json).ok(),
            Some(policy)
        );
        let overrides = PolicyOverrides {
            idle_for: Some(hours(1)),
            ..PolicyOverrides::default()
        };
        let json = serde_json::to_string(&overrides).expect("overrides are JSON");
        assert_eq!(json, r#"{"idle_for":"1h"}"#);
        assert_eq!(serde_json::from_str(&json).ok(), Some(overrides));
    }
}
