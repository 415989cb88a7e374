//! How a message about a keyring is answered.

use super::message;
use crate::{
    key::{Epoch, KeyringName, Revision},
    keyring::Position,
    proto::discovery::{self as wire, sidecar_message::Kind as Answer},
};

/// What an answer says of a keyring.
pub(super) struct Reply<'a> {
    pub(super) keyring: &'a KeyringName,
    pub(super) epoch: u64,
    pub(super) nonce: u64,
    pub(super) held: Position,
    pub(super) revoked_through: Revision,
    /// Up to where it is on the disk.
    pub(super) durable: (Epoch, Revision),
}

/// At most so many rejected items are named in one nack; the rest is counted by the set digest.
const MAX_NAMED_REJECTS: usize = 100;

impl Reply<'_> {
    /// An ack, or a nack that names what was rejected.
    pub(super) fn answer(&self, mut rejected: Vec<wire::RejectedItem>) -> wire::SidecarMessage {
        let keyring = self.keyring.to_string();
        // Of another history nothing is in use yet, whatever the number.
        let is_of_history = self.held.epoch.get() == self.epoch;
        let in_use = |revision: Revision| if is_of_history { revision.get() } else { 0 };
        let applied_revision = in_use(self.held.revision);
        let revoked_through = in_use(self.revoked_through);
        let (durable_epoch, durable) = self.durable;
        let is_durable = durable_epoch.get() == self.epoch;
        if rejected.is_empty() {
            return message(Answer::Ack(wire::Ack {
                keyring,
                epoch: self.epoch,
                nonce: self.nonce,
                applied_revision,
                durable_revision: if is_durable { durable.get() } else { 0 },
                revoked_through,
                ..Default::default()
            }));
        }
        for item in &rejected {
            tracing::error!(
                auth.keyring = keyring,
                item = item.name,
                reason = item.reason,
                "an item of the keyring cannot be used"
            );
        }
        rejected.truncate(MAX_NAMED_REJECTS);
        message(Answer::Nack(wire::Nack {
            keyring,
            epoch: self.epoch,
            nonce: self.nonce,
            items: rejected,
            applied_revision,
            revoked_through,
            ..Default::default()
        }))
    }
}
