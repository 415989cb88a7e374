//! The sidecars of this control plane: combines the book of the sidecars that may serve
//! ([`Serving`]) with clocks, streams and the store.

mod condition;
mod hello;
mod late_reporter;
mod presence_row;
mod stream;

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    admission::Refusal,
    clock::{BootTime, Clock},
    key::{Coverage, Epoch, KeyringName, Revision, Timestamp},
    proto::discovery,
    serving::{
        Barrier, Confirmation, ForgetError, Gap, Now, RowError, Run, RunKey, Serving, Target,
        UnknownRun,
    },
    store::{PresenceRow, Store, StoreError},
    tls::Identity,
    wire::change::refusal,
};

pub(crate) use condition::Condition;
pub(crate) use hello::Believed;
pub(crate) use late_reporter::LateReporter;
pub(crate) use stream::{OpenStream, Parting};

use presence_row::{presence_of_row, row_of_presence};

/// The sidecars that may serve, or did recently.
#[derive(Debug)]
pub struct Fleet {
    clock: Clock,
    serving: Mutex<Serving>,
    /// Held while the store is written, so that a deleted row is not saved again from an earlier
    /// look; with the time at which the ages of gaps were last written.
    recording: tokio::sync::Mutex<Option<BootTime>>,
    /// Counts changes; wakes the callers that wait for confirmations.
    changes: watch::Sender<u64>,
}

/// The answer to a beat must not be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GrantError {
    /// The run is not in the book.
    #[error(transparent)]
    Unknown(#[from] UnknownRun),
    /// The grants are not recorded in the store.
    #[error("the grant cannot be recorded")]
    Store(#[from] StoreError),
}

/// How often the ages of gaps are written. The time since the last write is lost with the process,
/// and versions are kept for as much longer.
const GAPS_EVERY: Duration = Duration::from_mins(10);

impl Fleet {
    /// Returns a fleet from the `rows` in the store. No answer grants more than `max_serve_for`.
    ///
    /// # Errors
    ///
    /// When a row cannot be read.
    pub fn new(
        clock: Clock,
        max_serve_for: Duration,
        rows: Vec<PresenceRow>,
    ) -> Result<Self, RowError> {
        let rows = rows.into_iter().map(row_of_presence).collect();
        let serving = Serving::restore(rows, max_serve_for, now(&clock))?;
        Ok(Self {
            clock,
            serving: Mutex::new(serving),
            recording: tokio::sync::Mutex::default(),
            changes: watch::Sender::new(0),
        })
    }

    /// Notes that the store is a backup: each sidecar that it knows may serve for its full bound
    /// from now on.
    pub(crate) fn distrust_rests(&self) {
        let now = self.now();
        self.lock().distrust_rests(now);
    }

    /// Returns the keyrings of a run in the book: those that it may hold, and those that it was
    /// granted before.
    #[must_use]
    pub(crate) fn keyrings_of(&self, key: &RunKey) -> BTreeSet<KeyringName> {
        let serving = self.lock();
        let run = serving.run(key);
        run.map_or_else(BTreeSet::new, |run| run.keyrings.keys().cloned().collect())
    }

    /// Returns the longest time that an answer grants.
    #[must_use]
    pub(crate) fn max_serve_for(&self) -> Duration {
        self.lock().max_serve_for()
    }

    /// Returns a receiver that wakes whenever a sidecar has connected, has gone or has answered.
    #[must_use]
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Notes that a stream of a sidecar begins, whose certificate or token proves `identity`;
    /// without an identity, the identity of the node is not checked. Nothing may be sent on the
    /// stream before [`record_news`](Self::record_news) has returned.
    ///
    /// # Errors
    ///
    /// When a later stream of the run has begun, when the run has ended, or when the node belongs
    /// to another identity, as far as is known. A control plane that has just started does not know
    /// the identities of sidecars that have not connected again.
    pub(crate) fn connected(
        &self,
        hello: &discovery::Hello,
        believed: &Believed,
        identity: Option<&Identity>,
    ) -> Result<OpenStream, Refusal> {
        let hello = hello::read(hello, believed, identity);
        let (run, number) = (hello.key.clone(), hello.stream);
        let identity = hello.about.identity.clone();
        let welcome = self.lock().hello(hello, self.now());
        let welcome = welcome.map_err(|error| hello::refusal(&error, &run, identity.as_ref()))?;
        if welcome.was_forgotten {
            tracing::error!(
                node = run.node,
                run_id = run.run_id,
                "a sidecar that was forgotten has connected again: it may have accepted keys that were revoked meanwhile; it receives its keyrings again"
            );
        }
        if welcome.has_namesake {
            tracing::warn!(
                node = run.node,
                run_id = run.run_id,
                "another process with this node id may serve too; see `relatch fleet`"
            );
        }
        self.wake();
        Ok(OpenStream {
            run,
            number,
            was_forgotten: welcome.was_forgotten,
        })
    }

    /// Notes that a sidecar subscribes to further keyrings on an open stream, all of which it may
    /// have. Nothing of them may be sent before [`record_news`](Self::record_news) has returned.
    /// Returns false if a later stream of the run has begun: the sidecar has left this one.
    #[must_use]
    pub(crate) fn subscribed(
        &self,
        stream: &OpenStream,
        subscriptions: &[discovery::Subscription],
    ) -> bool {
        let now = self.now();
        let is_open = {
            let mut serving = self.lock();
            let OpenStream { run, number, .. } = stream;
            subscriptions.iter().all(|subscription| {
                // A name that is not valid has no keyring.
                subscription.keyring.parse().map_or(true, |name| {
                    let held = hello::read_held(subscription);
                    serving.subscribed(run, *number, name, &held, now)
                })
            })
        };
        self.wake();
        is_open
    }

    /// Notes that a stream of a sidecar has ended.
    pub(crate) fn disconnected(&self, stream: &OpenStream, parting: Parting) {
        let now = self.now();
        {
            let mut serving = self.lock();
            match parting {
                Parting::Lost => serving.stream_ended(&stream.run, stream.number, now),
                Parting::Goodbye(farewell) => serving.goodbye(&stream.run, farewell, now),
            }
        }
        self.wake();
    }

    /// Records that the answer to a beat, which arrived at `arrived`, lets a sidecar serve each of
    /// `grants` for its time. The answer may be sent once this returns: the store then has
    /// everything that it grants.
    ///
    /// # Errors
    ///
    /// When the run has ended, or the store cannot be written; the answer must not be sent then.
    pub(crate) async fn grant(
        &self,
        store: &dyn Store,
        key: &RunKey,
        arrived: BootTime,
        grants: &[(KeyringName, Duration)],
    ) -> Result<(), GrantError> {
        let mut on_record = true;
        {
            let mut serving = self.lock();
            for (keyring, serve_for) in grants {
                on_record &= serving.grant(key, keyring, *serve_for, arrived)?;
            }
        }
        if !on_record {
            self.record_news(store).await?;
        }
        Ok(())
    }

    /// Notes that a sidecar has reported every use before `until`, and that the store has the
    /// report.
    pub(crate) fn told(&self, key: &RunKey, until: Timestamp) {
        let now = self.now();
        self.lock().reported(key, until, now);
    }

    /// Notes an ack: a sidecar has applied a change.
    pub(crate) fn acked(&self, stream: &OpenStream, ack: &discovery::Ack) {
        let confirmation = Confirmation {
            epoch: Epoch::new(ack.epoch),
            applied: Revision::new(ack.applied_revision),
            revoked_through: Revision::new(ack.revoked_through),
            durable: Revision::new(ack.durable_revision),
            durable_revoked_through: Revision::new(ack.durable_revoked_through),
            is_whole: ack.is_whole,
            rejected: Vec::new(),
            has_more_rejected: false,
        };
        self.confirmed(stream, &ack.keyring, &confirmation);
    }

    /// Notes a nack: a sidecar could not use some items.
    pub(crate) fn nacked(&self, stream: &OpenStream, nack: &discovery::Nack) {
        let rejected = nack.items.iter().map(|item| {
            let item = refusal(&item.name, &item.reason);
            (item.name, item.reason)
        });
        let confirmation = Confirmation {
            epoch: Epoch::new(nack.epoch),
            applied: Revision::new(nack.applied_revision),
            revoked_through: Revision::new(nack.revoked_through),
            durable: Revision::new(nack.durable_revision),
            durable_revoked_through: Revision::new(nack.durable_revoked_through),
            is_whole: nack.is_whole,
            rejected: rejected.collect(),
            has_more_rejected: nack.has_more,
        };
        self.confirmed(stream, &nack.keyring, &confirmation);
    }

    /// Notes that a sidecar has erased its data of a keyring.
    pub(crate) fn dropped(&self, stream: &OpenStream, keyring: &KeyringName) {
        self.lock().dropped(&stream.run, stream.number, keyring);
        self.wake();
    }

    /// Returns the runs of a node that may serve and are not connected: all of them, or the one
    /// with `run_id`.
    ///
    /// # Errors
    ///
    /// When no such run may serve, or all such runs are connected.
    pub(crate) fn lost_runs(
        &self,
        node: &str,
        run_id: Option<&str>,
    ) -> Result<Vec<RunKey>, ForgetError> {
        let serving = self.passed();
        let of_node = serving.runs().filter(|(key, _)| key.node == node);
        let mut of_node = of_node
            .filter(|(key, _)| run_id.is_none_or(|run_id| key.run_id == run_id))
            .peekable();
        if of_node.peek().is_none() {
            return Err(ForgetError::Unknown);
        }
        let lost = of_node.filter(|(_, run)| !run.is_connected());
        let lost: Vec<RunKey> = lost.map(|(key, _)| key.clone()).collect();
        if lost.is_empty() {
            return Err(ForgetError::Connected);
        }
        Ok(lost)
    }

    /// Notes the statement of an operator that `runs` do not serve any more. Returns the runs that
    /// are forgotten: a run that has gone meanwhile is not.
    ///
    /// # Errors
    ///
    /// When one of them is connected.
    pub(crate) fn forget(&self, runs: &[RunKey]) -> Result<Vec<RunKey>, ForgetError> {
        let now = self.now();
        let mut forgotten = Vec::new();
        {
            let mut serving = self.passed();
            let is_connected = |key| serving.run(key).is_some_and(Run::is_connected);
            if runs.iter().any(is_connected) {
                return Err(ForgetError::Connected);
            }
            for key in runs {
                if serving.forget(key, now).is_ok() {
                    forgotten.push(key.clone());
                }
            }
        }
        self.wake();
        Ok(forgotten)
    }

    /// Returns every sidecar that may serve.
    #[must_use]
    pub fn members(&self) -> Vec<(RunKey, Run)> {
        let serving = self.passed();
        let runs = serving.runs();
        runs.map(|(key, run)| (key.clone(), run.clone())).collect()
    }

    /// Returns the sidecars that have gone without their last report, of one keyring or of all.
    #[must_use]
    pub(crate) fn gaps(&self, keyring: Option<&KeyringName>) -> Vec<(RunKey, Gap)> {
        let serving = self.passed();
        let gaps = serving.gaps();
        gaps.filter(|(_, gap)| keyring.is_none_or(|name| gap.keyrings.contains(name)))
            .map(|(key, gap)| (key.clone(), gap.clone()))
            .collect()
    }

    /// Returns how completely the sidecars of a keyring have reported uses; `at` is the time by
    /// which planned ends come.
    #[must_use]
    pub fn coverage(&self, keyring: &KeyringName, at: Timestamp) -> Coverage {
        let now = self.now();
        self.passed().coverage(keyring, at, now)
    }

    /// Returns the sidecars that may serve a keyring and have not reported every use before
    /// `since`.
    #[must_use]
    pub(crate) fn late(&self, keyring: &KeyringName, since: Timestamp) -> Vec<LateReporter> {
        let serving = self.passed();
        let late = serving.runs().filter(|(_, run)| {
            run.keyrings.contains_key(keyring) && run.complete_until < Some(since)
        });
        late.map(|(key, run)| LateReporter::of(key, run)).collect()
    }

    /// Returns the condition of each sidecar of a keyring whose newest revision is `head`, and of
    /// each gap.
    #[must_use]
    pub(crate) fn conditions(
        &self,
        keyring: &KeyringName,
        epoch: Epoch,
        head: Revision,
    ) -> Vec<Condition> {
        let serving = self.passed();
        let runs = serving.runs().filter_map(|(_, run)| {
            let holding = run.keyrings.get(keyring)?;
            Some(Condition::of(run, holding, epoch, head))
        });
        let gone = serving.gaps();
        let gone = gone.filter(|(_, gap)| gap.keyrings.contains(keyring));
        runs.chain(gone.map(|_| Condition::Gap)).collect()
    }

    /// Returns how many sidecars that may serve a keyring have reached a target, and how many there
    /// are: a [`barrier`](Self::barrier) without names.
    #[must_use]
    pub(crate) fn reached(
        &self,
        keyring: &KeyringName,
        epoch: Epoch,
        target: Target,
        without: &BTreeSet<RunKey>,
    ) -> (usize, usize) {
        let now = self.now();
        self.lock().reached(keyring, epoch, target, without, now)
    }

    /// Returns how far the sidecars that may serve a keyring are from a target; those in `without`
    /// are passed by.
    #[must_use]
    pub(crate) fn barrier(
        &self,
        keyring: &KeyringName,
        epoch: Epoch,
        target: Target,
        without: &BTreeSet<RunKey>,
    ) -> Barrier {
        let now = self.now();
        self.passed().barrier(keyring, epoch, target, without, now)
    }

    /// Writes to the store which sidecars may serve, for how long, and which have gone; deletes
    /// those that are gone for good, and returns them.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; the next call tries again.
    pub(crate) async fn record(&self, store: &dyn Store) -> Result<Vec<RunKey>, StoreError> {
        let mut gaps_written = self.recording.lock().await;
        let now = self.now();
        let with_gaps = gaps_written.is_none_or(|at| now.boot.saturating_since(at) >= GAPS_EVERY);
        self.passed().write_down(with_gaps);
        let removed = self.write(store).await?;
        if with_gaps {
            *gaps_written = Some(now.boot);
        }
        Ok(removed)
    }

    /// Writes the changes before it returns. If many sidecars come or go at once, one call writes
    /// the changes of all that have come meanwhile. Returns the deleted runs.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; the next call tries again.
    pub(crate) async fn record_news(&self, store: &dyn Store) -> Result<Vec<RunKey>, StoreError> {
        let _turn = self.recording.lock().await;
        self.write(store).await
    }

    async fn write(&self, store: &dyn Store) -> Result<Vec<RunKey>, StoreError> {
        let now = self.now();
        let unsaved = self.lock().unsaved(now);
        if !unsaved.rows.is_empty() {
            let rows = unsaved.rows.iter().cloned().map(presence_of_row);
            store.save_presence(rows.collect()).await?;
        }
        if !unsaved.removed.is_empty() {
            let keys = unsaved.removed.iter().cloned().map(Into::into);
            store.remove_presence(keys.collect()).await?;
        }
        self.lock().saved(&unsaved, now);
        Ok(unsaved.removed)
    }

    fn confirmed(&self, stream: &OpenStream, keyring: &str, confirmation: &Confirmation) {
        let now = self.now();
        if let Ok(name) = keyring.parse() {
            let OpenStream { run, number, .. } = stream;
            self.lock()
                .confirmed(run, *number, &name, confirmation, now);
        }
        self.wake();
    }

    fn wake(&self) {
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Returns the book without the sidecars whose bound has passed.
    fn passed(&self) -> MutexGuard<'_, Serving> {
        let now = self.now();
        let mut serving = self.lock();
        serving.pass(now);
        serving
    }

    fn now(&self) -> Now {
        now(&self.clock)
    }

    fn lock(&self) -> MutexGuard<'_, Serving> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now(clock: &Clock) -> Now {
    Now {
        boot: clock.boot(),
        wall: clock.wall(),
    }
}

#[cfg(test)]
mod tests;
