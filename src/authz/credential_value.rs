//! The bytes of a credential.

use zeroize::Zeroizing;

/// The bytes of a credential: borrowed from the message, or decoded into a buffer that is
/// overwritten when it is dropped. They are never printed.
pub(super) enum CredentialValue<'a> {
    Borrowed(&'a [u8]),
    Owned(Zeroizing<Vec<u8>>),
}

impl CredentialValue<'_> {
    pub(super) fn owned(bytes: Vec<u8>) -> Self {
        Self::Owned(Zeroizing::new(bytes))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}
