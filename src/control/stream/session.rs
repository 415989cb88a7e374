//! The control plane's side of one stream: decides which message the sidecar receives next.
//!
//! No messages are queued for a stream. The stream has a cursor for each keyring into the feed that
//! all streams share, and creates a message when the transport asks for one. A slow reader thus
//! costs no memory, and a revocation waits only for the message that is being sent. In order of
//! precedence: revocations, keyrings to erase, the list of keyrings, settings, starts, deltas, the answer to a beat, the ack of usage, the
//! results of lookups, chunks of a snapshot.
//!
//! The result of a lookup is read from the newest state when its message is created. Earlier
//! messages on the stream are therefore never newer than it. Sidecars that hold a keyring on demand
//! rely on this (`keyring::on_demand`).

mod answering;
mod finding;

use std::{collections::VecDeque, future::Future, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::not_served::NotServedBook;
use crate::{
    admission::Audience,
    control::{
        catalog::Catalog,
        feed::EncodedSnapshot,
        metrics::LookupReply,
        served::ServedKeyring,
        usage::{Answers, UsageAcks},
    },
    key::{Epoch, KeyDigest, KeyringName, KeyringPattern, OperationRefusal, Revision},
    proto::discovery::{self, ResyncReason, control_message::Kind},
};

pub use answering::Terms;
pub(crate) use answering::{ArrivedBeat, Beats, Grantor};

use answering::{Answering, Granted};
use finding::Finding;

/// The state of a stream to one sidecar.
pub(crate) struct Session {
    catalog: Arc<Catalog>,
    subscriptions: Vec<Subscription>,
    asked: Asked,
    /// A lookup that has arrived and is not answered yet.
    lookup: Option<discovery::Lookup>,
    /// Rung by the keyrings of the stream when they change.
    bell: Arc<Notify>,
    /// Wakes when the control plane starts to serve a keyring.
    served: watch::Receiver<u64>,
    /// The message of the sidecar up to which all usage is in the store.
    usage: watch::Receiver<u64>,
    usage_acked: u64,
    answering: Answering,
    /// Records when beats were answered.
    answers: Answers,
    /// Limits how many snapshots are encoded at the same time.
    builds: Arc<Semaphore>,
    build: Option<(usize, Build)>,
    drains: Drains,
    drained: bool,
    /// Whether the last message was a chunk of a snapshot.
    sent_chunk: bool,
    not_served: Arc<NotServedBook>,
    /// Keyrings that the sidecar has to erase, of which it was not told yet.
    ended: VecDeque<Ending>,
    finding: Finding,
}

/// The requests of a sidecar while its stream is open.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Requests to receive a keyring from its start.
    pub(crate) resyncs: mpsc::Receiver<discovery::Resync>,
    /// Requests for a key.
    pub(crate) lookups: mpsc::Receiver<discovery::Lookup>,
    /// Requests for a confirmation.
    pub(crate) beats: watch::Receiver<Option<ArrivedBeat>>,
    /// Changes of the keyrings of the stream.
    pub(crate) changes: mpsc::Receiver<SubscriptionChange>,
}

/// A change of the keyrings of an open stream.
#[derive(Debug)]
pub(crate) enum SubscriptionChange {
    /// The sidecar asks for the keyrings that these patterns match.
    Find(Vec<KeyringPattern>),
    /// The sidecar subscribes to keyrings, and is on record as one that may hold them.
    Begin(Vec<discovery::Subscription>),
    /// A subscription of the stream has another `deny_after`.
    Limit {
        /// The name of the keyring.
        keyring: String,
        deny_after: Duration,
    },
    /// The sidecar has to erase a keyring.
    End(Ending),
}

/// A keyring that a sidecar has to erase, and why.
#[derive(Debug)]
pub(crate) struct Ending {
    /// The name, as the sidecar has sent it.
    pub(crate) keyring: String,
    pub(crate) reason: String,
}

/// The sidecar of a session.
#[derive(Debug)]
pub(crate) struct Subscriber {
    pub(crate) audience: Audience,
    /// The messages about keyrings that are not served, of which some are sent before the session
    /// begins.
    pub(crate) not_served: Arc<NotServedBook>,
    /// Records its grants.
    pub(crate) grantor: Grantor,
}

/// The reasons for which a stream ends in order, with a message to its sidecar.
#[derive(Clone, Debug)]
pub(crate) struct Drains {
    /// The control plane stops.
    pub(crate) stop: CancellationToken,
    /// The certificate with which the sidecar opened the stream has expired.
    pub(crate) expired: CancellationToken,
}

/// A snapshot that is being encoded.
type Build = Pin<Box<dyn Future<Output = Arc<EncodedSnapshot>> + Send>>;

/// One keyring of the stream.
#[derive(Debug)]
struct Subscription {
    name: KeyringName,
    is_on_demand: bool,
    /// The `deny_after` of the sidecar.
    deny_after: Duration,
    phase: Phase,
}

/// The state of a keyring on the stream.
#[derive(Debug)]
enum Phase {
    /// The control plane does not serve it, or not yet.
    NotServed { told: bool },
    /// The settings of the keyring have not been sent yet.
    Settings {
        served: Arc<ServedKeyring>,
        held: ClaimedState,
    },
    /// The sidecar holds the keyring on demand, and needs the revision from which it follows.
    Starting { at: Cursor },
    /// The sidecar needs a snapshot.
    Unsynced { at: Cursor },
    /// A snapshot is being sent.
    Snapshot { at: Cursor, sending: Sending },
    /// The sidecar follows with deltas.
    Following { at: Cursor },
}

/// The state of a keyring that a sidecar claims to hold; all zero for nothing.
#[derive(Clone, Copy, Debug, Default)]
struct ClaimedState {
    epoch: Epoch,
    revision: Revision,
    set_digest: u64,
    /// Less than the revision when the sidecar could not read a revocation, and more when
    /// revocations overtook deltas.
    revoked_through: Revision,
    /// The part of a snapshot that arrived.
    partial: Option<discovery::PartialSnapshot>,
}

/// A snapshot that is being sent. When the stream ends before the last chunk, the snapshot is kept
/// for the next stream.
#[derive(Debug)]
struct Sending {
    served: Arc<ServedKeyring>,
    snapshot: Arc<EncodedSnapshot>,
    /// The next chunk.
    next: usize,
}

/// The position up to which a sidecar has been sent a keyring.
#[derive(Clone, Debug)]
struct Cursor {
    served: Arc<ServedKeyring>,
    revision: Revision,
    revoked_through: Revision,
}

/// The most lookups of a stream that wait for an answer. Further ones are dropped, and their
/// sidecar denies the checks at its deadline. A control plane answers this many within a hundredth
/// of a second: only an overloaded one drops any.
pub(crate) const MAX_LOOKUPS: usize = 1_024;
/// How long a sidecar waits before it reconnects after the stop of a control plane: the next one
/// may be starting.
const DRAIN_RETRY_AFTER: Duration = Duration::from_millis(200);

impl Drains {
    /// Returns the message to the sidecar, once the stream has to end.
    fn due(&self) -> Option<discovery::Drain> {
        let (reason, retry_after) = if self.stop.is_cancelled() {
            (discovery::DrainReason::Stopping, Some(DRAIN_RETRY_AFTER))
        } else if self.expired.is_cancelled() {
            (discovery::DrainReason::CertificateExpired, None)
        } else {
            return None;
        };
        Some(discovery::Drain {
            retry_after: retry_after.and_then(|after| after.try_into().ok()),
            reason: reason.into(),
        })
    }
}

impl Session {
    /// Creates a session for the keyrings of a sidecar's hello. It acks the `usage` of the sidecar.
    /// It ends when `asked` closes, or with one of `drains`.
    pub(crate) fn new(
        catalog: Arc<Catalog>,
        sidecar: Subscriber,
        subscriptions: &[discovery::Subscription],
        asked: Asked,
        usage: UsageAcks,
        builds: Arc<Semaphore>,
        drains: Drains,
    ) -> Self {
        let served = catalog.watch_served();
        let bell = Arc::new(Notify::new());
        let subscriptions = subscriptions
            .iter()
            .filter_map(|asked| Subscription::begin(&catalog, asked, &bell))
            .collect();
        Self {
            answering: Answering::new(&catalog, sidecar.grantor, asked.beats.clone()),
            catalog,
            subscriptions,
            asked,
            lookup: None,
            bell,
            served,
            usage: usage.durable,
            usage_acked: 0,
            answers: usage.answers,
            builds,
            build: None,
            drains,
            drained: false,
            sent_chunk: false,
            not_served: sidecar.not_served,
            ended: VecDeque::new(),
            finding: Finding::new(sidecar.audience),
        }
    }

    /// Returns the messages, created on request.
    pub(crate) fn into_stream(
        self,
    ) -> impl Stream<Item = Result<discovery::ControlMessage, tonic::Status>> {
        futures_util::stream::unfold(self, |mut session| async move {
            if std::mem::take(&mut session.sent_chunk) {
                // The chunk leaves before the next one is requested: the transport gathers messages
                // that are ready in a buffer, which a stream keeps.
                tokio::task::yield_now().await;
            }
            let message = session.next().await?;
            session.sent_chunk = matches!(message, Kind::Snapshot(_));
            let message = discovery::ControlMessage {
                kind: Some(message),
            };
            Some((Ok(message), session))
        })
    }

    /// Returns the next message. None at the end of the stream.
    async fn next(&mut self) -> Option<Kind> {
        loop {
            if self.drained {
                return None;
            }
            if let Some(drain) = self.drains.due() {
                self.drained = true;
                return Some(Kind::Drain(drain));
            }
            self.usage.mark_unchanged();
            if self.served.has_changed().unwrap_or(false) {
                self.served.mark_unchanged();
                self.leave_old_epochs();
                self.finding.note_served();
            }
            self.record_grant();
            // A snapshot is always ready for its next chunk: changes must not wait for its end.
            while let Ok(change) = self.asked.changes.try_recv() {
                self.change(change);
            }
            if let Some(message) = self.ready() {
                return Some(message);
            }
            self.begin_build();
            tokio::select! {
                resync = self.asked.resyncs.recv() => self.resync(&resync?),
                change = self.asked.changes.recv() => self.change(change?),
                lookup = self.asked.lookups.recv() => self.lookup = Some(lookup?),
                () = self.bell.notified() => {}
                () = begun(&mut self.served) => {}
                () = changed(&mut self.usage) => {}
                () = self.answering.turn() => {}
                (at, snapshot) = built(&mut self.build) => self.built(at, snapshot),
                () = self.drains.stop.cancelled() => {}
                () = self.drains.expired.cancelled() => {}
            }
        }
    }

    /// Starts anew with each keyring whose history was rewritten while the stream is open.
    fn leave_old_epochs(&mut self) {
        for Subscription { name, phase, .. } in &mut self.subscriptions {
            if let Some(held) = phase.served()
                && let Ok(served) = self.catalog.get(name)
                && !Arc::ptr_eq(held, &served)
            {
                served.bells().join(&self.bell);
                let held = ClaimedState::default();
                *phase = Phase::Settings { served, held };
            }
        }
    }

    /// Changes the keyrings of the stream.
    fn change(&mut self, change: SubscriptionChange) {
        match change {
            SubscriptionChange::Find(patterns) => self.finding.find(patterns),
            SubscriptionChange::Begin(asked) => {
                for asked in &asked {
                    self.remove(&asked.keyring);
                    let begun = Subscription::begin(&self.catalog, asked, &self.bell);
                    self.subscriptions.extend(begun);
                }
            }
            SubscriptionChange::Limit {
                keyring,
                deny_after,
            } => {
                let mut held = self.subscriptions.iter_mut();
                if let Some(held) = held.find(|held| held.name.as_str() == keyring) {
                    held.deny_after = deny_after;
                }
            }
            SubscriptionChange::End(ending) => {
                self.remove(&ending.keyring);
                self.ended.push_back(ending);
            }
        }
    }

    fn remove(&mut self, keyring: &str) {
        let is_other = |held: &Subscription| held.name.as_str() != keyring;
        if !self.subscriptions.iter().all(is_other) {
            // The snapshot that is being encoded is for an index.
            self.build = None;
            self.subscriptions.retain(is_other);
        }
    }

    /// Returns the next message that the sidecar has to erase a keyring. A list follows, because a
    /// pattern may find the keyring again.
    fn ended(&mut self) -> Option<Kind> {
        let Ending { keyring, reason } = self.ended.pop_front()?;
        self.finding.list_again();
        Some(Kind::NotServed(self.not_served.forbidden(&keyring, reason)))
    }

    fn ready(&mut self) -> Option<Kind> {
        self.revocations()
            .or_else(|| self.ended())
            .or_else(|| self.finding.next(&self.catalog).map(Kind::Listing))
            .or_else(|| self.settings())
            .or_else(|| self.start())
            .or_else(|| self.delta())
            .or_else(|| self.beat_answer())
            .or_else(|| self.usage_ack())
            .or_else(|| self.lookup_result())
            .or_else(|| self.chunk())
    }

    fn revocations(&mut self) -> Option<Kind> {
        self.subscriptions
            .iter_mut()
            .filter_map(|subscription| subscription.phase.cursor())
            .find_map(|cursor| {
                let state = cursor.served.journal().state();
                let step = state.feed.revocation_after(cursor.revoked_through);
                // Without a step, the next search begins where this one ended.
                cursor.revoked_through = match step {
                    Some(step) => step.revision,
                    None => cursor.revoked_through.max(state.keyring.revision()),
                };
                step?.revocations.clone()
            })
            .map(Kind::Revocations)
    }

    fn settings(&mut self) -> Option<Kind> {
        for Subscription {
            name,
            is_on_demand,
            phase,
            ..
        } in &mut self.subscriptions
        {
            match phase {
                Phase::NotServed { told } => match self.catalog.get(name) {
                    Ok(served) => {
                        served.bells().join(&self.bell);
                        *phase = Phase::Settings {
                            served,
                            held: ClaimedState::default(),
                        };
                    }
                    Err(_) if *told => continue,
                    Err(refusal) => {
                        *told = true;
                        let reason = reason_of(&refusal);
                        // The keyring may be created later, or again: no rule forbids it to the
                        // sidecar.
                        let missing = self.not_served.missing(name, reason);
                        return Some(Kind::NotServed(missing));
                    }
                },
                Phase::Settings { .. }
                | Phase::Starting { .. }
                | Phase::Unsynced { .. }
                | Phase::Snapshot { .. }
                | Phase::Following { .. } => {}
            }
            if let Phase::Settings { served, held } = phase {
                let settings = served.settings();
                self.not_served.serve(name);
                *phase = Phase::after_settings(Arc::clone(served), *held, *is_on_demand);
                return Some(Kind::Settings(settings));
            }
        }
        None
    }

    fn start(&mut self) -> Option<Kind> {
        for Subscription { name, phase, .. } in &mut self.subscriptions {
            let Phase::Starting { at } = phase else {
                continue;
            };
            let mut at = at.clone();
            at.revision = at.served.revision();
            at.revoked_through = at.revoked_through.max(at.revision);
            let start = discovery::Start {
                keyring: name.to_string(),
                epoch: at.served.epoch().get(),
                revision: at.revision.get(),
                nonce: at.revision.get(),
            };
            *phase = Phase::Following { at };
            return Some(Kind::Start(start));
        }
        None
    }

    fn delta(&mut self) -> Option<Kind> {
        for Subscription {
            is_on_demand,
            phase,
            ..
        } in &mut self.subscriptions
        {
            let Phase::Following { at } = phase else {
                continue;
            };
            let state = at.served.journal().state();
            if at.revision >= state.keyring.revision() {
                continue;
            }
            if let Some(step) = state.feed.step_after(at.revision) {
                at.revision = step.revision;
                return Some(Kind::Delta(step.delta.clone()));
            }
            drop(state);
            *phase = Phase::anew(at.clone(), *is_on_demand);
            if *is_on_demand {
                return self.start();
            }
        }
        None
    }

    /// Starts to record the grant of the next answer. It grants the keyrings that the sidecar
    /// follows: of the others, the sidecar holds nothing to confirm.
    fn record_grant(&mut self) {
        self.answering.hear();
        let following = self
            .subscriptions
            .iter()
            .filter(|subscription| matches!(subscription.phase, Phase::Following { .. }));
        self.answering
            .record(following.map(|subscription| (&subscription.name, subscription.deny_after)));
        self.answering.bring_on();
    }

    /// Returns the answer to a beat. It confirms the keyrings that were sent to the last revision:
    /// the sidecar can treat a difference as a loss.
    fn beat_answer(&mut self) -> Option<Kind> {
        let granted = self.answering.take()?;
        let pulses = self.subscriptions.iter();
        let keyrings = pulses.filter_map(|subscription| subscription.pulse(&granted));
        let keyrings = keyrings.collect();
        self.answers.sending(granted.beat);
        Some(Kind::BeatAnswer(discovery::BeatAnswer {
            beat: granted.beat,
            sent_at: Some(self.catalog.clock().wall().to_wire()),
            beat_every_ms: saturating_millis(self.answering.beat_every()),
            keyrings,
        }))
    }

    fn usage_ack(&mut self) -> Option<Kind> {
        let sequence = *self.usage.borrow();
        (sequence > self.usage_acked).then(|| {
            self.usage_acked = sequence;
            Kind::UsageAck(discovery::UsageAck { sequence })
        })
    }

    /// Returns the result of the next lookup. A lookup in a keyring that the sidecar no longer
    /// follows has no result: it ended when the sidecar stopped following.
    fn lookup_result(&mut self) -> Option<Kind> {
        loop {
            let lookup = self.lookup.take();
            let lookup = lookup.or_else(|| self.asked.lookups.try_recv().ok())?;
            let followed = self.subscriptions.iter().find(|subscription| {
                subscription.is_on_demand && subscription.name.as_str() == lookup.keyring
            });
            let Some(Phase::Following { at }) = followed.map(|subscription| &subscription.phase)
            else {
                continue;
            };
            let Ok(digest) = KeyDigest::from_slice(&lookup.digest) else {
                continue;
            };
            let found = at.served.lookup(&digest);
            self.catalog.metrics().looked_up(match &found.item {
                Some(_) => LookupReply::Found,
                None => LookupReply::Unknown,
            });
            return Some(Kind::LookupResult(discovery::LookupResult {
                keyring: lookup.keyring,
                epoch: at.served.epoch().get(),
                revision: found.revision.get(),
                digest: lookup.digest,
                item: found.item,
                siblings: found.siblings,
            }));
        }
    }

    fn chunk(&mut self) -> Option<Kind> {
        for Subscription { phase, .. } in &mut self.subscriptions {
            let Phase::Snapshot { at, sending } = phase else {
                continue;
            };
            let chunk = sending.next_chunk();
            if sending.is_done() {
                let mut at = at.clone();
                at.revision = sending.snapshot.revision;
                *phase = Phase::Following { at };
            }
            return chunk.map(Kind::Snapshot);
        }
        None
    }

    /// Starts to encode a snapshot if one is needed and none is in progress.
    fn begin_build(&mut self) {
        if self.build.is_some() {
            return;
        }
        let unsynced = self
            .subscriptions
            .iter()
            .position(|subscription| matches!(subscription.phase, Phase::Unsynced { .. }));
        if let Some(index) = unsynced
            && let Some(cursor) = self.subscriptions[index].phase.cursor()
        {
            let served = Arc::clone(&cursor.served);
            let builds = Arc::clone(&self.builds);
            // A sidecar never returns to an earlier revision.
            let least = cursor.revision;
            self.build = Some((
                index,
                Box::pin(async move {
                    let _permit = builds.acquire().await;
                    tokio::task::spawn_blocking(move || served.snapshot(least))
                        .await
                        .expect("encoding a snapshot does not panic")
                }),
            ));
        }
    }

    fn built(&mut self, index: usize, snapshot: Arc<EncodedSnapshot>) {
        self.build = None;
        let phase = &mut self.subscriptions[index].phase;
        if let Phase::Unsynced { at } = phase {
            *phase = Phase::sending(at.clone(), snapshot, 0);
        }
    }

    fn resync(&mut self, resync: &discovery::Resync) {
        let Some(subscription) = self
            .subscriptions
            .iter_mut()
            .find(|subscription| subscription.name.as_str() == resync.keyring)
        else {
            return;
        };
        tracing::warn!(
            auth.keyring = resync.keyring,
            reason = ResyncReason::try_from(resync.reason).map_or("unknown", |r| r.as_str_name()),
            "a sidecar asks to receive the keyring from its start"
        );
        if let Phase::Following { at } | Phase::Snapshot { at, .. } = &subscription.phase {
            subscription.phase = Phase::anew(at.clone(), subscription.is_on_demand);
        }
    }
}

impl Subscription {
    /// Begins a subscription. None if its name is not valid.
    fn begin(
        catalog: &Catalog,
        asked: &discovery::Subscription,
        bell: &Arc<Notify>,
    ) -> Option<Self> {
        let name: KeyringName = asked.keyring.parse().ok()?;
        let held = ClaimedState {
            epoch: Epoch::new(asked.epoch),
            revision: Revision::new(asked.revision),
            set_digest: asked.set_digest,
            revoked_through: Revision::new(asked.revoked_through),
            partial: asked.partial,
        };
        let phase = Phase::begin(catalog, &name, held, bell);
        Some(Self {
            name,
            is_on_demand: asked.mode() == discovery::Mode::OnDemand,
            deny_after: Duration::from_millis(asked.deny_after_ms),
            phase,
        })
    }

    /// Returns the confirmation of the keyring in the answer to a beat. None while the sidecar has
    /// not been sent all of it.
    fn pulse(&self, granted: &Granted) -> Option<discovery::KeyringPulse> {
        match &self.phase {
            Phase::Following { at } => {
                let state = at.served.journal().state();
                let serve_for = granted.serve_for(&self.name)?;
                // After a failed read, it is unknown whether this is the head.
                let is_head = at.served.is_current() && at.revision == state.keyring.revision();
                is_head.then(|| discovery::KeyringPulse {
                    keyring: self.name.to_string(),
                    epoch: at.served.epoch().get(),
                    revision: at.revision.get(),
                    set_digest: state.feed.set_digest(),
                    serve_for_ms: u64::try_from(serve_for.as_millis()).unwrap_or(u64::MAX),
                })
            }
            Phase::NotServed { .. }
            | Phase::Settings { .. }
            | Phase::Starting { .. }
            | Phase::Unsynced { .. }
            | Phase::Snapshot { .. } => None,
        }
    }
}

impl Phase {
    fn begin(
        catalog: &Catalog,
        name: &KeyringName,
        held: ClaimedState,
        bell: &Arc<Notify>,
    ) -> Self {
        match catalog.get(name) {
            Ok(served) => {
                served.bells().join(bell);
                Self::Settings { served, held }
            }
            Err(_) => Self::NotServed { told: false },
        }
    }

    /// Returns the phase that follows the settings. A sidecar that holds a revision of this history
    /// continues from there. A sidecar that holds other items at this revision, because it could
    /// not use some, does not continue: its digest is not that of the revision. A sidecar that
    /// claims to be ahead continues: the next answer to a beat shows it that this control plane
    /// lags behind.
    fn after_settings(served: Arc<ServedKeyring>, held: ClaimedState, is_on_demand: bool) -> Self {
        let ClaimedState {
            epoch, revision, ..
        } = held;
        let same_history = epoch == served.epoch();
        let (newest, can_follow) = {
            let state = served.journal().state();
            let newest = state.keyring.revision();
            // A part of a set has no digest. The sidecar itself reports which revocations it could
            // not read.
            let agrees = if is_on_demand {
                held.revoked_through >= revision
            } else {
                state.feed.digest_at(revision) == Some(held.set_digest)
            };
            let leads_on = revision == newest || state.feed.step_after(revision).is_some();
            let is_ahead = revision > newest;
            (newest, same_history && (is_ahead || (agrees && leads_on)))
        };
        // A sidecar without this history receives all revocations in its snapshot.
        let at = Cursor {
            revoked_through: if same_history && revision > Revision::default() {
                held.revoked_through.min(newest)
            } else {
                newest
            },
            served,
            revision: revision.min(newest),
        };
        if can_follow {
            Self::Following { at }
        } else if let Some(partial) = held.partial.filter(|_| !is_on_demand) {
            Self::resumed(at, partial)
        } else {
            Self::anew(at, is_on_demand)
        }
    }

    /// Continues a snapshot of which the sidecar has some chunks, if the snapshot is still kept.
    fn resumed(at: Cursor, partial: discovery::PartialSnapshot) -> Self {
        let snapshot = at.served.resumed_snapshot(partial.id, at.revision);
        let next = usize::try_from(partial.chunks).unwrap_or(usize::MAX);
        match snapshot.filter(|snapshot| next < snapshot.chunks.len()) {
            Some(snapshot) => Self::sending(at, snapshot, next),
            None => Self::Unsynced { at },
        }
    }

    fn sending(at: Cursor, snapshot: Arc<EncodedSnapshot>, next: usize) -> Self {
        let served = Arc::clone(&at.served);
        Self::Snapshot {
            at,
            sending: Sending {
                served,
                snapshot,
                next,
            },
        }
    }

    /// Returns the phase of a sidecar that cannot continue from what it holds.
    const fn anew(at: Cursor, is_on_demand: bool) -> Self {
        if is_on_demand {
            Self::Starting { at }
        } else {
            Self::Unsynced { at }
        }
    }

    fn served(&self) -> Option<&Arc<ServedKeyring>> {
        match self {
            Self::Settings { served, .. } => Some(served),
            Self::Starting { at }
            | Self::Unsynced { at }
            | Self::Snapshot { at, .. }
            | Self::Following { at } => Some(&at.served),
            Self::NotServed { .. } => None,
        }
    }

    fn cursor(&mut self) -> Option<&mut Cursor> {
        match self {
            Self::Starting { at }
            | Self::Unsynced { at }
            | Self::Snapshot { at, .. }
            | Self::Following { at } => Some(at),
            Self::NotServed { .. } | Self::Settings { .. } => None,
        }
    }
}

/// Returns why a keyring is not served, in the words for its sidecars.
fn reason_of(refusal: &OperationRefusal) -> String {
    match refusal {
        OperationRefusal::NotFound { .. } => {
            "the keyring does not exist; create it with `relatch keyring create`".to_owned()
        }
        OperationRefusal::AlreadyExists { .. }
        | OperationRefusal::NoVersion(_)
        | OperationRefusal::DoneBefore(_)
        | OperationRefusal::Invalid { .. }
        | OperationRefusal::Unsafe(_)
        | OperationRefusal::InUse { .. } => refusal.to_string(),
    }
}

impl Sending {
    fn next_chunk(&mut self) -> Option<Bytes> {
        let chunk = self.snapshot.chunks.get(self.next).cloned();
        self.next += 1;
        chunk
    }

    fn is_done(&self) -> bool {
        self.next >= self.snapshot.chunks.len()
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if !self.is_done() {
            self.served.keep_snapshot(self.snapshot.id);
        }
    }
}

fn saturating_millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Waits until the control plane starts to serve a keyring, and leaves the change unseen.
async fn begun(served: &mut watch::Receiver<u64>) {
    match served.changed().await {
        Ok(()) => served.mark_changed(),
        Err(_) => std::future::pending().await,
    }
}

/// Waits for the next value; forever when there will be none.
async fn changed(usage: &mut watch::Receiver<u64>) {
    if usage.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits for the snapshot that is being encoded; forever when there is none.
async fn built(build: &mut Option<(usize, Build)>) -> (usize, Arc<EncodedSnapshot>) {
    match build {
        Some((index, build)) => (*index, build.await),
        None => std::future::pending().await,
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("subscriptions", &self.subscriptions)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
