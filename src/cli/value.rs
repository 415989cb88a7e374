//! Parsers of values on the command line. An error names the problem and gives an example; clap names the flag.

use std::{ffi::OsStr, time::Duration};

use clap::{Arg, Command, builder::TypedValueParser, error::ErrorKind};

use crate::key::{
    AllowedSources, KeyId, Lifetime, id::ParseIdError, permission::ParseSourceError,
    webhook::WebhookId,
};

/// Parses a [`KeyId`]. Unlike the parsers of clap, its error does not repeat the text: a user may have pasted a whole key
/// instead of its id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyIdParser;

/// Parses a [`WebhookId`]. Its error does not repeat the text either: it may be the signing secret.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WebhookIdParser;

/// A text that is not a duration, or not one that commands accept.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum ParseDurationError {
    /// The text is not a duration.
    #[error("{0}; examples: 30s, 12h or 7d")]
    Syntax(humantime::DurationError),
    /// The duration is zero, which has no meaning here.
    #[error("the duration must be longer than zero; examples: 30s, 12h or 7d")]
    Zero,
    /// The duration is longer than [`MAX_DURATION`].
    #[error("the duration is longer than 100 years; omit the flag for no end")]
    TooLong,
}

/// A text that is not a lifetime.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}, or never")]
pub(crate) struct ParseLifetimeError(#[from] ParseDurationError);

/// The longest duration, 100 years. A longer one is a typing error, and every shorter one fits into all formats that the
/// duration passes through.
pub(crate) const MAX_DURATION: Duration = Duration::from_hours(24 * 36_525);

/// Parses a duration such as `30s`, `7d` or `1h30m`; zero is allowed.
///
/// # Errors
///
/// When `text` is not a duration, or is too long.
pub(crate) fn duration(text: &str) -> Result<Duration, ParseDurationError> {
    let duration = humantime::parse_duration(text).map_err(ParseDurationError::Syntax)?;
    if duration > MAX_DURATION {
        return Err(ParseDurationError::TooLong);
    }
    Ok(duration)
}

/// Parses a [`duration`] above zero.
///
/// # Errors
///
/// As for [`duration`], and when it is zero.
pub(crate) fn positive_duration(text: &str) -> Result<Duration, ParseDurationError> {
    let duration = duration(text)?;
    if duration.is_zero() {
        return Err(ParseDurationError::Zero);
    }
    Ok(duration)
}

/// Parses the lifetime of a new version: a [`positive_duration`], or `never` for one that does not expire.
///
/// # Errors
///
/// When it is neither.
pub(crate) fn lifetime(text: &str) -> Result<Lifetime, ParseLifetimeError> {
    match text {
        "never" => Ok(Lifetime::Unlimited),
        text => Ok(Lifetime::Limited(positive_duration(text)?)),
    }
}

/// Checks that `text` is a CIDR block or an address, and returns it unchanged.
///
/// # Errors
///
/// When it is neither.
pub(crate) fn source(text: &str) -> Result<String, ParseSourceError> {
    AllowedSources::parse(&[text]).map(|_| text.to_owned())
}

impl TypedValueParser for KeyIdParser {
    type Value = KeyId;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<KeyId, clap::Error> {
        let id = KeyId::from_bytes(value.as_encoded_bytes());
        id.map_err(|error| unrepeated(command, arg, &error))
    }
}

impl TypedValueParser for WebhookIdParser {
    type Value = WebhookId;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<WebhookId, clap::Error> {
        let id = value.to_str().unwrap_or_default().parse();
        id.map_err(|error| unrepeated(command, arg, &error))
    }
}

/// The error of clap, without the value.
fn unrepeated(command: &Command, arg: Option<&Arg>, error: &ParseIdError) -> clap::Error {
    let name = arg.map_or_else(|| "ID".to_owned(), ToString::to_string);
    let problem = format!("invalid value for '{name}': {error}\n");
    clap::Error::raw(ErrorKind::ValueValidation, problem).with_cmd(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_mins(90)));
        assert_eq!(duration("7d"), Ok(Duration::from_hours(168)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        assert_eq!(positive_duration("0s"), Err(ParseDurationError::Zero));
    }

    #[test]
    fn the_longest_duration_is_a_hundred_years() {
        assert_eq!(duration("36525d"), Ok(MAX_DURATION));
        assert_eq!(duration("36525d 1s"), Err(ParseDurationError::TooLong));
    }

    #[test]
    fn a_bad_duration_is_answered_with_an_example() {
        for bad in ["", "soon", "30", "5 parsecs", "-3s"] {
            let error = duration(bad).expect_err("not a duration").to_string();
            assert!(error.ends_with("examples: 30s, 12h or 7d"), "{error}");
        }
    }

    #[test]
    fn a_lifetime_is_a_duration_or_never() {
        let days = Duration::from_hours(24 * 90);
        assert_eq!(lifetime("90d"), Ok(Lifetime::Limited(days)));
        assert_eq!(lifetime("never"), Ok(Lifetime::Unlimited));
        let error = lifetime("forever").expect_err("no duration").to_string();
        assert!(
            error.ends_with("examples: 30s, 12h or 7d, or never"),
            "{error}"
        );
        assert!(lifetime("0s").is_err());
    }

    #[test]
    fn sources_are_blocks_or_addresses() {
        assert_eq!(source("10.0.0.0/8").as_deref(), Ok("10.0.0.0/8"));
        assert!(source("2001:db8::1").is_ok());
        assert!(source("example.com").is_err());
    }
}
