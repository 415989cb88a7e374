//! Names of nodes and clusters.

use std::{fmt, str::FromStr, sync::Arc};

use crate::parse::ParseValueError;

/// The name of a node or cluster: 1 to 253 of `A-Z`, `a-z`, `0-9` and `. _ -`. A DNS name has the
/// same maximum length.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NodeName(Arc<str>);

impl NodeName {
    /// Returns the host name of this machine.
    ///
    /// # Errors
    ///
    /// When the host name is empty or is not a valid name of a node.
    pub(crate) fn of_host() -> Result<Self, ParseValueError> {
        rustix::system::uname()
            .nodename()
            .to_str()
            .ok()
            .and_then(|name| name.parse().ok())
            .ok_or(ParseValueError::new(
                "the host name of this machine is not a valid name of a node, set this field",
            ))
    }

    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = matches!(text.len(), 1..=253)
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(ParseValueError::new(
                "use 1 to 253 of A-Z, a-z, 0-9 and . _ -",
            ))
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
