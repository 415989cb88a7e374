//! Parses the fields of requests into values of the domain. A field without such a value is an
//! invalid argument, and the error names the field.

use std::time::{Duration, SystemTime};

use tonic::Status;

use super::error::invalid;
use crate::{control::token::Role, key::Timestamp, proto::admin as api};

/// Parses a text field that has a type of its own.
pub(super) fn parse<T>(name: &'static str, text: &str) -> Result<T, Status>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    text.parse().map_err(|error| invalid(name, error))
}

pub(super) fn duration(
    name: &'static str,
    value: Option<prost_types::Duration>,
) -> Result<Option<Duration>, Status> {
    value
        .map(|value| {
            Duration::try_from(value).map_err(|_| invalid(name, "use a duration of zero or more"))
        })
        .transpose()
}

pub(super) fn timestamp(
    name: &'static str,
    value: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>, Status> {
    value
        .map(|value| {
            SystemTime::try_from(value)
                .map(Timestamp::from)
                .map_err(|_| invalid(name, "is not a valid time"))
        })
        .transpose()
}

pub(super) fn role(value: i32) -> Result<Role, Status> {
    match api::Role::try_from(value) {
        Ok(api::Role::Viewer) => Ok(Role::Viewer),
        Ok(api::Role::Issuer) => Ok(Role::Issuer),
        Ok(api::Role::Revoker) => Ok(Role::Revoker),
        Ok(api::Role::Admin) => Ok(Role::Admin),
        Ok(api::Role::Unspecified) | Err(_) => {
            Err(invalid("role", "use viewer, issuer, revoker or admin"))
        }
    }
}
