//! Webhooks: what is committed to a keyring's log, told to those who asked for it.
//!
//! The way of an event: the [`projector`] walks each log and makes of a change that is an [`event`] one delivery for
//! each webhook that wants it, in the store, together with moving the log's cursor. The [`courier`] claims deliveries
//! that are due, [signs](signature) them and sends them; [`delivery`] says what follows from the answer. An event thus
//! arrives at least once, under the same id, or is given up for everybody to see.

pub(crate) mod courier;
pub(crate) mod delivery;
pub(crate) mod event;
pub mod metrics;
pub(crate) mod projector;
pub(crate) mod signature;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use self::{
    courier::{Courier, Flights},
    event::Event,
    metrics::WebhookMetrics,
    projector::Projector,
    signature::SigningSecret,
};
use super::catalog::Catalog;
use crate::{
    key::{EventKind, KeyringName, MasterPepper, Refusal, Webhook, WebhookId},
    outbound::{Limits, Outbound, SetupError},
    shutdown::unless_left_behind,
    store::{Delivery, Settled, StoreError},
    wire::backoff,
};

/// The webhooks of a control plane.
#[derive(Debug)]
pub struct Webhooks {
    catalog: Arc<Catalog>,
    courier: Arc<Courier>,
    pepper: MasterPepper,
    metrics: WebhookMetrics,
    options: Options,
}

/// What tests choose differently.
#[derive(Clone, Copy, Debug)]
struct Options {
    /// How long an endpoint has.
    limits: Limits,
    /// How often it is looked for deliveries that are due.
    every: Duration,
    /// Draws the jitter.
    random: fn() -> u32,
}

/// How a try of a webhook ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestResult {
    /// The HTTP status of the answer; none where there was no answer.
    pub status: Option<u16>,
    /// What went wrong; none when the endpoint took the event.
    pub(crate) error: Option<String>,
}

/// What is asked of a webhook cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// It does not exist.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How long the store keeps deliveries that are over is looked after so often: they are few.
const PRUNE_EVERY: Duration = Duration::from_mins(10);
/// The most deliveries that are listed at once: as many as are kept.
pub(crate) const MAX_LISTED: usize = courier::MAX_OVER;

impl Default for Options {
    /// An endpoint has 15 s in all, as Standard Webhooks advises, and 5 s of these to be connected to. A second is as
    /// long as an event may wait for its first attempt when another replica committed it.
    fn default() -> Self {
        Self {
            limits: Limits {
                connect: Duration::from_secs(5),
                total: Duration::from_secs(15),
            },
            every: Duration::from_secs(1),
            random: backoff::random,
        }
    }
}

impl Webhooks {
    /// The webhooks of the catalog's keyrings. Their signing secrets are derived from `pepper`.
    ///
    /// # Errors
    ///
    /// When no HTTP client can be made.
    pub fn new(
        catalog: Arc<Catalog>,
        pepper: MasterPepper,
        metrics: WebhookMetrics,
    ) -> Result<Self, SetupError> {
        Self::with_options(catalog, pepper, metrics, Options::default())
    }

    fn with_options(
        catalog: Arc<Catalog>,
        pepper: MasterPepper,
        metrics: WebhookMetrics,
        options: Options,
    ) -> Result<Self, SetupError> {
        let courier = Courier {
            catalog: Arc::clone(&catalog),
            outbound: Outbound::guarded(options.limits)?,
            pepper: pepper.clone(),
            metrics: metrics.clone(),
            random: options.random,
        };
        Ok(Self {
            catalog,
            courier: Arc::new(courier),
            pepper,
            metrics,
            options,
        })
    }

    /// Tells of events until `shutdown`; then waits a moment for what is under way. What is not answered by then is sent
    /// again by whoever starts next.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let clock = self.catalog.clock();
        let mut changes = self.catalog.watch();
        let mut projector = Projector::new(Arc::clone(&self.catalog));
        let mut flights = Flights::default();
        let mut pruned = None;
        let mut ticks = tokio::time::interval(self.options.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let follow = tokio::select! {
                () = shutdown.cancelled() => break,
                _ = ticks.tick() => true,
                Ok(()) = changes.changed() => true,
                () = flights.landed() => false,
            };
            if follow {
                projector.follow().await;
            }
            self.courier.send_due(&mut flights).await;
            let now = clock.boot();
            let since = |last| now.saturating_since(last);
            if pruned.is_none_or(|last| since(last) >= PRUNE_EVERY) {
                pruned = Some(now);
                self.courier.prune().await;
            }
        }
        unless_left_behind("webhooks", shutdown, flights.all_landed()).await;
    }

    /// The secret that a webhook's requests are signed with, for its receiver.
    #[must_use]
    pub fn secret(&self, webhook: WebhookId) -> SigningSecret {
        SigningSecret::of(&self.pepper, webhook)
    }

    /// Sends a `webhook.test` now, once, and waits for the answer. Nothing is kept of it.
    ///
    /// # Errors
    ///
    /// When there is no such webhook.
    pub async fn test(
        &self,
        keyring: &KeyringName,
        webhook: WebhookId,
    ) -> Result<TestResult, WebhookError> {
        let (webhook, event) = {
            let served = self.catalog.get(keyring)?;
            let state = served.journal().state();
            let found = find(state.keyring.webhooks().get(&webhook), webhook)?;
            let now = self.catalog.clock().wall();
            (found, Event::test(&state.keyring, webhook, now))
        };
        let outcome = self
            .courier
            .post(&webhook, &event.id, event.to_json())
            .await;
        let settled = match outcome.error() {
            None => Settled::Delivered,
            Some(_) => Settled::GivenUp,
        };
        self.metrics.count(EventKind::WebhookTest.as_str(), settled);
        Ok(TestResult {
            status: outcome.status().map(|status| status.as_u16()),
            error: outcome.error(),
        })
    }

    /// The deliveries to a webhook that are kept, the newest first, at most `limit` and [`MAX_LISTED`]. Those of a
    /// webhook that was removed are listed too.
    ///
    /// # Errors
    ///
    /// When there is no such keyring, or the store cannot be read.
    pub(crate) async fn deliveries(
        &self,
        keyring: &KeyringName,
        webhook: WebhookId,
        limit: usize,
    ) -> Result<Vec<Delivery>, WebhookError> {
        self.catalog.get(keyring)?;
        let limit = limit.min(MAX_LISTED);
        let store = self.catalog.store();
        Ok(store.deliveries(keyring, webhook.as_str(), limit).await?)
    }
}

fn find(found: Option<&Webhook>, id: WebhookId) -> Result<Webhook, Refusal> {
    found.cloned().ok_or_else(|| Refusal::NotFound {
        what: "webhook",
        name: id.to_string(),
    })
}
