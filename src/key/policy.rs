//! How keys are rotated: a policy per keyring, of which a key may override parts.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    sink_name::SinkName,
    time::Timestamp,
    version::{KeyVersion, VersionState},
};
use crate::duration::written;

/// How the keys of a keyring are rotated. Stored as JSON, its durations as text such as `7days`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotationPolicy {
    /// How long a version is active before the next rotation is due; none: rotations are started by people.
    #[serde(default, with = "optional_duration")]
    pub(crate) rotate_every: Option<Duration>,
    /// How long an old version stays accepted after the hand-over at least: what its consumer is promised.
    #[serde(with = "duration")]
    pub(crate) overlap: Duration,
    /// How long an old version has to go unused before it retires.
    #[serde(with = "duration")]
    pub(crate) idle_for: Duration,
    /// What becomes of an old version whose overlap is over while the evidence is not complete.
    pub(crate) on_deadline: OnDeadline,
    /// How long after its retirement a version may come back by a roll-back.
    #[serde(with = "duration")]
    pub(crate) rollback_for: Duration,
    /// How long before the end of an overlap, or of a key, its consumer is reminded.
    #[serde(with = "duration")]
    pub(crate) remind_before: Duration,
    /// The most versions of a key that may be accepted at once.
    pub(crate) max_versions: u32,
    /// Where the secrets of scheduled rotations are delivered; none: what is due is told and nothing is rotated.
    #[serde(default)]
    pub(crate) sink: Option<SinkName>,
}

/// The parts of a policy that are to be as given; the others stay as they are.
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

/// What becomes of an old version whose overlap is over while the evidence is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnDeadline {
    /// It retires, whoever still uses it.
    Retire,
    /// The overlap is extended by [`RotationPolicy::idle_for`], until its own expiry at the latest.
    Extend,
    /// It stays accepted until the evidence is complete, an operator decides, or it expires.
    Hold,
}

/// A text that names no [`OnDeadline`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an answer to a deadline: use retire, extend or hold")]
pub(crate) struct ParseOnDeadlineError;

/// A policy that contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub(crate) struct PolicyError {
    /// The part that cannot be.
    pub(crate) field: &'static str,
    /// What is wrong, and what to do.
    pub(crate) problem: String,
}

const DAY: Duration = Duration::from_hours(24);
/// Beyond, a number of days was most likely given in another unit.
const MAX_DURATION: Duration = Duration::from_hours(24 * 366 * 5);
/// A rotation takes seconds; below, a key would never be out of one.
const MIN_ROTATE_EVERY: Duration = Duration::from_secs(1);
/// Two are needed for an overlap; each one more is a secret more that works.
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=10;

impl PolicyOverrides {
    /// Nothing.
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
    /// The longest `idle_for`. Evidence of more would need gaps in the reports of uses that are no longer remembered.
    pub(crate) const MAX_IDLE_FOR: Duration = Duration::from_hours(30 * 24);

    /// The policy with the parts that `overrides` gives.
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

    /// Checks that the parts fit each other.
    ///
    /// # Errors
    ///
    /// With the first part that does not.
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
                return Err(invalid(field, "give at most five years"));
            }
        }
        if let Some(every) = self.rotate_every {
            if every < MIN_ROTATE_EVERY {
                return Err(invalid("rotate_every", "give at least one second"));
            }
            if self.overlap >= every {
                let overlap = written(self.overlap);
                let every = written(every);
                return Err(PolicyError {
                    field: "overlap",
                    problem: format!(
                        "{overlap} is not below rotate_every, {every}: the next rotation would begin before the overlap of the last is over; give less"
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
                    "{idle_for} is more than overlap, {overlap}: no evidence could be complete when the overlap is over; give at most as much"
                ),
            });
        }
        if self.idle_for > Self::MAX_IDLE_FOR {
            return Err(invalid(
                "idle_for",
                "give at most 30 days: so long relatch remembers sidecars that ended without their last report of uses",
            ));
        }
        if !VERSIONS.contains(&self.max_versions) {
            return Err(PolicyError {
                field: "max_versions",
                problem: format!("give {} to {}", VERSIONS.start(), VERSIONS.end()),
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
    /// These overrides, and where they give nothing, those of `former`.
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

    /// Whether nothing is given.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl OnDeadline {
    /// Its name.
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

/// A duration as people write it.
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

/// The same, or null.
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
    /// When something will be due of a version that is in no rotation.
    pub(super) fn due_at(&self, version: &KeyVersion) -> Option<Timestamp> {
        match version.state {
            VersionState::Active { .. } => [
                self.expiring_at(version),
                self.rotation_due_at(version).filter(|_| {
                    // Without a sink it is reported once; with one it stays due until it is done.
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

    /// When an active version is reported to expire soon; none when it was.
    pub(super) fn expiring_at(&self, version: &KeyVersion) -> Option<Timestamp> {
        let expires_at = version.window.expires_at?;
        (!version.told.expiring).then(|| expires_at.saturating_sub(self.remind_before))
    }

    /// When the next rotation of an active version is due.
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
