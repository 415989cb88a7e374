//! The work of a control plane that no call starts: it follows the store, commits changes that are
//! due, and writes the states of the sidecars to the store.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    catalog::Catalog, fleet::Fleet, journal::LogError, pace::Pace, served::ServedKeyring,
    token::Tokens, usage::UsageBook,
};
use crate::key::{KeyringName, VersionRef, rotation};

/// The background work of a control plane.
#[derive(Debug)]
pub(crate) struct Reconciler {
    catalog: Arc<Catalog>,
    tokens: Arc<Tokens>,
    fleet: Arc<Fleet>,
    usage: Arc<UsageBook>,
    pace: Arc<Pace>,
    /// The number of complete rounds.
    rounds: watch::Sender<u64>,
    /// The versions that were staged when this process started: the processes that staged them have
    /// ended.
    left_behind: BTreeMap<KeyringName, Vec<VersionRef>>,
}

/// The interval at which the store is read when no sidecar asks: after it, a commit of another
/// process is visible.
const EVERY: Duration = Duration::from_secs(1);
/// The states of the sidecars are written once in this number of rounds.
const BOOK_ROUNDS: u32 = 10;
/// The most changes of one commit: many changes that are due after a long stop do not block a
/// keyring.
const MAX_CHANGES: usize = 256;
/// The actor in the audit log.
const ACTOR: &str = "reconciler";

impl Reconciler {
    /// Creates a reconciler of everything that a control plane owns. To be created before that
    /// control plane stages anything.
    #[must_use]
    pub(crate) fn new(
        catalog: Arc<Catalog>,
        tokens: Arc<Tokens>,
        fleet: Arc<Fleet>,
        usage: Arc<UsageBook>,
        pace: Arc<Pace>,
    ) -> Self {
        let staged = |served: &Arc<ServedKeyring>| {
            let state = served.journal().state();
            let staged = rotation::staged(&state.keyring).collect();
            (served.name().clone(), staged)
        };
        Self {
            left_behind: catalog.list().iter().map(staged).collect(),
            catalog,
            tokens,
            fleet,
            usage,
            pace,
            rounds: watch::Sender::new(0),
        }
    }

    /// Returns the number of complete rounds. In each of them the store was read, and the changes
    /// due at that time were committed, at most 256 for each keyring. A commit that fails is
    /// logged, and the next round tries again.
    #[must_use]
    pub(crate) fn rounds(&self) -> watch::Receiver<u64> {
        self.rounds.subscribe()
    }

    /// Runs until `shutdown`. A failure is logged, and the next round tries again.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for round in (1..=BOOK_ROUNDS).cycle() {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => break,
            }
            if let Err(error) = self.follow().await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the store cannot be read; sidecars receive no confirmations until it can be read again"
                );
                continue;
            }
            let started = self.catalog.clock().system_time();
            let work = self.catalog.tracer().round("relatch.reconciler", started);
            work.carry(self.commit_due()).await;
            drop(work);
            self.forget_callers();
            self.rounds.send_modify(|rounds| *rounds += 1);
            if round == BOOK_ROUNDS {
                self.keep_book().await;
            }
        }
        // The next process waits for the sidecars that this process served last.
        self.keep_book().await;
    }

    /// Reads the tokens and the keyrings. A failed read of the tokens does not prevent the read of
    /// the keyrings.
    async fn follow(&self) -> Result<(), LogError> {
        let tokens = self.tokens.refresh().await;
        self.catalog.refresh().await?;
        tokens
    }

    async fn commit_due(&self) {
        for served in self.catalog.list() {
            let committed = self
                .catalog
                .commit(&served, ACTOR, |keyring, now| {
                    let left_behind = self.left_behind.get(served.name());
                    let left_behind = left_behind.map_or(&[][..], Vec::as_slice);
                    let settled = rotation::settle_left_behind(keyring, left_behind, MAX_CHANGES);
                    if !settled.is_empty() {
                        let count = settled.len();
                        return Ok((settled, count));
                    }
                    let now = now.min(self.pace.now());
                    let evidence = self.usage.evidence(keyring, &self.fleet, now);
                    let changes = rotation::plan(keyring, &evidence, now, MAX_CHANGES);
                    let count = changes.len();
                    Ok((changes, count))
                })
                .await;
            match committed {
                Ok(committed) if committed.value > 0 => tracing::info!(
                    auth.keyring = %served.name(),
                    auth.keyring.revision = committed.revision.get(),
                    changes = committed.value,
                    "changes that were due are committed"
                ),
                Ok(_) => {}
                Err(error) => tracing::error!(
                    auth.keyring = %served.name(),
                    error = &error as &dyn std::error::Error,
                    "changes that are due could not be committed"
                ),
            }
        }
    }

    async fn keep_book(&self) {
        match self.fleet.record(&**self.catalog.store()).await {
            Ok(gone) => gone
                .iter()
                .for_each(|member| self.usage.end(&member.run_id)),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the states of sidecars could not be written to the store"
            ),
        }
    }

    fn forget_callers(&self) {
        let now = self.pace.now();
        for served in self.catalog.list() {
            let state = served.journal().state();
            self.usage.forget_past_callers(&state.keyring, now);
        }
    }
}
