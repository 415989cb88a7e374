//! The receiver of a sidecar: applies the messages of the stream and returns the answers. It does
//! no network I/O.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use prost::Message;
use tokio::sync::Notify;

use super::reporter::{ReportProgress, Reporter};
use crate::{
    clock::{Clock, LatestWall},
    key::{Epoch, KeyringName, Revision, Timestamp},
    keyring::{
        Freshness, Keyrings, MAX_KEYRINGS, Mirror, Mode, Restored, Slot, on_demand::Follower,
    },
    proto::discovery::{self, control_message::Kind, sidecar_message::Kind as Answer},
    snapshot::{disk::Disk, recorder::Recorder},
    wire::settings::{self, SettingsError},
};

mod beats;
mod finder;
mod forbidden;
mod full;
mod on_demand;
mod pulse;
mod reply;
mod revoked;

use beats::Beats;
use finder::Finder;
pub(crate) use finder::Listed;
use forbidden::Forbidden;
use full::HeldSnapshot;
use on_demand::Followed;

/// Applies what the control plane sends to a sidecar's keyrings.
#[derive(Debug)]
pub struct Receiver {
    clock: Clock,
    keyrings: BTreeMap<KeyringName, Subscribed>,
    /// Finds keyrings by the patterns of the sidecar.
    finder: Finder,
    /// The `deny_after` of each keyring, as the open stream knows it.
    told_limits: BTreeMap<KeyringName, Duration>,
    /// The keyrings that the open stream has answered, as [`Receiver::is_answered`] defines it.
    answered: BTreeSet<KeyringName>,
    /// Notified when there is a lookup to send.
    lookups: Arc<Notify>,
    reporter: Reporter,
    /// The messages of usage reports that are still to be sent.
    report: VecDeque<discovery::Usage>,
    beats: Beats,
    /// None if nothing is kept on disk.
    recorder: Option<Recorder>,
    /// The keyrings that the sidecar must not hold any more.
    forbidden: Forbidden,
    /// Notes the control plane's wall clock from each answer to a beat.
    latest: LatestWall,
}

/// A keyring of the stream: held in full, or on demand.
#[derive(Debug)]
enum Subscribed {
    Full(HeldSnapshot),
    OnDemand(Followed),
}

/// The result of a message.
#[derive(Debug, Default)]
pub struct Received {
    /// The answers to send, in this order and before any usage.
    pub answers: Vec<discovery::SidecarMessage>,
    /// The milliseconds by which the control plane's wall clock is ahead of ours, if the message
    /// reports it; negative if it is behind.
    pub(crate) clock_skew_ms: Option<i64>,
    /// The effect of the message on the beats of the stream.
    pub(crate) beat: Option<BeatNews>,
    /// What the list of keyrings came to, if the message is one.
    pub(crate) listed: Option<Listed>,
}

/// The effect of a message on the beats of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BeatNews {
    /// A keyring was received anew and needs a confirmation: the next beat is due.
    Due,
    /// A beat was answered.
    Answered,
}

/// The reason why a sidecar leaves a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Leave {
    /// The control plane ends the stream in order.
    #[error("{reason}")]
    Drain {
        /// The reason that the control plane gives.
        reason: DrainReason,
        /// The pause before the next connection, to which the sidecar adds its own backoff; none
        /// for the backoff alone. It is ignored if a certificate has expired.
        retry_after: Option<Duration>,
    },
    /// The control plane is behind this sidecar: it is a replica that lags, or it has lost commits.
    #[error(
        "the control plane is at revision {found} of keyring {keyring}, older than {held} of the same epoch; if it was restored from a backup, start it with --new-epoch"
    )]
    Lagging {
        /// The keyring with an older revision at the control plane.
        keyring: KeyringName,
        /// The revision that this sidecar holds.
        held: Revision,
        /// The revision of the control plane.
        found: Revision,
    },
    /// The control plane violates the protocol; the text says what it sent.
    #[error("the control plane sent {0}")]
    Protocol(&'static str),
}

/// The reason why a control plane ends a stream in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainReason {
    /// The control plane stops.
    Stopping,
    /// The certificate with which the stream was opened has expired; the next stream can open at
    /// once.
    CertificateExpired,
    /// The control plane gives no reason that this version knows.
    Unspecified,
}

/// The beat number of a report that does not reply to an answer.
const NO_BEAT: u64 = 0;

impl Receiver {
    /// Returns a receiver for `keyrings`, none of which holds anything yet.
    #[must_use]
    pub fn new(keyrings: &Keyrings, clock: Clock) -> Self {
        let reporter = Reporter::new(keyrings);
        let lookups = Arc::clone(keyrings.lookups());
        Self {
            clock,
            keyrings: keyrings
                .load()
                .iter()
                .map(|slot| (slot.name().clone(), Subscribed::to(Arc::clone(slot))))
                .collect(),
            finder: Finder::new(keyrings.clone()),
            told_limits: BTreeMap::new(),
            answered: BTreeSet::new(),
            lookups,
            reporter,
            report: VecDeque::new(),
            beats: Beats::new(),
            recorder: None,
            forbidden: Forbidden::default(),
            latest: LatestWall::default(),
        }
    }

    /// Reports the control plane's wall clock to `latest`.
    #[must_use]
    pub(crate) fn telling(self, latest: LatestWall) -> Self {
        Self { latest, ..self }
    }

    /// Records what is applied from now on with `recorder`.
    pub(crate) fn record(&mut self, recorder: &Recorder) {
        self.recorder = Some(recorder.clone());
        for keyring in self.keyrings.values_mut() {
            match keyring {
                Subscribed::Full(held) => held.record(recorder.clone()),
                Subscribed::OnDemand(_) => {}
            }
        }
    }

    /// Loads the kept state of a keyring that is held in full.
    pub(crate) fn restore(&mut self, keyring: &KeyringName, restored: Restored) {
        match self.keyrings.get_mut(keyring) {
            Some(Subscribed::Full(held)) => held.restore(restored),
            Some(Subscribed::OnDemand(_)) | None => {}
        }
    }

    /// Returns the state of the disk; none if nothing is kept there.
    #[must_use]
    pub(crate) fn disk(&self) -> Option<&Disk> {
        self.recorder.as_ref().map(|recorder| &**recorder.disk())
    }

    /// Returns an ack for a keyring of which more is on the disk than was reported.
    #[must_use]
    pub(crate) fn next_durable(&self) -> Option<discovery::SidecarMessage> {
        let disk = self.disk()?;
        loop {
            match self.keyrings.get(&disk.next_untold()?) {
                Some(Subscribed::Full(held)) => return Some(held.tell_durable()),
                Some(Subscribed::OnDemand(_)) | None => {}
            }
        }
    }

    /// Notes that a stream is open: lookups can be sent, and the state on the disk is reported
    /// again.
    pub fn connected(&mut self) {
        if let Some(disk) = self.disk() {
            disk.forget_told();
        }
        for keyring in self.keyrings.values_mut() {
            keyring.connected();
        }
        // The subscriptions of the Hello that the configuration does not ask for end now.
        self.finder.keyrings().reconfigured().notify_one();
    }

    /// Notes that the stream has ended: checks that wait for a lookup stop waiting.
    pub fn disconnected(&mut self) {
        self.answered.clear();
        self.finder.disconnected();
        self.beats.disconnected();
        self.forbidden.disconnected();
        for followed in self.followed() {
            followed.follower().disconnected();
        }
    }

    /// Returns the clock of the receiver.
    #[must_use]
    pub(crate) const fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Returns the next beat, to be sent at once: what its answer confirms is as old as this call.
    pub fn next_beat(&mut self) -> discovery::SidecarMessage {
        message(Answer::Beat(self.beats.send(self.clock.reading())))
    }

    /// Returns the pause between two beats, as the control plane last asked for it.
    #[must_use]
    pub(crate) const fn beat_every(&self) -> Duration {
        self.beats.every()
    }

    /// Returns whether the open stream has been of use: for each keyring, the control plane has
    /// refused to serve it, or has answered a beat while no snapshot or start of the keyring was
    /// missing. If the sidecar has patterns, it has received a list of keyrings.
    #[must_use]
    pub(crate) fn is_answered(&self) -> bool {
        self.answered.len() == self.keyrings.len() && self.finder.is_answered()
    }

    /// Returns the message that asks for the keyrings that the patterns match; none if the open
    /// stream knows the patterns.
    pub(crate) fn find(&mut self) -> Option<discovery::SidecarMessage> {
        let find = self.finder.ask(self.beats.last());
        find.map(Answer::Find).map(message)
    }

    /// Follows a new configuration on the open stream, and returns the messages about it:
    /// subscriptions to keyrings that are new, the new limits of others, the end of subscriptions,
    /// and patterns.
    pub(crate) fn reconfigure(&mut self) -> Vec<discovery::SidecarMessage> {
        let mut subscriptions = self.limits();
        subscriptions.extend(self.hold_wanted().into_iter().filter_map(|name| {
            let keyring = self.keyrings.get_mut(&name)?;
            keyring.connected();
            Some(keyring.subscription())
        }));
        self.note_limits();
        let mut messages = Vec::new();
        messages.extend(subscribe(subscriptions));
        messages.extend(self.find());
        messages.extend(self.end_unwanted());
        messages
    }

    /// Notifies one waiter when there is a new configuration to follow.
    pub(crate) fn reconfigured(&self) -> impl Future<Output = ()> + use<> {
        let keyrings = self.finder.keyrings().clone();
        async move { keyrings.reconfigured().notified().await }
    }

    /// Holds the keyrings that the configuration names and that are not held yet, and returns their
    /// names. A keyring whose former subscription has not ended yet waits for that end.
    fn hold_wanted(&mut self) -> Vec<KeyringName> {
        let slots = self.finder.keyrings().load();
        let new = slots
            .iter()
            .filter(|slot| !self.keyrings.contains_key(slot.name()));
        let new: Vec<_> = new.cloned().collect();
        let names = new.iter().map(|slot| slot.name().clone()).collect();
        for slot in new {
            self.hold(slot);
        }
        names
    }

    /// Returns the subscriptions whose `deny_after` has changed since they were sent.
    fn limits(&self) -> Vec<discovery::Subscription> {
        let slots = self.finder.keyrings().load();
        let changed = slots.iter().filter(|slot| {
            let told = self.told_limits.get(slot.name());
            let is_other = told.is_some_and(|told| *told != slot.staleness().deny_after);
            is_other && !self.finder.has_ended(slot.name())
        });
        let changed = changed.map(|slot| discovery::Subscription {
            keyring: slot.name().to_string(),
            mode: match slot.mode() {
                Mode::Full => discovery::Mode::Full.into(),
                Mode::OnDemand(_) => discovery::Mode::OnDemand.into(),
            },
            deny_after_ms: pulse::deny_after_ms(slot),
            ..Default::default()
        });
        changed.collect()
    }

    fn note_limits(&mut self) {
        let slots = self.finder.keyrings().load();
        let limits = slots.iter();
        let limits = limits.map(|slot| (slot.name().clone(), slot.staleness().deny_after));
        self.told_limits = limits.collect();
    }

    /// Ends the subscriptions that the configuration does not ask for any more.
    fn end_unwanted(&mut self) -> Vec<discovery::SidecarMessage> {
        let slots = self.finder.keyrings().load();
        let names = self.keyrings.keys();
        let unwanted = names.filter(|name| slots.get(name.as_str()).is_none());
        let unwanted: Vec<_> = unwanted.cloned().collect();
        let ended = unwanted.into_iter().filter(|name| self.finder.end(name));
        ended.map(|name| unsubscribe(&name)).collect()
    }

    /// Adds a keyring of the snapshot file that a pattern finds, and returns its slot. None if no
    /// pattern finds it, or if it is now held on demand.
    pub(crate) fn find_kept(&mut self, name: &KeyringName) -> Option<Arc<Slot>> {
        let (_, mode) = self.finder.keyrings().wanted().of(name)?;
        if mode != Mode::Full || self.keyrings.len() >= MAX_KEYRINGS {
            return None;
        }
        let slot = self.finder.keyrings().find(name)?;
        self.hold(Arc::clone(&slot));
        Some(slot)
    }

    /// Returns the next lookup to send.
    #[must_use]
    pub fn next_lookup(&self) -> Option<discovery::SidecarMessage> {
        let lookup = self.keyrings.values().find_map(|keyring| match keyring {
            Subscribed::Full(_) => None,
            Subscribed::OnDemand(followed) => followed.next_lookup(),
        })?;
        Some(message(Answer::Lookup(lookup)))
    }

    /// Returns what is notified when there is a lookup to send.
    #[must_use]
    pub(crate) const fn lookups(&self) -> &Arc<Notify> {
        &self.lookups
    }

    /// Returns the next message of usage to send. All answers are sent before it, because checks
    /// and operators wait for them. The reports of dropped keyrings follow the usage, so that the
    /// last counts of a dropped keyring arrive first.
    pub(crate) fn next_usage(&mut self) -> Option<discovery::SidecarMessage> {
        if let Some(usage) = self.report.pop_front() {
            return Some(message(Answer::Usage(usage)));
        }
        let dropped = self.forbidden.next(self.recorder.as_ref());
        dropped.map(Answer::Dropped).map(message)
    }

    /// Returns whether there is usage or a dropped keyring to report.
    #[must_use]
    pub(crate) fn has_usage(&self) -> bool {
        !self.report.is_empty() || self.forbidden.has_next(self.recorder.as_ref())
    }

    /// Returns the subscriptions for the first message of a new stream. The unsent rest of a usage
    /// report is dropped. The received part of a snapshot is kept until the new stream brings the
    /// rest, or something else.
    pub fn subscriptions(&mut self) -> Vec<discovery::Subscription> {
        self.report.clear();
        self.reporter.reconnected();
        self.hold_wanted();
        self.note_limits();
        let keyrings = self.keyrings.values_mut();
        keyrings.map(Subscribed::subscription).collect()
    }

    /// Applies one message and returns the answers to it.
    ///
    /// # Errors
    ///
    /// When the sidecar has to leave the stream.
    pub fn receive(&mut self, message: discovery::ControlMessage) -> Result<Received, Leave> {
        let Some(kind) = message.kind else {
            // A kind of message that this version does not know.
            return Ok(Received::default());
        };
        match kind {
            Kind::Settings(settings) => self.settings(&settings).map(Received::answer),
            Kind::Snapshot(chunk) => self.chunk(chunk).map(Received::begin),
            Kind::Delta(delta) => self.delta(delta).map(Received::answers),
            Kind::Revocations(revocations) => self.revocations(revocations).map(Received::answers),
            Kind::Drain(drain) => Err(Leave::Drain {
                reason: drain.reason().into(),
                retry_after: drain
                    .retry_after
                    .and_then(|after| Duration::try_from(after).ok()),
            }),
            Kind::UsageAck(ack) => {
                self.reporter.acked(ack.sequence);
                Ok(Received::default())
            }
            Kind::BeatAnswer(answer) => self.beat_answer(answer),
            Kind::Start(start) => self.start(&start).map(Received::begin),
            Kind::LookupResult(result) => self.lookup_result(&result).map(|()| Received::default()),
            Kind::Listing(listing) => Ok(self.list(&listing)),
            Kind::NotServed(refusal) => {
                tracing::warn!(
                    auth.keyring = refusal.keyring,
                    reason = refusal.reason,
                    "the control plane does not serve this keyring"
                );
                let again = if refusal.is_forbidden {
                    self.drop_keyring(&refusal)
                } else {
                    None
                };
                self.note_answered(&refusal.keyring);
                Ok(Received::answer(again))
            }
        }
    }

    /// Drops a keyring that the sidecar must not hold any more: from memory at once, and from the
    /// file. When both are done, the drop is reported, after the last counts of the keyring. Returns
    /// a new subscription if the configuration has come to ask for the keyring again.
    fn drop_keyring(
        &mut self,
        refusal: &discovery::NotServed,
    ) -> Option<discovery::SidecarMessage> {
        let name: KeyringName = refusal.keyring.parse().ok()?;
        let is_asked_for = self.finder.has_ended(&name);
        match self.keyrings.get_mut(&name) {
            Some(Subscribed::Full(held)) => held.forget(),
            Some(Subscribed::OnDemand(followed)) => followed.forget(),
            None => return None,
        }
        if is_asked_for {
            tracing::info!(auth.keyring = %name, "the keyring is dropped");
        } else {
            tracing::error!(
                auth.keyring = %name,
                reason = refusal.reason,
                "this sidecar may no longer hold the keyring: it is dropped, and its checks are denied"
            );
        }
        // This report does not reply to an answer to a beat: it brings the last counts, and
        // completes nothing.
        let last = self.reporter.report(NO_BEAT);
        self.report.extend(last);
        if self.finder.lose(&name) {
            self.keyrings.remove(&name);
            self.answered.remove(&name);
        }
        self.forbidden
            .forbid(name.clone(), refusal.number, self.recorder.as_ref());
        if !is_asked_for {
            return None;
        }
        let slot = self.finder.keyrings().get(&name)?;
        self.hold(slot);
        let keyring = self.keyrings.get_mut(&name)?;
        keyring.connected();
        subscribe(vec![keyring.subscription()])
    }

    /// Applies the list of the keyrings that the patterns match: subscribes to those that the
    /// sidecar does not hold.
    fn list(&mut self, listing: &discovery::Listing) -> Received {
        let listed = listing.keyrings.iter();
        let names: BTreeSet<KeyringName> = listed.filter_map(|name| name.parse().ok()).collect();
        let unnamed = listing.total.saturating_sub(listing.keyrings.len() as u64);
        let mut left_out = usize::try_from(unnamed).unwrap_or(usize::MAX);
        let mut found = Vec::new();
        for name in &names {
            let keyrings = self.finder.keyrings();
            if self.keyrings.contains_key(name) || keyrings.wanted().of(name).is_none() {
                continue;
            }
            let has_room = self.keyrings.len() < MAX_KEYRINGS;
            if let Some(slot) = has_room.then(|| keyrings.find(name)).flatten() {
                self.hold(slot);
            }
            if let Some(keyring) = self.keyrings.get_mut(name) {
                keyring.connected();
                found.push(keyring.subscription());
                tracing::info!(auth.keyring = %name, "a keyring is found by a pattern");
            } else {
                left_out = left_out.saturating_add(1);
            }
        }
        let listed = Listed {
            matching: usize::try_from(listing.total).unwrap_or(usize::MAX),
            left_out,
        };
        self.finder.listed(names, unnamed == 0, listed);
        self.note_limits();
        Received {
            listed: Some(listed),
            ..Received::answer(subscribe(found))
        }
    }

    /// Holds a keyring from now on.
    fn hold(&mut self, slot: Arc<Slot>) {
        self.reporter.follow(&slot);
        let name = slot.name().clone();
        let mut keyring = Subscribed::to(slot);
        if let (Subscribed::Full(held), Some(recorder)) = (&mut keyring, &self.recorder) {
            held.record(recorder.clone());
        }
        self.keyrings.insert(name, keyring);
    }

    /// Ends the subscriptions to keyrings that a pattern found, and that the control plane does not
    /// list any more, once they are stale. Until then they are served, because the control plane
    /// may be restored from an old backup.
    fn end_unlisted(&mut self) -> Vec<discovery::SidecarMessage> {
        let now = self.clock.reading();
        let is_stale = |slot: &Slot| slot.freshness(now) == Freshness::Stale;
        let ended = self.finder.end_unlisted(is_stale).into_iter();
        let ended = ended.map(|name| {
            tracing::warn!(
                auth.keyring = %name,
                "the control plane does not list the keyring any more, and it is stale: it is dropped"
            );
            unsubscribe(&name)
        });
        ended.collect()
    }

    /// Creates the last usage report, once no check is under way and none will come, and returns
    /// the sequence of its last message. It is sent after the rest of the report before it.
    pub(crate) fn make_last_report(&mut self) -> u64 {
        let last = self.reporter.last_report();
        self.report.extend(last);
        self.report.back().map_or(0, |usage| usage.sequence)
    }

    /// Returns the progress of the usage reports.
    #[must_use]
    pub(crate) fn progress(&self) -> ReportProgress {
        self.reporter.progress()
    }

    fn settings(
        &mut self,
        settings: &discovery::KeyringSettings,
    ) -> Result<Option<discovery::SidecarMessage>, Leave> {
        let adopted = settings::decode(settings).map_err(|error| {
            Leave::Protocol(match error {
                SettingsError::Pepper => "a pepper of the wrong length",
                SettingsError::NoPepper => "settings without a pepper",
                SettingsError::Prefix => "settings with an invalid prefix",
            })
        })?;
        match self.subscribed(&settings.keyring) {
            Some(Subscribed::Full(held)) => {
                held.adopt(adopted, settings.encode_to_vec().into());
            }
            Some(Subscribed::OnDemand(followed)) => followed.follower().adopt(adopted),
            None => return Ok(None),
        }
        // Settings come before all other messages of the keyring. So no report of this stream omits
        // uses that the store has lost in a restore.
        if let Ok(name) = settings.keyring.parse() {
            self.forbidden.allow(&name);
            self.reporter.entered(&name, Epoch::new(settings.epoch));
        }
        Ok(None)
    }

    fn chunk(&mut self, chunk: Bytes) -> Result<Option<discovery::SidecarMessage>, Leave> {
        let chunk = discovery::SnapshotChunk::decode(chunk)
            .map_err(|_| Leave::Protocol("a snapshot that cannot be decoded"))?;
        match self.subscribed(&chunk.keyring) {
            Some(Subscribed::Full(held)) => held.chunk(&chunk),
            Some(Subscribed::OnDemand(_)) | None => Ok(None),
        }
    }

    fn delta(&mut self, delta: Bytes) -> Result<Vec<discovery::SidecarMessage>, Leave> {
        let serialized = delta.clone();
        let delta = discovery::Delta::decode(delta)
            .map_err(|_| Leave::Protocol("a delta that cannot be decoded"))?;
        Ok(match self.subscribed(&delta.keyring) {
            Some(Subscribed::Full(held)) => held.delta(&delta, serialized),
            Some(Subscribed::OnDemand(followed)) => followed.delta(&delta),
            None => Vec::new(),
        })
    }

    fn revocations(&mut self, message: Bytes) -> Result<Vec<discovery::SidecarMessage>, Leave> {
        let serialized = message.clone();
        let message = discovery::Revocations::decode(message)
            .map_err(|_| Leave::Protocol("revocations that cannot be decoded"))?;
        Ok(match self.subscribed(&message.keyring) {
            Some(Subscribed::Full(held)) => held.revocations(&message, serialized),
            Some(Subscribed::OnDemand(followed)) => followed.revocations(&message),
            None => Vec::new(),
        })
    }

    /// Applies the answer to a beat. All that it confirms is as old as the beat: the answer may
    /// have waited on its way, and this process may have been stopped.
    fn beat_answer(&mut self, answer: discovery::BeatAnswer) -> Result<Received, Leave> {
        let now = self.clock.reading();
        let sent_at = timestamp(answer.sent_at)?;
        let Some(asked) = self.beats.answered(answer.beat) else {
            return Ok(Received::default());
        };
        // When the beat was sent, the control plane's wall clock was at most at `sent_at`.
        self.latest.told(sent_at, asked.boot);
        let mut outcome = Received {
            answers: Vec::new(),
            clock_skew_ms: Some(sent_at.as_millis() - now.wall.as_millis()),
            beat: Some(BeatNews::Answered),
            listed: None,
        };
        self.beats
            .pace(Duration::from_millis(answer.beat_every_ms.into()));
        for pulse in answer.keyrings {
            let (answer, is_following) = match self.subscribed(&pulse.keyring) {
                Some(Subscribed::Full(held)) => {
                    let answer = held.pulse(&pulse, asked.into(), now.boot)?;
                    (answer, held.is_following())
                }
                Some(Subscribed::OnDemand(followed)) => {
                    let answer = followed.pulse(&pulse, asked.into())?;
                    (answer, followed.is_following())
                }
                None => (None, false),
            };
            outcome.answers.extend(answer);
            if is_following {
                self.note_answered(&pulse.keyring);
            }
        }
        outcome.answers.extend(self.end_unlisted());
        self.finder.answered(answer.beat);
        // A report that is still being sent is completed first: an ack also covers all messages
        // before it.
        if self.report.is_empty() {
            self.report.extend(self.reporter.report(answer.beat));
        }
        Ok(outcome)
    }

    fn start(
        &mut self,
        start: &discovery::Start,
    ) -> Result<Option<discovery::SidecarMessage>, Leave> {
        match self.subscribed(&start.keyring) {
            Some(Subscribed::OnDemand(followed)) => followed.start(start),
            Some(Subscribed::Full(_)) | None => Ok(None),
        }
    }

    fn lookup_result(&mut self, result: &discovery::LookupResult) -> Result<(), Leave> {
        let now = self.clock.boot();
        match self.subscribed(&result.keyring) {
            Some(Subscribed::OnDemand(followed)) => followed.lookup_result(result, now),
            Some(Subscribed::Full(_)) | None => Ok(()),
        }
    }

    fn note_answered(&mut self, keyring: &str) {
        let name = keyring.parse().ok();
        let name = name.filter(|name| self.keyrings.contains_key(name));
        self.answered.extend(name);
    }

    /// Returns the keyring of a message; none if the sidecar has not subscribed to it, and then the
    /// message is ignored.
    fn subscribed(&mut self, keyring: &str) -> Option<&mut Subscribed> {
        let name: KeyringName = keyring.parse().ok()?;
        self.keyrings.get_mut(&name)
    }

    /// Returns the keyrings that are held on demand.
    fn followed(&mut self) -> impl Iterator<Item = &mut Followed> {
        self.keyrings
            .values_mut()
            .filter_map(|keyring| match keyring {
                Subscribed::Full(_) => None,
                Subscribed::OnDemand(followed) => Some(followed),
            })
    }
}

impl Subscribed {
    fn to(slot: Arc<Slot>) -> Self {
        match slot.cache().cloned() {
            None => Self::Full(HeldSnapshot::new(Mirror::new(slot))),
            Some(cache) => Self::OnDemand(Followed::new(Follower::new(slot, cache))),
        }
    }

    /// Notes that a stream is open, on which lookups can be sent.
    fn connected(&mut self) {
        match self {
            Self::Full(_) => {}
            Self::OnDemand(followed) => followed.follower().connected(),
        }
    }

    /// Returns the subscription for a new stream, or for one that is open.
    fn subscription(&mut self) -> discovery::Subscription {
        match self {
            Self::Full(held) => held.subscription(),
            Self::OnDemand(followed) => followed.subscription(),
        }
    }
}

impl From<discovery::DrainReason> for DrainReason {
    fn from(reason: discovery::DrainReason) -> Self {
        match reason {
            discovery::DrainReason::Stopping => Self::Stopping,
            discovery::DrainReason::CertificateExpired => Self::CertificateExpired,
            discovery::DrainReason::Unspecified => Self::Unspecified,
        }
    }
}

impl fmt::Display for DrainReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopping => "the control plane is stopping",
            Self::CertificateExpired => "the certificate that the stream began with has expired",
            Self::Unspecified => "the control plane ends the stream without a reason",
        })
    }
}

impl Received {
    fn answers(answers: Vec<discovery::SidecarMessage>) -> Self {
        Self {
            answers,
            ..Self::default()
        }
    }

    fn answer(answer: Option<discovery::SidecarMessage>) -> Self {
        Self {
            answers: answer.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Returns the answer to a message that brings a keyring anew. Once the keyring is complete,
    /// the next beat is due.
    fn begin(answer: Option<discovery::SidecarMessage>) -> Self {
        Self {
            beat: answer.is_some().then_some(BeatNews::Due),
            ..Self::answer(answer)
        }
    }
}

fn timestamp(time: Option<prost_types::Timestamp>) -> Result<Timestamp, Leave> {
    time.and_then(|time| std::time::SystemTime::try_from(time).ok())
        .map(Timestamp::from)
        .ok_or(Leave::Protocol("an answer to a beat without a time"))
}

/// Returns the message that subscribes on an open stream; none without subscriptions.
fn subscribe(subscriptions: Vec<discovery::Subscription>) -> Option<discovery::SidecarMessage> {
    let is_empty = subscriptions.is_empty();
    let subscribe = discovery::Subscribe { subscriptions };
    (!is_empty).then(|| message(Answer::Subscribe(subscribe)))
}

fn unsubscribe(keyring: &KeyringName) -> discovery::SidecarMessage {
    message(Answer::Unsubscribe(discovery::Unsubscribe {
        keyring: keyring.to_string(),
    }))
}

const fn message(kind: Answer) -> discovery::SidecarMessage {
    discovery::SidecarMessage { kind: Some(kind) }
}
