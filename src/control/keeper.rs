//! Keeps what makes starts and streams quick: saves the states of keyrings. Drops what is not needed any more: snapshots that
//! nobody asks for, and the secrets of answers that are old.

use std::{sync::Arc, time::Duration};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{calls::Calls, catalog::Catalog};

/// The keeper of all keyrings. To save a large one takes its time, for which nothing else waits.
#[derive(Debug)]
pub(crate) struct Keeper {
    catalog: Arc<Catalog>,
    calls: Arc<Calls>,
}

/// How often it is looked what has changed. A snapshot is kept for this long at least after it was asked for last.
const EVERY: Duration = Duration::from_secs(1);

impl Keeper {
    /// A keeper of the catalog's keyrings, and of answers.
    #[must_use]
    pub(crate) const fn new(catalog: Arc<Catalog>, calls: Arc<Calls>) -> Self {
        Self { catalog, calls }
    }

    /// Runs until `shutdown`. A failure is logged and tried again in the next round.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => return,
            }
            self.calls.forget();
            for served in self.catalog.list() {
                served.drop_idle_snapshot();
                if !served.is_current() {
                    // The store may have another history, and takes no state of this one.
                    continue;
                }
                let saved = tokio::select! {
                    saved = served.journal().save_if_due() => saved,
                    // What is half saved is left; the next start reads the log instead.
                    () = shutdown.cancelled() => return,
                };
                if let Err(error) = saved {
                    tracing::warn!(
                        auth.keyring = %served.name(),
                        error = &error as &dyn std::error::Error,
                        "the state of the keyring could not be saved; the next start reads more of its log"
                    );
                }
            }
        }
    }
}
