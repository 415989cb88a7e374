//! Keys: made, imported, looked at.

use std::sync::Arc;

use tonic::Status;
use zeroize::Zeroizing;

use super::{AdminApi, error, wire};
use crate::{
    control::{
        served::ServedKeyring,
        token::{Caller, Permission},
    },
    key::{
        AllowedSources, ConsumerId, KeyId, Keyring, KeyringName, Pepper, Prefix, Refusal, Scope,
        Scopes, Secret, Use, VersionRef, Window, operation::KeySpec,
    },
    proto::admin as api,
};

impl AdminApi {
    pub(super) async fn take_key(
        &self,
        caller: &Caller,
        request: api::ImportKeyRequest,
    ) -> Result<api::IssuedKey, Status> {
        let secret = Secret::import(Zeroizing::new(request.secret))
            .map_err(|problem| error::invalid("secret", problem))?;
        let key = request
            .key
            .ok_or_else(|| error::invalid("key", "say what key it shall be"))?;
        self.make_key(caller, key, Some(secret)).await
    }

    /// Makes a key, with a secret of another system or a new one.
    pub(super) async fn make_key(
        &self,
        caller: &Caller,
        request: api::CreateKeyRequest,
        imported: Option<Secret>,
    ) -> Result<api::IssuedKey, Status> {
        let consumer: ConsumerId = wire::field("consumer", &request.consumer)?;
        let scopes: Scopes = request
            .scopes
            .iter()
            .map(|scope| wire::field::<Scope>("scopes", scope))
            .collect::<Result<_, _>>()?;
        let allowed_sources = AllowedSources::parse(&request.allowed_sources)
            .map_err(|problem| error::invalid("allowed_sources", problem))?;
        let not_before = wire::timestamp("not_before", request.not_before)?;
        let expires_in = wire::duration("expires_in", request.expires_in)?;
        let is_imported = imported.is_some();
        let keyring: KeyringName = wire::field("keyring", &request.keyring)?;
        let held = self.keyring_for(caller, &keyring, request.create_missing)?;
        let key_id = KeyId::generate().map_err(|e| error::commit(e.into()))?;
        let prefix = held.as_ref().map_or_else(Prefix::default, |served| {
            served.journal().state().keyring.prefix().clone()
        });
        let secret = match imported {
            Some(secret) => secret,
            None => Secret::generate(&prefix, key_id).map_err(|e| error::commit(e.into()))?,
        };
        let plan = |keyring: &Keyring, pepper: &Pepper, now| {
            let start = not_before.unwrap_or(now);
            let expires_at = expires_in.map(|life| start.saturating_add(life));
            let spec = KeySpec {
                key_id,
                consumer: consumer.clone(),
                name: request.name.clone(),
                scopes: scopes.clone(),
                allowed_sources: allowed_sources.clone(),
                window: Window::new(not_before, expires_at),
                imported: is_imported,
            };
            if request.create_missing {
                keyring.create_key_and_consumer(spec, &secret.presented(), pepper, now)
            } else {
                keyring.create_key(spec, &secret.presented(), pepper, now)
            }
        };
        // Whatever is missing is committed together with the key: a key that is refused leaves nothing behind.
        let (served, revision) = match held {
            Some(served) => {
                let committed = self
                    .catalog
                    .commit(&served, &caller.actor, |keyring, now| {
                        Ok((plan(keyring, served.pepper(), now)?, ()))
                    })
                    .await
                    .map_err(error::commit)?;
                (served, committed.revision)
            }
            None => {
                self.begin_keyring_with(caller, keyring, prefix, is_imported, None, plan)
                    .await?
            }
        };
        tracing::info!(
            actor = caller.actor,
            auth.keyring = %served.name(),
            auth.consumer.id = %consumer,
            auth.key.id = %key_id,
            imported = is_imported,
            "key created"
        );
        let state = served.journal().state();
        let key = state
            .keyring
            .key(key_id)
            .map_err(|refusal| error::refused(&refusal))?;
        let version = key
            .active()
            .ok_or_else(|| Status::aborted("the key was revoked as it was made"))?;
        let told = if is_imported { "" } else { secret.expose() };
        Ok(wire::issued(&state.keyring, key, version, told, revision))
    }

    pub(super) fn all_keys(
        &self,
        request: &api::ListKeysRequest,
    ) -> Result<api::ListKeysResponse, Status> {
        let keyrings = match request.keyring.as_str() {
            "" => self.catalog.list(),
            name => vec![self.served("keyring", name)?],
        };
        let consumer: Option<ConsumerId> = match request.consumer.as_str() {
            "" => None,
            text => Some(wire::field("consumer", text)?),
        };
        let mut keys = Vec::new();
        for served in keyrings {
            let used = self.used(served.name());
            let state = served.journal().state();
            keys.extend(
                state
                    .keyring
                    .keys()
                    .values()
                    .filter(|key| consumer.as_ref().is_none_or(|id| key.consumer == *id))
                    .map(|key| wire::key(&state.keyring, key, &used)),
            );
        }
        Ok(api::ListKeysResponse { keys })
    }

    pub(super) fn one_key(&self, request: &api::GetKeyRequest) -> Result<api::Key, Status> {
        let key_id: KeyId = wire::field("key_id", &request.key_id)?;
        let describe = || {
            let served = self.catalog.holding(key_id)?;
            let used = self.used(served.name());
            let state = served.journal().state();
            let key = state.keyring.key(key_id)?;
            Ok(wire::key(&state.keyring, key, used))
        };
        describe().map_err(|refusal: Refusal| error::refused(&refusal))
    }

    /// How often a keyring's versions were used. What was told of nowhere was not used, once all sidecars have told.
    fn used(&self, keyring: &KeyringName) -> impl Fn(VersionRef) -> Option<Use> {
        let coverage = self.fleet.coverage(keyring, self.catalog.clock().wall());
        let unused = coverage.complete_until.map(|_| Use::default());
        move |version| self.usage.use_of(keyring, version).or(unused)
    }

    /// The keyring of a new key; none where it does not exist and is to be created.
    fn keyring_for(
        &self,
        caller: &Caller,
        name: &KeyringName,
        create_missing: bool,
    ) -> Result<Option<Arc<ServedKeyring>>, Status> {
        match self.catalog.get(name) {
            Ok(served) => Ok(Some(served)),
            Err(_) if create_missing => {
                if !caller.role.permits(Permission::Administer) {
                    return Err(Status::permission_denied(format!(
                        "keyring {name} does not exist, and only a token with role admin may create it"
                    )));
                }
                Ok(None)
            }
            Err(refusal) => Err(error::refused(&refusal)),
        }
    }
}
