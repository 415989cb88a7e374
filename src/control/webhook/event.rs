//! An event, as webhooks are told of it: CloudEvents 1.0 in structured JSON
//! (<https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md>).

use std::sync::Arc;

use serde::Serialize;

use crate::key::{
    Change, ConsumerId, Epoch, EventKind, KeyId, Keyring, KeyringName, Revision, Timestamp,
    VersionNumber, VersionRef, VersionState, WebhookId, change::OldVersion, note::Note, rotation,
};

/// Something that happened to a key. It holds no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// Unique, and the same however often the event is made from its change. Printable, without a full stop.
    pub(crate) id: String,
    /// What happened.
    pub(crate) kind: EventKind,
    /// When it was committed.
    pub(crate) time: Timestamp,
    /// The rest.
    pub(crate) data: Data,
}

/// What is told of an event. What does not apply is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Data {
    /// The keyring.
    pub(crate) keyring: KeyringName,
    /// Whose key it is about; none in a test.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) consumer: Option<ConsumerId>,
    /// The key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_id: Option<KeyId>,
    /// The version that ends, has ended or expires.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<VersionNumber>,
    /// The same where several end at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) versions: Vec<VersionNumber>,
    /// The version to use instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) replaced_by: Option<VersionNumber>,
    /// The deadline of the overlap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sunset: Option<Timestamp>,
    /// When the version expires by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) expires_at: Option<Timestamp>,
    /// Since when the version is not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unused_since: Option<Timestamp>,
    /// Since when a rotation is due, or cannot be delivered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) due_since: Option<Timestamp>,
    /// Why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<Arc<str>>,
    /// Whether an operator retired the version although it may still have been used.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) forced: bool,
    /// The page for consumers whose key is about to retire.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) help_url: Option<String>,
    /// The webhook that is tried out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) webhook_id: Option<WebhookId>,
}

/// The envelope.
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

/// Before the kind, so that no other producer's types are like ours.
const TYPE_PREFIX: &str = "dev.relatch.";

impl Event {
    /// What is told of `change`, which was committed to `keyring` at `revision`; none when nothing is. The keyring may
    /// have changed since, so that of it only what cannot change is told, or what still is as the change left it.
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

    /// A try of a webhook.
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

    /// The body of a request that tells of it.
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

    /// With the version that begins to retire and the one to use from then on.
    fn with_move(self, old: Option<OldVersion>, new: VersionNumber) -> Self {
        Self {
            version: old.map(|old| old.version),
            sunset: old.map(|old| old.until),
            replaced_by: Some(new),
            ..self
        }
    }
}

/// The kind of a change that is told of, and its data on top of `nothing`.
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
        // Of a version that nobody was given, and of what only operators decide, consumers have nothing to do.
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
                // Only a version that retires has a deadline; a delivery that fails has begun to at that time.
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

/// The version to use instead of one that retires or has retired.
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
