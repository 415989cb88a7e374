//! Idempotency keys: they identify a repeated call as the same call.
//!
//! The id of everything that a call creates is derived from its idempotency key. A control plane
//! that was restarted does not remember the call. By that id it finds what the call has created,
//! and does not create it twice.

use std::{fmt, str::FromStr, sync::Arc};

use super::{base62, digest::Pepper, id::KeyId, random::RandomError};

/// The name of one call: 1 to 128 printable ASCII characters without spaces. Not a secret.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct IdempotencyKey(Arc<str>);

/// A text that is not a valid idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "use 1 to {} printable ASCII characters without spaces",
    IdempotencyKey::MAX_LEN
)]
pub(crate) struct ParseIdempotencyKeyError;

impl IdempotencyKey {
    /// The maximum length in characters. A UUID has 36; the keys of workflow engines seldom have
    /// more than 100.
    pub(crate) const MAX_LEN: usize = 128;

    /// Creates a key of 24 base62 characters from the operating system's random source.
    ///
    /// # Errors
    ///
    /// When that source fails.
    pub(crate) fn generate() -> Result<Self, RandomError> {
        let characters: [u8; 24] = base62::random()?;
        let text: String = characters.into_iter().map(char::from).collect();
        Ok(Self(text.into()))
    }

    /// Returns the key as text.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Derives the id of what the `attempt`-th run of a call of `method` by `actor` creates. The
    /// same key of another actor gives another id.
    #[must_use]
    pub(crate) fn id(&self, pepper: &Pepper, actor: &str, method: &str, attempt: u32) -> KeyId {
        let attempt = attempt.to_be_bytes();
        let parts: [&[u8]; 4] = [
            actor.as_bytes(),
            method.as_bytes(),
            self.0.as_bytes(),
            &attempt,
        ];
        KeyId::from_uniform(pepper.mac(&parts))
    }
}

impl FromStr for IdempotencyKey {
    type Err = ParseIdempotencyKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = matches!(text.len(), 1..=Self::MAX_LEN)
            && text.bytes().all(|byte| byte.is_ascii_graphic());
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(ParseIdempotencyKeyError)
        }
    }
}

impl fmt::Display for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{MasterPepper, PepperId};

    fn key(text: &str) -> IdempotencyKey {
        text.parse().expect("an idempotency key")
    }

    #[test]
    fn ids_depend_on_pepper_actor_method_key_and_attempt() {
        let [one, other] = [[7; 32], [8; 32]].map(|secret| {
            MasterPepper::new(PepperId::new(1), &secret)
                .expect("32 bytes")
                .for_idempotency()
        });
        let id = key("k").id(&one, "alice", "CreateKey", 0);
        assert_eq!(id, key("k").id(&one, "alice", "CreateKey", 0));
        for different in [
            key("l").id(&one, "alice", "CreateKey", 0),
            key("k").id(&one, "mallory", "CreateKey", 0),
            key("k").id(&one, "alice", "CreateToken", 0),
            key("k").id(&one, "alice", "CreateKey", 1),
            key("k").id(&other, "alice", "CreateKey", 0),
            // The border between the parts counts.
            key("yk").id(&one, "alice", "CreateKe", 0),
        ] {
            assert_ne!(id, different);
        }
    }

    #[test]
    fn keys_are_printable_and_bounded() {
        assert!(
            "4f9c1f6e-0f5d-4b7e-9a52-1d4c3c2b1a00"
                .parse::<IdempotencyKey>()
                .is_ok()
        );
        assert!("k".repeat(128).parse::<IdempotencyKey>().is_ok());
        for bad in [
            String::new(),
            "a b".to_owned(),
            "ä".to_owned(),
            "k".repeat(129),
        ] {
            assert_eq!(bad.parse::<IdempotencyKey>(), Err(ParseIdempotencyKeyError));
        }
        let [one, other] = [(); 2].map(|()| IdempotencyKey::generate().expect("random"));
        assert_ne!(one, other);
        assert_eq!(one.as_str().parse(), Ok(one));
    }
}
