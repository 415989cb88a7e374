//! Names and numbers that identify things. Each kind has its own type.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{base62, random::RandomError};

/// The name of a keyring: 1 to 63 of `a-z`, `0-9` and `-`, beginning with a letter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyringName(Arc<str>);

/// The name of a consumer within its keyring: 1 to 128 of `A-Z`, `a-z`, `0-9` and `. _ - : @ /`.
///
/// HTTP headers and metric labels contain it, so it is plain ASCII without spaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ConsumerId(Arc<str>);

/// The public id of a key, stable across its versions: 12 base62 characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId([u8; KeyId::LEN]);

/// The public id of a rotation: 12 base62 characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RotationId(KeyId);

/// The number of a key version, counted from 1 and never used twice for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VersionNumber(u32);

/// One version of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionRef {
    /// The id of the key.
    pub key_id: KeyId,
    /// The number of the version within the key.
    pub version: VersionNumber,
}

/// A position in a keyring's log; 0 before the first change.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(u64);

/// The number of one uninterrupted history of a log. A new epoch starts whenever the history may
/// have been rewritten.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(u64);

/// A text that is not a valid name or id. The message says what is valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {what}: {rule}")]
pub struct ParseIdError {
    what: &'static str,
    rule: &'static str,
}

impl KeyringName {
    const ERROR: ParseIdError = ParseIdError {
        what: "keyring name",
        rule: "use 1 to 63 of a-z, 0-9 and '-', beginning with a letter",
    };

    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KeyringName {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = matches!(text.len(), 1..=63)
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(Self::ERROR)
        }
    }
}

impl ConsumerId {
    const ERROR: ParseIdError = ParseIdError {
        what: "consumer",
        rule: "use 1 to 128 of A-Z, a-z, 0-9 and . _ - : @ /",
    };

    /// Returns the id as text.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ConsumerId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = matches!(text.len(), 1..=128)
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-:@/".contains(&b));
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(Self::ERROR)
        }
    }
}

impl KeyId {
    /// The length in characters.
    pub(crate) const LEN: usize = 12;

    const ERROR: ParseIdError = ParseIdError {
        what: "key id",
        rule: "it has 12 characters of A-Z, a-z and 0-9, and stands between the first two '_' of a key",
    };

    /// Creates an id from the operating system's random source.
    ///
    /// # Errors
    ///
    /// When that source fails.
    pub fn generate() -> Result<Self, RandomError> {
        base62::random().map(Self)
    }

    /// Creates the id for uniformly distributed bytes. Only the first 16 bytes count: they are 128
    /// bits for the 71 bits of an id, so that no id is noticeably more likely than another.
    pub(super) fn from_uniform(bytes: [u8; 32]) -> Self {
        let mut rest = bytes[..16]
            .iter()
            .fold(0_u128, |number, byte| number << 8 | u128::from(*byte));
        Self(std::array::from_fn(|_| {
            let digit = rest % 62;
            rest /= 62;
            base62::character(digit)
        }))
    }

    /// Parses the id in the middle of a token.
    ///
    /// # Errors
    ///
    /// When `bytes` is not 12 base62 characters.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, ParseIdError> {
        let id: [u8; Self::LEN] = bytes.try_into().map_err(|_| Self::ERROR)?;
        if id.iter().all(u8::is_ascii_alphanumeric) {
            Ok(Self(id))
        } else {
            Err(Self::ERROR)
        }
    }

    /// Returns the id as text.
    #[must_use]
    #[expect(
        clippy::missing_panics_doc,
        reason = "an id holds base62 characters only"
    )]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a key id holds base62 characters only")
    }
}

impl FromStr for KeyId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::from_bytes(text.as_bytes())
    }
}

impl RotationId {
    /// Creates an id from the operating system's random source.
    ///
    /// # Errors
    ///
    /// When that source fails.
    pub fn generate() -> Result<Self, RandomError> {
        KeyId::generate().map(Self)
    }

    /// Returns the id as text.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// Keeps the characters: both ids have 12 base62 characters.
impl From<KeyId> for RotationId {
    fn from(id: KeyId) -> Self {
        Self(id)
    }
}

impl FromStr for RotationId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self).map_err(|_| ParseIdError {
            what: "rotation id",
            rule: "it has 12 characters of A-Z, a-z and 0-9",
        })
    }
}

impl VersionRef {
    /// A value below all references to versions that exist.
    pub(crate) const LEAST: Self = Self {
        key_id: KeyId([0; KeyId::LEN]),
        version: VersionNumber(0),
    };
}

impl VersionNumber {
    /// The number of a key's first version.
    pub const FIRST: Self = Self(1);

    /// Creates the version number `number`; none for 0.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        match number {
            0 => None,
            number => Some(Self(number)),
        }
    }

    /// Returns the number as an integer.
    #[must_use]
    pub(crate) const fn get(self) -> u32 {
        self.0
    }

    /// Returns the number after this one.
    #[must_use]
    pub(crate) const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl Revision {
    /// Creates the revision `number`.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Returns the number as an integer.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the revision after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// Returns by how many revisions this one is behind `head`; zero when it is not behind.
    #[must_use]
    pub(crate) const fn behind(self, head: Self) -> u64 {
        head.0.saturating_sub(self.0)
    }
}

impl Epoch {
    /// Creates the epoch `number`.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Returns the number as an integer.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

macro_rules! text_conversions {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.as_str().to_owned()
            }
        }
    )*};
}

text_conversions!(KeyringName, ConsumerId, KeyId, RotationId);

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

impl fmt::Debug for RotationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RotationId({self})")
    }
}

impl fmt::Display for VersionNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Key id and version, such as `7Qm2Xc91TbKe/2`.
impl fmt::Display for VersionRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.key_id, self.version)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyring_names_are_checked() {
        assert!("payments-2".parse::<KeyringName>().is_ok());
        for bad in [
            "",
            "Payments",
            "2payments",
            "-a",
            "_control",
            &"a".repeat(64),
        ] {
            assert!(bad.parse::<KeyringName>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn consumer_ids_cannot_break_a_header() {
        assert!("team/checkout@eu-1".parse::<ConsumerId>().is_ok());
        for bad in ["", "a b", "a,b", "a\r\nb", "ä", &"a".repeat(129)] {
            assert!(bad.parse::<ConsumerId>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn key_ids_have_twelve_base62_characters() {
        let id = KeyId::generate().expect("the random source works");
        assert_eq!(id.as_str().parse::<KeyId>(), Ok(id));
        for bad in ["", "7Qm2Xc91TbK", "7Qm2Xc91TbKe0", "7Qm2Xc91Tb-e"] {
            assert!(bad.parse::<KeyId>().is_err(), "{bad:?} was accepted");
        }
    }
}
