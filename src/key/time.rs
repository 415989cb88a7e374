//! Points in time and half-open windows of validity.

use std::{
    fmt,
    num::NonZeroU64,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A point on the wall clock in whole milliseconds since the Unix epoch; written as RFC 3339 in UTC.
///
/// The stored value is the milliseconds plus one, so that `Option<Timestamp>` needs no more memory:
/// keys have many.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(NonZeroU64);

/// A half-open window `[not_before, expires_at)`; an absent end is unbounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// The first instant at which the window holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) not_before: Option<Timestamp>,
    /// The first instant at which the window does not hold any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expires_at: Option<Timestamp>,
}

/// Where an instant lies relative to a [`Window`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowPosition {
    /// Before `not_before`.
    Before,
    /// Within the window.
    Inside,
    /// At or after `expires_at`.
    After,
}

/// A text that is not a point in time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a time: write RFC 3339 in UTC, for example 2027-01-31T12:00:00Z")]
pub struct ParseTimestampError;

/// The last millisecond of the year 9999, the latest that RFC 3339 can write.
const MAX_MILLIS: i64 = 253_402_300_799_999;

impl Timestamp {
    /// Returns the instant `millis` milliseconds after the Unix epoch, limited to the years 1970 to
    /// 9999.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        let held = if millis < 0 {
            0
        } else if millis > MAX_MILLIS {
            MAX_MILLIS
        } else {
            millis
        };
        Self(NonZeroU64::MIN.saturating_add(held.unsigned_abs()))
    }

    /// Returns the milliseconds since the Unix epoch.
    #[must_use]
    pub const fn as_millis(self) -> i64 {
        (self.0.get() - 1).cast_signed()
    }

    /// Returns the instant `duration` later, at most the end of the year 9999.
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self::from_millis(self.as_millis().saturating_add(millis))
    }

    /// Returns the instant `duration` earlier, at least the beginning of the year 1970.
    #[must_use]
    pub(crate) fn saturating_sub(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self::from_millis(self.as_millis().saturating_sub(millis))
    }

    /// Returns the time since `earlier`; zero if `earlier` is later than this instant.
    #[must_use]
    pub fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.get().saturating_sub(earlier.0.get()))
    }
}

impl Window {
    /// Creates a window from `not_before` to `expires_at`.
    #[must_use]
    pub(crate) const fn new(not_before: Option<Timestamp>, expires_at: Option<Timestamp>) -> Self {
        Self {
            not_before,
            expires_at,
        }
    }

    /// Returns where `now` lies. An empty window is over at every time from `expires_at` on.
    #[must_use]
    pub(crate) fn position(&self, now: Timestamp) -> WindowPosition {
        if self.expires_at.is_some_and(|end| now >= end) {
            WindowPosition::After
        } else if self.not_before.is_some_and(|start| now < start) {
            WindowPosition::Before
        } else {
            WindowPosition::Inside
        }
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        UNIX_EPOCH + Duration::from_millis(time.0.get() - 1)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", humantime::format_rfc3339_millis((*self).into()))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Timestamp {
    type Err = ParseTimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_rfc3339(text)
            .map(Self::from)
            .map_err(|_| ParseTimestampError)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    #[test]
    fn window_is_half_open() {
        let window = Window::new(Some(at(100)), Some(at(200)));
        assert_eq!(window.position(at(99)), WindowPosition::Before);
        assert_eq!(window.position(at(100)), WindowPosition::Inside);
        assert_eq!(window.position(at(199)), WindowPosition::Inside);
        assert_eq!(window.position(at(200)), WindowPosition::After);
    }

    #[test]
    fn window_without_ends_always_holds() {
        assert_eq!(Window::default().position(at(0)), WindowPosition::Inside);
        assert_eq!(
            Window::default().position(at(MAX_MILLIS)),
            WindowPosition::Inside
        );
    }

    #[test]
    fn empty_window_is_over_before_it_begins() {
        let window = Window::new(Some(at(200)), Some(at(100)));
        assert_eq!(window.position(at(150)), WindowPosition::After);
    }

    #[test]
    fn timestamp_round_trips_through_rfc_3339() {
        let time: Timestamp = "2027-01-31T12:00:00.250Z".parse().expect("a valid time");
        assert_eq!(time.to_string(), "2027-01-31T12:00:00.250Z");
        assert!("tomorrow".parse::<Timestamp>().is_err());
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(at(5).saturating_since(at(9)), Duration::ZERO);
        assert_eq!(at(5).saturating_add(Duration::MAX), at(MAX_MILLIS));
    }
}
