//! The error for invalid values.

/// A text that is not a valid value. The error describes a valid one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseValueError(&'static str);

impl ParseValueError {
    pub(crate) const fn new(rule: &'static str) -> Self {
        Self(rule)
    }
}
