//! Durations as people write them: `90d`, `1d 12h`, `1h 30m`, `45s`, `250ms`.

use std::{fmt, time::Duration};

/// Displays a duration in days and smaller units, each less than one of the next larger unit. The
/// parser of durations reads the text back exactly.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written(Duration);

/// The units. Months and years are left out: their length varies, and nobody writes a lifetime of
/// `2months 29days 2h 52m 48s`.
const UNITS: [(&str, u128); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Returns `duration` as people write it.
#[must_use]
pub(crate) const fn written(duration: Duration) -> Written {
    Written(duration)
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_zero() {
            return f.write_str("0s");
        }
        let mut rest = self.0.as_nanos();
        let mut separator = "";
        for (unit, length) in UNITS {
            let count = rest / length;
            rest %= length;
            if count > 0 {
                write!(f, "{separator}{count}{unit}")?;
                separator = " ";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cli::value;

    #[test]
    fn durations_read_as_people_write_them() {
        for (duration, text) in [
            (Duration::ZERO, "0s"),
            (Duration::from_millis(250), "250ms"),
            (Duration::from_secs(45), "45s"),
            (Duration::from_mins(1), "1m"),
            (Duration::from_mins(90), "1h 30m"),
            (Duration::from_hours(24), "1d"),
            (Duration::from_hours(36), "1d 12h"),
            (Duration::from_hours(7 * 24), "7d"),
            (Duration::from_hours(90 * 24), "90d"),
            (Duration::from_hours(366 * 24), "366d"),
            (Duration::new(61, 1), "1m 1s 1ns"),
        ] {
            assert_eq!(written(duration).to_string(), text);
        }
        assert_eq!(written(value::MAX_DURATION).to_string(), "36525d");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            seconds in prop_oneof![0..100_u64, 0..=value::MAX_DURATION.as_secs() - 1],
            nanos in prop_oneof![Just(0), 0..1_000_000_000_u32],
        ) {
            let duration = Duration::new(seconds, nanos);
            prop_assert_eq!(value::duration(&written(duration).to_string()), Ok(duration));
        }
    }
}
