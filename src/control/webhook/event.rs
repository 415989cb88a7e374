//! An event in the form that webhooks receive, CloudEvents 1.0 in structured JSON
//! (<https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md>).

use std::sync::Arc;

use serde::Serialize;

use crate::key::{
    Change, ConsumerId, Epoch, EventKind, KeyId, Keyring, KeyringName, Revision, Timestamp,
    VersionNumber, VersionRef, VersionState, WebhookId, change::OldVersion, note::Note, rotation,
};

/// A change of a key, or a test of a webhook. It contains no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// The unique id, which is the same each time the event is created from its change. Printable,
    /// without a full stop.
    pub(crate) id: String,
    pub(crate) kind: EventKind,
    /// When the change was committed, or the test began.
    pub(crate) time: Timestamp,
    pub(crate) data: Data,
}

/// The data of an event. Fields that do not apply are omitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Data {
    pub(crate) keyring: KeyringName,
    /// The consumer that owns the key; none in a test.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) consumer: Option<ConsumerId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_id: Option<KeyId>,
    /// The version that ends, has ended or expires.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<VersionNumber>,
    /// All versions that were revoked, even if there is only one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) versions: Vec<VersionNumber>,
    /// The version to use instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) replaced_by: Option<VersionNumber>,
    /// The deadline of the overlap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sunset: Option<Timestamp>,
    /// When the version expires.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) expires_at: Option<Timestamp>,
    /// The time since which the version has not been used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unused_since: Option<Timestamp>,
    /// The time since which a rotation is due or its delivery fails, or since which a version with
    /// a lost secret is staged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) due_since: Option<Timestamp>,
    /// The reason for the event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<Arc<str>>,
    /// Whether an operator retired the version although it may still have been used.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) forced: bool,
    /// The page for consumers whose key is about to retire.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) help_url: Option<String>,
    /// The webhook under test.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) webhook_id: Option<WebhookId>,
}

/// The envelope of CloudEvents.
#[derive(Serialize)]
struct CloudEvent<'a> {
    specversion: &'static str,
    id: &'a str,
    source: String,
    r#type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<KeyId>,
    time: Timestamp,
    datacontenttype: &'static str,
    data: &'a Data,
}

/// The media type of [`Event::to_json`].
pub(crate) const CONTENT_TYPE: &str = "application/cloudevents+json; charset=utf-8";

/// The prefix of the event types: it separates them from those of other producers.
const TYPE_PREFIX: &str = "dev.relatch.";

impl Event {
    /// Returns the event of `change`, which was committed to `keyring` at `revision`. None when the
    /// change has no event. The keyring may have changed since. The event therefore contains only
    /// facts that cannot change, or that are still as the change left them.
    #[must_use]
    pub(crate) fn of(
        keyring: &Keyring,
        epoch: Epoch,
        revision: Revision,
        at: Timestamp,
        change: &Change,
    ) -> Option<Self> {
        let key = keyring.keys().get(&change.key_id()?)?;
        let nothing = Data {
            consumer: Some(key.consumer.clone()),
            key_id: Some(key.id),
            ..Data::about(keyring)
        };
        let (kind, data) = told(keyring, change, nothing)?;
        Some(Self {
            id: format!("{}-{epoch}-{revision}", keyring.name()),
            kind,
            time: at,
            data,
        })
    }

    /// Returns the event that tests a webhook.
    #[must_use]
    pub(crate) fn test(keyring: &Keyring, webhook: WebhookId, now: Timestamp) -> Self {
        Self {
            id: format!("{}-test-{webhook}-{}", keyring.name(), now.as_millis()),
            kind: EventKind::WebhookTest,
            time: now,
            data: Data {
                webhook_id: Some(webhook),
                ..Data::about(keyring)
            },
        }
    }

    /// Returns the body of a request with the event.
    #[must_use]
    pub(crate) fn to_json(&self) -> String {
        let event = CloudEvent {
            specversion: "1.0",
            id: &self.id,
            source: format!("/relatch/keyrings/{}", self.data.keyring),
            r#type: format!("{TYPE_PREFIX}{}", self.kind),
            subject: self.data.key_id,
            time: self.time,
            datacontenttype: "application/json",
            data: &self.data,
        };
        serde_json::to_string(&event).expect("an event has no map with other keys than text")
    }
}

impl Data {
    fn about(keyring: &Keyring) -> Self {
        Self {
            keyring: keyring.name().clone(),
            consumer: None,
            key_id: None,
            version: None,
            versions: Vec::new(),
            replaced_by: None,
            sunset: None,
            expires_at: None,
            unused_since: None,
            due_since: None,
            reason: None,
            forced: false,
            help_url: keyring.help_url().map(ToOwned::to_owned),
            webhook_id: None,
        }
    }

    /// Adds the version that begins to retire and the version to use from then on.
    fn with_move(self, old: Option<OldVersion>, new: VersionNumber) -> Self {
        Self {
            version: old.map(|old| old.version),
            sunset: old.map(|old| old.until),
            replaced_by: Some(new),
            ..self
        }
    }
}

/// Returns the kind and the data of a change's event, with the data on top of `nothing`. None when
/// the change has no event.
fn told(keyring: &Keyring, change: &Change, nothing: Data) -> Option<(EventKind, Data)> {
    match change {
        Change::HandedOver { version, old, .. } => Some((
            EventKind::RotationStarted,
            nothing.with_move(*old, *version),
        )),
        Change::RolledBack {
            version,
            replaced,
            reason,
            ..
        } => {
            let data = Data {
                reason: Some(Arc::clone(reason)),
                ..nothing.with_move(*replaced, *version)
            };
            Some((EventKind::RotationRolledBack, data))
        }
        Change::VersionRetired {
            key_id,
            version,
            reason,
            forced,
        } => {
            let data = Data {
                version: Some(*version),
                replaced_by: successor(keyring, *key_id, *version),
                reason: Some(Arc::clone(reason)),
                forced: *forced,
                ..nothing
            };
            Some((EventKind::RotationRetired, data))
        }
        Change::VersionsRevoked {
            versions, reason, ..
        } => {
            let data = Data {
                version: match versions.as_slice() {
                    [only] => Some(*only),
                    _ => None,
                },
                versions: versions.clone(),
                reason: Some(Arc::clone(reason)),
                ..nothing
            };
            Some((EventKind::KeyRevoked, data))
        }
        Change::Noted {
            key_id,
            version,
            note,
        } => {
            let data = Data {
                version: Some(*version),
                replaced_by: successor(keyring, *key_id, *version),
                ..nothing
            };
            Some(noted(note, data))
        }
        // Consumers have nothing to do about a version that nobody received, or about decisions of
        // operators alone.
        Change::KeyringCreated { .. }
        | Change::ConsumerCreated { .. }
        | Change::KeyCreated { .. }
        | Change::VersionStaged { .. }
        | Change::VersionWithdrawn { .. }
        | Change::OverlapExtended { .. }
        | Change::DeliveryBegun { .. }
        | Change::KeyringPolicySet { .. }
        | Change::KeyPolicySet { .. }
        | Change::WebhookAdded { .. }
        | Change::WebhookRemoved { .. } => None,
    }
}

fn noted(note: &Note, data: Data) -> (EventKind, Data) {
    match note {
        Note::Reminder { deadline } => (
            EventKind::RotationReminder,
            Data {
                sunset: Some(*deadline),
                ..data
            },
        ),
        Note::Drained { unused_since } => (
            EventKind::RotationDrained,
            Data {
                unused_since: Some(*unused_since),
                ..data
            },
        ),
        Note::Held { deadline, reason } => (
            EventKind::RotationHeld,
            Data {
                // Only a retiring version has a deadline. For a failed delivery, this is the time
                // of its first failure.
                sunset: data.replaced_by.and(Some(*deadline)),
                due_since: data.replaced_by.is_none().then_some(*deadline),
                reason: Some(Arc::clone(reason)),
                ..data
            },
        ),
        Note::SecretLost { sink, since } => {
            let lost = data.key_id.zip(data.version).map(|(key_id, version)| {
                let which = VersionRef { key_id, version };
                rotation::secret_lost(which, sink).into()
            });
            let data = Data {
                due_since: Some(*since),
                reason: lost,
                ..data
            };
            (EventKind::RotationSecretLost, data)
        }
        Note::Expiring { expires_at } => (
            EventKind::KeyExpiring,
            Data {
                expires_at: Some(*expires_at),
                ..data
            },
        ),
        Note::RotationDue { since } => (
            EventKind::RotationDue,
            Data {
                due_since: Some(*since),
                ..data
            },
        ),
    }
}

/// Returns the version to use instead of one that retires or has retired.
fn successor(keyring: &Keyring, key_id: KeyId, version: VersionNumber) -> Option<VersionNumber> {
    let (_, version) = keyring.version(VersionRef { key_id, version })?;
    match version.state {
        VersionState::Retiring { replaced_by, .. } | VersionState::Retired { replaced_by, .. } => {
            Some(replaced_by)
        }
        VersionState::Pending { .. }
        | VersionState::Active { .. }
        | VersionState::Revoked { .. } => None,
    }
}
