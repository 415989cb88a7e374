//! Notes: the reports to people about a version, and a record of those that are already made.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{sink_name::SinkName, time::Timestamp};

/// A report to people about a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case", deny_unknown_fields)]
pub enum Note {
    /// The overlap ends soon, and the evidence does not show yet that the version is unused.
    Reminder {
        /// The end of the overlap.
        deadline: Timestamp,
    },
    /// The version is not used any more.
    Drained {
        /// The time since which the version is unused.
        unused_since: Timestamp,
    },
    /// The rotation does not continue without a decision.
    Held {
        /// The deadline that has passed: the end of the overlap, or `withdraw_after` of a delivery.
        /// For a delivery that has failed: the time of its first failure.
        deadline: Timestamp,
        /// The condition that keeps the rotation from continuing, as text for people.
        reason: Arc<str>,
    },
    /// The control plane that staged the version stopped before the sink confirmed the secret, and
    /// lost the secret.
    SecretLost {
        /// The sink that may have received the secret.
        sink: SinkName,
        /// The time at which the version was staged.
        since: Timestamp,
    },
    /// The active version expires soon, and no other version replaces it.
    Expiring {
        /// The time at which the version expires.
        expires_at: Timestamp,
    },
    /// A rotation is due, and the policy names no sink for it.
    RotationDue {
        /// The time since which the rotation is due.
        since: Timestamp,
    },
}

/// The notes that exist of a version in its present state, so that each is made only once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "facts that do not depend on each other"
)]
pub(crate) struct NotesTold {
    /// The end of the overlap of the last reminder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reminded_of: Option<Timestamp>,
    /// Whether the version was noted as not used any more.
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) drained: bool,
    /// The deadline of the last note that the rotation is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) held_at: Option<Timestamp>,
    /// Whether the secret was noted as lost, in state pending.
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) secret_lost: bool,
    /// Whether it was noted that the version expires soon, in state active.
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) expiring: bool,
    /// Whether it was noted that a rotation is due, in state active.
    #[serde(skip_serializing_if = "is_false")]
    pub(crate) rotation_due: bool,
}

impl NotesTold {
    /// Adds a note.
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

    /// Returns whether there is no note.
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
