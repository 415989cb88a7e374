//! A keyring that a sidecar holds in full: applies its settings, snapshots, deltas and revocations.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use super::{
    Leave, message,
    pulse::{deny_after_ms, reason_to_resync},
    reply::{Answered, Reply},
    revoked::RevokedThrough,
};
use crate::{
    clock::BootTime,
    key::{Epoch, KeyRecord, KeyringName, Revision},
    keyring::{
        Confirmation, DeltaError, KeyringSettings, Mirror, Restored, SnapshotBuilder, SnapshotError,
    },
    proto::discovery::{self, ResyncReason, sidecar_message::Kind as Answer},
    snapshot::{
        journal::WriteUrgency,
        recorder::{After, Recorder},
    },
    wire::change::{Changes, decode_items, decode_revocations},
};

/// One keyring that is held in full.
#[derive(Debug)]
pub(super) struct HeldSnapshot {
    mirror: Mirror,
    incoming: Option<Box<Incoming>>,
    /// The part of a snapshot from a stream that broke, until the next stream brings the rest or
    /// something else.
    partial: Option<Box<Incoming>>,
    /// A resync was requested: deltas are not applied until its snapshot arrives.
    awaits_snapshot: bool,
    /// The last snapshot was not applied, because it shrinks the keyring too much.
    awaits_confirmation: bool,
    revoked_through: RevokedThrough,
    pacer: ResyncPacer,
    /// None if nothing is kept on disk.
    recorder: Option<Recorder>,
}

/// A snapshot whose chunks are coming in.
#[derive(Debug)]
struct Incoming {
    /// The id in its chunks; zero if the snapshot cannot be resumed.
    id: u64,
    builder: SnapshotBuilder,
    next_index: u32,
    items: u64,
    rejected: Vec<discovery::RejectedItem>,
}

/// Spaces out resyncs that may change nothing. An item that this version cannot read makes every
/// snapshot mismatch, and must not cause an endless series of snapshots.
#[derive(Debug)]
struct ResyncPacer {
    wait: Duration,
    not_before: BootTime,
}

impl HeldSnapshot {
    pub(super) fn new(mirror: Mirror) -> Self {
        Self {
            mirror,
            incoming: None,
            partial: None,
            awaits_snapshot: false,
            awaits_confirmation: false,
            revoked_through: RevokedThrough::default(),
            pacer: ResyncPacer::new(),
            recorder: None,
        }
    }

    /// Records what is applied from now on with `recorder`.
    pub(super) fn record(&mut self, recorder: Recorder) {
        self.recorder = Some(recorder);
    }

    /// Loads the kept state. Everything up to its revision was applied, so no revocation is
    /// missing.
    pub(super) fn restore(&mut self, restored: Restored) {
        self.revoked_through
            .replaced(restored.view().revision(), false);
        self.mirror.restore(restored);
    }

    /// Drops the keyring, which the sidecar must not hold any more.
    pub(super) fn forget(&mut self) {
        self.mirror.forget();
        self.incoming = None;
        self.awaits_snapshot = false;
        self.awaits_confirmation = false;
        self.revoked_through = RevokedThrough::default();
        self.partial = None;
    }

    /// Applies new settings at once; `message` is their serialized form.
    pub(super) fn adopt(&mut self, settings: KeyringSettings, message: Bytes) {
        self.mirror.adopt(settings);
        if let Some(recorder) = &self.recorder {
            recorder.settings(self.after(), message);
        }
    }

    /// Returns an ack that reports up to which revision the keyring is on the disk.
    pub(super) fn tell_durable(&self) -> discovery::SidecarMessage {
        const NO_MESSAGE: u64 = 0;
        self.answer(
            self.mirror.position().epoch.get(),
            NO_MESSAGE,
            Answered::part(),
        )
    }

    /// Returns the subscription for the first message of a new stream.
    pub(super) fn subscription(&mut self) -> discovery::Subscription {
        if let Some(incoming) = self.incoming.take() {
            self.partial = Some(incoming).filter(|incoming| incoming.id != 0);
        }
        self.awaits_snapshot = false;
        self.awaits_confirmation = false;
        let position = self.mirror.position();
        discovery::Subscription {
            keyring: self.name().to_string(),
            epoch: position.epoch.get(),
            revision: position.revision.get(),
            set_digest: position.set_digest,
            mode: discovery::Mode::Full.into(),
            revoked_through: self.revoked_through.get().get(),
            partial: self
                .partial
                .as_ref()
                .map(|partial| discovery::PartialSnapshot {
                    id: partial.id,
                    chunks: partial.next_index,
                }),
            deny_after_ms: deny_after_ms(self.mirror.slot()),
        }
    }

    pub(super) fn chunk(
        &mut self,
        chunk: &discovery::SnapshotChunk,
    ) -> Result<Option<discovery::SidecarMessage>, Leave> {
        let (epoch, revision) = (Epoch::new(chunk.epoch), Revision::new(chunk.revision));
        if chunk.index == 0 {
            self.partial = None;
            let versions = usize::try_from(chunk.total_items).unwrap_or(usize::MAX);
            let builder = match self.mirror.begin_snapshot(epoch, revision, versions) {
                Ok(builder) => builder,
                Err(SnapshotError::Older { held, found }) => {
                    return Err(Leave::Lagging {
                        keyring: self.name(),
                        held,
                        found,
                    });
                }
                Err(
                    SnapshotError::NoSettings
                    | SnapshotError::Digest
                    | SnapshotError::Shrinks { .. },
                ) => return Err(Leave::Protocol("a snapshot before the keyring's settings")),
            };
            self.incoming = Some(Box::new(Incoming {
                id: chunk.id,
                builder,
                next_index: 0,
                items: 0,
                rejected: Vec::new(),
            }));
        } else if self.incoming.is_none() {
            self.incoming = self.partial.take();
        }
        let Some(mut incoming) = self.incoming.take().filter(|incoming| {
            let builder = &incoming.builder;
            incoming.next_index == chunk.index
                && incoming.id == chunk.id
                && builder.epoch() == epoch
                && builder.revision() == revision
        }) else {
            return Err(Leave::Protocol("a snapshot with a chunk out of order"));
        };
        let (items, rejected) = decode_items(&chunk.items);
        for announced in items {
            incoming.builder.add(&announced);
        }
        incoming.rejected.extend(rejected);
        incoming.items += chunk.items.len() as u64;
        incoming.next_index += 1;
        if chunk.last {
            self.finish(*incoming, chunk).map(Some)
        } else {
            self.incoming = Some(incoming);
            Ok(None)
        }
    }

    fn finish(
        &mut self,
        incoming: Incoming,
        last: &discovery::SnapshotChunk,
    ) -> Result<discovery::SidecarMessage, Leave> {
        if incoming.items != last.total_items {
            return Err(Leave::Protocol("an incomplete snapshot"));
        }
        let held = self.mirror.position();
        let new_epoch = held.epoch != Epoch::default() && held.epoch != incoming.builder.epoch();
        let set_digest = incoming.rejected.is_empty().then_some(last.set_digest);
        let confirmed = usize::try_from(last.confirmed_items).unwrap_or(usize::MAX);
        match self
            .mirror
            .finish_snapshot(incoming.builder, set_digest, confirmed)
        {
            Ok(()) => {
                self.awaits_snapshot = false;
                self.awaits_confirmation = false;
                let is_same_history = held.epoch == Epoch::new(last.epoch);
                self.revoked_through
                    .replaced(Revision::new(last.revision), is_same_history);
                if let Some(recorder) = &self.recorder {
                    recorder.replaced(self.after());
                }
                let keyring = self.name();
                if new_epoch {
                    tracing::warn!(
                        auth.keyring = %keyring,
                        old_epoch = %held.epoch,
                        new_epoch = last.epoch,
                        auth.keyring.revision = last.revision,
                        "the keyring has a new epoch, because its history was rewritten; revocations that this sidecar knows stay in force"
                    );
                } else {
                    tracing::info!(
                        auth.keyring = %keyring,
                        auth.keyring.revision = last.revision,
                        items = last.total_items,
                        "snapshot applied"
                    );
                }
                let answered = Answered::whole(incoming.rejected);
                Ok(self.answer(last.epoch, last.nonce, answered))
            }
            Err(SnapshotError::Shrinks { held, found }) => {
                tracing::error!(
                    auth.keyring = %self.name(),
                    held,
                    found,
                    "snapshot held: it would drop more than half of the keyring; confirm the number of items if it is right"
                );
                // The requested snapshot has arrived. At answers to beats, the sidecar requests it
                // again until an operator confirms it.
                self.awaits_snapshot = false;
                self.awaits_confirmation = true;
                let reason = SnapshotError::Shrinks { held, found }.to_string();
                let rejected = vec![discovery::RejectedItem {
                    name: "snapshot".to_owned(),
                    reason,
                }];
                Ok(self.answer(last.epoch, last.nonce, Answered::part_without(rejected)))
            }
            Err(
                SnapshotError::Digest | SnapshotError::NoSettings | SnapshotError::Older { .. },
            ) => Err(Leave::Protocol(
                "a snapshot whose items do not match its digest",
            )),
        }
    }

    pub(super) fn revocations(
        &mut self,
        message: &discovery::Revocations,
        serialized: Bytes,
    ) -> Vec<discovery::SidecarMessage> {
        let held = |digest: &_| self.mirror.record(digest);
        let (records, rejected) = decode_revocations(&message.items, held);
        let records = records.into_iter().map(|announced| announced.record);
        self.mirror.revoke(records.collect());
        let is_refused = !rejected.is_empty();
        if is_refused {
            self.note_refused(message.epoch, message.revision);
        } else if self.is_of_history(message.epoch) {
            let after = Revision::new(message.complete_after);
            self.revoked_through
                .overtaken(after, Revision::new(message.revision));
        }
        // Recorded after the revocations are applied, because the record says up to which revision
        // all of them are.
        if let Some(recorder) = &self.recorder {
            recorder.revocations(self.after(), serialized);
        }
        let answered = Answered::part_without(rejected);
        let answer = self.answer(message.epoch, message.nonce, answered);
        self.with_resync(answer, is_refused)
    }

    pub(super) fn delta(
        &mut self,
        delta: &discovery::Delta,
        serialized: Bytes,
    ) -> Vec<discovery::SidecarMessage> {
        let Changes {
            revocations,
            upserts,
            removals,
            rejected,
            is_revocation_rejected,
        } = Changes::of(delta, |digest| self.mirror.record(digest));
        if is_revocation_rejected {
            self.note_refused(delta.epoch, delta.revision);
        }
        let revoked: Vec<_> = revocations.iter().map(|a| a.record.clone()).collect();
        if self.awaits_snapshot || self.awaits_confirmation || self.incoming.is_some() {
            self.revoke_alone(delta, revoked);
            return Vec::new();
        }
        let urgency = if revoked.is_empty() {
            WriteUrgency::Soon
        } else {
            WriteUrgency::Now
        };
        let applied = self.mirror.apply_delta(
            Epoch::new(delta.epoch),
            Revision::new(delta.prev_revision),
            Revision::new(delta.revision),
            revocations,
            upserts,
            &removals,
        );
        match applied {
            Ok(()) => {
                self.partial = None;
                self.revoked_through.applied(Revision::new(delta.revision));
                if let Some(recorder) = &self.recorder {
                    recorder.delta(self.after(), serialized, urgency);
                }
                let answered = Answered::part_without(rejected);
                let answer = self.answer(delta.epoch, delta.nonce, answered);
                self.with_resync(answer, is_revocation_rejected)
            }
            Err(error) => {
                // A revocation counts even if the order of the deltas is wrong.
                self.revoke_alone(delta, revoked);
                tracing::warn!(auth.keyring = %self.name(), %error, "asking for a snapshot");
                vec![self.resync(match error {
                    DeltaError::Epoch { .. } => ResyncReason::Epoch,
                    DeltaError::Gap { .. } | DeltaError::Backwards { .. } => ResyncReason::Gap,
                })]
            }
        }
    }

    /// Notes a revocation that could not be read: its version may still be accepted.
    fn note_refused(&mut self, epoch: u64, revision: u64) {
        if self.is_of_history(epoch) {
            self.revoked_through.refused(Revision::new(revision));
        }
    }

    fn is_of_history(&self, epoch: u64) -> bool {
        self.mirror.position().epoch == Epoch::new(epoch)
    }

    /// Returns the answer, and a resync if a revocation could not be read: in the snapshot, the
    /// version is missing or revoked. If a snapshot is on its way already, a delta follows with the
    /// changes that it does not contain.
    fn with_resync(
        &mut self,
        answer: discovery::SidecarMessage,
        is_revocation_refused: bool,
    ) -> Vec<discovery::SidecarMessage> {
        let awaits = self.awaits_snapshot || self.awaits_confirmation || self.incoming.is_some();
        let mut answers = vec![answer];
        if is_revocation_refused && !awaits {
            answers.push(self.resync(ResyncReason::RevocationUnreadable));
        }
        answers
    }

    /// Applies only the revocations of a delta.
    fn revoke_alone(&mut self, delta: &discovery::Delta, revoked: Vec<KeyRecord>) {
        if revoked.is_empty() {
            return;
        }
        self.mirror.revoke(revoked);
        if let Some(recorder) = &self.recorder {
            let revocations = discovery::Revocations {
                keyring: delta.keyring.clone(),
                epoch: delta.epoch,
                revision: delta.revision,
                nonce: delta.nonce,
                items: delta.revocations.clone(),
                // The delta was not applied, so changes before it may be missing.
                complete_after: delta.prev_revision,
            };
            let serialized = revocations.encode_to_vec().into();
            recorder.revocations(self.after(), serialized);
        }
    }

    pub(super) fn pulse(
        &mut self,
        pulse: &discovery::KeyringPulse,
        asked: Confirmation,
        now: BootTime,
    ) -> Result<Option<discovery::SidecarMessage>, Leave> {
        if self.awaits_snapshot || self.incoming.is_some() {
            return Ok(None);
        }
        if self.awaits_confirmation {
            let looks = self.pacer.may_resync(now);
            return Ok(looks.then(|| self.resync(ResyncReason::SnapshotHeld)));
        }
        let held = self.mirror.position();
        if let Some(reason) = reason_to_resync(&self.name(), held, pulse)? {
            return Ok(Some(self.resync(reason)));
        }
        if pulse.set_digest == held.set_digest {
            self.pacer = ResyncPacer::new();
            self.partial = None;
            self.mirror
                .slot()
                .confirm(asked, Duration::from_millis(pulse.serve_for_ms));
            return Ok(None);
        }
        if !self.pacer.may_resync(now) {
            return Ok(None);
        }
        tracing::error!(
            auth.keyring = %self.name(),
            auth.keyring.revision = pulse.revision,
            "the keyring differs from that of the control plane at the same revision; asking for a snapshot"
        );
        Ok(Some(self.resync(ResyncReason::DigestMismatch)))
    }

    /// Returns the state that was applied so far, for the recorder.
    fn after(&self) -> After<'_> {
        After {
            slot: self.mirror.slot(),
            revoked_through: self.revoked_through.get(),
        }
    }

    /// Returns whether no snapshot is awaited or arriving. A snapshot that waits for an operator's
    /// confirmation does not count.
    pub(super) const fn is_following(&self) -> bool {
        !self.awaits_snapshot && self.incoming.is_none()
    }

    fn resync(&mut self, reason: ResyncReason) -> discovery::SidecarMessage {
        self.incoming = None;
        self.partial = None;
        self.awaits_snapshot = true;
        message(Answer::Resync(discovery::Resync {
            keyring: self.name().to_string(),
            reason: reason.into(),
        }))
    }

    fn answer(&self, epoch: u64, nonce: u64, answered: Answered) -> discovery::SidecarMessage {
        let reply = Reply {
            keyring: self.mirror.slot().name(),
            epoch,
            nonce,
            held: self.mirror.position(),
            revoked_through: self.revoked_through.get(),
            durable: self
                .recorder
                .as_ref()
                .map(|recorder| recorder.durable(self.mirror.slot()))
                .unwrap_or_default(),
        };
        reply.answer(answered)
    }

    fn name(&self) -> KeyringName {
        self.mirror.slot().name().clone()
    }
}

impl ResyncPacer {
    const FIRST: Duration = Duration::from_secs(10);
    const MAX: Duration = Duration::from_mins(5);

    fn new() -> Self {
        Self {
            wait: Self::FIRST,
            not_before: BootTime::default(),
        }
    }

    fn may_resync(&mut self, now: BootTime) -> bool {
        if now < self.not_before {
            return false;
        }
        self.not_before = now.saturating_add(self.wait);
        self.wait = (2 * self.wait).min(Self::MAX);
        true
    }
}
