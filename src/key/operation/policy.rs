//! The operations on policies.

use super::OperationRefusal;
use crate::key::{
    change::Change,
    id::KeyId,
    keyring::Keyring,
    policy::{PolicyError, PolicyOverrides},
    sink_name::SinkName,
};

impl Keyring {
    /// Sets parts of the policy of the keyring. The other parts do not change.
    ///
    /// # Errors
    ///
    /// When the name of the sink is not valid, or when the policy would contradict itself: that of
    /// the keyring, or that of a key with its overrides.
    pub(crate) fn set_policy(
        &self,
        parts: &PolicyOverrides,
    ) -> Result<Vec<Change>, OperationRefusal> {
        let policy = self.policy().with(&sound(parts)?);
        policy.check().map_err(contradiction)?;
        for key in self.keys().values() {
            let Some(overrides) = &key.policy else {
                continue;
            };
            policy.with(overrides).check().map_err(|error| {
                OperationRefusal::Unsafe(format!(
                    "the policy would not fit the own settings of key {}: {error}; change the policy of that key first",
                    key.id
                ))
            })?;
        }
        Ok(if policy == *self.policy() {
            Vec::new()
        } else {
            vec![Change::KeyringPolicySet { policy }]
        })
    }

    /// Sets overrides of a key for the policy of its keyring. With `anew`, deletes its former
    /// overrides first.
    ///
    /// # Errors
    ///
    /// When the key does not exist, the name of the sink is not valid, or the policy of the key
    /// would contradict itself.
    pub(crate) fn set_key_policy(
        &self,
        key_id: KeyId,
        parts: &PolicyOverrides,
        anew: bool,
    ) -> Result<Vec<Change>, OperationRefusal> {
        let key = self.key(key_id)?;
        let parts = sound(parts)?;
        let overrides = if anew {
            parts
        } else {
            parts.over(key.overrides())
        };
        self.policy()
            .with(&overrides)
            .check()
            .map_err(contradiction)?;
        Ok(if overrides == *key.overrides() {
            Vec::new()
        } else {
            vec![Change::KeyPolicySet { key_id, overrides }]
        })
    }
}

/// Returns `parts`, if the name of its sink is empty or valid.
fn sound(parts: &PolicyOverrides) -> Result<PolicyOverrides, OperationRefusal> {
    if let Some(name) = parts.sink.as_deref().filter(|name| !name.is_empty()) {
        name.parse::<SinkName>()
            .map_err(|error| OperationRefusal::Invalid {
                field: "sink",
                problem: error.to_string(),
            })?;
    }
    Ok(parts.clone())
}

fn contradiction(error: PolicyError) -> OperationRefusal {
    OperationRefusal::Invalid {
        field: error.field,
        problem: error.problem,
    }
}
