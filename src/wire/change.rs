//! The changes in a delta, decoded item by item. An item that cannot be decoded is reported by its
//! name and does not affect other items. A revocation needs only its digest.

use super::item;
use crate::{
    key::{KeyDigest, KeyRecord, KeyState},
    keyring::Announced,
    proto::discovery,
};

/// The items of a delta.
#[derive(Debug)]
pub(crate) struct Changes {
    /// The versions that are revoked.
    pub(crate) revocations: Vec<Announced>,
    /// The versions that are new or changed.
    pub(crate) upserts: Vec<Announced>,
    /// The versions that the keyring no longer contains.
    pub(crate) removals: Vec<KeyDigest>,
    /// The items that cannot be decoded.
    pub(crate) rejected: Vec<discovery::RejectedItem>,
    /// Whether a revocation is among the rejected items: the sidecar may still accept a version
    /// that is revoked.
    pub(crate) is_revocation_rejected: bool,
}

/// The maximum length in bytes of an item's name that is passed on: five times the length of a key
/// version's name.
const MAX_NAME: usize = 100;
/// The maximum length of a reason in bytes: a sentence. A hundred of them fit into one message,
/// whatever was received.
const MAX_REASON: usize = 300;

impl Changes {
    /// Decodes a delta. `held` returns the record that the keyring contains for a digest.
    #[must_use]
    pub(crate) fn of(
        delta: &discovery::Delta,
        held: impl Fn(&KeyDigest) -> Option<KeyRecord>,
    ) -> Self {
        let (revocations, mut rejected) = decode_revocations(&delta.revocations, held);
        let is_revocation_rejected = !rejected.is_empty();
        let (upserts, rejected_upserts) = decode_items(&delta.upserts);
        rejected.extend(rejected_upserts);
        let mut removals = Vec::with_capacity(delta.removals.len());
        for removal in &delta.removals {
            match KeyDigest::from_slice(&removal.digest) {
                Ok(digest) => removals.push(digest),
                Err(error) => rejected.push(refusal(&removal.name, &error.to_string())),
            }
        }
        Self {
            revocations,
            upserts,
            removals,
            rejected,
            is_revocation_rejected,
        }
    }
}

/// Decodes items. An item that cannot be decoded is reported by its name and does not affect the
/// other items.
#[must_use]
pub(crate) fn decode_items(
    items: &[discovery::Item],
) -> (Vec<Announced>, Vec<discovery::RejectedItem>) {
    let mut decoded = Vec::with_capacity(items.len());
    let mut rejected = Vec::new();
    for item in items {
        match item::decode(item) {
            Ok(record) => decoded.push(Announced {
                record,
                hash: item::hash(item),
            }),
            Err(error) => rejected.push(refusal(&item.name, &error.to_string())),
        }
    }
    (decoded, rejected)
}

/// Decodes revocations. If only the digest of an item can be read, the version is revoked with the
/// record that `held` returns, or with a tombstone; such an item is not rejected.
#[must_use]
pub(crate) fn decode_revocations(
    items: &[discovery::Item],
    held: impl Fn(&KeyDigest) -> Option<KeyRecord>,
) -> (Vec<Announced>, Vec<discovery::RejectedItem>) {
    let mut decoded = Vec::with_capacity(items.len());
    let mut rejected = Vec::new();
    for item in items {
        let record: Result<_, String> = item::decode(item).or_else(|error| {
            let digest = item::digest_of(&item.record).ok_or_else(|| error.to_string())?;
            let refused = refusal(&item.name, &error.to_string());
            tracing::warn!(
                item = refused.name,
                reason = refused.reason,
                "only the digest of a revocation can be read; the version is revoked nevertheless"
            );
            let record = held(&digest).unwrap_or_else(|| item::tombstone(digest, &item.name));
            Ok(KeyRecord {
                state: KeyState::Revoked,
                ..record
            })
        });
        match record {
            Ok(record) => decoded.push(Announced {
                record,
                hash: item::hash(item),
            }),
            Err(reason) => rejected.push(refusal(&item.name, &reason)),
        }
    }
    (decoded, rejected)
}

/// Creates the report about an item that cannot be used. Long texts are cut.
#[must_use]
pub(crate) fn refusal(name: &str, reason: &str) -> discovery::RejectedItem {
    let cut = |text: &str, max| text[..text.floor_char_boundary(max)].to_owned();
    discovery::RejectedItem {
        name: cut(name, MAX_NAME),
        reason: cut(reason, MAX_REASON),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_about_an_item_are_cut() {
        let cut = refusal(&"ä".repeat(60_000), &"long ".repeat(60_000));
        assert_eq!((cut.name.len(), cut.reason.len()), (MAX_NAME, MAX_REASON));
        let whole = refusal("7Qm2Xc91TbKe/1", "state: 99 is no state");
        assert_eq!(whole.name, "7Qm2Xc91TbKe/1");
        assert_eq!(whole.reason, "state: 99 is no state");
    }
}
