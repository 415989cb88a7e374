//! How a message about a keyring is answered.

use super::message;
use crate::{
    key::{KeyringName, Revision},
    keyring::Position,
    proto::discovery::{self, sidecar_message::Kind as Answer},
    snapshot::durable::Durable,
};

/// What an answer says of a keyring.
pub(super) struct Reply<'a> {
    pub(super) keyring: &'a KeyringName,
    pub(super) epoch: u64,
    pub(super) nonce: u64,
    pub(super) held: Position,
    pub(super) revoked_through: Revision,
    /// Up to where it is on the disk.
    pub(super) durable: Durable,
}

/// What an answer says of the message that it is for.
pub(super) struct Answered {
    /// Its items that cannot be used.
    pub(super) rejected: Vec<discovery::RejectedItem>,
    /// It is a whole snapshot or a start, and in use.
    pub(super) is_whole: bool,
}

/// At most so many rejected items are named in one nack, which says so where there are more.
const MAX_NAMED_REJECTS: usize = 100;

impl Answered {
    /// A snapshot or a start is in use, but for what was rejected.
    pub(super) const fn whole(rejected: Vec<discovery::RejectedItem>) -> Self {
        Self {
            rejected,
            is_whole: true,
        }
    }

    /// A change, or nothing at all, is in use.
    pub(super) const fn part() -> Self {
        Self::part_without(Vec::new())
    }

    /// A change is in use, but for what was rejected.
    pub(super) const fn part_without(rejected: Vec<discovery::RejectedItem>) -> Self {
        Self {
            rejected,
            is_whole: false,
        }
    }
}

impl Reply<'_> {
    /// An ack, or a nack that names what was rejected.
    pub(super) fn answer(&self, answered: Answered) -> discovery::SidecarMessage {
        let Answered {
            mut rejected,
            is_whole,
        } = answered;
        let keyring = self.keyring.to_string();
        // Of another history nothing is in use yet, whatever the number.
        let is_of_history = self.held.epoch.get() == self.epoch;
        let in_use = |revision: Revision| if is_of_history { revision.get() } else { 0 };
        let applied_revision = in_use(self.held.revision);
        let revoked_through = in_use(self.revoked_through);
        let is_durable = self.durable.epoch.get() == self.epoch;
        let on_disk = |revision: Revision| if is_durable { revision.get() } else { 0 };
        let durable_revision = on_disk(self.durable.revision);
        let durable_revoked_through = on_disk(self.durable.revoked_through);
        if rejected.is_empty() {
            return message(Answer::Ack(discovery::Ack {
                keyring,
                epoch: self.epoch,
                nonce: self.nonce,
                applied_revision,
                durable_revision,
                revoked_through,
                is_whole,
                durable_revoked_through,
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
        let has_more = rejected.len() > MAX_NAMED_REJECTS;
        rejected.truncate(MAX_NAMED_REJECTS);
        message(Answer::Nack(discovery::Nack {
            keyring,
            epoch: self.epoch,
            nonce: self.nonce,
            items: rejected,
            applied_revision,
            revoked_through,
            is_whole,
            has_more,
            durable_revision,
            durable_revoked_through,
        }))
    }
}
