//! Notes: what people are told of a version, and what they were told already.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{sink_name::SinkName, time::Timestamp};

/// What people are told of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case", deny_unknown_fields)]
pub enum Note {
    /// The overlap ends soon, and the version is still used as far as is known.
    Reminder {
        /// The deadline.
        deadline: Timestamp,
    },
    /// The version is not used any more.
    Drained {
        /// Since when.
        unused_since: Timestamp,
    },
    /// The rotation does not go on by itself.
    Held {
        /// The deadline that has passed; of a delivery, when it failed for the first time.
        deadline: Timestamp,
        /// Why.
        reason: Arc<str>,
    },
    /// The control plane that staged the version has stopped before its sink confirmed the secret, which is lost with it.
    SecretLost {
        /// Where the secret may have arrived.
        sink: SinkName,
        /// Since when the version is staged.
        since: Timestamp,
    },
    /// The version to use expires soon, and no other takes its place.
    Expiring {
        /// When.
        expires_at: Timestamp,
    },
    /// A rotation is due, and the policy names no sink to start it with.
    RotationDue {
        /// Since when.
        since: Timestamp,
    },
}

/// What was told of a version, so that it is told once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "facts that do not depend on each other"
)]
pub(crate) struct Told {
    /// That its overlap ends soon, for an overlap that ends at this moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reminded_of: Option<Timestamp>,
    /// That it is not used any more.
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) drained: bool,
    /// That its rotation is held at this deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) held_at: Option<Timestamp>,
    /// That its secret is lost, in state pending.
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) secret_lost: bool,
    /// That it expires soon, in state active.
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) expiring: bool,
    /// That a rotation is due, in state active.
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) rotation_due: bool,
}

impl Told {
    /// With one thing more.
    #[must_use]
    pub(crate) const fn and(mut self, note: &Note) -> Self {
        match note {
            Note::Reminder { deadline } => self.reminded_of = Some(*deadline),
            Note::Drained { .. } => self.drained = true,
            Note::Held { deadline, .. } => self.held_at = Some(*deadline),
            Note::SecretLost { .. } => self.secret_lost = true,
            Note::Expiring { .. } => self.expiring = true,
            Note::RotationDue { .. } => self.rotation_due = true,
        }
        self
    }

    /// Whether nothing was told.
    #[must_use]
    pub(crate) fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde gives to `skip_serializing_if`"
)]
const fn is_false(flag: &bool) -> bool {
    !*flag
}
