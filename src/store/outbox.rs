//! Deliveries of events to webhooks, and the revision up to which each log was turned into
//! deliveries.

use std::fmt;

use crate::key::{KeyringName, Revision, Timestamp};

/// A delivery to be created: one event for one webhook.
#[derive(Clone, PartialEq, Eq)]
pub struct NewDelivery {
    /// The id of the webhook.
    pub webhook: String,
    /// The id of the event. A webhook gets an event only once, even if the event is projected
    /// again.
    pub event: String,
    /// The keyring of the webhook and of the event.
    pub keyring: KeyringName,
    /// The revision of the change that the event reports.
    pub revision: Revision,
    /// The kind of the event, for lists and counts.
    pub kind: String,
    /// The body of the request, in JSON.
    pub body: String,
    /// The time at which the delivery was decided; the first attempt is due then.
    pub created_at: Timestamp,
}

/// A delivery and its progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The event, and the webhook to deliver it to.
    pub what: NewDelivery,
    /// The progress of the delivery.
    pub state: DeliveryState,
    /// The number of claims, the present claim included.
    pub attempts: u32,
    /// The time from which the delivery may be claimed again; without meaning once the delivery is
    /// complete.
    pub next_attempt_at: Timestamp,
    /// The time at which the last attempt ended, or the delivery was given up; none before.
    pub settled_at: Option<Timestamp>,
    /// The HTTP status of the last answer; none if there was no answer.
    pub last_status: Option<u16>,
    /// The error of the last attempt, or the reason for giving up; none before, or if it succeeded.
    pub last_error: Option<String>,
}

/// The progress of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryState {
    /// An attempt is due later, due now or in progress.
    Waiting,
    /// The webhook accepted the event.
    Delivered,
    /// The webhook did not accept the event, and there are no more attempts.
    GivenUp,
}

/// The result of a claimed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settlement {
    /// The id of the webhook.
    pub webhook: String,
    /// The id of the event.
    pub event: String,
    /// [`Delivery::attempts`] as the claim returned it.
    pub attempts: u32,
    /// The time at which the attempt ended.
    pub at: Timestamp,
    /// The consequence of the result.
    pub state: Settled,
    /// The HTTP status of the answer; none if there was no answer.
    pub status: Option<u16>,
    /// The error; none if the attempt succeeded.
    pub error: Option<String>,
}

/// The consequence of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The delivery is complete: the webhook accepted the event.
    Delivered,
    /// Another attempt is due at this time.
    Retry(Timestamp),
    /// The delivery is complete: there are no more attempts.
    GivenUp,
}

/// The deliveries that stay in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Delivered ones that were settled before this time are deleted.
    pub delivered_since: Timestamp,
    /// Given-up ones that were settled before this time are deleted.
    pub given_up_since: Timestamp,
    /// The maximum number of complete deliveries for each webhook; the oldest are deleted first.
    pub max_over: usize,
    /// The maximum number of waiting deliveries for each webhook; the oldest are given up first.
    pub max_waiting: usize,
}

impl DeliveryState {
    /// Returns the name of the state in the store, in JSON and in tables.
    #[must_use]
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Delivered => "delivered",
            Self::GivenUp => "given_up",
        }
    }
}

impl Settled {
    /// Returns the state of the delivery after the attempt.
    #[must_use]
    pub(crate) const fn state(self) -> DeliveryState {
        match self {
            Self::Delivered => DeliveryState::Delivered,
            Self::Retry(_) => DeliveryState::Waiting,
            Self::GivenUp => DeliveryState::GivenUp,
        }
    }
}

impl fmt::Debug for NewDelivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewDelivery")
            .field("webhook", &self.webhook)
            .field("event", &self.event)
            .field("keyring", &self.keyring)
            .field("revision", &self.revision)
            .field("kind", &self.kind)
            .field("body_len", &self.body.len())
            .field("created_at", &self.created_at)
            .finish()
    }
}
