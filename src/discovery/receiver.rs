//! What a sidecar does with what comes down its stream. No network: a message goes in, answers come out.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message;
use tokio::sync::Notify;

use super::{
    item,
    reporter::{ReportProgress, Reporter},
};
use crate::{
    clock::{BootTime, Clock},
    key::{Epoch, KeyDigest, KeyringName, Pepper, PepperId, Revision, Timestamp},
    keyring::{
        Announced, DeltaError, KeyringSettings, Keyrings, Mirror, Position, SnapshotBuilder,
        SnapshotError, on_demand::Follower,
    },
    proto::discovery::{
        self as wire, ResyncReason, control_message::Kind, sidecar_message::Kind as Answer,
    },
};

mod on_demand;

use on_demand::Followed;

/// Applies what the control plane sends to a sidecar's keyrings.
#[derive(Debug)]
pub struct Receiver {
    clock: Clock,
    /// Those that are held in full.
    keyrings: BTreeMap<KeyringName, Held>,
    on_demand: BTreeMap<KeyringName, Followed>,
    /// Woken when there is a lookup to send.
    lookups: Arc<Notify>,
    reporter: Reporter,
}

/// What came of a message.
#[derive(Debug, Default)]
pub struct Outcome {
    /// To send, in order.
    pub answers: Vec<wire::SidecarMessage>,
    /// How far the control plane's wall clock is ahead of ours, in milliseconds, where the message told.
    pub clock_skew_ms: Option<i64>,
}

/// Why a sidecar leaves a stream of its own accord.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Leave {
    /// The control plane is about to stop.
    #[error("the control plane drains its streams")]
    Drain {
        /// When to connect again; none to leave it to the sidecar.
        retry_after: Option<Duration>,
    },
    /// The control plane knows less than we do: a replica that lags, or one that lost commits.
    #[error(
        "the control plane is at revision {found} of keyring {keyring}, older than {held} of the same epoch; if it was restored from a backup, start it with --new-epoch"
    )]
    Lagging {
        /// Which keyring.
        keyring: KeyringName,
        /// What we hold.
        held: Revision,
        /// What the control plane has.
        found: Revision,
    },
    /// The control plane does not keep to the protocol.
    #[error("the control plane sent {0}")]
    Protocol(&'static str),
}

#[derive(Debug)]
struct Held {
    mirror: Mirror,
    incoming: Option<Incoming>,
    /// A resync was asked for: deltas are of no use until its snapshot comes.
    awaits_snapshot: bool,
    /// The last snapshot was not taken because it shrinks the keyring too much.
    awaits_confirmation: bool,
    revoked_through: Revision,
    pacer: ResyncPacer,
}

/// How a message about a keyring is answered.
struct Reply<'a> {
    keyring: &'a KeyringName,
    epoch: u64,
    nonce: u64,
    held: Position,
    revoked_through: Revision,
}

/// A snapshot whose chunks are coming in.
#[derive(Debug)]
struct Incoming {
    builder: SnapshotBuilder,
    next_index: u32,
    items: u64,
    rejected: Vec<wire::RejectedItem>,
}

/// Spaces the resyncs that may well change nothing: an item that this version cannot read makes every snapshot
/// mismatch, and must not turn into a stream of snapshots.
#[derive(Debug)]
struct ResyncPacer {
    wait: Duration,
    not_before: BootTime,
}

/// At most so many rejected items are named in one nack; the rest is counted by the set digest.
const MAX_NAMED_REJECTS: usize = 100;

impl Receiver {
    /// A receiver for `keyrings`, none of which holds anything yet.
    #[must_use]
    pub fn new(keyrings: &Keyrings, clock: Clock) -> Self {
        let reporter = Reporter::new(keyrings);
        let lookups = Arc::clone(keyrings.lookups());
        let (mut full, mut on_demand) = (BTreeMap::new(), BTreeMap::new());
        for slot in keyrings.iter() {
            let (name, slot) = (slot.name().clone(), Arc::clone(slot));
            if let Some(cache) = slot.cache().cloned() {
                on_demand.insert(name, Followed::new(Follower::new(slot, cache)));
            } else {
                full.insert(name, Held::new(Mirror::new(slot)));
            }
        }
        Self {
            clock,
            keyrings: full,
            on_demand,
            lookups,
            reporter,
        }
    }

    /// A stream is open: what it answers can be asked for.
    pub fn connected(&mut self) {
        for followed in self.on_demand.values_mut() {
            followed.follower().connected();
        }
    }

    /// The stream has ended: whoever waits for an answer is told.
    pub fn disconnected(&mut self) {
        for followed in self.on_demand.values_mut() {
            followed.follower().disconnected();
        }
    }

    /// The next lookup to send.
    pub fn next_lookup(&self) -> Option<wire::SidecarMessage> {
        let mut lookups = self.on_demand.values();
        let lookup = lookups.find_map(Followed::next_lookup)?;
        Some(message(Answer::Lookup(lookup)))
    }

    /// Woken when there is a lookup to send.
    #[must_use]
    pub const fn lookups(&self) -> &Arc<Notify> {
        &self.lookups
    }

    /// What the first message of a new stream says of each keyring. What was half received before is forgotten.
    pub fn subscriptions(&mut self) -> Vec<wire::Subscription> {
        self.reporter.reconnected();
        let full = self.keyrings.values_mut().map(Held::subscription);
        let on_demand = self.on_demand.values_mut().map(Followed::subscription);
        full.chain(on_demand).collect()
    }

    /// Takes one message.
    ///
    /// # Errors
    ///
    /// When the stream is to be left.
    pub fn receive(&mut self, message: wire::ControlMessage) -> Result<Outcome, Leave> {
        let Some(kind) = message.kind else {
            // A kind of message that this version does not know.
            return Ok(Outcome::default());
        };
        match kind {
            Kind::Settings(settings) => self.settings(settings).map(Outcome::answer),
            Kind::Snapshot(chunk) => self.chunk(chunk).map(Outcome::answer),
            Kind::Delta(delta) => self.delta(delta).map(Outcome::answer),
            Kind::Revocations(revocations) => self.revocations(revocations).map(Outcome::answer),
            Kind::Heartbeat(heartbeat) => self.heartbeat(heartbeat),
            Kind::Drain(drain) => Err(Leave::Drain {
                retry_after: drain
                    .retry_after
                    .and_then(|after| Duration::try_from(after).ok()),
            }),
            Kind::UsageAck(ack) => {
                self.reporter.acked(ack.sequence);
                Ok(Outcome::default())
            }
            Kind::Start(start) => self.start(&start).map(Outcome::answer),
            Kind::LookupResult(result) => self.lookup_result(&result).map(|()| Outcome::default()),
            Kind::NotServed(refusal) => {
                tracing::warn!(
                    auth.keyring = refusal.keyring,
                    reason = refusal.reason,
                    "the control plane does not serve this keyring"
                );
                Ok(Outcome::default())
            }
        }
    }

    /// The last usage report, once no check is under way and none will come.
    pub fn last_report(&mut self) -> Vec<wire::Usage> {
        let now = self.clock.wall();
        self.reporter.last_report(now)
    }

    /// How far the usage reports have come.
    #[must_use]
    pub fn progress(&self) -> ReportProgress {
        self.reporter.progress()
    }

    fn settings(
        &mut self,
        settings: wire::KeyringSettings,
    ) -> Result<Option<wire::SidecarMessage>, Leave> {
        let peppers = settings
            .peppers
            .iter()
            .map(|pepper| Pepper::new(PepperId::new(pepper.id), &pepper.secret))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Leave::Protocol("a pepper of the wrong length"))?;
        if peppers.is_empty() {
            return Err(Leave::Protocol("settings without a pepper"));
        }
        let adopted = KeyringSettings {
            prefix: settings
                .prefix
                .parse()
                .map_err(|_| Leave::Protocol("settings with an invalid prefix"))?,
            issued_only: settings.issued_only,
            peppers,
            help_url: Some(settings.help_url).filter(|url| !url.is_empty()),
        };
        if let Some(followed) = self.followed(&settings.keyring) {
            followed.follower().adopt(adopted);
        } else if let Some(held) = self.held(&settings.keyring) {
            held.mirror.adopt(adopted);
        } else {
            return Ok(None);
        }
        // They come before anything else of the keyring, so that no report of this stream passes over what was lost.
        if let Ok(name) = settings.keyring.parse() {
            self.reporter.entered(&name, Epoch::new(settings.epoch));
        }
        Ok(None)
    }

    fn chunk(&mut self, chunk: Bytes) -> Result<Option<wire::SidecarMessage>, Leave> {
        let chunk = wire::SnapshotChunk::decode(chunk)
            .map_err(|_| Leave::Protocol("a snapshot that cannot be decoded"))?;
        let Some(held) = self.held(&chunk.keyring) else {
            return Ok(None);
        };
        held.chunk(&chunk)
    }

    fn delta(&mut self, delta: Bytes) -> Result<Option<wire::SidecarMessage>, Leave> {
        let delta = wire::Delta::decode(delta)
            .map_err(|_| Leave::Protocol("a delta that cannot be decoded"))?;
        if let Some(followed) = self.followed(&delta.keyring) {
            return Ok(followed.delta(&delta));
        }
        Ok(self
            .held(&delta.keyring)
            .and_then(|held| held.delta(&delta)))
    }

    fn revocations(&mut self, message: Bytes) -> Result<Option<wire::SidecarMessage>, Leave> {
        let message = wire::Revocations::decode(message)
            .map_err(|_| Leave::Protocol("revocations that cannot be decoded"))?;
        if let Some(followed) = self.followed(&message.keyring) {
            return Ok(Some(followed.revocations(&message)));
        }
        Ok(self.held(&message.keyring).map(|held| {
            let (records, rejected) = decode_items(&message.items);
            let records = records.into_iter().map(|announced| announced.record);
            held.mirror.revoke(records.collect());
            let is_of_history = held.mirror.position().epoch.get() == message.epoch;
            if rejected.is_empty() && is_of_history {
                held.revoked_through = held.revoked_through.max(Revision::new(message.revision));
            }
            held.answer(message.epoch, message.nonce, rejected)
        }))
    }

    fn heartbeat(&mut self, heartbeat: wire::Heartbeat) -> Result<Outcome, Leave> {
        let (now, wall) = (self.clock.boot(), self.clock.wall());
        let sent_at = timestamp(heartbeat.sent_at)?;
        let mut outcome = Outcome {
            answers: Vec::new(),
            clock_skew_ms: Some(sent_at.as_millis() - wall.as_millis()),
        };
        for pulse in heartbeat.keyrings {
            let as_of = timestamp(pulse.as_of)?;
            let confirmed_at = now.saturating_sub(sent_at.saturating_since(as_of));
            if let Some(followed) = self.followed(&pulse.keyring) {
                outcome
                    .answers
                    .extend(followed.pulse(&pulse, confirmed_at)?);
            } else if let Some(held) = self.held(&pulse.keyring) {
                outcome
                    .answers
                    .extend(held.pulse(&pulse, confirmed_at, now)?);
            }
        }
        let report = self.reporter.report(wall).into_iter();
        let report = report.map(|usage| message(Answer::Usage(usage)));
        outcome.answers.extend(report);
        Ok(outcome)
    }

    fn start(&mut self, start: &wire::Start) -> Result<Option<wire::SidecarMessage>, Leave> {
        match self.followed(&start.keyring) {
            Some(followed) => followed.start(start),
            None => Ok(None),
        }
    }

    fn lookup_result(&mut self, result: &wire::LookupResult) -> Result<(), Leave> {
        let now = self.clock.boot();
        match self.followed(&result.keyring) {
            Some(followed) => followed.lookup_result(result, now),
            None => Ok(()),
        }
    }

    /// The same of a keyring that is held on demand.
    fn followed(&mut self, keyring: &str) -> Option<&mut Followed> {
        let name: KeyringName = keyring.parse().ok()?;
        self.on_demand.get_mut(&name)
    }

    /// The keyring of a message; one that was not subscribed to is passed over.
    fn held(&mut self, keyring: &str) -> Option<&mut Held> {
        let name: KeyringName = keyring.parse().ok()?;
        self.keyrings.get_mut(&name)
    }
}

impl Outcome {
    fn answer(answer: Option<wire::SidecarMessage>) -> Self {
        Self {
            answers: answer.into_iter().collect(),
            clock_skew_ms: None,
        }
    }
}

impl Held {
    fn new(mirror: Mirror) -> Self {
        Self {
            mirror,
            incoming: None,
            awaits_snapshot: false,
            awaits_confirmation: false,
            revoked_through: Revision::default(),
            pacer: ResyncPacer::new(),
        }
    }

    /// What the first message of a new stream says of it.
    fn subscription(&mut self) -> wire::Subscription {
        self.incoming = None;
        self.awaits_snapshot = false;
        self.awaits_confirmation = false;
        let position = self.mirror.position();
        wire::Subscription {
            keyring: self.name().to_string(),
            epoch: position.epoch.get(),
            revision: position.revision.get(),
            set_digest: position.set_digest,
            mode: wire::Mode::Full.into(),
        }
    }

    fn chunk(
        &mut self,
        chunk: &wire::SnapshotChunk,
    ) -> Result<Option<wire::SidecarMessage>, Leave> {
        let (epoch, revision) = (Epoch::new(chunk.epoch), Revision::new(chunk.revision));
        if chunk.index == 0 {
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
            self.incoming = Some(Incoming {
                builder,
                next_index: 0,
                items: 0,
                rejected: Vec::new(),
            });
        }
        let Some(mut incoming) = self.incoming.take().filter(|incoming| {
            let builder = &incoming.builder;
            incoming.next_index == chunk.index
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
            self.finish(incoming, chunk).map(Some)
        } else {
            self.incoming = Some(incoming);
            Ok(None)
        }
    }

    fn finish(
        &mut self,
        incoming: Incoming,
        last: &wire::SnapshotChunk,
    ) -> Result<wire::SidecarMessage, Leave> {
        if incoming.items != last.total_items {
            return Err(Leave::Protocol("a snapshot that is cut short"));
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
                self.revoked_through = Revision::new(last.revision);
                let keyring = self.name();
                if new_epoch {
                    tracing::warn!(
                        auth.keyring = %keyring,
                        old_epoch = %held.epoch,
                        new_epoch = last.epoch,
                        auth.keyring.revision = last.revision,
                        "the keyring has a new epoch: its history was rewritten; revocations known here stay in force"
                    );
                } else {
                    tracing::info!(
                        auth.keyring = %keyring,
                        auth.keyring.revision = last.revision,
                        items = last.total_items,
                        "snapshot applied"
                    );
                }
                Ok(self.answer(last.epoch, last.nonce, incoming.rejected))
            }
            Err(SnapshotError::Shrinks { held, found }) => {
                tracing::error!(
                    auth.keyring = %self.name(),
                    held,
                    found,
                    "snapshot held: it would drop more than half of the keyring; confirm the number of items if it is right"
                );
                // The one that was asked for has come; heartbeats ask again until one is confirmed.
                self.awaits_snapshot = false;
                self.awaits_confirmation = true;
                let reason = SnapshotError::Shrinks { held, found }.to_string();
                Ok(self.answer(
                    last.epoch,
                    last.nonce,
                    vec![wire::RejectedItem {
                        name: "snapshot".to_owned(),
                        reason,
                    }],
                ))
            }
            Err(
                SnapshotError::Digest | SnapshotError::NoSettings | SnapshotError::Older { .. },
            ) => Err(Leave::Protocol(
                "a snapshot with other items than its digest says",
            )),
        }
    }

    fn delta(&mut self, delta: &wire::Delta) -> Option<wire::SidecarMessage> {
        let (revocations, mut rejected) = decode_items(&delta.revocations);
        let revoked: Vec<_> = revocations.iter().map(|a| a.record.clone()).collect();
        if self.awaits_snapshot || self.awaits_confirmation || self.incoming.is_some() {
            self.mirror.revoke(revoked);
            return None;
        }
        let (upserts, rejected_upserts) = decode_items(&delta.upserts);
        rejected.extend(rejected_upserts);
        let removals: Vec<_> = delta
            .removals
            .iter()
            .filter_map(|removal| match KeyDigest::from_slice(&removal.digest) {
                Ok(digest) => Some(digest),
                Err(error) => {
                    rejected.push(wire::RejectedItem {
                        name: removal.name.clone(),
                        reason: error.to_string(),
                    });
                    None
                }
            })
            .collect();
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
                self.revoked_through = self.revoked_through.max(Revision::new(delta.revision));
                Some(self.answer(delta.epoch, delta.nonce, rejected))
            }
            Err(error) => {
                // Whatever is wrong with the order, a revocation holds.
                self.mirror.revoke(revoked);
                tracing::warn!(auth.keyring = %self.name(), %error, "asking for a snapshot");
                Some(self.resync(match error {
                    DeltaError::Epoch { .. } => ResyncReason::Epoch,
                    DeltaError::Gap { .. } => ResyncReason::Gap,
                }))
            }
        }
    }

    fn pulse(
        &mut self,
        pulse: &wire::KeyringPulse,
        confirmed_at: BootTime,
        now: BootTime,
    ) -> Result<Option<wire::SidecarMessage>, Leave> {
        if self.awaits_snapshot || self.incoming.is_some() {
            return Ok(None);
        }
        if self.awaits_confirmation {
            let looks = self.pacer.may_resync(now);
            return Ok(looks.then(|| self.resync(ResyncReason::SnapshotHeld)));
        }
        let held = self.mirror.position();
        let revision = Revision::new(pulse.revision);
        if held.epoch != Epoch::new(pulse.epoch) {
            return Ok(Some(self.resync(ResyncReason::Epoch)));
        }
        if revision < held.revision {
            return Err(Leave::Lagging {
                keyring: self.name(),
                held: held.revision,
                found: revision,
            });
        }
        if revision > held.revision {
            return Ok(Some(self.resync(ResyncReason::Gap)));
        }
        if pulse.set_digest == held.set_digest {
            self.pacer = ResyncPacer::new();
            self.mirror.slot().confirm(confirmed_at);
            return Ok(None);
        }
        if !self.pacer.may_resync(now) {
            return Ok(None);
        }
        tracing::error!(
            auth.keyring = %self.name(),
            auth.keyring.revision = pulse.revision,
            "the keyring differs from the control plane's at the same revision; asking for a snapshot"
        );
        Ok(Some(self.resync(ResyncReason::DigestMismatch)))
    }

    fn resync(&mut self, reason: ResyncReason) -> wire::SidecarMessage {
        self.incoming = None;
        self.awaits_snapshot = true;
        message(Answer::Resync(wire::Resync {
            keyring: self.name().to_string(),
            reason: reason.into(),
        }))
    }

    fn answer(
        &self,
        epoch: u64,
        nonce: u64,
        rejected: Vec<wire::RejectedItem>,
    ) -> wire::SidecarMessage {
        let reply = Reply {
            keyring: self.mirror.slot().name(),
            epoch,
            nonce,
            held: self.mirror.position(),
            revoked_through: self.revoked_through,
        };
        reply.answer(rejected)
    }

    fn name(&self) -> KeyringName {
        self.mirror.slot().name().clone()
    }
}

impl Reply<'_> {
    /// An ack, or a nack that names what was rejected.
    fn answer(&self, mut rejected: Vec<wire::RejectedItem>) -> wire::SidecarMessage {
        let keyring = self.keyring.to_string();
        // Of another history nothing is in use yet, whatever the number.
        let is_of_history = self.held.epoch.get() == self.epoch;
        let in_use = |revision: Revision| if is_of_history { revision.get() } else { 0 };
        let applied_revision = in_use(self.held.revision);
        let revoked_through = in_use(self.revoked_through);
        if rejected.is_empty() {
            return message(Answer::Ack(wire::Ack {
                keyring,
                epoch: self.epoch,
                nonce: self.nonce,
                applied_revision,
                durable_revision: 0,
                revoked_through,
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
        }))
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

fn decode_items(items: &[wire::Item]) -> (Vec<Announced>, Vec<wire::RejectedItem>) {
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

fn timestamp(time: Option<prost_types::Timestamp>) -> Result<Timestamp, Leave> {
    time.and_then(|time| std::time::SystemTime::try_from(time).ok())
        .map(Timestamp::from)
        .ok_or(Leave::Protocol("a heartbeat without a time"))
}

const fn message(kind: Answer) -> wire::SidecarMessage {
    wire::SidecarMessage { kind: Some(kind) }
}
