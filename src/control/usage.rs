//! The use of key versions: sidecars report it, the store keeps it, and rotations read it as
//! evidence.
//!
//! A report is merged in memory immediately, and written with all others within [`FLUSH_AFTER`],
//! or at once if it is the last one of a sidecar.
//! After the write, the report is acked, and the [`fleet`](super::fleet) counts it as reported:
//! what the evidence calls complete survives the control plane. Counts are cumulative and merged by
//! maximum: reports that arrive twice, late or in another order change nothing.

mod answers;
mod callers;
mod ledger;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{catalog::Catalog, fleet::Fleet, pace::Pace};
use crate::{
    clock::{BootTime, Clock},
    key::{
        Evidence, Key, KeyVersion, Keyring, KeyringName, Timestamp, Use, VersionRef, VersionState,
    },
    proto::discovery,
    serving::RunKey,
    store::{PresenceRow, Store, StoreError, UsageRow},
};

pub(crate) use answers::Answers;
pub(crate) use callers::ReportedCaller;

use callers::{Callers, MAX_CALLERS};
use ledger::{Boot, CountName, Ledger, Receipt, ReportedUse, count_name_of};

/// The use of each version, from all reports of sidecars.
#[derive(Debug)]
pub struct UsageBook {
    store: Arc<dyn Store>,
    clock: Clock,
    /// Limits times in reports that are in the future, even when both clocks have jumped ahead.
    pace: Arc<Pace>,
    state: Mutex<UsageState>,
    /// Wakes the writer when there is something to write.
    written_to: Notify,
    /// Wakes the writer at once: a sidecar that stops waits for the ack of its last report.
    hurried: Notify,
    /// Held by the task that writes to the store.
    flushing: tokio::sync::Mutex<()>,
}

/// The reports of one stream.
#[derive(Debug)]
pub(crate) struct UsageStream {
    book: Arc<UsageBook>,
    id: u64,
    boot: Boot,
    subscribed: BTreeSet<KeyringName>,
    answers: Answers,
    /// The sequence number that is expected next.
    next: Option<u64>,
    /// Whether a message of the current report is missing.
    holed: bool,
    /// Whether the last message ended a final report that is complete.
    told_all: bool,
}

/// The state of its reports that a session needs.
#[derive(Debug)]
pub(crate) struct UsageAcks {
    /// The message up to which everything is in the store.
    pub(crate) durable: watch::Receiver<u64>,
    /// Records each answer to a beat.
    pub(crate) answers: Answers,
}

/// The facts of a keyring about a version that a sidecar reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// Whether to keep the callers of the version.
    pub(crate) keeps_callers: bool,
}

/// The existing versions.
pub(crate) trait KnownVersions {
    /// Returns the facts about each of `versions`; none for one that does not exist.
    fn known(
        &self,
        keyring: &KeyringName,
        versions: &[VersionRef],
        now: Timestamp,
    ) -> Vec<Option<Known>>;
}

#[derive(Debug)]
struct UsageState {
    ledger: Ledger,
    callers: Callers,
    streams: BTreeMap<u64, Open>,
    next_stream: u64,
    /// The ended processes whose counts are still to be added to the sum.
    ended: BTreeSet<Boot>,
    /// The number of dropped versions since the last log line about them.
    dropped: u64,
    dropped_logged: Option<BootTime>,
}

/// A stream whose reports are merged.
#[derive(Debug)]
struct Open {
    member: RunKey,
    /// The message up to which everything is merged.
    merged: u64,
    /// The time until which the last report that was merged whole is complete.
    complete_until: Option<Timestamp>,
    /// The time until which reports are complete, as last passed to the fleet.
    told_until: Option<Timestamp>,
    /// The message up to which everything is in the store.
    durable: watch::Sender<u64>,
    closed: bool,
}

/// The state of a stream at the start of a flush.
#[derive(Debug)]
struct Written {
    id: u64,
    merged: u64,
    complete_until: Option<Timestamp>,
    closed: bool,
}

/// How long a report waits for others that are written with it: short compared with the pause
/// between beats, and long enough that a thousand sidecars cost four transactions a second.
pub(crate) const FLUSH_AFTER: Duration = Duration::from_millis(250);
/// How long to wait after a failed write.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The most rows of one transaction. It holds the only write lock for some ten milliseconds.
const MAX_ROWS: usize = 2_000;
/// The shortest time between two log lines about dropped reports: a sidecar with wrong reports
/// sends them again and again.
const LOG_DROPPED_EVERY: Duration = Duration::from_mins(1);

impl UsageBook {
    /// Opens the usage in `store`. A process with counts but without `presence` has ended.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn open(
        store: Arc<dyn Store>,
        clock: Clock,
        pace: Arc<Pace>,
        presence: &[PresenceRow],
    ) -> Result<Self, StoreError> {
        let stored = store.load_usage().await?;
        let now = clock.wall();
        let mut ledger = Ledger::load(stored.counts, stored.folded, now);
        let present: HashSet<&str> = presence.iter().map(|row| row.run_id.as_str()).collect();
        let mut ended = ledger.boots();
        ended.retain(|boot| !present.contains(&**boot));
        for boot in &ended {
            ledger.end(boot, now);
        }
        let state = UsageState {
            ledger,
            callers: Callers::load(stored.callers),
            streams: BTreeMap::new(),
            next_stream: 0,
            ended,
            dropped: 0,
            dropped_logged: None,
        };
        Ok(Self {
            store,
            pace,
            clock,
            state: Mutex::new(state),
            written_to: Notify::new(),
            hurried: Notify::new(),
            flushing: tokio::sync::Mutex::default(),
        })
    }

    /// Opens the reports of a new stream, about the keyrings to which its sidecar subscribes.
    #[must_use]
    pub(crate) fn stream(
        self: &Arc<Self>,
        member: &RunKey,
        subscribed: BTreeSet<KeyringName>,
    ) -> (UsageStream, UsageAcks) {
        let (durable, written) = watch::channel(0);
        let answers = Answers::new(Arc::clone(&self.pace));
        let acks = UsageAcks {
            durable: written,
            answers: answers.clone(),
        };
        let mut state = self.lock();
        let id = state.next_stream;
        state.next_stream += 1;
        let open = Open {
            member: member.clone(),
            merged: 0,
            complete_until: None,
            told_until: None,
            durable,
            closed: false,
        };
        state.streams.insert(id, open);
        let stream = UsageStream {
            book: Arc::clone(self),
            id,
            boot: member.run_id.as_str().into(),
            subscribed,
            answers,
            next: None,
            holed: false,
            told_all: false,
        };
        (stream, acks)
    }

    /// Ends a process for good: its counts are added to the sum of all ended processes.
    pub(crate) fn end(&self, run_id: &str) {
        let boot = Boot::from(run_id);
        let now = self.clock.wall();
        let mut state = self.lock();
        state.ledger.end(&boot, now);
        state.ended.insert(boot);
        drop(state);
        self.written_to.notify_one();
    }

    /// Returns the use of a version. None when no report names it.
    #[must_use]
    pub(crate) fn use_of(&self, keyring: &KeyringName, version: VersionRef) -> Option<Use> {
        self.lock().ledger.total(keyring, version)
    }

    /// Returns the versions of a keyring that reports name, in any order.
    #[must_use]
    pub(crate) fn used(&self, keyring: &KeyringName) -> Vec<VersionRef> {
        self.lock().ledger.versions(keyring).copied().collect()
    }

    /// Returns the use of each of `versions`, without those that no report names.
    #[must_use]
    pub(crate) fn uses_of(
        &self,
        keyring: &KeyringName,
        versions: &[VersionRef],
    ) -> HashMap<VersionRef, Use> {
        let state = self.lock();
        let told = |which: &VersionRef| Some((*which, state.ledger.total(keyring, *which)?));
        versions.iter().filter_map(told).collect()
    }

    /// Returns the reported requests per second with a version, as an average over the last 1 to 2
    /// minutes. 0 when the count did not grow in the last minute.
    #[must_use]
    pub(crate) fn rate(&self, keyring: &KeyringName, version: VersionRef) -> f64 {
        let now = self.clock.boot();
        self.lock().ledger.rate(keyring, version, now)
    }

    /// Returns the callers of a version that its consumer should no longer use, at most 16. Those
    /// with the most requests come first.
    #[must_use]
    pub(crate) fn callers(
        &self,
        keyring: &KeyringName,
        version: VersionRef,
    ) -> Vec<ReportedCaller> {
        self.lock().callers.of(keyring, version)
    }

    /// Returns the evidence about the versions that are in a rotation.
    #[must_use]
    pub(crate) fn evidence(&self, keyring: &Keyring, fleet: &Fleet, now: Timestamp) -> Evidence {
        // Read before the counts, which then hold everything that the coverage includes.
        let coverage = fleet.coverage(keyring.name(), now);
        let state = self.lock();
        let uses = keyring
            .moving()
            .filter_map(|(key, version)| {
                let which = VersionRef {
                    key_id: key.id,
                    version: version.number,
                };
                Some((which, state.ledger.total(keyring.name(), which)?))
            })
            .collect();
        Evidence { coverage, uses }
    }

    /// Forgets the callers of versions.
    pub(crate) fn forget_callers(&self, keyring: &KeyringName, versions: &[VersionRef]) {
        let mut state = self.lock();
        for version in versions {
            state.callers.forget(keyring, *version);
        }
        drop(state);
        self.written_to.notify_one();
    }

    /// Forgets the callers of versions whose rotation is over: the version no longer exists, is in
    /// use again, or ended longer ago than a roll-back reaches.
    pub(crate) fn forget_past_callers(&self, keyring: &Keyring, now: Timestamp) {
        let held = self.lock().callers.versions(keyring.name());
        let past: Vec<VersionRef> = held
            .into_iter()
            .filter(|which| {
                let known = keyring.version(*which);
                !known.is_some_and(|(key, version)| keeps_callers(keyring, key, version, now))
            })
            .collect();
        if !past.is_empty() {
            self.forget_callers(keyring.name(), &past);
        }
    }

    /// Writes the unsaved counts and callers to the store, and informs the fleet and the streams.
    ///
    /// # Errors
    ///
    /// When the store cannot be written. The next flush tries again.
    pub async fn flush(&self, fleet: &Fleet) -> Result<(), StoreError> {
        let _turn = self.flushing.lock().await;
        let (callers, streams, ended) = {
            let state = self.lock();
            let streams: Vec<Written> = state.streams.iter().map(Open::seen).collect();
            (state.callers.unsaved(), streams, state.ended.clone())
        };
        self.flush_counts().await?;
        // Acks and evidence depend only on the counts.
        self.acknowledge(&streams, fleet);
        for batch in callers.rows.chunks(MAX_ROWS) {
            self.store.save_callers(batch.to_vec()).await?;
        }
        self.lock().callers.saved(&callers);
        for boot in ended {
            self.store.fold_usage(&boot, self.clock.wall()).await?;
            let mut state = self.lock();
            state.ledger.fold(&boot);
            state.callers.fold(&boot);
            state.ended.remove(&boot);
            // The callers that were moved have to be written.
            self.written_to.notify_one();
        }
        Ok(())
    }

    /// Writes the counts that are unsaved when this begins. A report waits for one batch at most.
    async fn flush_counts(&self) -> Result<(), StoreError> {
        let mut last: Option<CountName> = None;
        loop {
            let batch = self.lock().ledger.unsaved(last.as_ref(), MAX_ROWS);
            let Some(row) = batch.last() else {
                return Ok(());
            };
            last = Some(count_name_of(row));
            self.store.save_usage(batch.clone()).await?;
            self.lock().ledger.saved(&batch);
        }
    }

    /// Writes new data until `end`, and then the rest.
    pub(crate) async fn run(self: Arc<Self>, fleet: Arc<Fleet>, end: CancellationToken) {
        let mut pause = FLUSH_AFTER;
        while !end.is_cancelled() {
            tokio::select! {
                () = self.written_to.notified() => {}
                () = end.cancelled() => break,
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.hurried.notified(), if pause == FLUSH_AFTER => {}
                () = end.cancelled() => break,
            }
            pause = if self.try_flush(&fleet).await {
                FLUSH_AFTER
            } else {
                self.written_to.notify_one();
                RETRY_AFTER
            };
        }
        self.try_flush(&fleet).await;
    }

    /// Flushes, and returns whether that succeeded.
    async fn try_flush(&self, fleet: &Fleet) -> bool {
        let flushed = self.flush(fleet).await;
        if let Err(error) = &flushed {
            tracing::error!(
                error = error as &dyn std::error::Error,
                "the use of keys cannot be written to the store; sidecars repeat their reports until it can"
            );
        }
        flushed.is_ok()
    }

    fn acknowledge(&self, written: &[Written], fleet: &Fleet) {
        let mut told = Vec::new();
        {
            let mut state = self.lock();
            for Written {
                id,
                merged,
                complete_until,
                closed,
            } in written
            {
                if let Some(stream) = state.streams.get_mut(id) {
                    stream.durable.send_if_modified(|durable| {
                        let is_news = *durable < *merged;
                        *durable = *merged;
                        is_news
                    });
                    if let Some(until) =
                        complete_until.filter(|_| stream.told_until < *complete_until)
                    {
                        stream.told_until = Some(until);
                        told.push((stream.member.clone(), until));
                    }
                }
                if *closed {
                    state.streams.remove(id);
                }
            }
        }
        for (member, until) in told {
            fleet.told(&member, until);
        }
    }

    fn merge(
        &self,
        stream: &UsageStream,
        usage: &discovery::Usage,
        versions: &impl KnownVersions,
        now: Timestamp,
    ) {
        for told in &usage.keyrings {
            let keyring = told.keyring.parse::<KeyringName>().ok();
            let Some(keyring) = keyring.filter(|name| stream.subscribed.contains(name)) else {
                self.drop_unknown(&stream.boot, told.versions.len());
                continue;
            };
            let named: Vec<_> = told
                .versions
                .iter()
                .filter_map(|version| Some((version_ref(version)?, version)))
                .collect();
            let refs: Vec<VersionRef> = named.iter().map(|(which, _)| *which).collect();
            let known = versions.known(&keyring, &refs, now);
            let mut taken = 0;
            let mut state = self.lock();
            for ((which, version), known) in named.iter().zip(known) {
                let Some(known) = known else { continue };
                taken += 1;
                let boot = &stream.boot;
                let receipt = Receipt {
                    wall: now,
                    boot: self.clock.boot(),
                };
                let told = reported_use(version, now);
                state.ledger.merge(&keyring, *which, boot, told, receipt);
                if known.keeps_callers && !version.callers.is_empty() {
                    let callers = version.callers.iter().take(MAX_CALLERS);
                    let callers = callers.map(|caller| ReportedCaller::from_wire(caller, now));
                    state
                        .callers
                        .tell(&keyring, *which, boot, callers.collect());
                }
            }
            drop(state);
            self.drop_unknown(&stream.boot, told.versions.len() - taken);
        }
    }

    /// Counts dropped versions, and logs them at most once a minute.
    fn drop_unknown(&self, boot: &Boot, count: usize) {
        if count == 0 {
            return;
        }
        let now = self.clock.boot();
        let mut state = self.lock();
        state.dropped = state.dropped.saturating_add(count as u64);
        let is_recent = |at: BootTime| now.saturating_since(at) < LOG_DROPPED_EVERY;
        if !state.dropped_logged.is_some_and(is_recent) {
            tracing::warn!(
                run_id = &**boot,
                versions = state.dropped,
                "reports of use were dropped: their versions do not exist, or the sidecar has no subscription to their keyrings"
            );
            state.dropped = 0;
            state.dropped_logged = Some(now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, UsageState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UsageStream {
    /// Merges a message. A repeated or late message changes nothing. After a missing message,
    /// nothing counts as complete until the next report, which contains everything that was not
    /// acked.
    pub(crate) fn note(&mut self, usage: &discovery::Usage, versions: &impl KnownVersions) {
        let now = self.book.pace.now();
        self.book.merge(self, usage, versions, now);
        let is_late = self.next.is_some_and(|next| usage.sequence < next);
        if !is_late {
            self.holed |= self.next.is_some_and(|next| usage.sequence > next);
            self.next = Some(usage.sequence.saturating_add(1));
            let is_whole = !self.holed;
            let is_last = usage.is_final || usage.complete_until_beat > 0;
            self.told_all = is_whole && usage.is_final;
            if is_last {
                self.holed = false;
            }
            if is_whole {
                // A final report does not exclude that another process has begun since from the
                // same snapshot file: like other reports, it is as complete as the answer to which
                // it replies.
                let complete_until = self.answers.complete_until(usage.complete_until_beat);
                if let Some(open) = self.book.lock().streams.get_mut(&self.id) {
                    open.merged = usage.sequence;
                    open.complete_until = open.complete_until.max(complete_until);
                }
            }
        }
        self.book.written_to.notify_one();
        if self.told_all {
            self.book.hurried.notify_one();
        }
    }

    /// Accepts reports about a further keyring.
    pub(crate) fn subscribe(&mut self, keyring: &str) {
        self.subscribed.extend(keyring.parse());
    }

    /// Writes the reports of the stream. Returns whether they are everything that its sidecar saw,
    /// if the sidecar has ended.
    pub(crate) async fn settle(&self, fleet: &Fleet) -> bool {
        self.told_all && self.book.try_flush(fleet).await
    }
}

impl Drop for UsageStream {
    fn drop(&mut self) {
        if let Some(open) = self.book.lock().streams.get_mut(&self.id) {
            open.closed = true;
        }
        self.book.written_to.notify_one();
    }
}

impl Open {
    fn seen((id, stream): (&u64, &Self)) -> Written {
        Written {
            id: *id,
            merged: stream.merged,
            complete_until: stream.complete_until,
            closed: stream.closed,
        }
    }
}

impl KnownVersions for Catalog {
    fn known(
        &self,
        keyring: &KeyringName,
        versions: &[VersionRef],
        now: Timestamp,
    ) -> Vec<Option<Known>> {
        let Ok(served) = self.get(keyring) else {
            // The versions of a keyring that cannot be read now are unknown; sidecars may serve it.
            let mut unreadable = self.unreadable().into_iter();
            let known = unreadable.any(|(name, _)| name == *keyring);
            let keeps_callers = false;
            return vec![known.then_some(Known { keeps_callers }); versions.len()];
        };
        let state = served.journal().state();
        let known = |which: &VersionRef| {
            let (key, version) = state.keyring.version(*which)?;
            Some(Known {
                keeps_callers: keeps_callers(&state.keyring, key, version, now),
            })
        };
        versions.iter().map(known).collect()
    }
}

/// Returns whether to keep the callers of a version: while it is retiring, and for `rollback_for`
/// after it was retired or revoked.
fn keeps_callers(keyring: &Keyring, key: &Key, version: &KeyVersion, now: Timestamp) -> bool {
    match version.state {
        VersionState::Retiring { .. } => true,
        VersionState::Retired { since, .. } | VersionState::Revoked { since, .. } => {
            now < since.saturating_add(keyring.policy_of(key).rollback_for)
        }
        VersionState::Pending { .. } | VersionState::Active { .. } => false,
    }
}

fn version_ref(version: &discovery::VersionUsage) -> Option<VersionRef> {
    Some(VersionRef {
        key_id: version.key_id.parse().ok()?,
        version: crate::key::VersionNumber::new(version.version)?,
    })
}

/// Returns the report at `now`, within bounds. The growth of the count decides when a version was
/// last used.
fn reported_use(told: &discovery::VersionUsage, now: Timestamp) -> ReportedUse {
    let requests = told.requests.min(UsageRow::MAX_COUNT);
    ReportedUse {
        requests,
        denied: told.denied.min(requests),
        // A use is older than its report. A use without a time may have been just now.
        first_used: match told.first_used_ms {
            ..=0 => now,
            millis => Timestamp::from_millis(millis).min(now),
        },
    }
}

#[cfg(test)]
mod tests;
