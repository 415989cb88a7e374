//! The keys that checks present.

use std::fmt;

use anyhow::{Result, ensure};

/// The secrets of the keys of a keyring, one after another, all with the same length.
pub(crate) struct Keys(Vec<u8>);

impl Keys {
    /// The length of a token whose prefix is `rlk`: prefix, `_`, key id, `_`, secret, checksum.
    pub(crate) const LEN: usize = 3 + 1 + 12 + 1 + 32 + 6;

    /// The keys in `bytes`.
    pub(crate) const fn of(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes of all keys.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Adds a key.
    ///
    /// # Errors
    ///
    /// When it has another length.
    pub(crate) fn push(&mut self, key: &str) -> Result<()> {
        ensure!(key.len() == Self::LEN, "a key has another length");
        self.0.extend_from_slice(key.as_bytes());
        Ok(())
    }

    /// The number of keys.
    pub(crate) fn len(&self) -> u64 {
        (self.0.len() / Self::LEN) as u64
    }

    /// Key `number`.
    pub(crate) fn get(&self, number: u64) -> &[u8] {
        let number = usize::try_from(number).expect("it is below their number");
        &self.0[number * Self::LEN..][..Self::LEN]
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.len())
    }
}
