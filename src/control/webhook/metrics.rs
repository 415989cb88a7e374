//! The metrics of the courier.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::store::Settled;

/// The instruments of deliveries; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct WebhookMetrics {
    deliveries: Family<[(&'static str, String); 2], Counter>,
}

impl WebhookMetrics {
    /// Registers the instruments.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "relatch_webhook_deliveries",
            "Number of attempts to deliver an event to a webhook by outcome, and of deliveries that were given up without an attempt",
            metrics.deliveries.clone(),
        );
        metrics
    }

    /// Counts an attempt, or a delivery that is given up without one. `event` is the name of its kind.
    pub(crate) fn count(&self, event: &str, settled: Settled) {
        let outcome = match settled {
            Settled::Delivered => "delivered",
            Settled::Retry(_) => "retried",
            Settled::GivenUp => "given_up",
        };
        self.deliveries
            .get_or_create(&[("event", event.to_owned()), ("outcome", outcome.to_owned())])
            .inc();
    }
}
