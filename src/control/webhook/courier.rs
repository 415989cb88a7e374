//! Sends events to their endpoints.

use std::{error::Error, fmt, panic, sync::Arc, time::Duration};

use http::{HeaderValue, Method, header::CONTENT_TYPE};
use tokio::task::{JoinError, JoinSet};

use super::{delivery::DeliveryOutcome, event, metrics::WebhookMetrics, signature::SigningSecret};
use crate::{
    control::catalog::Catalog,
    key::{MasterPepper, Timestamp, Webhook, WebhookId},
    outbound::{Outbound, OutboundUrl, Request},
    store::{Delivery, NewDelivery, Retention, Settled},
};

/// Sends deliveries and records their results.
#[derive(Debug)]
pub(crate) struct Courier {
    pub(super) catalog: Arc<Catalog>,
    pub(super) outbound: Outbound,
    pub(super) pepper: MasterPepper,
    pub(super) metrics: WebhookMetrics,
    /// Draws the jitter.
    pub(super) random: fn() -> u32,
}

/// The deliveries in progress in this process, one for each webhook. Dropping this cancels them.
#[derive(Default)]
pub(crate) struct Flights(JoinSet<()>);

/// The most webhooks that receive events at the same time: when this many endpoints do not answer,
/// the next one waits for one deadline.
const MAX_FLIGHTS: usize = 64;
/// How long a claim is valid: several times the longest attempt, so that it expires only after its
/// process has ended.
const CLAIM: Duration = Duration::from_mins(1);
/// How long a delivered event is listed.
const DELIVERED_FOR: Duration = Duration::from_hours(7 * 24);
/// How long a delivery that was given up is listed: a month, so that an operator sees it.
const GIVEN_UP_FOR: Duration = Duration::from_hours(30 * 24);
/// The most deliveries of a webhook that are listed when they are over.
pub(crate) const MAX_OVER: usize = 1_000;
/// The most deliveries that wait for one endpoint: many days of rotations.
const MAX_WAITING: usize = 10_000;

impl Courier {
    /// Sends due deliveries, as far as there is room. Each is claimed by this process for
    /// [`CLAIM`].
    pub(crate) async fn send_due(self: &Arc<Self>, flights: &mut Flights) {
        let room = MAX_FLIGHTS - flights.0.len().min(MAX_FLIGHTS);
        if room == 0 {
            return;
        }
        let now = self.catalog.clock().wall();
        let until = now.saturating_add(CLAIM);
        match self
            .catalog
            .store()
            .claim_deliveries(now, until, room)
            .await
        {
            Ok(claimed) => {
                for delivery in claimed {
                    let courier = Arc::clone(self);
                    flights
                        .0
                        .spawn(async move { courier.deliver(delivery).await });
                }
            }
            Err(error) => tracing::error!(
                error = &error as &dyn Error,
                "events are not delivered to webhooks, because the store cannot be used; the control plane retries"
            ),
        }
    }

    /// Sends one event to one webhook.
    pub(super) async fn post(&self, webhook: &Webhook, id: &str, body: String) -> DeliveryOutcome {
        let url = match OutboundUrl::parse(&webhook.url) {
            Ok(url) => url,
            Err(error) => return DeliveryOutcome::Unusable(error),
        };
        let now = self.catalog.clock().wall();
        let secret = SigningSecret::of(&self.pepper, webhook.id);
        let mut headers = secret.headers(id, now, body.as_bytes());
        let content_type = HeaderValue::from_static(event::CONTENT_TYPE);
        headers.insert(CONTENT_TYPE, content_type);
        let request = Request {
            method: Method::POST,
            url,
            headers,
            body: body.into(),
            allow_private: webhook.allow_private,
        };
        match self.outbound.send(request).await {
            Ok(answer) => {
                let now = self.catalog.clock().wall();
                DeliveryOutcome::answered(answer.status, &answer.headers, now)
            }
            Err(error) => DeliveryOutcome::Failed(error),
        }
    }

    /// Deletes deliveries that were listed for long enough, and gives up waiting deliveries beyond
    /// the limit.
    pub(super) async fn prune(&self) {
        let now = self.catalog.clock().wall();
        let retention = Retention {
            delivered_since: earlier(now, DELIVERED_FOR),
            given_up_since: earlier(now, GIVEN_UP_FOR),
            max_over: MAX_OVER,
            max_waiting: MAX_WAITING,
        };
        match self.catalog.store().prune_deliveries(now, retention).await {
            Ok(given_up) => {
                for delivery in given_up {
                    let error = delivery.last_error.as_deref().unwrap_or_default();
                    self.tell(&delivery, Settled::GivenUp, error);
                }
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn Error,
                "old deliveries to webhooks cannot be deleted from the store; the control plane retries"
            ),
        }
    }

    async fn deliver(&self, delivery: Delivery) {
        let outcome = match self.webhook_of(&delivery.what) {
            Ok(webhook) => {
                let NewDelivery { event, body, .. } = &delivery.what;
                self.post(&webhook, event, body.clone()).await
            }
            Err(outcome) => outcome,
        };
        let now = self.catalog.clock().wall();
        let settlement = outcome.settle(&delivery, now, (self.random)());
        let (settled, error) = (settlement.state, outcome.error().unwrap_or_default());
        match self.catalog.store().settle_delivery(settlement).await {
            Ok(true) => self.tell(&delivery, settled, &error),
            // The process that has claimed it since reports the result.
            Ok(false) => {}
            Err(error) => tracing::error!(
                error = &error as &dyn Error,
                webhook = delivery.what.webhook,
                event = delivery.what.event,
                "the result of a delivery to a webhook cannot be recorded; the event will be sent once more"
            ),
        }
    }

    /// Returns the current webhook of a delivery.
    fn webhook_of(&self, what: &NewDelivery) -> Result<Webhook, DeliveryOutcome> {
        let served = self
            .catalog
            .get(&what.keyring)
            .map_err(|_| DeliveryOutcome::Behind)?;
        let state = served.journal().state();
        // The webhook existed when the delivery was created, at this revision or a later one.
        if state.keyring.revision() < what.revision {
            return Err(DeliveryOutcome::Behind);
        }
        let id: WebhookId = what.webhook.parse().map_err(|_| DeliveryOutcome::Removed)?;
        let found = state.keyring.webhooks().get(&id);
        found.cloned().ok_or(DeliveryOutcome::Removed)
    }

    fn tell(&self, delivery: &Delivery, settled: Settled, error: &str) {
        let Delivery { what, attempts, .. } = delivery;
        self.metrics.count(&what.kind, settled);
        let NewDelivery {
            webhook,
            event,
            kind,
            keyring,
            ..
        } = what;
        match settled {
            Settled::Delivered => tracing::debug!(
                auth.keyring = %keyring, webhook, event, kind, attempts, "an event was delivered to a webhook"
            ),
            Settled::Retry(next) => tracing::info!(
                auth.keyring = %keyring, webhook, event, kind, attempts, error, %next,
                "an event could not be delivered to a webhook; the control plane retries"
            ),
            Settled::GivenUp => tracing::warn!(
                auth.keyring = %keyring, webhook, event, kind, attempts, error,
                "the delivery of an event was given up: the webhook will not receive it"
            ),
        }
    }
}

impl Flights {
    /// Waits until one delivery is over; forever when there is none. Cancellation safe.
    pub(crate) async fn landed(&mut self) {
        match self.0.join_next().await {
            Some(landed) => rethrow(landed),
            None => std::future::pending().await,
        }
    }

    /// Waits until all deliveries are over.
    pub(crate) async fn all_landed(&mut self) {
        while let Some(landed) = self.0.join_next().await {
            rethrow(landed);
        }
    }
}

impl fmt::Debug for Flights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Flights").field(&self.0.len()).finish()
    }
}

/// Passes the panic of a task on to its owner.
fn rethrow(landed: Result<(), JoinError>) {
    if let Err(error) = landed
        && let Ok(panic) = error.try_into_panic()
    {
        panic::resume_unwind(panic);
    }
}

fn earlier(now: Timestamp, by: Duration) -> Timestamp {
    let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
    Timestamp::from_millis(now.as_millis().saturating_sub(by))
}
