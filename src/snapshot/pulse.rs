//! The times in a snapshot file: when it was written, and when the keyrings were last confirmed.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    clock::{BootTime, Clock, Reading},
    key::{KeyringName, Timestamp},
    keyring::{Confirmation, Keyrings},
    proto::snapshot,
};

/// The times of a sidecar at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulse {
    /// The latest time at which validity was judged.
    pub latest_wall: Timestamp,
    /// The last confirmation of each keyring; a keyring without a confirmation is not in it.
    pub confirmed: BTreeMap<KeyringName, Confirmed>,
}

/// The last confirmation of a keyring by the control plane, by both clocks of the sidecar, and the granted time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmed {
    /// The time of the wall clock.
    pub(crate) wall: Timestamp,
    /// The time in milliseconds since the boot; negative if it was before the boot.
    pub(crate) boot_ms: i64,
    /// How long the sidecar may serve the keyring after that without another confirmation; zero: not at all.
    pub(crate) serve_for: Duration,
}

/// The current times of the clocks of a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// The wall clock.
    pub(crate) wall: Timestamp,
    /// The boot clock.
    pub(crate) boot: BootTime,
}

impl Pulse {
    /// The current times. `latest_wall` is the latest time at which validity was judged.
    #[must_use]
    pub(crate) fn of(keyrings: &Keyrings, latest_wall: Timestamp) -> Self {
        let slots = keyrings.load();
        let confirmed = slots.iter().filter_map(|slot| {
            let (Confirmation { boot_ms, wall_ms }, serve_for) = slot.confirmation()?;
            let confirmed = Confirmed {
                wall: Timestamp::from_millis(wall_ms),
                boot_ms,
                serve_for,
            };
            Some((slot.name().clone(), confirmed))
        });
        Self {
            latest_wall,
            confirmed: confirmed.collect(),
        }
    }

    /// The part of it that is newer than `former`.
    #[must_use]
    pub(crate) fn since(&self, former: &Self) -> Self {
        let confirmed = self.confirmed.iter();
        let newer = confirmed.filter(|(name, is)| former.confirmed.get(*name) != Some(*is));
        Self {
            latest_wall: self.latest_wall,
            confirmed: newer.map(|(name, is)| (name.clone(), *is)).collect(),
        }
    }

    /// Adds `newer`, which has only the changes.
    pub(crate) fn advance(&mut self, newer: Self) {
        self.latest_wall = newer.latest_wall;
        self.confirmed.extend(newer.confirmed);
    }

    /// Returns the confirmation and the grant with which a keyring starts at `now`, by the same boot clock. None if the keyring
    /// was never confirmed, or nothing was granted.
    ///
    /// The age is the larger one of the two clocks. If the wall clock is earlier than its latest time in the file, that latest
    /// time is used.
    #[must_use]
    pub(crate) fn restored(
        &self,
        keyring: &KeyringName,
        now: &Now,
    ) -> Option<(Confirmation, Duration)> {
        let Confirmed {
            wall,
            boot_ms,
            serve_for,
        } = *self.confirmed.get(keyring)?;
        let now_ms = signed_millis(now.boot);
        if serve_for.is_zero() || now_ms < boot_ms {
            return None;
        }
        let by_wall = now.wall.max(self.latest_wall).saturating_since(wall);
        let confirmed = Confirmation {
            boot_ms: boot_ms.min(now_ms.saturating_sub(saturating_millis(by_wall))),
            wall_ms: wall.as_millis(),
        };
        Some((confirmed, serve_for))
    }

    pub(super) fn to_wire(&self) -> snapshot::Pulse {
        let confirmed = self
            .confirmed
            .iter()
            .map(|(keyring, confirmed)| snapshot::Confirmed {
                keyring: keyring.to_string(),
                wall_ms: confirmed.wall.as_millis(),
                boot_ms: confirmed.boot_ms,
                serve_for_ms: u64::try_from(confirmed.serve_for.as_millis()).unwrap_or(u64::MAX),
            });
        snapshot::Pulse {
            latest_wall_ms: self.latest_wall.as_millis(),
            confirmed: confirmed.collect(),
        }
    }

    /// None if the name of a keyring is not valid.
    pub(super) fn from_wire(pulse: snapshot::Pulse) -> Option<Self> {
        let confirmed = pulse.confirmed.into_iter().map(|confirmed| {
            let name: KeyringName = confirmed.keyring.parse().ok()?;
            let confirmed = Confirmed {
                wall: Timestamp::from_millis(confirmed.wall_ms),
                boot_ms: confirmed.boot_ms,
                serve_for: Duration::from_millis(confirmed.serve_for_ms),
            };
            Some((name, confirmed))
        });
        Some(Self {
            latest_wall: Timestamp::from_millis(pulse.latest_wall_ms),
            confirmed: confirmed.collect::<Option<_>>()?,
        })
    }
}

impl Now {
    /// The current times of `clock`.
    #[must_use]
    pub(crate) fn of(clock: &Clock) -> Self {
        Self {
            wall: clock.wall(),
            boot: clock.boot(),
        }
    }

    /// Creates it from the times of both clocks.
    #[must_use]
    pub(crate) const fn reading(&self) -> Reading {
        Reading {
            boot: self.boot,
            wall: self.wall,
        }
    }
}

fn saturating_millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn signed_millis(boot: BootTime) -> i64 {
    i64::try_from(boot.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing;

    /// A keyring that was confirmed at wall time 1,000,000 s and 500 s after the boot, written 20 s later.
    fn pulse() -> Pulse {
        let confirmed = Confirmed {
            wall: seconds(1_000_000),
            boot_ms: 500_000,
            serve_for: GRANT,
        };
        Pulse {
            latest_wall: seconds(1_000_020),
            confirmed: [(testing::keyring_name(), confirmed)].into(),
        }
    }

    const GRANT: Duration = Duration::from_hours(1);

    /// How old the keyring is then, in seconds.
    fn age(pulse: &Pulse, wall: i64, boot: u64) -> Option<i64> {
        let now = Now {
            wall: seconds(wall),
            boot: BootTime::from_millis(boot * 1_000),
        };
        let (confirmed, serve_for) = pulse.restored(&testing::keyring_name(), &now)?;
        assert_eq!(serve_for, GRANT);
        Some(signed_millis(now.boot).saturating_sub(confirmed.boot_ms) / 1_000)
    }

    fn seconds(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    #[test]
    fn the_larger_of_both_clocks_tells() {
        let pulse = pulse();
        assert_eq!(age(&pulse, 1_000_060, 560), Some(60));
        // Set back by a day, set ahead by an hour.
        assert_eq!(age(&pulse, 1_000_060 - 86_400, 560), Some(60));
        assert_eq!(age(&pulse, 1_000_060 + 3_600, 560), Some(3_660));
        // It was 20 s old as it was written, whatever the clocks say now.
        assert_eq!(age(&pulse, 1_000_000, 500), Some(20));
    }

    #[test]
    fn a_clock_that_runs_forward_only_and_is_behind_tells_nothing() {
        assert_eq!(age(&pulse(), 1_000_060, 499), None);
    }

    #[test]
    fn a_keyring_that_was_never_confirmed_or_granted_has_no_age() {
        let never = Pulse {
            confirmed: BTreeMap::new(),
            ..pulse()
        };
        assert_eq!(age(&never, 1_000_060, 560), None);
        let mut ungranted = pulse();
        for confirmed in ungranted.confirmed.values_mut() {
            confirmed.serve_for = Duration::ZERO;
        }
        assert_eq!(age(&ungranted, 1_000_060, 560), None);
    }

    #[test]
    fn a_pulse_is_read_as_it_was_written() {
        assert_eq!(Pulse::from_wire(pulse().to_wire()), Some(pulse()));
    }

    #[test]
    fn what_is_newer_leads_to_the_whole() {
        let other: KeyringName = "partners".parse().expect("a name");
        let former = pulse();
        let mut is = pulse();
        let newer = Confirmed {
            boot_ms: 600_000,
            ..is.confirmed[&testing::keyring_name()]
        };
        is.confirmed.insert(other.clone(), newer);
        is.latest_wall = seconds(1_000_030);
        let since = is.since(&former);
        assert_eq!(since.confirmed.keys().collect::<Vec<_>>(), [&other]);
        let mut read = former;
        read.advance(since);
        assert_eq!(read, is);
    }
}
