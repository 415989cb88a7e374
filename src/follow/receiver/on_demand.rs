//! A keyring that a sidecar holds on demand: applies its starts, deltas, revocations and lookup
//! results.

use std::time::Duration;

use super::{
    Leave, message,
    pulse::{deny_after_ms, reason_to_resync},
    reply::{Answered, Reply},
    revoked::RevokedThrough,
};
use crate::{
    clock::BootTime,
    key::{Epoch, KeyDigest, KeyRecord, KeyringName, Revision},
    keyring::{
        Confirmation, DeltaError,
        on_demand::{Fill, Follower, Found, StartError},
    },
    proto::discovery::{self, ResyncReason, sidecar_message::Kind as Answer},
    snapshot::durable::Durable,
    wire::{
        change::{decode_items, decode_revocations, refusal},
        item,
    },
};

/// One keyring that is held on demand.
#[derive(Debug)]
pub(super) struct Followed {
    follower: Follower,
    /// A resync was requested: deltas are not applied until the keyring starts anew.
    awaits_start: bool,
    revoked_through: RevokedThrough,
}

impl Followed {
    pub(super) fn new(follower: Follower) -> Self {
        Self {
            follower,
            awaits_start: false,
            revoked_through: RevokedThrough::default(),
        }
    }

    pub(super) const fn follower(&mut self) -> &mut Follower {
        &mut self.follower
    }

    /// Drops the keyring, which the sidecar must not hold any more.
    pub(super) fn forget(&mut self) {
        self.follower.forget();
        self.awaits_start = false;
        self.revoked_through = RevokedThrough::default();
    }

    /// Returns the subscription for the first message of a new stream.
    pub(super) fn subscription(&mut self) -> discovery::Subscription {
        self.awaits_start = false;
        let position = self.follower.position();
        discovery::Subscription {
            keyring: self.name().to_string(),
            epoch: position.epoch.get(),
            revision: position.revision.get(),
            set_digest: 0,
            mode: discovery::Mode::OnDemand.into(),
            revoked_through: self.revoked_through.get().get(),
            deny_after_ms: deny_after_ms(self.follower.slot()),
            ..Default::default()
        }
    }

    pub(super) fn start(
        &mut self,
        start: &discovery::Start,
    ) -> Result<Option<discovery::SidecarMessage>, Leave> {
        let (epoch, revision) = (Epoch::new(start.epoch), Revision::new(start.revision));
        let former = self.follower.position();
        match self.follower.start(epoch, revision) {
            Ok(true) => {}
            Ok(false) => return Err(Leave::Protocol("a start before the keyring's settings")),
            Err(StartError { held, found }) => {
                return Err(Leave::Lagging {
                    keyring: self.name(),
                    held,
                    found,
                });
            }
        }
        self.awaits_start = false;
        self.revoked_through
            .replaced(revision, former.epoch == epoch);
        if former.epoch != Epoch::default() && former.epoch != epoch {
            tracing::warn!(
                auth.keyring = %self.name(),
                old_epoch = %former.epoch,
                new_epoch = start.epoch,
                auth.keyring.revision = start.revision,
                "the keyring has a new epoch, because its history was rewritten; revocations that this sidecar knows stay in force"
            );
        } else {
            tracing::info!(
                auth.keyring = %self.name(),
                auth.keyring.revision = start.revision,
                "the keyring is followed from this revision; keys are looked up again"
            );
        }
        let answered = Answered::whole(Vec::new());
        Ok(Some(self.answer(start.epoch, start.nonce, answered)))
    }

    /// Returns whether deltas are applied: no start is missing.
    pub(super) const fn is_following(&self) -> bool {
        !self.awaits_start
    }

    pub(super) fn revocations(
        &mut self,
        message: &discovery::Revocations,
    ) -> Vec<discovery::SidecarMessage> {
        let (records, rejected) = revocations(&message.items);
        let revision = Revision::new(message.revision);
        let epoch = Epoch::new(message.epoch);
        self.follower.revoke(epoch, revision, &records);
        let is_refused = !rejected.is_empty();
        if is_refused {
            self.note_refused(epoch, revision);
        } else if epoch == self.follower.position().epoch {
            let after = Revision::new(message.complete_after);
            self.revoked_through.overtaken(after, revision);
        }
        let answered = Answered::part_without(rejected);
        let answer = self.answer(message.epoch, message.nonce, answered);
        self.with_resync(answer, is_refused)
    }

    pub(super) fn delta(&mut self, delta: &discovery::Delta) -> Vec<discovery::SidecarMessage> {
        let (epoch, revision) = (Epoch::new(delta.epoch), Revision::new(delta.revision));
        let (revoked, mut rejected) = revocations(&delta.revocations);
        let mut is_unsure = !rejected.is_empty();
        if is_unsure {
            self.note_refused(epoch, revision);
        }
        if self.awaits_start {
            self.follower.revoke(epoch, revision, &revoked);
            return Vec::new();
        }
        let (upserts, rejected_upserts) = records(&delta.upserts);
        // The cached state of such a version is outdated: the next check looks the version up, and
        // is denied.
        let mut outdated = Vec::new();
        if !rejected_upserts.is_empty() {
            let unreadable = delta.upserts.iter();
            let unreadable = unreadable.filter(|found| item::decode(found).is_err());
            for digest in unreadable.map(|found| item::digest_of(&found.record)) {
                is_unsure |= digest.is_none();
                outdated.extend(digest);
            }
        }
        rejected.extend(rejected_upserts);
        let mut removals: Vec<_> = delta
            .removals
            .iter()
            .filter_map(|removal| match KeyDigest::from_slice(&removal.digest) {
                Ok(digest) => Some(digest),
                Err(error) => {
                    rejected.push(refusal(&removal.name, &error.to_string()));
                    None
                }
            })
            .collect();
        removals.extend(outdated);
        let applied = self.follower.apply_delta(
            epoch,
            Revision::new(delta.prev_revision),
            revision,
            &revoked,
            &upserts,
            &removals,
        );
        match applied {
            Ok(()) => {
                self.revoked_through.applied(revision);
                let answered = Answered::part_without(rejected);
                let answer = self.answer(delta.epoch, delta.nonce, answered);
                self.with_resync(answer, is_unsure)
            }
            Err(error) => {
                // A revocation counts even if the order of the deltas is wrong.
                self.follower.revoke(epoch, revision, &revoked);
                tracing::warn!(auth.keyring = %self.name(), %error, "asking for a new start");
                vec![self.resync(match error {
                    DeltaError::Epoch { .. } => ResyncReason::Epoch,
                    DeltaError::Gap { .. } | DeltaError::Backwards { .. } => ResyncReason::Gap,
                })]
            }
        }
    }

    /// Notes a revocation that could not be read: its version may be cached as accepted.
    fn note_refused(&mut self, epoch: Epoch, revision: Revision) {
        if epoch == self.follower.position().epoch {
            self.revoked_through.refused(revision);
        }
    }

    /// Returns the answer, and a resync if it is unknown which version a change is about: after the
    /// start that follows, nothing that is cached now is used again.
    fn with_resync(
        &mut self,
        answer: discovery::SidecarMessage,
        is_unsure: bool,
    ) -> Vec<discovery::SidecarMessage> {
        let mut answers = vec![answer];
        if is_unsure && !self.awaits_start {
            answers.push(self.resync(ResyncReason::RevocationUnreadable));
        }
        answers
    }

    pub(super) fn lookup_result(
        &mut self,
        result: &discovery::LookupResult,
        now: BootTime,
    ) -> Result<(), Leave> {
        let digest = KeyDigest::from_slice(&result.digest)
            .map_err(|_| Leave::Protocol("a lookup's result without a digest"))?;
        let found = match &result.item {
            None => Found::Nothing,
            Some(found) => match item::decode(found) {
                Ok(record) if record.digest == digest => Found::Version(Box::new(record)),
                Ok(_) => {
                    return Err(Leave::Protocol(
                        "another key than the one that was looked up",
                    ));
                }
                Err(error) => {
                    tracing::error!(
                        auth.keyring = %self.name(),
                        item = found.name,
                        %error,
                        "an item of the keyring cannot be used"
                    );
                    Found::Unreadable
                }
            },
        };
        let (siblings, rejected) = records(&result.siblings);
        for discovery::RejectedItem { name, reason } in &rejected {
            tracing::error!(
                auth.keyring = %self.name(),
                item = name,
                error = reason,
                "an item of the keyring cannot be used"
            );
        }
        let fill = Fill {
            epoch: Epoch::new(result.epoch),
            revision: Revision::new(result.revision),
            digest,
            found,
            siblings: rejected.is_empty().then_some(siblings),
        };
        self.follower.fill(fill, now);
        Ok(())
    }

    pub(super) fn pulse(
        &mut self,
        pulse: &discovery::KeyringPulse,
        asked: Confirmation,
    ) -> Result<Option<discovery::SidecarMessage>, Leave> {
        if self.awaits_start {
            return Ok(None);
        }
        let held = self.follower.position();
        if let Some(reason) = reason_to_resync(&self.name(), held, pulse)? {
            return Ok(Some(self.resync(reason)));
        }
        self.follower
            .slot()
            .confirm(asked, Duration::from_millis(pulse.serve_for_ms));
        Ok(None)
    }

    /// Returns the next lookup to send.
    pub(super) fn next_lookup(&self) -> Option<discovery::Lookup> {
        let digest = self.follower.cache().next_request()?;
        Some(discovery::Lookup {
            keyring: self.name().to_string(),
            digest: digest.as_bytes().to_vec().into(),
        })
    }

    fn resync(&mut self, reason: ResyncReason) -> discovery::SidecarMessage {
        self.awaits_start = true;
        message(Answer::Resync(discovery::Resync {
            keyring: self.name().to_string(),
            reason: reason.into(),
        }))
    }

    fn answer(&self, epoch: u64, nonce: u64, answered: Answered) -> discovery::SidecarMessage {
        let reply = Reply {
            keyring: self.follower.slot().name(),
            epoch,
            nonce,
            held: self.follower.position(),
            revoked_through: self.revoked_through.get(),
            durable: Durable::default(),
        };
        reply.answer(answered)
    }

    fn name(&self) -> KeyringName {
        self.follower.slot().name().clone()
    }
}

/// Decodes revoked versions. If only the digest of a version can be read, the rest of its record
/// does not matter: it is denied.
fn revocations(items: &[discovery::Item]) -> (Vec<KeyRecord>, Vec<discovery::RejectedItem>) {
    let (announced, rejected) = decode_revocations(items, |_| None);
    let records = announced.into_iter().map(|announced| announced.record);
    (records.collect(), rejected)
}

fn records(items: &[discovery::Item]) -> (Vec<KeyRecord>, Vec<discovery::RejectedItem>) {
    let (announced, rejected) = decode_items(items);
    let records = announced.into_iter().map(|announced| announced.record);
    (records.collect(), rejected)
}
