//! How late it was as something was written, and how fresh what was written.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    clock::{BootId, BootTime, Clock, Reading},
    key::{KeyringName, Timestamp},
    keyring::Keyrings,
    proto::snapshot as wire,
};

/// What a sidecar's clocks said at some time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulse {
    /// The latest time by which windows were judged.
    pub latest_wall: Timestamp,
    /// The boot of the machine; none when it could not be told.
    pub boot_id: Option<BootId>,
    /// When each keyring was confirmed last; those that never were are not among them.
    pub confirmed: BTreeMap<KeyringName, Confirmed>,
}

/// When the control plane last confirmed a keyring, by both of the sidecar's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmed {
    /// By the wall clock.
    pub wall: Timestamp,
    /// In milliseconds since the boot; below zero when that was before.
    pub boot_ms: i64,
}

/// What a machine's clocks say.
#[derive(Clone, Debug)]
pub struct Now {
    /// The wall clock.
    pub wall: Timestamp,
    /// The clock that runs forward only.
    pub boot: BootTime,
    /// Since which boot; none when it cannot be told.
    pub boot_id: Option<BootId>,
}

/// How old a keyring is that was read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// The control plane has never confirmed it.
    Never,
    /// So much time has passed since.
    Known(Duration),
    /// The machine has booted since, and its wall clock is behind the latest time that it had.
    Untold,
}

impl Pulse {
    /// What is so now. `latest_wall` is the latest time by which windows were judged.
    #[must_use]
    pub fn of(keyrings: &Keyrings, latest_wall: Timestamp, now: &Now) -> Self {
        let confirmed = keyrings.iter().filter_map(|slot| {
            let (confirmed, _) = slot.confirmation()?;
            let confirmed = Confirmed {
                wall: Timestamp::from_millis(confirmed.wall_ms),
                boot_ms: confirmed.boot_ms,
            };
            Some((slot.name().clone(), confirmed))
        });
        Self {
            latest_wall,
            boot_id: now.boot_id.clone(),
            confirmed: confirmed.collect(),
        }
    }

    /// How old a keyring is at `now`, of which this is the last that was written: by the larger of what the two clocks say.
    ///
    /// The clock that runs forward only tells as long as the machine has not booted. A wall clock that is behind the latest
    /// time that it had was set back; how much time has passed since then it cannot tell.
    #[must_use]
    pub fn age(&self, keyring: &KeyringName, now: &Now) -> Age {
        let Some(confirmed) = self.confirmed.get(keyring) else {
            return Age::Never;
        };
        let by_wall = now
            .wall
            .max(self.latest_wall)
            .saturating_since(confirmed.wall);
        let is_same_boot = self.boot_id.is_some() && self.boot_id == now.boot_id;
        let since_boot = signed_millis(now.boot).saturating_sub(confirmed.boot_ms);
        match u64::try_from(since_boot) {
            Ok(by_boot) if is_same_boot => Age::Known(by_wall.max(Duration::from_millis(by_boot))),
            // The latest time may be held at what the control plane said, and the clock have been further ahead.
            Ok(_) | Err(_) if now.wall < self.latest_wall.max(confirmed.wall) => Age::Untold,
            Ok(_) | Err(_) => Age::Known(by_wall),
        }
    }

    pub(super) fn to_wire(&self) -> wire::Pulse {
        let confirmed = self
            .confirmed
            .iter()
            .map(|(keyring, confirmed)| wire::Confirmed {
                keyring: keyring.to_string(),
                wall_ms: confirmed.wall.as_millis(),
                boot_ms: confirmed.boot_ms,
            });
        wire::Pulse {
            latest_wall_ms: self.latest_wall.as_millis(),
            boot_id: self
                .boot_id
                .as_ref()
                .map_or_else(String::new, BootId::to_string),
            confirmed: confirmed.collect(),
        }
    }

    /// None when it names a keyring that cannot be.
    pub(super) fn from_wire(pulse: wire::Pulse) -> Option<Self> {
        let confirmed = pulse.confirmed.into_iter().map(|confirmed| {
            let name: KeyringName = confirmed.keyring.parse().ok()?;
            let confirmed = Confirmed {
                wall: Timestamp::from_millis(confirmed.wall_ms),
                boot_ms: confirmed.boot_ms,
            };
            Some((name, confirmed))
        });
        Some(Self {
            latest_wall: Timestamp::from_millis(pulse.latest_wall_ms),
            boot_id: BootId::new(&pulse.boot_id),
            confirmed: confirmed.collect::<Option<_>>()?,
        })
    }
}

impl Now {
    /// What a clock says.
    #[must_use]
    pub fn of(clock: &Clock) -> Self {
        Self {
            wall: clock.wall(),
            boot: clock.boot(),
            boot_id: clock.boot_id(),
        }
    }

    /// Both clocks.
    #[must_use]
    pub const fn reading(&self) -> Reading {
        Reading {
            boot: self.boot,
            wall: self.wall,
        }
    }
}

fn signed_millis(boot: BootTime) -> i64 {
    i64::try_from(boot.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing;

    /// A keyring that was confirmed at wall time 1,000,000 s and 500 s after the boot, written 20 s later.
    fn pulse(boot: &str) -> Pulse {
        let confirmed = Confirmed {
            wall: seconds(1_000_000),
            boot_ms: 500_000,
        };
        Pulse {
            latest_wall: seconds(1_000_020),
            boot_id: BootId::new(boot),
            confirmed: [(testing::keyring_name(), confirmed)].into(),
        }
    }

    fn age(pulse: &Pulse, wall: i64, boot: u64, boot_id: &str) -> Age {
        let now = Now {
            wall: seconds(wall),
            boot: BootTime::from_millis(boot * 1_000),
            boot_id: BootId::new(boot_id),
        };
        pulse.age(&testing::keyring_name(), &now)
    }

    fn seconds(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    const fn known(seconds: u64) -> Age {
        Age::Known(Duration::from_secs(seconds))
    }

    #[test]
    fn within_a_boot_the_larger_of_both_clocks_tells() {
        let pulse = pulse("one");
        assert_eq!(age(&pulse, 1_000_060, 560, "one"), known(60));
        assert_eq!(age(&pulse, 1_000_060, 560, "one"), known(60));
        // Set back by a day, set ahead by an hour.
        assert_eq!(age(&pulse, 1_000_060 - 86_400, 560, "one"), known(60));
        assert_eq!(age(&pulse, 1_000_060 + 3_600, 560, "one"), known(3_660));
    }

    #[test]
    fn across_boots_the_wall_clock_tells_unless_it_was_set_back() {
        let pulse = pulse("one");
        assert_eq!(age(&pulse, 1_000_060, 5, "two"), known(60));
        assert_eq!(age(&pulse, 1_000_020, 5, "two"), known(20));
        assert_eq!(age(&pulse, 1_000_019, 5, "two"), Age::Untold);
        // A boot that cannot be told is not the same one.
        assert_eq!(age(&pulse, 1_000_019, 560, ""), Age::Untold);
        let untold = self::pulse("");
        assert_eq!(age(&untold, 1_000_019, 560, ""), Age::Untold);
    }

    #[test]
    fn a_clock_that_was_ahead_makes_nothing_fresh_when_it_is_set_right() {
        let pulse = Pulse {
            latest_wall: seconds(900_000),
            ..pulse("one")
        };
        assert_eq!(age(&pulse, 900_010, 5, "two"), Age::Untold);
        assert_eq!(age(&pulse, 900_010, 560, "one"), known(60));
    }

    #[test]
    fn a_clock_that_runs_forward_only_and_is_behind_is_of_another_boot() {
        let pulse = pulse("one");
        assert_eq!(age(&pulse, 1_000_060, 499, "one"), known(60));
        assert_eq!(age(&pulse, 999_000, 499, "one"), Age::Untold);
    }

    #[test]
    fn a_keyring_that_was_never_confirmed_has_no_age() {
        let pulse = Pulse {
            confirmed: BTreeMap::new(),
            ..pulse("one")
        };
        assert_eq!(age(&pulse, 1_000_060, 560, "one"), Age::Never);
    }

    #[test]
    fn a_pulse_is_read_as_it_was_written() {
        for pulse in [pulse("one"), pulse("")] {
            assert_eq!(Pulse::from_wire(pulse.to_wire()), Some(pulse));
        }
    }
}
