//! Why a text is not a value.

/// A text that is not a valid value; says what is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseValueError(&'static str);

impl ParseValueError {
    pub(crate) const fn new(rule: &'static str) -> Self {
        Self(rule)
    }
}
