//! Webhooks: the endpoints that receive events about keys, and the kinds of events.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    id::{ConsumerId, KeyId, ParseIdError},
    random::RandomError,
    time::Timestamp,
};

/// The public id of a webhook: 12 base62 characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WebhookId(KeyId);

/// An endpoint that receives events about the keys of a keyring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// The id, unique in its keyring. The signing secret is derived from it.
    pub id: WebhookId,
    /// The URL that events are sent to, at most 2,048 bytes.
    pub url: String,
    /// The consumer whose events are sent; none: all consumers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consumer: Option<ConsumerId>,
    /// The kinds of events that are sent; empty: all kinds.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub events: BTreeSet<EventKind>,
    /// Whether `url` may resolve to an address that is not public, and may have the scheme `http`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_private: bool,
    /// The time at which the webhook was added.
    pub created_at: Timestamp,
}

/// The kind of an event. Later releases may add kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum EventKind {
    /// A new version was handed over; the old one is retiring.
    RotationStarted,
    /// The overlap ends soon, and the evidence does not show yet that the old version is unused.
    RotationReminder,
    /// The old version is not used any more.
    RotationDrained,
    /// The rotation does not continue without a decision.
    RotationHeld,
    /// The control plane lost the secret of a staged version before the sink confirmed it.
    RotationSecretLost,
    /// The old version has retired.
    RotationRetired,
    /// An earlier version is active again.
    RotationRolledBack,
    /// A rotation is due, and the policy names no sink for it.
    RotationDue,
    /// Versions were revoked.
    KeyRevoked,
    /// The active version expires soon.
    KeyExpiring,
    /// An administrator tests a webhook.
    WebhookTest,
}

/// A text that is not the name of an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an event: use one of {}", EventKind::ALL.map(EventKind::as_str).join(", "))]
pub struct ParseEventKindError;

impl WebhookId {
    /// Creates a random id.
    ///
    /// # Errors
    ///
    /// When the operating system's random source fails.
    pub fn generate() -> Result<Self, RandomError> {
        KeyId::generate().map(Self)
    }

    /// Returns the id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// Keeps the characters: both ids have 12 base62 characters.
impl From<KeyId> for WebhookId {
    fn from(id: KeyId) -> Self {
        Self(id)
    }
}

impl FromStr for WebhookId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl TryFrom<String> for WebhookId {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<WebhookId> for String {
    fn from(id: WebhookId) -> Self {
        id.as_str().to_owned()
    }
}

impl fmt::Display for WebhookId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for WebhookId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WebhookId({self})")
    }
}

impl Webhook {
    /// Returns whether the webhook receives `event`, which is about a key of `consumer`.
    #[must_use]
    pub(crate) fn wants(&self, event: EventKind, consumer: &ConsumerId) -> bool {
        let of_whom = self.consumer.as_ref().is_none_or(|only| only == consumer);
        of_whom && (self.events.is_empty() || self.events.contains(&event))
    }
}

impl EventKind {
    /// All kinds, in the order of their declaration.
    pub const ALL: [Self; 11] = [
        Self::RotationStarted,
        Self::RotationReminder,
        Self::RotationDrained,
        Self::RotationHeld,
        Self::RotationSecretLost,
        Self::RotationRetired,
        Self::RotationRolledBack,
        Self::RotationDue,
        Self::KeyRevoked,
        Self::KeyExpiring,
        Self::WebhookTest,
    ];

    /// Returns the name of the event: the `type` that receivers see.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RotationStarted => "rotation.started",
            Self::RotationReminder => "rotation.reminder",
            Self::RotationDrained => "rotation.drained",
            Self::RotationHeld => "rotation.held",
            Self::RotationSecretLost => "rotation.secret_lost",
            Self::RotationRetired => "rotation.retired",
            Self::RotationRolledBack => "rotation.rolled_back",
            Self::RotationDue => "rotation.due",
            Self::KeyRevoked => "key.revoked",
            Self::KeyExpiring => "key.expiring",
            Self::WebhookTest => "webhook.test",
        }
    }
}

impl FromStr for EventKind {
    type Err = ParseEventKindError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or(ParseEventKindError)
    }
}

impl TryFrom<String> for EventKind {
    type Error = ParseEventKindError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<EventKind> for &'static str {
    fn from(kind: EventKind) -> Self {
        kind.as_str()
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_by_consumer_and_by_event() {
        let mut webhook = Webhook {
            id: "7Qm2Xc91TbKe".parse().expect("an id"),
            url: "https://example.com/".to_owned(),
            consumer: None,
            events: BTreeSet::new(),
            allow_private: false,
            created_at: Timestamp::from_millis(0),
        };
        let [mine, other] = ["checkout", "billing"].map(|id| id.parse().expect("an id"));
        assert!(webhook.wants(EventKind::KeyRevoked, &other));
        webhook.consumer = Some(mine);
        assert!(!webhook.wants(EventKind::KeyRevoked, &other));
        let mine = webhook.consumer.clone().expect("it was set");
        assert!(webhook.wants(EventKind::KeyRevoked, &mine));
        webhook.events.insert(EventKind::RotationStarted);
        assert!(!webhook.wants(EventKind::KeyRevoked, &mine));
        assert!(webhook.wants(EventKind::RotationStarted, &mine));
    }

    #[test]
    fn names_of_events_round_trip() {
        for kind in EventKind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
            let json = serde_json::to_string(&kind).expect("JSON");
            assert_eq!(json, format!("\"{kind}\""));
            assert_eq!(serde_json::from_str(&json).ok(), Some(kind));
        }
        let error = "rotation".parse::<EventKind>().expect_err("no event");
        assert!(error.to_string().contains("rotation.started, "));
    }
}
