//! What a sidecar does with what comes down its stream. No network: a message goes in, answers come out.

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
    keyring::{Keyrings, Mirror, Restored, Slot, on_demand::Follower},
    proto::discovery::{self, control_message::Kind, sidecar_message::Kind as Answer},
    snapshot::{disk::Disk, recorder::Recorder},
    wire::settings::{self, SettingsError},
};

mod beats;
mod forbidden;
mod full;
mod on_demand;
mod pulse;
mod reply;
mod revoked;

use beats::Beats;
use forbidden::Forbidden;
use full::Held;
use on_demand::Followed;

/// Applies what the control plane sends to a sidecar's keyrings.
#[derive(Debug)]
pub struct Receiver {
    clock: Clock,
    keyrings: BTreeMap<KeyringName, Subscribed>,
    /// The keyrings of which the open stream has brought what it has to.
    answered: BTreeSet<KeyringName>,
    /// Woken when there is a lookup to send.
    lookups: Arc<Notify>,
    reporter: Reporter,
    /// What is still to be sent of the last usage report.
    report: VecDeque<discovery::Usage>,
    beats: Beats,
    /// None when nothing is kept on disk.
    recorder: Option<Recorder>,
    /// Those that the sidecar may not have any more.
    forbidden: Forbidden,
    /// Told of the control plane's wall clock.
    latest: LatestWall,
}

/// A keyring of the stream, by how much of it the sidecar holds.
#[derive(Debug)]
enum Subscribed {
    Full(Held),
    OnDemand(Followed),
}

/// What came of a message.
#[derive(Debug, Default)]
pub struct Outcome {
    /// To send, in order, before any usage.
    pub answers: Vec<discovery::SidecarMessage>,
    /// How far the control plane's wall clock is ahead of ours, in milliseconds, where the message told.
    pub(crate) clock_skew_ms: Option<i64>,
    /// What the message means for the beats of the stream.
    pub(crate) beat: Option<BeatNews>,
}

/// What a message means for the beats of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BeatNews {
    /// A keyring has come anew, and is to be confirmed: the next beat is due.
    Due,
    /// A beat is answered.
    Answered,
}

/// Why a sidecar leaves a stream of its own accord.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Leave {
    /// The control plane ends the stream in order.
    #[error("{reason}")]
    Drain {
        /// Why.
        reason: DrainReason,
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

/// Why a control plane ends a stream in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainReason {
    /// It stops.
    Stopping,
    /// The certificate that the stream began with has expired; the next stream can begin at once.
    CertificateExpired,
    /// It gives none that this version knows.
    Unspecified,
}

/// In the place of a beat in a report that replies to no answer.
const NO_BEAT: u64 = 0;

impl Receiver {
    /// A receiver for `keyrings`, none of which holds anything yet.
    #[must_use]
    pub fn new(keyrings: &Keyrings, clock: Clock) -> Self {
        let reporter = Reporter::new(keyrings);
        let lookups = Arc::clone(keyrings.lookups());
        let subscribed = |slot: &Arc<Slot>| match slot.cache().cloned() {
            None => Subscribed::Full(Held::new(Mirror::new(Arc::clone(slot)))),
            Some(cache) => {
                Subscribed::OnDemand(Followed::new(Follower::new(Arc::clone(slot), cache)))
            }
        };
        Self {
            clock,
            keyrings: keyrings
                .iter()
                .map(|slot| (slot.name().clone(), subscribed(slot)))
                .collect(),
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

    /// Tells `latest` of the control plane's wall clock.
    #[must_use]
    pub(crate) fn telling(self, latest: LatestWall) -> Self {
        Self { latest, ..self }
    }

    /// From now on `recorder` notes what is applied.
    pub(crate) fn record(&mut self, recorder: &Recorder) {
        self.recorder = Some(recorder.clone());
        for keyring in self.keyrings.values_mut() {
            match keyring {
                Subscribed::Full(held) => held.record(recorder.clone()),
                Subscribed::OnDemand(_) => {}
            }
        }
    }

    /// Begins with what was kept of a keyring that is held in full.
    pub(crate) fn restore(&mut self, keyring: &KeyringName, restored: Restored) {
        match self.keyrings.get_mut(keyring) {
            Some(Subscribed::Full(held)) => held.restore(restored),
            Some(Subscribed::OnDemand(_)) | None => {}
        }
    }

    /// What is known of the disk; none when nothing is kept there.
    #[must_use]
    pub(crate) fn disk(&self) -> Option<&Disk> {
        self.recorder.as_ref().map(|recorder| &**recorder.disk())
    }

    /// An ack for a keyring of which more has come to the disk.
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

    /// A stream is open: what it answers can be asked for.
    pub fn connected(&mut self) {
        if let Some(disk) = self.disk() {
            disk.forget_told();
        }
        for followed in self.followed() {
            followed.follower().connected();
        }
    }

    /// The stream has ended: whoever waits for an answer is told.
    pub fn disconnected(&mut self) {
        self.answered.clear();
        self.beats.disconnected();
        self.forbidden.disconnected();
        for followed in self.followed() {
            followed.follower().disconnected();
        }
    }

    /// The clock that everything here goes by.
    #[must_use]
    pub(crate) const fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The next beat, to be sent at once: what its answer confirms is as old as this call.
    pub fn next_beat(&mut self) -> discovery::SidecarMessage {
        message(Answer::Beat(self.beats.send(self.clock.reading())))
    }

    /// The pause between two beats, as the control plane last asked for it.
    #[must_use]
    pub(crate) const fn beat_every(&self) -> Duration {
        self.beats.every()
    }

    /// Whether the open stream has been of use: the control plane has said of each keyring that it does not serve it, or has
    /// brought what it has and confirmed it.
    #[must_use]
    pub(crate) fn is_answered(&self) -> bool {
        self.answered.len() == self.keyrings.len()
    }

    /// The next lookup to send.
    #[must_use]
    pub fn next_lookup(&self) -> Option<discovery::SidecarMessage> {
        let lookup = self.keyrings.values().find_map(|keyring| match keyring {
            Subscribed::Full(_) => None,
            Subscribed::OnDemand(followed) => followed.next_lookup(),
        })?;
        Some(message(Answer::Lookup(lookup)))
    }

    /// Woken when there is a lookup to send.
    #[must_use]
    pub(crate) const fn lookups(&self) -> &Arc<Notify> {
        &self.lookups
    }

    /// The next message of usage to send, after all answers: what waits for those are checks and operators. Behind the usage
    /// comes which keyrings were dropped, so that their last counts are there before.
    pub(crate) fn next_usage(&mut self) -> Option<discovery::SidecarMessage> {
        if let Some(usage) = self.report.pop_front() {
            return Some(message(Answer::Usage(usage)));
        }
        let dropped = self.forbidden.next(self.recorder.as_ref());
        dropped.map(Answer::Dropped).map(message)
    }

    /// Whether there is usage to send, or a keyring that was dropped to report.
    #[must_use]
    pub(crate) fn has_usage(&self) -> bool {
        !self.report.is_empty() || self.forbidden.has_next(self.recorder.as_ref())
    }

    /// What the first message of a new stream says of each keyring. What was half sent before is forgotten; what was half
    /// received of a snapshot is kept until the new stream brings the rest, or something else.
    pub fn subscriptions(&mut self) -> Vec<discovery::Subscription> {
        self.report.clear();
        self.reporter.reconnected();
        let keyrings = self.keyrings.values_mut();
        let subscriptions = keyrings.map(|keyring| match keyring {
            Subscribed::Full(held) => held.subscription(),
            Subscribed::OnDemand(followed) => followed.subscription(),
        });
        subscriptions.collect()
    }

    /// Takes one message.
    ///
    /// # Errors
    ///
    /// When the stream is to be left.
    pub fn receive(&mut self, message: discovery::ControlMessage) -> Result<Outcome, Leave> {
        let Some(kind) = message.kind else {
            // A kind of message that this version does not know.
            return Ok(Outcome::default());
        };
        match kind {
            Kind::Settings(settings) => self.settings(&settings).map(Outcome::answer),
            Kind::Snapshot(chunk) => self.chunk(chunk).map(Outcome::begin),
            Kind::Delta(delta) => self.delta(delta).map(Outcome::answers),
            Kind::Revocations(revocations) => self.revocations(revocations).map(Outcome::answers),
            Kind::Drain(drain) => Err(Leave::Drain {
                reason: drain.reason().into(),
                retry_after: drain
                    .retry_after
                    .and_then(|after| Duration::try_from(after).ok()),
            }),
            Kind::UsageAck(ack) => {
                self.reporter.acked(ack.sequence);
                Ok(Outcome::default())
            }
            Kind::BeatAnswer(answer) => self.beat_answer(answer),
            Kind::Start(start) => self.start(&start).map(Outcome::begin),
            Kind::LookupResult(result) => self.lookup_result(&result).map(|()| Outcome::default()),
            Kind::NotServed(refusal) => {
                tracing::warn!(
                    auth.keyring = refusal.keyring,
                    reason = refusal.reason,
                    "the control plane does not serve this keyring"
                );
                if refusal.is_forbidden {
                    self.drop_keyring(&refusal);
                }
                self.note_answered(&refusal.keyring);
                Ok(Outcome::default())
            }
        }
    }

    /// Drops a keyring that the sidecar may not have any more: from memory at once, and from the file. That is reported when
    /// it was done, behind the last counts of the keyring.
    fn drop_keyring(&mut self, refusal: &discovery::NotServed) {
        let Ok(name) = refusal.keyring.parse::<KeyringName>() else {
            return;
        };
        match self.keyrings.get_mut(&name) {
            Some(Subscribed::Full(held)) => held.forget(),
            Some(Subscribed::OnDemand(followed)) => followed.forget(),
            None => return,
        }
        tracing::error!(
            auth.keyring = %name,
            reason = refusal.reason,
            "this sidecar may no longer have the keyring: it is dropped, and its checks are denied"
        );
        // It replies to no answer: it brings the last counts, and makes nothing complete.
        let last = self.reporter.report(NO_BEAT);
        self.report.extend(last);
        self.forbidden
            .forbid(name, refusal.number, self.recorder.as_ref());
    }

    /// Makes the last usage report, once no check is under way and none will come, and returns the sequence of its last
    /// message. It is sent behind what is left of the one before.
    pub(crate) fn make_last_report(&mut self) -> u64 {
        let last = self.reporter.last_report();
        self.report.extend(last);
        self.report.back().map_or(0, |usage| usage.sequence)
    }

    /// How far the usage reports have come.
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
        // They come before anything else of the keyring, so that no report of this stream passes over what was lost.
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

    /// Takes the answer to a beat. Whatever it brings is as old as the beat: the answer may have waited on its way, and this
    /// process may have been stopped.
    fn beat_answer(&mut self, answer: discovery::BeatAnswer) -> Result<Outcome, Leave> {
        let now = self.clock.reading();
        let sent_at = timestamp(answer.sent_at)?;
        let Some(asked) = self.beats.answered(answer.beat) else {
            return Ok(Outcome::default());
        };
        // By then it was at most so late there.
        self.latest.told(sent_at, asked.boot);
        let mut outcome = Outcome {
            answers: Vec::new(),
            clock_skew_ms: Some(sent_at.as_millis() - now.wall.as_millis()),
            beat: Some(BeatNews::Answered),
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
        // One that is still being sent is sent to its end: an ack is for everything before it, too.
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

    /// The keyring of a message; one that was not subscribed to is passed over.
    fn subscribed(&mut self, keyring: &str) -> Option<&mut Subscribed> {
        let name: KeyringName = keyring.parse().ok()?;
        self.keyrings.get_mut(&name)
    }

    /// Those that are held on demand.
    fn followed(&mut self) -> impl Iterator<Item = &mut Followed> {
        self.keyrings
            .values_mut()
            .filter_map(|keyring| match keyring {
                Subscribed::Full(_) => None,
                Subscribed::OnDemand(followed) => Some(followed),
            })
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

impl Outcome {
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

    /// The answer to what brings a keyring anew, once it is here.
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

const fn message(kind: Answer) -> discovery::SidecarMessage {
    discovery::SidecarMessage { kind: Some(kind) }
}
