//! Evidence: what sidecars have told of the use of key versions, and what may be concluded from it.
//!
//! A silent sidecar is not zero use. A version is idle since a moment only when every sidecar that could have seen it
//! used has told of everything after that moment.

use std::{collections::HashMap, time::Duration};

use super::{id::VersionRef, time::Timestamp};

/// How often a version was used, as far as it was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// Checks that presented the version, whatever became of them.
    pub(crate) requests: u64,
    /// Those of them that were denied.
    pub(crate) denied: u64,
    /// When the first was, by the wall clock of its sidecar, and no later than its report was received.
    pub(crate) first_used: Option<Timestamp>,
    /// When the last report of one was received.
    pub(crate) last_used: Option<Timestamp>,
}

/// How completely the sidecars of a keyring have told of uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Every sidecar that may serve has reported all uses before this moment; none when one of them has reported nothing yet.
    pub complete_until: Option<Timestamp>,
    /// A sidecar that vanished without its last report may have seen uses until this moment; none when all that went
    /// had told everything.
    pub(crate) gap_until: Option<Timestamp>,
}

/// What is known of the use of a keyring's versions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Evidence {
    /// How complete it is.
    pub(crate) coverage: Coverage,
    /// By version; one that is absent was not used.
    pub(crate) uses: HashMap<VersionRef, Use>,
}

/// Whether a version has been idle for long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idleness {
    /// It was not used in `[since, complete_until)`, which is long enough.
    Complete {
        /// The last use, or from when on there is evidence.
        since: Timestamp,
        /// Until when sidecars have told everything.
        complete_until: Timestamp,
    },
    /// It was not used since, which is not long enough yet.
    Pending {
        /// When it will have been, if no use comes.
        until: Timestamp,
        /// What began the time that has to pass.
        since: Since,
    },
    /// A sidecar that may serve has reported nothing yet.
    Unknown,
}

/// What the time in which a version has to be idle begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Since {
    /// The begin of the overlap: nothing has been seen since.
    Overlap(Timestamp),
    /// A use.
    Use(Timestamp),
    /// The end of a gap: a sidecar vanished without its last report.
    Gap(Timestamp),
}

impl Evidence {
    /// The use of one version.
    #[must_use]
    pub(crate) fn of(&self, version: VersionRef) -> Use {
        self.uses.get(&version).copied().unwrap_or_default()
    }

    /// Whether `version`, whose overlap began at `overlap`, has been idle for `idle_for`.
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
            // A use at `since` itself is one before the time begins: all later moments have to be covered.
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
    /// The moment itself.
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
