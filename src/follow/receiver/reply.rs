//! The answers to messages about a keyring.

use super::message;
use crate::{
    key::{KeyringName, Revision},
    keyring::KeyringPosition,
    proto::discovery::{self, sidecar_message::Kind as Answer},
    snapshot::durable::Durable,
};

/// The state of a keyring in an answer.
pub(super) struct Reply<'a> {
    pub(super) keyring: &'a KeyringName,
    pub(super) epoch: u64,
    pub(super) nonce: u64,
    pub(super) held: KeyringPosition,
    pub(super) revoked_through: Revision,
    /// The revisions of the keyring that are on the disk.
    pub(super) durable: Durable,
}

/// The result of the message that is answered.
pub(super) struct Answered {
    /// The items of the message that cannot be used.
    pub(super) rejected: Vec<discovery::RejectedItem>,
    /// The message is a whole snapshot or a start, and is in use.
    pub(super) is_whole: bool,
}

/// The most rejected items that one nack names; `has_more` says that there are more.
const MAX_NAMED_REJECTS: usize = 100;

impl Answered {
    /// Returns the result of a snapshot or a start that is in use, except for the rejected items.
    pub(super) const fn whole(rejected: Vec<discovery::RejectedItem>) -> Self {
        Self {
            rejected,
            is_whole: true,
        }
    }

    /// Returns the result of a change that is in use, or of no change.
    pub(super) const fn part() -> Self {
        Self::part_without(Vec::new())
    }

    /// Returns the result of a change that is in use, except for the rejected items, or of a
    /// snapshot that is rejected as a whole.
    pub(super) const fn part_without(rejected: Vec<discovery::RejectedItem>) -> Self {
        Self {
            rejected,
            is_whole: false,
        }
    }
}

impl Reply<'_> {
    /// Returns an ack, or a nack that names the rejected items.
    pub(super) fn answer(&self, answered: Answered) -> discovery::SidecarMessage {
        let Answered {
            mut rejected,
            is_whole,
        } = answered;
        let keyring = self.keyring.to_string();
        // Nothing of this history is in use yet if the held state is of another one, whatever its
        // revision.
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
