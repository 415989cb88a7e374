//! Evidence: what sidecars have reported about the use of key versions, and what follows from it.
//!
//! A silent sidecar does not mean zero use. A version counts as idle since a time only if every
//! sidecar that could have seen a use has reported everything after that time.

use std::{collections::HashMap, time::Duration};

use super::{id::VersionRef, time::Timestamp};

/// The reported use of a version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// The number of checks that presented the version, allowed or denied.
    pub(crate) requests: u64,
    /// The number of these checks that were denied.
    pub(crate) denied: u64,
    /// The time of the first check, by the wall clock of its sidecar, but no later than the receipt
    /// of its report.
    pub(crate) first_used: Option<Timestamp>,
    /// The receipt of the last report of a check.
    pub(crate) last_used: Option<Timestamp>,
}

/// How completely the sidecars of a keyring have reported uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Every sidecar that may serve has reported all uses before this moment; none when one of them has reported nothing yet.
    pub complete_until: Option<Timestamp>,
    /// The end of the last gap: until this moment, a sidecar that is gone without its last report
    /// may have seen uses. None when every sidecar that is gone had reported everything.
    pub(crate) gap_until: Option<Timestamp>,
}

/// What relatch knows about the use of a keyring's versions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Evidence {
    /// How complete `uses` is.
    pub(crate) coverage: Coverage,
    /// The reported uses by version. No use is reported of an absent version.
    pub(crate) uses: HashMap<VersionRef, Use>,
}

/// Whether a version has been idle for long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idleness {
    /// The version was not used between `since` and `complete_until`, both excluded. That is long
    /// enough.
    Complete {
        /// The last use, the begin of the overlap, or the end of a gap: the latest of them.
        since: Timestamp,
        /// The time before which sidecars have reported all uses.
        complete_until: Timestamp,
    },
    /// The version is not known to be unused for long enough yet.
    Pending {
        /// The time at which it will be, if it is not used and sidecars report all uses until then.
        until: Timestamp,
        /// The event after which the version has to be unused.
        since: Since,
    },
    /// A sidecar that may serve has reported nothing yet.
    Unknown,
}

/// The event that begins the time in which a version has to be idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Since {
    /// The begin of the overlap: no use is reported since.
    Overlap(Timestamp),
    /// The last reported use.
    Use(Timestamp),
    /// The end of a gap: a sidecar is gone without its last report.
    Gap(Timestamp),
}

impl Evidence {
    /// Returns the use of one version; zero if none is reported.
    #[must_use]
    pub(crate) fn of(&self, version: VersionRef) -> Use {
        self.uses.get(&version).copied().unwrap_or_default()
    }

    /// Reports whether `version`, whose overlap began at `overlap`, has been idle for `idle_for`.
    #[must_use]
    pub(crate) fn idleness(
        &self,
        version: VersionRef,
        overlap: Timestamp,
        idle_for: Duration,
    ) -> Idleness {
        let Coverage {
            complete_until,
            gap_until,
        } = self.coverage;
        let since = [
            self.of(version).last_used.map(Since::Use),
            gap_until.map(Since::Gap),
        ]
        .into_iter()
        .flatten()
        .fold(Since::Overlap(overlap), |latest, other| {
            if other.moment() > latest.moment() {
                other
            } else {
                latest
            }
        });
        let until = since.moment().saturating_add(idle_for);
        match complete_until {
            None => Idleness::Unknown,
            // The idle time begins after `since`, so that a use at `since` does not count: the
            // reports have to cover all later moments.
            Some(complete_until) if complete_until > since.moment() && complete_until >= until => {
                Idleness::Complete {
                    since: since.moment(),
                    complete_until,
                }
            }
            Some(_) => Idleness::Pending { until, since },
        }
    }
}

impl Since {
    /// Returns the time of the event.
    #[must_use]
    pub(crate) const fn moment(self) -> Timestamp {
        match self {
            Self::Overlap(at) | Self::Use(at) | Self::Gap(at) => at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE_FOR: Duration = Duration::from_millis(100);

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn version() -> VersionRef {
        VersionRef {
            key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
            version: super::super::VersionNumber::FIRST,
        }
    }

    fn idleness(
        complete_until: Option<i64>,
        gap_until: Option<i64>,
        last_used: Option<i64>,
    ) -> Idleness {
        let used = Use {
            last_used: last_used.map(at),
            ..Use::default()
        };
        Evidence {
            coverage: Coverage {
                complete_until: complete_until.map(at),
                gap_until: gap_until.map(at),
            },
            uses: HashMap::from([(version(), used)]),
        }
        .idleness(version(), at(1_000), IDLE_FOR)
    }

    #[test]
    fn a_version_is_idle_when_everything_was_told_for_long_enough() {
        for (last_used, since) in [(None, 1_000), (Some(990), 1_000), (Some(1_500), 1_500)] {
            let almost = idleness(Some(since + 99), None, last_used);
            assert!(matches!(almost, Idleness::Pending { until, .. } if until == at(since + 100)));
            let complete = Idleness::Complete {
                since: at(since),
                complete_until: at(since + 100),
            };
            assert_eq!(idleness(Some(since + 100), None, last_used), complete);
        }
    }

    #[test]
    fn a_gap_counts_as_a_use_at_its_end() {
        let since = Since::Gap(at(1_700));
        let until = at(1_800);
        let pending = Idleness::Pending { until, since };
        assert_eq!(idleness(Some(1_799), Some(1_700), Some(1_200)), pending);
        let after = idleness(Some(1_800), Some(1_700), Some(1_200));
        assert!(matches!(after, Idleness::Complete { .. }));
    }

    #[test]
    fn a_sidecar_that_told_nothing_is_not_zero_use() {
        assert_eq!(idleness(None, None, None), Idleness::Unknown);
    }

    #[test]
    fn no_time_at_all_still_needs_a_report_after_the_last_use() {
        let evidence = |complete_until| {
            let coverage = Coverage {
                complete_until: Some(at(complete_until)),
                gap_until: None,
            };
            Evidence {
                coverage,
                ..Evidence::default()
            }
            .idleness(version(), at(1_000), Duration::ZERO)
        };
        assert!(matches!(evidence(1_000), Idleness::Pending { .. }));
        assert!(matches!(evidence(1_001), Idleness::Complete { .. }));
    }
}
