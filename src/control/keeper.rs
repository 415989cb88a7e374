//! Saves the states of keyrings, which makes starts quick. Drops what is not needed any more:
//! snapshots that no stream has requested lately, and the secrets of old answers.

use std::{sync::Arc, time::Duration};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{calls::Calls, catalog::Catalog};

/// The keeper of all keyrings. Saving a large one takes time, but nothing else waits for it.
#[derive(Debug)]
pub(crate) struct Keeper {
    catalog: Arc<Catalog>,
    calls: Arc<Calls>,
}

/// How often the keeper looks for changes. A snapshot is kept for at least this long after it was
/// last requested.
const EVERY: Duration = Duration::from_secs(1);

impl Keeper {
    /// Returns a keeper of the catalog's keyrings, and of answers.
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
                    // The store may have another history, in which a state of this one has no
                    // place.
                    continue;
                }
                let saved = tokio::select! {
                    saved = served.journal().save_if_due() => saved,
                    // A state that is partly saved is left; the next start reads the log instead.
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
