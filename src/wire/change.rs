//! What a delta changes, read item by item: those that cannot be read are named, and spoil no others. A revocation needs no
//! more than its digest.

use super::item;
use crate::{
    key::{KeyDigest, KeyRecord, KeyState},
    keyring::Announced,
    proto::discovery,
};

/// The items of a delta.
#[derive(Debug)]
pub(crate) struct Changes {
    /// Versions that are revoked.
    pub(crate) revocations: Vec<Announced>,
    /// Versions that are new, or other than they were.
    pub(crate) upserts: Vec<Announced>,
    /// Versions that the keyring no longer holds.
    pub(crate) removals: Vec<KeyDigest>,
    /// What could not be read.
    pub(crate) rejected: Vec<discovery::RejectedItem>,
    /// A revocation is among that, so that a version may still be accepted which is not any more.
    pub(crate) is_revocation_rejected: bool,
}

/// The longest name of an item that is passed on, in bytes: five times what a key version's takes.
const MAX_NAME: usize = 100;
/// The longest reason: a sentence. So a hundred of them fit into one message, whatever was sent.
const MAX_REASON: usize = 300;

impl Changes {
    /// Reads a delta. `held` is what is held of a version.
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

/// Reads items; those that cannot be read are named, and spoil no others.
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

/// Reads revocations. Where nothing but the digest can be read, the version is what `held` says, or a tombstone, and revoked:
/// that is not rejected.
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
                "of a revocation only the digest can be read; the version is revoked all the same"
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

/// What is told, and kept, of an item that cannot be used. Texts that nobody would read to the end are cut.
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
