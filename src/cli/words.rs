//! Words for people: lists, ages, counted nouns, and text that cannot steer a terminal.

use std::{borrow::Cow, time::Duration};

use crate::{key::Timestamp, printable, proto::admin};

/// The colour of a [`label`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Colour {
    /// For errors.
    Red,
    /// For notes and hints.
    Cyan,
}

/// The text of a cell without a value.
pub(crate) const NOTHING: &str = "-";

/// The bold word at the start of a line on standard error.
#[must_use]
pub(crate) fn label(text: &str, colour: Colour, coloured: bool) -> String {
    let code = match colour {
        Colour::Red => "31",
        Colour::Cyan => "36",
    };
    if coloured {
        format!("\x1b[1;{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Replaces every character of `text` that controls a terminal or deceives the reader, so that text of another party stays
/// on its line and cannot look like something else.
#[must_use]
pub(crate) fn printable(text: &str) -> String {
    printable::line(text)
}

/// Does the same for a text of several lines.
#[must_use]
pub(crate) fn printable_lines(text: &str) -> Cow<'_, str> {
    printable::lines(text)
}

/// `text`, or a dash if it is empty.
#[must_use]
pub(crate) fn or_nothing(text: &str) -> String {
    if text.is_empty() {
        NOTHING.to_owned()
    } else {
        text.to_owned()
    }
}

/// A point in time to the second, or a dash.
#[must_use]
pub(crate) fn time(time: Option<Timestamp>) -> String {
    time.map_or_else(
        || NOTHING.to_owned(),
        |time| humantime::format_rfc3339_seconds(time.into()).to_string(),
    )
}

/// Whether a sidecar may answer checks.
#[must_use]
pub(crate) const fn presence(presence: admin::Presence) -> &'static str {
    match presence {
        admin::Presence::Unspecified => "unknown",
        admin::Presence::Connected => "connected",
        admin::Presence::Lost => "lost",
        admin::Presence::Stopped => "stopped",
    }
}

/// `yes` or `no`.
#[must_use]
pub(crate) fn yes_no(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}

/// How long before `now` something was, in its largest unit: `4s`, `3m`, `2h`, `5d`.
#[must_use]
pub(crate) fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.saturating_since(then).as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// How long something took: `1.4 ms`, `412 ms`, `2.41 s`.
#[must_use]
pub(crate) fn took(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match duration.as_millis() {
        0..10 => format!("{:.1} ms", seconds * 1e3),
        10..1_000 => format!("{:.0} ms", seconds * 1e3),
        1_000.. => format!("{seconds:.2} s"),
    }
}

/// How far a point in time is from `now`: `in 3d`, `4s ago`.
#[must_use]
pub(crate) fn distance(then: Timestamp, now: Timestamp) -> String {
    if then > now {
        format!("in {}", age(now, then))
    } else {
        format!("{} ago", age(then, now))
    }
}

/// [`distance`], or a dash.
#[must_use]
pub(crate) fn when(then: Option<Timestamp>, now: Timestamp) -> String {
    then.map_or_else(|| NOTHING.to_owned(), |then| distance(then, now))
}

/// Requests per second: `0.02/s`, `7.5/s`, `320/s`.
#[must_use]
pub(crate) fn rate(rate: f64) -> String {
    if rate == 0.0 {
        "0/s".to_owned()
    } else if rate < 0.01 {
        "<0.01/s".to_owned()
    } else if rate < 1.0 {
        format!("{rate:.2}/s")
    } else if rate < 100.0 {
        format!("{rate:.1}/s")
    } else {
        format!("{rate:.0}/s")
    }
}

/// A share between 0 and 1 in percent. A small share is not shown as 0 %, and a share below 1 is not shown as 100 %.
#[must_use]
pub(crate) fn percent(share: f64) -> String {
    if share > 0.0 && share < 0.01 {
        "<1%".to_owned()
    } else if share > 0.99 && share < 1.0 {
        ">99%".to_owned()
    } else {
        format!("{:.0}%", share * 100.0)
    }
}

/// `1 revision`, `2 revisions`.
#[must_use]
pub(crate) fn count(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// `a`, `a and b`, `a, b and c`; at most `most` names, and the number of the rest.
#[must_use]
pub(crate) fn list(names: &[String], most: usize) -> String {
    let rest = names.len().saturating_sub(most);
    let mut shown: Vec<String> = names.iter().take(most).map(|n| printable(n)).collect();
    if rest > 0 {
        shown.push(format!("{rest} more"));
    }
    match shown.split_last() {
        None => String::new(),
        Some((only, [])) => only.clone(),
        Some((last, before)) => format!("{} and {last}", before.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_read_as_english() {
        let names: Vec<String> = ["a", "b", "c", "d"].map(str::to_owned).into();
        assert_eq!(list(&names[..0], 3), "");
        assert_eq!(list(&names[..1], 3), "a");
        assert_eq!(list(&names[..2], 3), "a and b");
        assert_eq!(list(&names[..3], 3), "a, b and c");
        assert_eq!(list(&names, 2), "a, b and 2 more");
    }

    #[test]
    fn ages_use_their_largest_unit() {
        let now = Timestamp::from_millis(1_000_000_000_000);
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (3_599, "59m"),
            (3_600, "1h"),
            (86_399, "23h"),
            (86_400, "1d"),
        ] {
            let then = Timestamp::from_millis(now.as_millis() - seconds * 1_000);
            assert_eq!(age(then, now), text);
        }
        assert_eq!(age(now.saturating_add(Duration::from_secs(9)), now), "0s");
    }

    #[test]
    fn short_times_are_told_in_milliseconds() {
        for (micros, text) in [
            (0, "0.0 ms"),
            (1_440, "1.4 ms"),
            (9_999, "10.0 ms"),
            (10_000, "10 ms"),
            (412_000, "412 ms"),
            (1_000_000, "1.00 s"),
            (61_234_000, "61.23 s"),
        ] {
            assert_eq!(took(Duration::from_micros(micros)), text);
        }
    }

    #[test]
    fn a_distance_says_on_which_side_of_now_it_lies() {
        let now = Timestamp::from_millis(1_000_000_000_000);
        let later = now.saturating_add(Duration::from_mins(3));
        assert_eq!(distance(later, now), "in 3m");
        assert_eq!(distance(now, later), "3m ago");
        assert_eq!(distance(now, now), "0s ago");
    }

    #[test]
    fn rates_and_shares_keep_what_is_little_apart_from_nothing() {
        for (number, text) in [
            (0.0, "0/s"),
            (0.000_1, "<0.01/s"),
            (0.02, "0.02/s"),
            (7.5, "7.5/s"),
            (320.4, "320/s"),
        ] {
            assert_eq!(rate(number), text);
        }
        for (share, text) in [
            (0.0, "0%"),
            (0.001, "<1%"),
            (0.125, "12%"),
            (0.75, "75%"),
            (0.999, ">99%"),
            (1.0, "100%"),
        ] {
            assert_eq!(percent(share), text);
        }
    }
}
