//! Shows and sets policies.

use std::time::Duration;

use tonic::Status;

use super::{AdminApi, error, field, messages};
use crate::{
    control::{served::ServedKeyring, token::AdminCaller},
    key::{KeyId, OnDeadline, PolicyOverrides, RotationPolicy},
    proto::admin::{self as api, get_policy_request, set_policy_request},
};

impl AdminApi {
    pub(super) fn get_policy(
        &self,
        request: api::GetPolicyRequest,
    ) -> Result<api::PolicyStatus, Status> {
        match request.of {
            Some(get_policy_request::Of::Keyring(name)) => {
                Ok(of_keyring(&*self.served("keyring", &name)?))
            }
            Some(get_policy_request::Of::KeyId(key_id)) => {
                let key_id: KeyId = field::parse("key_id", &key_id)?;
                of_key(&*self.holding(key_id)?, key_id)
            }
            None => Err(error::invalid("of", "name a keyring or a key")),
        }
    }

    pub(super) async fn set_policy(
        &self,
        caller: AdminCaller,
        request: api::SetPolicyRequest,
    ) -> Result<api::PolicyStatus, Status> {
        let parts = parts(request.policy.unwrap_or_default())?;
        if let Some(sink) = parts.sink.as_deref().filter(|sink| !sink.is_empty())
            && !self
                .rotations
                .sinks()
                .names()
                .any(|known| known.as_str() == sink)
        {
            return Err(error::invalid(
                "sink",
                format!("the configuration of the control plane has no sink {sink:?}"),
            ));
        }
        let (served, key_id) = match request.of {
            Some(set_policy_request::Of::Keyring(name)) => (self.served("keyring", &name)?, None),
            Some(set_policy_request::Of::KeyId(key_id)) => {
                let key_id: KeyId = field::parse("key_id", &key_id)?;
                (self.holding(key_id)?, Some(key_id))
            }
            None => return Err(error::invalid("of", "name a keyring or a key")),
        };
        self.catalog
            .commit(&served, &caller.actor, |keyring, _| {
                let changes = match key_id {
                    Some(key_id) => keyring.set_key_policy(key_id, &parts, request.anew)?,
                    None => keyring.set_policy(&parts)?,
                };
                Ok((changes, ()))
            })
            .await
            .map_err(error::commit)?;
        tracing::info!(
            actor = caller.actor,
            auth.keyring = %served.name(),
            auth.key.id = key_id.map(|key_id| key_id.to_string()),
            "policy set"
        );
        match key_id {
            Some(key_id) => of_key(&served, key_id),
            None => Ok(of_keyring(&served)),
        }
    }
}

fn of_keyring(served: &ServedKeyring) -> api::PolicyStatus {
    let state = served.journal().state();
    api::PolicyStatus {
        keyring: served.name().to_string(),
        key_id: String::new(),
        policy: Some(policy(state.keyring.policy())),
        overridden: Vec::new(),
        revision: state.keyring.revision().get(),
    }
}

fn of_key(served: &ServedKeyring, key_id: KeyId) -> Result<api::PolicyStatus, Status> {
    let state = served.journal().state();
    let key = state
        .keyring
        .key(key_id)
        .map_err(|refusal| error::refused(&refusal))?;
    Ok(api::PolicyStatus {
        keyring: served.name().to_string(),
        key_id: key_id.to_string(),
        policy: Some(policy(&state.keyring.policy_of(key))),
        overridden: overridden(key.overrides()),
        revision: state.keyring.revision().get(),
    })
}

fn policy(policy: &RotationPolicy) -> api::Policy {
    let known = |duration: Duration| messages::elapsed(duration);
    api::Policy {
        rotate_every: known(policy.rotate_every.unwrap_or_default()),
        overlap: known(policy.overlap),
        idle_for: known(policy.idle_for),
        on_deadline: messages::on_deadline(policy.on_deadline),
        rollback_for: known(policy.rollback_for),
        remind_before: known(policy.remind_before),
        max_versions: policy.max_versions,
        sink: Some(
            policy
                .sink
                .as_ref()
                .map_or_else(String::new, ToString::to_string),
        ),
    }
}

fn parts(policy: api::Policy) -> Result<PolicyOverrides, Status> {
    Ok(PolicyOverrides {
        rotate_every: field::duration("rotate_every", policy.rotate_every)?,
        overlap: field::duration("overlap", policy.overlap)?,
        idle_for: field::duration("idle_for", policy.idle_for)?,
        on_deadline: match api::OnDeadline::try_from(policy.on_deadline) {
            Ok(api::OnDeadline::Unspecified) => None,
            Ok(api::OnDeadline::Retire) => Some(OnDeadline::Retire),
            Ok(api::OnDeadline::Extend) => Some(OnDeadline::Extend),
            Ok(api::OnDeadline::Hold) => Some(OnDeadline::Hold),
            Err(_) => return Err(error::invalid("on_deadline", "use retire, extend or hold")),
        },
        rollback_for: field::duration("rollback_for", policy.rollback_for)?,
        remind_before: field::duration("remind_before", policy.remind_before)?,
        max_versions: (policy.max_versions != 0).then_some(policy.max_versions),
        sink: policy.sink.map(Into::into),
    })
}

fn overridden(overrides: &PolicyOverrides) -> Vec<String> {
    let PolicyOverrides {
        rotate_every,
        overlap,
        idle_for,
        on_deadline,
        rollback_for,
        remind_before,
        max_versions,
        sink,
    } = overrides;
    [
        ("rotate_every", rotate_every.is_some()),
        ("overlap", overlap.is_some()),
        ("idle_for", idle_for.is_some()),
        ("on_deadline", on_deadline.is_some()),
        ("rollback_for", rollback_for.is_some()),
        ("remind_before", remind_before.is_some()),
        ("max_versions", max_versions.is_some()),
        ("sink", sink.is_some()),
    ]
    .into_iter()
    .filter(|(_, given)| *given)
    .map(|(field, _)| field.to_owned())
    .collect()
}
