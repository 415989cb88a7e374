//! What is to be told to webhooks: deliveries, and how far each log was turned into them.

use std::fmt;

use crate::key::{KeyringName, Revision, Timestamp};

/// A delivery to be made: one event for one webhook.
#[derive(Clone, PartialEq, Eq)]
pub struct NewDelivery {
    /// The webhook.
    pub webhook: String,
    /// The event's id. A webhook gets an event once, however often it is projected.
    pub event: String,
    /// The keyring that both belong to.
    pub keyring: KeyringName,
    /// The change that the event tells of.
    pub revision: Revision,
    /// The event's kind, for those who list and count.
    pub kind: String,
    /// What is sent.
    pub body: String,
    /// When it was decided to make it; the first attempt is due then.
    pub created_at: Timestamp,
}

/// A delivery, with what became of it so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// What is to be delivered, and where.
    pub what: NewDelivery,
    /// Whether it is over.
    pub state: DeliveryState,
    /// How often it was claimed, the present claim included.
    pub attempts: u32,
    /// When it may be claimed next; of no meaning once it is over.
    pub next_attempt_at: Timestamp,
    /// When the last attempt ended, or it was given up; none before.
    pub settled_at: Option<Timestamp>,
    /// The HTTP status of the last answer; none where there was no answer.
    pub last_status: Option<u16>,
    /// Why the last attempt failed; none when it did not.
    pub last_error: Option<String>,
}

/// How far a delivery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryState {
    /// It is to be made, or is being made.
    Waiting,
    /// The webhook took it.
    Delivered,
    /// It was not taken, and is not tried any more.
    GivenUp,
}

/// How a claimed attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settlement {
    /// The webhook.
    pub webhook: String,
    /// The event.
    pub event: String,
    /// [`Delivery::attempts`] as it was claimed.
    pub attempts: u32,
    /// When it ended.
    pub at: Timestamp,
    /// What follows.
    pub state: Settled,
    /// The HTTP status of the answer.
    pub status: Option<u16>,
    /// What went wrong.
    pub error: Option<String>,
}

/// What follows from an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Nothing: the webhook took it.
    Delivered,
    /// Another attempt at this time.
    Retry(Timestamp),
    /// Nothing: it is not tried any more.
    GivenUp,
}

/// Which deliveries stay in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Delivered ones that were settled before are removed.
    pub delivered_since: Timestamp,
    /// Given-up ones that were settled before are removed.
    pub given_up_since: Timestamp,
    /// The most that are over, per webhook; the oldest go first.
    pub max_over: usize,
    /// The most that wait, per webhook; the oldest are given up first.
    pub max_waiting: usize,
}

impl DeliveryState {
    /// Its name in the store, in JSON and in tables.
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
    /// The state that the delivery is in from then on.
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
