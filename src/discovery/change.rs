//! What a delta changes, read item by item: those that cannot be read are named, and spoil no others.

use super::item;
use crate::{key::KeyDigest, keyring::Announced, proto::discovery as wire};

/// The items of a delta.
#[derive(Debug)]
pub struct Changes {
    /// Versions that are revoked.
    pub revocations: Vec<Announced>,
    /// Versions that are new, or other than they were.
    pub upserts: Vec<Announced>,
    /// Versions that the keyring no longer holds.
    pub removals: Vec<KeyDigest>,
    /// What could not be read.
    pub rejected: Vec<wire::RejectedItem>,
}

impl Changes {
    /// Reads a delta.
    #[must_use]
    pub fn of(delta: &wire::Delta) -> Self {
        let (revocations, mut rejected) = decode_items(&delta.revocations);
        let (upserts, rejected_upserts) = decode_items(&delta.upserts);
        rejected.extend(rejected_upserts);
        let mut removals = Vec::with_capacity(delta.removals.len());
        for removal in &delta.removals {
            match KeyDigest::from_slice(&removal.digest) {
                Ok(digest) => removals.push(digest),
                Err(error) => rejected.push(wire::RejectedItem {
                    name: removal.name.clone(),
                    reason: error.to_string(),
                }),
            }
        }
        Self {
            revocations,
            upserts,
            removals,
            rejected,
        }
    }
}

/// Reads items; those that cannot be read are named, and spoil no others.
#[must_use]
pub fn decode_items(items: &[wire::Item]) -> (Vec<Announced>, Vec<wire::RejectedItem>) {
    let mut decoded = Vec::with_capacity(items.len());
    let mut rejected = Vec::new();
    for item in items {
        match item::decode(item) {
            Ok(record) => decoded.push(Announced {
                record,
                hash: item::hash(item),
            }),
            Err(error) => rejected.push(wire::RejectedItem {
                name: item.name.clone(),
                reason: error.to_string(),
            }),
        }
    }
    (decoded, rejected)
}
