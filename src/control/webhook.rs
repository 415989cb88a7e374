//! Webhooks: the endpoints that receive events about the changes in a keyring's log.
//!
//! The way of an event: the [`projector`] reads each log. For a change that is an [`event`], it
//! stores one delivery for each webhook that wants it, and moves the log's cursor in the same
//! transaction. The [`courier`] claims due deliveries, [signs](signature) them and sends them;
//! [`delivery`] decides what follows from the answer. An event thus arrives at least once, under
//! the same id, or its delivery is given up, which operators can see.

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
    key::{EventKind, KeyringName, MasterPepper, OperationRefusal, Webhook, WebhookId},
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

/// The options that tests change.
#[derive(Clone, Copy, Debug)]
struct Options {
    /// How long an endpoint may take.
    limits: Limits,
    /// The interval at which due deliveries are looked for.
    every: Duration,
    /// Draws the jitter.
    random: fn() -> u32,
}

/// The result of a test of a webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestResult {
    /// The HTTP status of the answer; none when no answer arrived.
    pub status: Option<u16>,
    /// The error; none when the endpoint accepted the event.
    pub(crate) error: Option<String>,
}

/// The reasons why a request about a webhook fails.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The keyring or the webhook does not exist.
    #[error(transparent)]
    Refused(#[from] OperationRefusal),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The interval at which old deliveries are deleted: they are few.
const PRUNE_EVERY: Duration = Duration::from_mins(10);
/// The most deliveries in one list: as many as are kept when they are over.
pub(crate) const MAX_LISTED: usize = courier::MAX_OVER;

impl Default for Options {
    /// An endpoint has 15 s in all, as Standard Webhooks advises, and 5 s of these for the
    /// connection. An event that another replica committed waits at most a second for its first
    /// attempt.
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
    /// Creates the webhooks of the catalog's keyrings, whose signing secrets are derived from
    /// `pepper`.
    ///
    /// # Errors
    ///
    /// When the HTTP client cannot be created.
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

    /// Sends events until `shutdown`, and then waits a moment for the requests in progress. The
    /// process that starts next repeats those without an answer.
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

    /// Returns the secret that signs a webhook's requests, for its receiver.
    #[must_use]
    pub fn secret(&self, webhook: WebhookId) -> SigningSecret {
        SigningSecret::of(&self.pepper, webhook)
    }

    /// Sends one `webhook.test` immediately, and waits for the answer. Nothing is stored.
    ///
    /// # Errors
    ///
    /// When the keyring or the webhook does not exist.
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

    /// Returns the stored deliveries to a webhook, the newest first, at most `limit` and at most
    /// [`MAX_LISTED`]. The list includes those of a removed webhook.
    ///
    /// # Errors
    ///
    /// When the keyring does not exist, or the store cannot be read.
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

fn find(found: Option<&Webhook>, id: WebhookId) -> Result<Webhook, OperationRefusal> {
    found.cloned().ok_or_else(|| OperationRefusal::NotFound {
        what: "webhook",
        name: id.to_string(),
    })
}
