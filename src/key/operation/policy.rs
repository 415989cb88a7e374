//! What may be asked of policies.

use super::Refusal;
use crate::key::{
    change::Change,
    id::KeyId,
    keyring::Keyring,
    policy::{PolicyError, PolicyOverrides},
    sink_name::SinkName,
};

impl Keyring {
    /// Sets parts of the policy of the keyring.
    ///
    /// # Errors
    ///
    /// When the policy would contradict itself, or that of a key with its departures would.
    pub(crate) fn set_policy(&self, parts: &PolicyOverrides) -> Result<Vec<Change>, Refusal> {
        let policy = self.policy().with(&sound(parts)?);
        policy.check().map_err(contradiction)?;
        for key in self.keys().values() {
            let Some(overrides) = &key.policy else {
                continue;
            };
            policy.with(overrides).check().map_err(|error| {
                Refusal::Unsafe(format!(
                    "with the departures of key {} the policy would contradict itself: {error}; change that of the key first",
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

    /// Sets in what a key departs from the policy of its keyring; with `anew`, former departures are forgotten.
    ///
    /// # Errors
    ///
    /// When the key does not exist, or its policy would contradict itself.
    pub(crate) fn set_key_policy(
        &self,
        key_id: KeyId,
        parts: &PolicyOverrides,
        anew: bool,
    ) -> Result<Vec<Change>, Refusal> {
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

/// Parts of a policy whose names can be.
fn sound(parts: &PolicyOverrides) -> Result<PolicyOverrides, Refusal> {
    if let Some(name) = parts.sink.as_deref().filter(|name| !name.is_empty()) {
        name.parse::<SinkName>().map_err(|error| Refusal::Invalid {
            field: "sink",
            problem: error.to_string(),
        })?;
    }
    Ok(parts.clone())
}

fn contradiction(error: PolicyError) -> Refusal {
    Refusal::Invalid {
        field: error.field,
        problem: error.problem,
    }
}
