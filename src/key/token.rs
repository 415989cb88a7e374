//! The tokens that consumers present: their format, checksum and creation.
//!
//! A token is `<prefix>_<keyid>_<secret><checksum>`: the keyring's [`Prefix`], the 12 characters of
//! a [`KeyId`], 32 base62 characters from the operating system's random source (190 bits), and the
//! CRC-32 (IEEE) of everything before it as 6 base62 characters. The checksum is not for security:
//! it rejects a typo before anything is hashed, and lets secret scanners avoid false matches.
//!
//! These types erase a secret from the memory that they own when they are dropped. They cannot
//! erase copies that a network stack or a terminal creates.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    base62,
    id::{KeyId, ParseIdError},
    random::RandomError,
    wrapping::Wrapping,
};

/// A key as a request presents it. Borrowed, never printed.
#[derive(Clone, Copy)]
pub struct PresentedKey<'a>(&'a [u8]);

/// A key that this process has generated, or received for import. Erased on drop, never printed.
pub struct Secret(Zeroizing<String>);

/// The prefix of a keyring's tokens: 2 to 16 of `a-z` and `0-9`, with `-` only between them.
/// Default: `rlk`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix(Arc<str>);

/// The reason why the bytes of a credential cannot be a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PresentedKeyError {
    /// The credential is longer than [`PresentedKey::MAX_LEN`].
    #[error("longer than {} bytes", PresentedKey::MAX_LEN)]
    TooLong,
    /// The credential is empty, or has a byte outside `0x21..=0x7e`.
    #[error("empty, or not printable ASCII without spaces")]
    NotPrintable,
}

/// A presented key that is not a token of the keyring. Deliberately does not report which check
/// failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a token of this keyring")]
pub struct FormatError;

/// A key of another system that cannot be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Other text surrounds the key. A consumer that presents the key alone would be denied.
    #[error("the key {0}: import the key alone")]
    Wrapped(Wrapping),
    /// The key does not have 8 to 512 printable ASCII characters, or has one that separates texts.
    #[error(
        "a key to import has {min} to {max} printable ASCII characters, none of them a space, ',', ';' or '\"'",
        min = Secret::MIN_IMPORTED_LEN,
        max = PresentedKey::MAX_LEN
    )]
    Form,
}

const SECRET_LEN: usize = 32;
const CHECKSUM_LEN: usize = 6;
/// The length of the part after the prefix: `_`, key id, `_`, secret, checksum.
const TAIL_LEN: usize = 1 + KeyId::LEN + 1 + SECRET_LEN + CHECKSUM_LEN;

impl<'a> PresentedKey<'a> {
    /// The maximum length of a credential, in bytes. A token has at most 68 bytes. Imported keys of
    /// other systems seldom have more than 128, and longer credentials would only cost hashing.
    pub const MAX_LEN: usize = 512;

    /// Creates a presented key from the bytes of a credential.
    ///
    /// # Errors
    ///
    /// When the bytes are not printable ASCII without spaces, when there are none, or when there
    /// are more than [`PresentedKey::MAX_LEN`].
    pub fn new(bytes: &'a [u8]) -> Result<Self, PresentedKeyError> {
        if bytes.len() > Self::MAX_LEN {
            Err(PresentedKeyError::TooLong)
        } else if bytes.is_empty() || !bytes.iter().all(u8::is_ascii_graphic) {
            Err(PresentedKeyError::NotPrintable)
        } else {
            Ok(Self(bytes))
        }
    }

    /// Checks format, prefix and checksum, and returns the id of the key that the token claims to be.
    ///
    /// # Errors
    ///
    /// When the key is not a token that a keyring with `prefix` issues.
    pub fn parse(&self, prefix: &Prefix) -> Result<KeyId, FormatError> {
        let tail = self
            .0
            .strip_prefix(prefix.as_str().as_bytes())
            .ok_or(FormatError)?;
        let tail: &[u8; TAIL_LEN] = tail.try_into().map_err(|_| FormatError)?;
        let (separated_id, secret) = tail.split_at(1 + KeyId::LEN);
        if separated_id[0] != b'_' || secret[0] != b'_' {
            return Err(FormatError);
        }
        let id = KeyId::from_bytes(&separated_id[1..]).map_err(|_: ParseIdError| FormatError)?;
        let (body, sum) = self.0.split_at(self.0.len() - CHECKSUM_LEN);
        let is_base62 = secret[1..].iter().all(u8::is_ascii_alphanumeric);
        if is_base62 && sum == checksum(body) {
            Ok(id)
        } else {
            Err(FormatError)
        }
    }

    pub(super) const fn expose(&self) -> &'a [u8] {
        self.0
    }
}

impl fmt::Debug for PresentedKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresentedKey(redacted)")
    }
}

impl Secret {
    const MIN_IMPORTED_LEN: usize = 8;

    /// Generates a token for key `id`.
    ///
    /// # Errors
    ///
    /// When the operating system's random source fails.
    pub fn generate(prefix: &Prefix, id: KeyId) -> Result<Self, RandomError> {
        let random = Zeroizing::new(base62::random::<SECRET_LEN>()?);
        let mut token = Zeroizing::new(String::with_capacity(prefix.as_str().len() + TAIL_LEN));
        token.push_str(prefix.as_str());
        token.push('_');
        token.push_str(id.as_str());
        token.push('_');
        token.extend(random.iter().copied().map(char::from));
        let sum = checksum(token.as_bytes());
        token.extend(sum.into_iter().map(char::from));
        Ok(Self(token))
    }

    /// Imports a key of another system unchanged.
    ///
    /// # Errors
    ///
    /// When it does not have 8 to 512 printable ASCII characters, or when it contains a space, `,`,
    /// `;` or `"`: it could then not be separated from other text in a header, a query string or a
    /// cookie. Also when a scheme, quotation marks or a line end surround it.
    pub fn import(key: Zeroizing<String>) -> Result<Self, ImportError> {
        let valid = matches!(key.len(), Self::MIN_IMPORTED_LEN..=PresentedKey::MAX_LEN)
            && key
                .bytes()
                .all(|b| b.is_ascii_graphic() && !b",;\"".contains(&b));
        match Wrapping::of(key.as_bytes()) {
            Some(wrapping) => Err(ImportError::Wrapped(wrapping)),
            None if valid => Ok(Self(key)),
            None => Err(ImportError::Form),
        }
    }

    /// Returns the key in plaintext, for its legitimate receiver.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Returns the key as a consumer presents it.
    #[must_use]
    pub fn presented(&self) -> PresentedKey<'_> {
        PresentedKey(self.0.as_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

impl Prefix {
    /// Returns the prefix as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self("rlk".into())
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Prefix {
    type Err = ParsePrefixError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = matches!(text.len(), 2..=16)
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !text.starts_with('-')
            && !text.ends_with('-');
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(ParsePrefixError)
        }
    }
}

/// A text that is not a valid prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid prefix: use 2 to 16 of a-z and 0-9, with '-' only between them")]
pub struct ParsePrefixError;

impl TryFrom<String> for Prefix {
    type Error = ParsePrefixError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.as_str().to_owned()
    }
}

fn checksum(body: &[u8]) -> [u8; CHECKSUM_LEN] {
    let mut rest = crc32fast::hash(body);
    let mut digits = [b'0'; CHECKSUM_LEN];
    for digit in digits.iter_mut().rev() {
        *digit = base62::ALPHABET[(rest % 62) as usize];
        rest /= 62;
    }
    digits
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token(prefix: &str) -> (Prefix, KeyId, Secret) {
        let prefix: Prefix = prefix.parse().expect("a valid prefix");
        let id = KeyId::generate().expect("the random source works");
        let secret = Secret::generate(&prefix, id).expect("the random source works");
        (prefix, id, secret)
    }

    #[test]
    fn checksum_is_crc_32_in_base_62() {
        // CRC-32 (IEEE) of "123456789" is 0xcbf43926 = 3421780262.
        assert_eq!(&checksum(b"123456789"), b"3jZRME");
        assert_eq!(checksum(b"").as_slice(), b"000000");
    }

    #[test]
    fn generated_token_has_the_documented_shape() {
        let (_, id, secret) = token("rlk-test");
        let parts: Vec<&str> = secret.expose().split('_').collect();
        assert_eq!(parts[..2], ["rlk-test", id.as_str()]);
        assert_eq!(parts[2].len(), SECRET_LEN + CHECKSUM_LEN);
        assert_eq!(parts.len(), 3);
    }

    #[test]
    fn secrets_do_not_print() {
        let (_, _, secret) = token("rlk");
        let printed = format!("{secret:?} {:?}", secret.presented());
        assert_eq!(printed, "Secret(redacted) PresentedKey(redacted)");
    }

    #[test]
    fn prefixes_are_checked() {
        for good in ["rlk", "ab", "a-b", "rlk-test", "0123456789abcdef"] {
            assert!(good.parse::<Prefix>().is_ok(), "{good:?} was refused");
        }
        for bad in ["", "a", "-ab", "ab-", "Rlk", "a_b", "0123456789abcdefg"] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn imported_keys_must_survive_headers_queries_and_cookies() {
        let import = |key: &str| Secret::import(Zeroizing::new(key.to_owned()));
        assert!(import("ak_live_0123456789abcdef").is_ok());
        for bad in [
            "short",
            "with space",
            "with,comma",
            "with;semicolon",
            "umlaut-äöü",
        ] {
            assert!(import(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(import(&"x".repeat(PresentedKey::MAX_LEN + 1)).is_err());
        for (wrapped, error) in [
            (
                "Bearer ak_live_0123456789abcdef",
                "the key begins with the scheme Bearer: import the key alone",
            ),
            (
                "'ak_live_0123456789abcdef'",
                "the key is in quotation marks: import the key alone",
            ),
            (
                "ak_live_0123456789abcdef\n",
                "the key has a line end: import the key alone",
            ),
        ] {
            let refused = import(wrapped).expect_err("it is wrapped");
            assert_eq!(refused.to_string(), error);
        }
    }

    proptest! {
        #[test]
        fn generated_tokens_parse_to_their_key_id(prefix in "[a-z0-9][a-z0-9-]{0,14}[a-z0-9]") {
            let (prefix, id, secret) = token(&prefix);
            prop_assert_eq!(secret.presented().parse(&prefix), Ok(id));
        }

        #[test]
        fn one_changed_character_is_always_found(at in 0_usize..55, by in 1_u8..62) {
            let (prefix, _, secret) = token("rlk");
            let mut bytes = secret.expose().as_bytes().to_vec();
            let at = at % bytes.len();
            let old = base62::ALPHABET.iter().position(|b| *b == bytes[at]).unwrap_or(0);
            bytes[at] = base62::ALPHABET[(old + usize::from(by)) % 62];
            prop_assume!(bytes != secret.expose().as_bytes());
            let presented = PresentedKey::new(&bytes).expect("printable");
            prop_assert_eq!(presented.parse(&prefix), Err(FormatError));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(key) = PresentedKey::new(&bytes) {
                let _ = key.parse(&Prefix::default());
            }
        }

        #[test]
        fn truncated_and_extended_tokens_are_refused(cut in 0_usize..55, tail in "[0-9A-Za-z_]{1,8}") {
            let (prefix, _, secret) = token("rlk");
            let cut = &secret.expose().as_bytes()[..cut];
            if let Ok(key) = PresentedKey::new(cut) {
                prop_assert!(key.parse(&prefix).is_err());
            }
            let long = format!("{}{tail}", secret.expose());
            let key = PresentedKey::new(long.as_bytes()).expect("printable");
            prop_assert!(key.parse(&prefix).is_err());
        }
    }
}
