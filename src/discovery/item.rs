//! One key version on the wire, and how both ends count it in a keyring's set digest.

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};

use crate::{
    key::{
        AllowedSources, KeyDigest, KeyRecord, KeyState, PepperId, Scope, Scopes, Timestamp,
        VersionNumber, Window,
    },
    proto::discovery as wire,
};

/// An item cannot be used; says which field and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ItemError {
    field: &'static str,
    problem: String,
}

/// The wire form of a record.
#[must_use]
pub fn encode(record: &KeyRecord) -> wire::Item {
    let message = wire::KeyVersion {
        digest: Bytes::copy_from_slice(record.digest.as_bytes()),
        pepper_id: record.pepper.get(),
        key_id: record.key_id.to_string(),
        version: record.version.get(),
        consumer: record.consumer.to_string(),
        state: encode_state(record.state).into(),
        not_before_ms: millis(record.window.not_before),
        expires_at_ms: millis(record.window.expires_at),
        retires_at_ms: millis(record.retires_at),
        scopes: record
            .scopes
            .iter()
            .map(|scope| scope.as_str().to_owned())
            .collect(),
        allowed_sources: record
            .allowed_sources
            .iter()
            .map(ToString::to_string)
            .collect(),
        replaced_by: record.replaced_by.map_or(0, VersionNumber::get),
        rotation_id: record
            .rotation
            .map(|id| id.as_str().to_owned())
            .unwrap_or_default(),
        retiring_since_ms: millis(record.retiring_since),
    };
    wire::Item {
        name: record.version_ref().to_string(),
        record: message.encode_to_vec().into(),
    }
}

/// The record of an item.
///
/// # Errors
///
/// When a field of it cannot be what it has to be.
pub fn decode(item: &wire::Item) -> Result<KeyRecord, ItemError> {
    let message = wire::KeyVersion::decode(item.record.clone()).map_err(wrong("record"))?;
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

/// The hash under which an item counts in a set digest: the first eight bytes of SHA-256 of its record,
/// little-endian. A set digest is the wrapping sum over all items, so that it does not depend on their order and
/// follows a change without a look at the other items.
#[must_use]
pub fn hash(item: &wire::Item) -> u64 {
    let digest: [u8; 32] = Sha256::digest(&item.record).into();
    digest
        .first_chunk()
        .map_or(0, |head| u64::from_le_bytes(*head))
}

const fn encode_state(state: KeyState) -> wire::KeyState {
    match state {
        KeyState::Pending => wire::KeyState::Pending,
        KeyState::Active => wire::KeyState::Active,
        KeyState::Retiring => wire::KeyState::Retiring,
        KeyState::Retired => wire::KeyState::Retired,
        KeyState::Revoked => wire::KeyState::Revoked,
    }
}

fn decode_state(state: i32) -> Result<KeyState, ItemError> {
    match wire::KeyState::try_from(state) {
        Ok(wire::KeyState::Pending) => Ok(KeyState::Pending),
        Ok(wire::KeyState::Active) => Ok(KeyState::Active),
        Ok(wire::KeyState::Retiring) => Ok(KeyState::Retiring),
        Ok(wire::KeyState::Retired) => Ok(KeyState::Retired),
        Ok(wire::KeyState::Revoked) => Ok(KeyState::Revoked),
        Ok(wire::KeyState::Unspecified) | Err(_) => Err(wrong("state")(format!(
            "{state} is no state that this version of relatch knows"
        ))),
    }
}

/// Zero stands for no bound; a version cannot be bounded by 1970 itself.
fn millis(time: Option<Timestamp>) -> i64 {
    time.map_or(0, |time| time.as_millis().max(1))
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

    use super::*;
    use crate::key::{RotationId, testing};

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

    #[test]
    fn a_bad_item_names_its_field() {
        let broken = |change: fn(&mut wire::KeyVersion)| {
            let item = encode(&record());
            let mut message = wire::KeyVersion::decode(item.record).expect("just encoded");
            change(&mut message);
            let record = message.encode_to_vec().into();
            let item = wire::Item { record, ..item };
            decode(&item).expect_err("the item is bad").to_string()
        };
        assert!(broken(|m| m.digest = Bytes::from_static(b"short")).starts_with("digest: "));
        assert!(broken(|m| m.state = 99).starts_with("state: 99 is no state"));
        assert!(broken(|m| m.version = 0).starts_with("version: "));
        assert!(broken(|m| m.consumer = "a b".into()).starts_with("consumer: "));
        assert!(broken(|m| m.allowed_sources = vec!["x".into()]).starts_with("allowed_sources: "));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let item = wire::Item { name: String::new(), record: bytes.into() };
            let _ = decode(&item);
            let _ = hash(&item);
        }
    }
}
