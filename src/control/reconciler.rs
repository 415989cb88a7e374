//! What a control plane does without being asked: follow the store, commit what time makes due, keep the fleet's book.

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
    /// Counts its rounds.
    rounds: watch::Sender<u64>,
    /// What was being staged when this process started, by processes that are gone.
    left_behind: BTreeMap<KeyringName, Vec<VersionRef>>,
}

/// How often the store is read where no sidecar asks: a commit of another process is seen by then.
const EVERY: Duration = Duration::from_secs(1);
/// Every so many rounds the fleet's book is written.
const BOOK_ROUNDS: u32 = 10;
/// The most changes of one commit, so that what is due after a long stop does not hold a keyring up.
const MAX_CHANGES: usize = 256;
/// As the audit log names it.
const ACTOR: &str = "reconciler";

impl Reconciler {
    /// A reconciler of everything that a control plane owns, made before that control plane stages anything.
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

    /// Counts the rounds that are over, in each of which the store was read and what was due by then was committed.
    #[must_use]
    pub(crate) fn rounds(&self) -> watch::Receiver<u64> {
        self.rounds.subscribe()
    }

    /// Runs until `shutdown`. A failure is logged and tried again in the next round.
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
        // Whoever starts next waits for the sidecars that were here last.
        self.keep_book().await;
    }

    /// Keyrings are read whether the tokens can be or not.
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
