//! The encoding of a key version, and its hash in the set digest of a keyring, which both ends
//! compute.

use prost::{
    Message,
    encoding::{
        DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
    },
};
use sha2::{Digest, Sha256};

use crate::{
    key::{
        AllowedSources, ConsumerId, KeyDigest, KeyId, KeyRecord, KeyState, PepperId, RotationId,
        Scope, Scopes, Timestamp, VersionNumber, Window,
    },
    proto::discovery,
};

/// The reason that an item cannot be used; it names the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ItemError {
    field: &'static str,
    problem: String,
}

/// The encoded fields of a message. As in every proto3 message, a field with its default value is
/// left out.
struct Fields(Vec<u8>);

/// The initial capacity in bytes: more than most records need, which have a digest, two short names
/// and a few scopes.
const ROOM: usize = 160;

/// Encodes a record as an item.
#[must_use]
pub fn encode(record: &KeyRecord) -> discovery::Item {
    discovery::Item {
        name: record.version_ref().to_string(),
        record: encode_record(record).into(),
    }
}

/// Encodes a record as a serialized [`discovery::KeyVersion`], in the order of its tags as prost
/// does. A control plane encodes every version when it starts and for every snapshot: the message
/// type would need a dozen allocations each time.
#[must_use]
pub fn encode_record(record: &KeyRecord) -> Vec<u8> {
    let mut fields = Fields(Vec::with_capacity(ROOM));
    fields.bytes(1, record.digest.as_bytes());
    fields.number(2, record.pepper.get().into());
    fields.bytes(3, record.key_id.as_str().as_bytes());
    fields.number(4, record.version.get().into());
    fields.bytes(5, record.consumer.as_str().as_bytes());
    fields.number(
        6,
        i32::from(encode_state(record.state)).unsigned_abs().into(),
    );
    fields.number(7, millis(record.window.not_before));
    fields.number(8, millis(record.window.expires_at));
    fields.number(9, millis(record.retires_at));
    for scope in record.scopes.iter() {
        fields.element(10, scope.as_str().as_bytes());
    }
    for block in record.allowed_sources.iter() {
        fields.element(11, block.to_string().as_bytes());
    }
    fields.number(12, record.replaced_by.map_or(0, VersionNumber::get).into());
    let rotation = record.rotation.as_ref();
    fields.bytes(13, rotation.map_or("", RotationId::as_str).as_bytes());
    fields.number(14, millis(record.retiring_since));
    fields.0
}

/// Decodes the record of an item.
///
/// # Errors
///
/// When a field has an invalid value.
pub fn decode(item: &discovery::Item) -> Result<KeyRecord, ItemError> {
    let message = discovery::KeyVersion::decode(item.record.clone()).map_err(wrong("record"))?;
    Ok(KeyRecord {
        digest: KeyDigest::from_slice(&message.digest).map_err(wrong("digest"))?,
        pepper: PepperId::new(message.pepper_id),
        key_id: message.key_id.parse().map_err(wrong("key_id"))?,
        version: VersionNumber::new(message.version)
            .ok_or("it is zero")
            .map_err(wrong("version"))?,
        consumer: message.consumer.parse().map_err(wrong("consumer"))?,
        state: decode_state(message.state)?,
        window: Window::new(time(message.not_before_ms), time(message.expires_at_ms)),
        retiring_since: time(message.retiring_since_ms),
        retires_at: time(message.retires_at_ms),
        scopes: message
            .scopes
            .into_iter()
            .map(|scope| scope.parse::<Scope>())
            .collect::<Result<Scopes, _>>()
            .map_err(wrong("scopes"))?,
        allowed_sources: AllowedSources::parse(&message.allowed_sources)
            .map_err(wrong("allowed_sources"))?,
        replaced_by: VersionNumber::new(message.replaced_by),
        rotation: match message.rotation_id.as_str() {
            "" => None,
            id => Some(id.parse().map_err(wrong("rotation_id"))?),
        },
    })
}

/// Returns the digest in a serialized [`discovery::KeyVersion`], whatever its other fields contain;
/// none if the digest cannot be read either. Of several valid digests the last one counts, as in
/// every protobuf message.
#[must_use]
pub fn digest_of(record: &[u8]) -> Option<KeyDigest> {
    const DIGEST: u32 = 1;
    let mut rest = record;
    let mut found = None;
    while let Ok((tag, wire_type)) = decode_key(&mut rest) {
        if (tag, wire_type) == (DIGEST, WireType::LengthDelimited) {
            let len = decode_varint(&mut rest).ok();
            let len = len.and_then(|len| usize::try_from(len).ok());
            let Some((digest, behind)) = len.and_then(|len| rest.split_at_checked(len)) else {
                break;
            };
            found = KeyDigest::from_slice(digest).ok().or(found);
            rest = behind;
        } else if skip_field(wire_type, tag, &mut rest, DecodeContext::default()).is_err() {
            break;
        }
    }
    found
}

/// Returns a revoked version of which only the digest is known, and its key id and version if
/// `name` is valid: enough to deny the key.
///
/// # Panics
///
/// Never: the placeholders for unknown fields are valid.
#[must_use]
pub(crate) fn tombstone(digest: KeyDigest, name: &str) -> KeyRecord {
    const NO_KEY: &[u8] = b"unreadable00";
    const NO_CONSUMER: &str = "unreadable";
    let named = name.split_once('/').and_then(|(key_id, version)| {
        let version = version.parse().ok().and_then(VersionNumber::new)?;
        Some((key_id.parse::<KeyId>().ok()?, version))
    });
    let (key_id, version) = named.unwrap_or_else(|| {
        let key_id = KeyId::from_bytes(NO_KEY).expect("twelve characters of base62");
        (key_id, VersionNumber::FIRST)
    });
    KeyRecord {
        digest,
        pepper: PepperId::new(0),
        key_id,
        version,
        consumer: NO_CONSUMER.parse::<ConsumerId>().expect("a valid id"),
        state: KeyState::Revoked,
        window: Window::default(),
        retiring_since: None,
        retires_at: None,
        scopes: Scopes::default(),
        allowed_sources: AllowedSources::default(),
        replaced_by: None,
        rotation: None,
    }
}

/// Returns the hash with which an item counts in a set digest: the first eight bytes of SHA-256 of
/// its record, little-endian. A set digest is the wrapping sum over all items. It therefore does
/// not depend on their order, and a change updates it without a look at the other items.
#[must_use]
pub fn hash(item: &discovery::Item) -> u64 {
    hash_record(&item.record)
}

/// Returns the hash of an encoded record, as [`hash`] does of an item.
#[must_use]
pub(crate) fn hash_record(record: &[u8]) -> u64 {
    let digest: [u8; 32] = Sha256::digest(record).into();
    digest
        .first_chunk()
        .map_or(0, |head| u64::from_le_bytes(*head))
}

impl Fields {
    fn number(&mut self, tag: u32, value: u64) {
        if value != 0 {
            encode_key(tag, WireType::Varint, &mut self.0);
            encode_varint(value, &mut self.0);
        }
    }

    fn bytes(&mut self, tag: u32, value: &[u8]) {
        if !value.is_empty() {
            self.element(tag, value);
        }
    }

    /// Writes one element of a repeated field.
    fn element(&mut self, tag: u32, value: &[u8]) {
        encode_key(tag, WireType::LengthDelimited, &mut self.0);
        encode_varint(value.len() as u64, &mut self.0);
        self.0.extend_from_slice(value);
    }
}

const fn encode_state(state: KeyState) -> discovery::KeyState {
    match state {
        KeyState::Pending => discovery::KeyState::Pending,
        KeyState::Active => discovery::KeyState::Active,
        KeyState::Retiring => discovery::KeyState::Retiring,
        KeyState::Retired => discovery::KeyState::Retired,
        KeyState::Revoked => discovery::KeyState::Revoked,
    }
}

fn decode_state(state: i32) -> Result<KeyState, ItemError> {
    match discovery::KeyState::try_from(state) {
        Ok(discovery::KeyState::Pending) => Ok(KeyState::Pending),
        Ok(discovery::KeyState::Active) => Ok(KeyState::Active),
        Ok(discovery::KeyState::Retiring) => Ok(KeyState::Retiring),
        Ok(discovery::KeyState::Retired) => Ok(KeyState::Retired),
        Ok(discovery::KeyState::Revoked) => Ok(KeyState::Revoked),
        Ok(discovery::KeyState::Unspecified) | Err(_) => Err(wrong("state")(format!(
            "{state} is no state that this version of relatch knows"
        ))),
    }
}

/// Zero means no bound. A bound of exactly 1970 is moved by a millisecond.
fn millis(time: Option<Timestamp>) -> u64 {
    time.map_or(0, |time| time.as_millis().max(1).unsigned_abs())
}

fn time(millis: i64) -> Option<Timestamp> {
    (millis != 0).then(|| Timestamp::from_millis(millis))
}

fn wrong<E: ToString>(field: &'static str) -> impl Fn(E) -> ItemError {
    move |problem| ItemError {
        field,
        problem: problem.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use bytes::Bytes;

    use super::*;
    use crate::key::testing;

    fn record() -> KeyRecord {
        KeyRecord {
            state: KeyState::Retiring,
            window: Window::new(
                Some(Timestamp::from_millis(1_000)),
                Some(Timestamp::from_millis(9_000)),
            ),
            retiring_since: Some(Timestamp::from_millis(4_000)),
            retires_at: Some(Timestamp::from_millis(5_000)),
            scopes: Scopes::parse("read write").expect("valid scopes"),
            allowed_sources: AllowedSources::parse(&["10.0.0.0/8", "2001:db8::/32"])
                .expect("valid blocks"),
            replaced_by: VersionNumber::new(2),
            rotation: Some(RotationId::generate().expect("the random source works")),
            ..testing::record()
        }
    }

    #[test]
    fn records_survive_the_wire() {
        for record in [record(), testing::record()] {
            assert_eq!(decode(&encode(&record)), Ok(record));
        }
    }

    /// Sidecars and control planes of any version hash the same bytes.
    #[test]
    fn a_record_is_written_as_prost_writes_its_message() {
        for record in [record(), testing::record()] {
            let written = encode_record(&record);
            let message = discovery::KeyVersion::decode(&*written).expect("it is one");
            assert_eq!(message.encode_to_vec(), written);
        }
    }

    #[test]
    fn a_bad_item_names_its_field() {
        let broken = |change: fn(&mut discovery::KeyVersion)| {
            let item = encode(&record());
            let mut message = discovery::KeyVersion::decode(item.record).expect("just encoded");
            change(&mut message);
            let record = message.encode_to_vec().into();
            let item = discovery::Item { record, ..item };
            decode(&item).expect_err("the item is bad").to_string()
        };
        assert!(broken(|m| m.digest = Bytes::from_static(b"short")).starts_with("digest: "));
        assert!(broken(|m| m.state = 99).starts_with("state: 99 is no state"));
        assert!(broken(|m| m.version = 0).starts_with("version: "));
        assert!(broken(|m| m.consumer = "a b".into()).starts_with("consumer: "));
        assert!(broken(|m| m.allowed_sources = vec!["x".into()]).starts_with("allowed_sources: "));
    }

    #[test]
    fn a_digest_is_read_whatever_surrounds_it() {
        let record = record();
        let whole = encode_record(&record);
        assert_eq!(digest_of(&whole), Some(record.digest));
        // Unknown fields, an invalid state, a cut message or bytes that are not protobuf: after the
        // digest, and before it.
        let mut unknown = Vec::new();
        encode_key(200, WireType::LengthDelimited, &mut unknown);
        encode_varint(2, &mut unknown);
        unknown.extend_from_slice(b"ab");
        encode_key(6, WireType::Varint, &mut unknown);
        encode_varint(99, &mut unknown);
        assert_eq!(
            digest_of(&[&unknown, &whole[..]].concat()),
            Some(record.digest)
        );
        assert_eq!(
            digest_of(&[&whole[..], b"\xff"].concat()),
            Some(record.digest)
        );
        let behind_digest = 2 + KeyDigest::LEN;
        assert_eq!(digest_of(&whole[..behind_digest]), Some(record.digest));
        assert_eq!(digest_of(&whole[..behind_digest - 1]), None);
        assert_eq!(digest_of(b"\xff"), None);
        assert_eq!(
            digest_of(&[&b"\x0a\x05short"[..], &whole].concat()),
            Some(record.digest)
        );
        assert_eq!(
            digest_of(&[&whole[..], b"\x0a\x05short"].concat()),
            Some(record.digest)
        );
    }

    #[test]
    fn a_tombstone_has_the_name_of_its_item_where_that_is_one() {
        let digest = testing::record().digest;
        let named = tombstone(digest, "7Qm2Xc91TbKe/3");
        assert_eq!(named.version_ref().to_string(), "7Qm2Xc91TbKe/3");
        for name in ["", "7Qm2Xc91TbKe", "7Qm2Xc91TbKe/0", "a b/1", "/"] {
            let unnamed = tombstone(digest, name);
            assert_eq!(unnamed.version_ref().to_string(), "unreadable00/1");
            // A tombstone is encoded and decoded like every record.
            assert_eq!(decode(&encode(&unnamed)), Ok(unnamed));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let item = discovery::Item { name: String::new(), record: bytes.into() };
            let _ = hash(&item);
            // A complete decode finds the same digest.
            if let Ok(record) = decode(&item) {
                prop_assert_eq!(digest_of(&item.record), Some(record.digest));
            }
            let _ = digest_of(&item.record);
        }
    }
}
