//! The keyed digest of a key. Keys are hashed and compared only here.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{
    id::KeyringName,
    random::{RandomError, fill_random},
    token::PresentedKey,
    webhook::WebhookId,
};

/// HMAC-SHA256 of a key under a pepper. Compared in constant time. It is not a secret, and is
/// useless without the pepper.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyDigest([u8; KeyDigest::LEN]);

/// The id of a pepper, so that peppers can be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PepperId(u32);

/// The secret that keys the digests of one keyring.
#[derive(Clone)]
pub struct Pepper {
    id: PepperId,
    secret: Zeroizing<[u8; Pepper::LEN]>,
    /// The state after both pads, so that a digest needs two compressions less.
    mac: Hmac<Sha256>,
}

/// The secret from which the peppers of all keyrings are derived. It is kept in a file, separate
/// from the store.
#[derive(Clone)]
pub struct MasterPepper {
    id: PepperId,
    secret: Zeroizing<[u8; Pepper::LEN]>,
}

/// A check value that identifies a master pepper. A store records which master pepper its digests
/// need. The value is an HMAC under the pepper and not a secret: it reveals nothing about the
/// pepper or about other values derived from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PepperCheck(KeyDigest);

/// Bytes of the wrong length for a digest or a pepper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not {expected} bytes long")]
pub struct LengthError {
    expected: usize,
}

impl KeyDigest {
    /// The length in bytes.
    pub const LEN: usize = 32;

    /// Creates a digest from its bytes.
    ///
    /// # Errors
    ///
    /// When `bytes` does not have 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, LengthError> {
        let bytes = bytes.try_into().map_err(|_| LengthError {
            expected: Self::LEN,
        })?;
        Ok(Self(bytes))
    }

    /// Returns the bytes of the digest.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// Returns the first 8 bytes of the digest, in little-endian order. They are as good as random,
    /// so that tables do not hash the digest again.
    #[must_use]
    pub(crate) const fn table_hash(&self) -> u64 {
        match self.0.first_chunk() {
            Some(head) => u64::from_le_bytes(*head),
            None => 0,
        }
    }

    fn to_hex(self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut hex, b| {
            write!(hex, "{b:02x}").expect("writing to a string cannot fail");
            hex
        })
    }
}

impl PartialEq for KeyDigest {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for KeyDigest {}

impl std::hash::Hash for KeyDigest {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u64(self.table_hash());
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyDigest(redacted)")
    }
}

impl From<KeyDigest> for String {
    fn from(digest: KeyDigest) -> Self {
        digest.to_hex()
    }
}

impl TryFrom<String> for KeyDigest {
    type Error = LengthError;

    fn try_from(hex: String) -> Result<Self, Self::Error> {
        let error = LengthError {
            expected: Self::LEN,
        };
        if hex.len() != 2 * Self::LEN || !hex.is_ascii() {
            return Err(error);
        }
        let mut bytes = [0; Self::LEN];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).map_err(|_| error)?;
        }
        Ok(Self(bytes))
    }
}

impl PepperCheck {
    /// Returns the first four bytes as hexadecimal digits, for messages. They are enough to
    /// distinguish the peppers of one operator.
    #[must_use]
    pub(crate) fn fingerprint(&self) -> String {
        let mut hex = self.0.to_hex();
        hex.truncate(8);
        hex
    }
}

impl PepperId {
    /// Creates the id with the number `id`.
    #[must_use]
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// Returns the id as a number.
    #[must_use]
    pub(crate) const fn get(self) -> u32 {
        self.0
    }
}

impl Pepper {
    /// The length of the secret in bytes.
    pub const LEN: usize = 32;

    /// Creates a pepper from its secret.
    ///
    /// # Errors
    ///
    /// When the secret is not 32 bytes long.
    pub fn new(id: PepperId, secret: &[u8]) -> Result<Self, LengthError> {
        let secret: [u8; Self::LEN] = secret.try_into().map_err(|_| LengthError {
            expected: Self::LEN,
        })?;
        Ok(Self::from_secret(id, Zeroizing::new(secret)))
    }

    fn from_secret(id: PepperId, secret: Zeroizing<[u8; Self::LEN]>) -> Self {
        Self {
            id,
            mac: keyed(&secret),
            secret,
        }
    }

    /// Returns the id. It is that of the master pepper, if the pepper is derived from one.
    #[must_use]
    pub const fn id(&self) -> PepperId {
        self.id
    }

    /// Returns the secret, for the authenticated stream to a sidecar.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        self.secret.as_slice()
    }

    /// Computes the digest of `key` under this pepper.
    #[must_use]
    pub fn digest(&self, key: &PresentedKey<'_>) -> KeyDigest {
        let mut mac = self.mac.clone();
        mac.update(key.expose());
        KeyDigest(mac.finalize().into_bytes().into())
    }
}

impl Pepper {
    /// Computes the HMAC-SHA256 of `parts`. The length of each part precedes it, so that no two
    /// lists of parts have the same input.
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = self.mac.clone();
        for part in parts {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for Pepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pepper({}, redacted)", self.id.0)
    }
}

impl MasterPepper {
    /// Creates a master pepper from the operating system's random source.
    ///
    /// # Errors
    ///
    /// When that source fails.
    pub fn generate(id: PepperId) -> Result<Self, RandomError> {
        let mut secret = Zeroizing::new([0; Pepper::LEN]);
        fill_random(secret.as_mut_slice())?;
        Ok(Self { id, secret })
    }

    /// Creates a master pepper from its secret.
    ///
    /// # Errors
    ///
    /// When the secret is not 32 bytes long.
    pub fn new(id: PepperId, secret: &[u8]) -> Result<Self, LengthError> {
        let secret = secret.try_into().map_err(|_| LengthError {
            expected: Pepper::LEN,
        })?;
        Ok(Self {
            id,
            secret: Zeroizing::new(secret),
        })
    }

    /// Returns the id.
    #[must_use]
    pub(crate) const fn id(&self) -> PepperId {
        self.id
    }

    /// Returns the secret, for the file that holds it.
    #[must_use]
    pub(crate) fn expose(&self) -> &[u8] {
        self.secret.as_slice()
    }

    /// Derives the pepper of one keyring. A sidecar that receives it learns nothing about the
    /// pepper of another keyring.
    #[must_use]
    pub fn for_keyring(&self, keyring: &KeyringName) -> Pepper {
        self.derive(b"relatch keyring pepper 1\0", keyring.as_str())
    }

    /// Derives the pepper of admin tokens.
    #[must_use]
    pub fn for_admin_tokens(&self) -> Pepper {
        self.derive(b"relatch admin token pepper 1\0", "")
    }

    /// Derives the pepper of the tokens that sidecars present.
    #[must_use]
    pub(crate) fn for_sidecar_tokens(&self) -> Pepper {
        self.derive(b"relatch sidecar token pepper 1\0", "")
    }

    /// Derives the pepper of the ids that follow from idempotency keys.
    #[must_use]
    pub(crate) fn for_idempotency(&self) -> Pepper {
        self.derive(b"relatch idempotency pepper 1\0", "")
    }

    /// Derives the secret that signs the requests of a webhook. It is stored nowhere.
    #[must_use]
    pub(crate) fn for_webhook(&self, webhook: WebhookId) -> Zeroizing<[u8; Pepper::LEN]> {
        self.derive_secret(b"relatch webhook secret 1\0", webhook.as_str())
    }

    /// Derives the value by which a store recognizes this pepper. It also depends on the pepper's
    /// id.
    #[must_use]
    pub(crate) fn check(&self) -> PepperCheck {
        let check = self.derive_secret(b"relatch pepper check 1\0", &self.id.0.to_string());
        PepperCheck(KeyDigest(*check))
    }

    fn derive(&self, purpose: &[u8], name: &str) -> Pepper {
        Pepper::from_secret(self.id, self.derive_secret(purpose, name))
    }

    fn derive_secret(&self, purpose: &[u8], name: &str) -> Zeroizing<[u8; Pepper::LEN]> {
        let mut mac = keyed(&self.secret);
        mac.update(purpose);
        mac.update(name.as_bytes());
        Zeroizing::new(mac.finalize().into_bytes().into())
    }
}

impl fmt::Debug for MasterPepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterPepper({}, redacted)", self.id.0)
    }
}

fn keyed(secret: &[u8; Pepper::LEN]) -> Hmac<Sha256> {
    Hmac::new_from_slice(secret).expect("HMAC takes a key of any length")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presented(key: &str) -> PresentedKey<'_> {
        PresentedKey::new(key.as_bytes()).expect("printable")
    }

    fn master() -> MasterPepper {
        MasterPepper::new(PepperId::new(1), &[0x0b; 32]).expect("32 bytes")
    }

    #[test]
    fn digest_is_hmac_sha256() {
        // Computed with `printf %s Hi-There | openssl dgst -sha256 -mac HMAC -macopt hexkey:0b0b…` (32 bytes).
        let pepper = Pepper::new(PepperId::new(1), &[0x0b; 32]).expect("32 bytes");
        let hex = String::from(pepper.digest(&presented("Hi-There")));
        assert_eq!(hex, HI_THERE);
    }

    const CHECK: &str = "f94bdce3";
    const HI_THERE: &str = "7c7742dd7438d1d60436b7c329caa5dadb14b20b10df648ba897b5def4e2664c";

    #[test]
    fn digests_differ_by_keyring_and_by_purpose() {
        let key = presented("rlk_key");
        let payments = "payments".parse().expect("a valid name");
        let partners = "partners".parse().expect("a valid name");
        let digests = [
            master().for_keyring(&payments).digest(&key),
            master().for_keyring(&partners).digest(&key),
            master().for_admin_tokens().digest(&key),
        ];
        assert_ne!(digests[0], digests[1]);
        assert_ne!(digests[0], digests[2]);
        assert_eq!(digests[0], master().for_keyring(&payments).digest(&key));
    }

    #[test]
    fn every_webhook_has_a_secret_of_its_own() {
        let [one, other] = ["7Qm2Xc91TbKe", "8Qm2Xc91TbKe"].map(|id| id.parse().expect("an id"));
        let secret = master().for_webhook(one);
        assert_eq!(secret, master().for_webhook(one));
        assert_ne!(secret, master().for_webhook(other));
        // Of the same name and another purpose.
        let keyring = master().derive(b"relatch keyring pepper 1\0", one.as_str());
        assert_ne!(secret.as_slice(), keyring.expose());
    }

    #[test]
    fn a_check_value_tells_peppers_and_their_ids_apart() {
        let check = master().check();
        assert_eq!(check, master().check());
        let renamed = MasterPepper::new(PepperId::new(2), &[0x0b; 32]).expect("32 bytes");
        let other = MasterPepper::new(PepperId::new(1), &[0x0c; 32]).expect("32 bytes");
        for pepper in [renamed, other] {
            assert_ne!(check, pepper.check());
            assert_ne!(check.fingerprint(), pepper.check().fingerprint());
        }
        // Computed with `printf 'relatch pepper check 1\0001' | openssl dgst -sha256 -mac HMAC -macopt hexkey:0b0b…`.
        assert_eq!(check.fingerprint(), CHECK);
        let json = serde_json::to_string(&check).expect("serializable");
        assert!(json.starts_with(&format!("\"{CHECK}")), "{json}");
        assert_eq!(serde_json::from_str::<PepperCheck>(&json).ok(), Some(check));
    }

    #[test]
    fn digest_round_trips_through_hexadecimal() {
        let digest = master().for_admin_tokens().digest(&presented("a"));
        assert_eq!(KeyDigest::try_from(String::from(digest)), Ok(digest));
        assert!(KeyDigest::try_from("zz".repeat(32)).is_err());
        assert!(KeyDigest::try_from("é".repeat(32)).is_err());
    }

    #[test]
    fn peppers_and_digests_do_not_print() {
        let pepper = master().for_admin_tokens();
        let printed = format!(
            "{pepper:?} {:?} {:?}",
            master(),
            pepper.digest(&presented("a"))
        );
        assert_eq!(
            printed,
            "Pepper(1, redacted) MasterPepper(1, redacted) KeyDigest(redacted)"
        );
    }
}
