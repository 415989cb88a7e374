//! New keys: created, or imported from another system.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tonic::Status;
use zeroize::Zeroizing;

use super::{
    AdminApi, error, field,
    idempotency::{committed, reused, withdrawn},
    messages,
};
use crate::{
    clock::BootTime,
    control::{
        calls::{CallId, CallIdentity, Kept, KeptKey, ReusedError},
        rotation::{Goal, Patience, RotationError, RotationProgress},
        served::ServedKeyring,
        token::{AdminCaller, Permission},
    },
    key::{
        AllowedSources, ConsumerId, KeyId, Keyring, KeyringName, Pepper, Prefix, Revision, Scope,
        Scopes, Secret, Timestamp, VersionNumber, VersionRef, VersionState, Window,
        operation::{KeySpec, Which},
    },
    proto::admin as api,
    serving::{Barrier, Target},
};

/// A request for a key, with what was parsed of it.
struct Order {
    request: api::CreateKeyRequest,
    /// The secret from another system; none if a new one is to be created.
    imported: Option<Secret>,
    /// How long to wait for the sidecars; none if the call does not wait.
    wait: Option<Patience>,
}

/// A key that was committed.
struct Created {
    served: Arc<ServedKeyring>,
    version: VersionRef,
    /// The secret; none for an imported key.
    secret: Option<Secret>,
    revision: Revision,
    at: BootTime,
}

/// The properties of a new key, parsed.
struct Details {
    consumer: ConsumerId,
    scopes: Scopes,
    allowed_sources: AllowedSources,
    not_before: Option<Timestamp>,
    expires_in: Option<Duration>,
}

/// The most attempts to revoke a key that was not handed out while the store fails, and the wait
/// between them: as long as a disk is busy for a moment. The caller waits meanwhile.
const TAKE_BACK_TRIES: u32 = 5;
const TAKE_BACK_RETRY: Duration = Duration::from_secs(1);

impl AdminApi {
    pub(super) async fn create_key(
        &self,
        caller: AdminCaller,
        request: api::CreateKeyRequest,
    ) -> Result<api::IssuedKey, Status> {
        let identity = self.identify(&caller, "CreateKey", &request.idempotency_key, &request)?;
        self.issue(caller, self.order(request, None)?, identity)
            .await
    }

    pub(super) async fn import_key(
        &self,
        caller: AdminCaller,
        request: api::ImportKeyRequest,
    ) -> Result<api::IssuedKey, Status> {
        let key = request.key.as_ref();
        let key =
            key.ok_or_else(|| error::invalid("key", "is missing, describe the key to import"))?;
        let identity = self.identify(&caller, "ImportKey", &key.idempotency_key, &request)?;
        let key = key.clone();
        let secret = Secret::import(Zeroizing::new(request.secret))
            .map_err(|problem| error::invalid("secret", problem))?;
        self.issue(caller, self.order(key, Some(secret))?, identity)
            .await
    }

    async fn issue(
        &self,
        caller: AdminCaller,
        order: Order,
        identity: Option<CallIdentity>,
    ) -> Result<api::IssuedKey, Status> {
        // Nobody reads the progress. The receiver lives as long as the caller waits.
        let (progress, _caller_is_there) = mpsc::channel(1);
        let api = self.clone();
        self.carry_out(async move { api.issue_once(&caller, order, identity, &progress).await })
            .await
    }

    async fn issue_once(
        &self,
        caller: &AdminCaller,
        mut order: Order,
        identity: Option<CallIdentity>,
        progress: &mpsc::Sender<RotationProgress>,
    ) -> Result<api::IssuedKey, Status> {
        let mut turn = self.turn(identity).await?;
        if let Some(Kept::Key(kept)) = turn.kept() {
            return self.answer(kept);
        }
        let id = turn.id(|id| self.catalog.holding(id).is_ok());
        let key_id = match id.map_err(|error| error::commit(error.into()))? {
            CallId::New(id) => id,
            CallId::Used(id) => return self.issued_before(id, &order, progress).await,
        };
        if progress.is_closed() {
            return Err(withdrawn(error::rotation(RotationError::Abandoned)));
        }
        if let Some(patience) = &order.wait {
            let keyring = field::parse("keyring", &order.request.keyring)?;
            self.note_passed_by(&caller.actor, "new key", &keyring, Some(key_id), patience)
                .await?;
        }
        let created = self.create(caller, key_id, &mut order).await?;
        let mut barrier = None;
        if let Some(patience) = order.wait.take() {
            match self.accepted(&created, &patience, progress).await {
                Ok(all) => barrier = Some(all),
                Err(problem) if created.secret.is_some() => {
                    let became = if self.take_back(caller, &created, &problem).await {
                        "and is revoked".to_owned()
                    } else {
                        format!(
                            "and could not be revoked: revoke it with `relatch revoke {key_id} --all`"
                        )
                    };
                    turn.give_up(key_id);
                    let what = format!("key {key_id} was not handed out, {became}");
                    return Err(withdrawn(explained(&what, problem)));
                }
                Err(problem) => return Err(committed(not_confirmed(key_id, problem))),
            }
        }
        let kept = KeptKey {
            version: created.version,
            secret: created.secret,
            revision: created.revision,
            barrier,
        };
        let answer = self.answer(&kept);
        turn.keep(Kept::Key(kept));
        answer
    }

    /// Commits a key, together with its consumer and its keyring if they are to be created. A
    /// refused key leaves nothing behind.
    async fn create(
        &self,
        caller: &AdminCaller,
        key_id: KeyId,
        order: &mut Order,
    ) -> Result<Created, Status> {
        let request = &order.request;
        let Details {
            consumer,
            scopes,
            allowed_sources,
            not_before,
            expires_in,
        } = Details::parse(request)?;
        let keyring: KeyringName = field::parse("keyring", &request.keyring)?;
        let held = self.keyring_for(caller, &keyring, request.create_missing)?;
        let prefix = held.as_ref().map_or_else(Prefix::default, |served| {
            served.journal().state().keyring.prefix().clone()
        });
        let imported = order.imported.take();
        let is_imported = imported.is_some();
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
        let at = self.catalog.clock().boot();
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
        Ok(Created {
            served,
            version: VersionRef {
                key_id,
                version: VersionNumber::FIRST,
            },
            secret: (!is_imported).then_some(secret),
            revision,
            at,
        })
    }

    /// Waits until every sidecar that may serve accepts a key.
    async fn accepted(
        &self,
        created: &Created,
        patience: &Patience,
        progress: &mpsc::Sender<RotationProgress>,
    ) -> Result<Barrier, RotationError> {
        let goal = Goal {
            served: &created.served,
            target: Target::Applied(created.revision, created.version),
            committed_at: Some(created.at),
            patience,
        };
        self.rotations.wait(&goal, progress).await
    }

    /// Revokes a key that not every sidecar has accepted. Returns whether the revocation is
    /// committed. If it is not, the key stays, and nobody has its secret.
    async fn take_back(
        &self,
        caller: &AdminCaller,
        created: &Created,
        problem: &RotationError,
    ) -> bool {
        let why = match problem {
            RotationError::TimedOut { .. } => "not every sidecar accepted it in time",
            RotationError::Abandoned => "the caller disconnected",
            RotationError::Stopping => "the control plane stopped",
            RotationError::Commit(_) | RotationError::TakenBack | RotationError::Unsure { .. } => {
                "it failed"
            }
        };
        let reason = format!("its secret was not handed out: {why}");
        let key_id = created.version.key_id;
        for attempt in 1..=TAKE_BACK_TRIES {
            let revoked = self
                .rotations
                .revoke(&created.served, &caller.actor, key_id, Which::All, &reason)
                .await;
            let Err(error) = revoked else {
                tracing::warn!(
                    actor = caller.actor,
                    auth.keyring = %created.served.name(),
                    auth.key.id = %key_id,
                    why,
                    "a new key was revoked before its secret was handed out"
                );
                return true;
            };
            tracing::error!(
                auth.keyring = %created.served.name(),
                auth.key.id = %key_id,
                attempt,
                error = &error as &dyn std::error::Error,
                "a new key whose secret was not handed out could not be revoked"
            );
            if attempt < TAKE_BACK_TRIES {
                tokio::time::sleep(TAKE_BACK_RETRY).await;
            }
        }
        false
    }

    /// Returns the answer of a call that is remembered.
    fn answer(&self, kept: &KeptKey) -> Result<api::IssuedKey, Status> {
        let secret = kept.secret.as_ref().map_or("", Secret::expose);
        Ok(api::IssuedKey {
            barrier: kept.barrier.as_ref().map(messages::barrier),
            ..self.issued(kept.version, secret, kept.revision)?
        })
    }

    /// Returns the answer of a call that is forgotten, and has created the key with `id`. A caller
    /// that imported the key can wait for the sidecars again.
    async fn issued_before(
        &self,
        id: KeyId,
        order: &Order,
        progress: &mpsc::Sender<RotationProgress>,
    ) -> Result<api::IssuedKey, Status> {
        let (served, issued) = self.stands(id, order)?;
        let Some(patience) = order.wait.clone().filter(|_| order.imported.is_some()) else {
            return Ok(issued);
        };
        let version = VersionRef {
            key_id: id,
            version: VersionNumber::FIRST,
        };
        let goal = Goal {
            served: &served,
            target: Target::Applied(Revision::new(issued.revision), version),
            committed_at: None,
            patience: &patience,
        };
        let waited = self.rotations.wait(&goal, progress).await;
        let barrier = waited.map_err(|problem| committed(not_confirmed(id, problem)))?;
        Ok(api::IssuedKey {
            barrier: Some(messages::barrier(&barrier)),
            ..issued
        })
    }

    /// Returns the key that an earlier call has created, if it stands and `order` asks for the
    /// same.
    fn stands(
        &self,
        id: KeyId,
        order: &Order,
    ) -> Result<(Arc<ServedKeyring>, api::IssuedKey), Status> {
        let version = VersionRef {
            key_id: id,
            version: VersionNumber::FIRST,
        };
        let served = self.holding(id)?;
        let state = served.journal().state();
        let Some((key, first)) = state.keyring.version(version) else {
            return Err(Status::internal("a key has no first version"));
        };
        let asked = Details::parse(&order.request)?;
        let is_same_secret = order
            .imported
            .as_ref()
            .is_none_or(|secret| served.pepper().digest(&secret.presented()) == first.digest);
        let is_same = order.request.keyring == served.name().as_str()
            && order.request.name == key.name
            && (&asked.consumer, &asked.scopes, &asked.allowed_sources)
                == (&key.consumer, &key.scopes, &key.allowed_sources);
        if !is_same_secret || !is_same {
            return Err(reused(ReusedError));
        }
        if let VersionState::Revoked { reason, .. } | VersionState::Retired { reason, .. } =
            &first.state
        {
            let state = first.state.kind();
            return Err(Status::failed_precondition(format!(
                "this call created key {id} before, whose version 1 is {state} ({reason}); to create another key, repeat the call with a new idempotency key"
            )));
        }
        let issued = messages::issued(&state.keyring, key, first, "", state.keyring.revision());
        let issued = api::IssuedKey {
            secret_forgotten: order.imported.is_none(),
            ..issued
        };
        drop(state);
        Ok((served, issued))
    }

    fn issued(
        &self,
        which: VersionRef,
        secret: &str,
        revision: Revision,
    ) -> Result<api::IssuedKey, Status> {
        let served = self.holding(which.key_id)?;
        let state = served.journal().state();
        let (key, version) = state
            .keyring
            .version(which)
            .ok_or_else(|| Status::internal("the created key does not exist"))?;
        Ok(messages::issued(
            &state.keyring,
            key,
            version,
            secret,
            revision,
        ))
    }

    /// Returns the keyring of a new key; none if it does not exist and is to be created.
    fn keyring_for(
        &self,
        caller: &AdminCaller,
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

impl Details {
    fn parse(request: &api::CreateKeyRequest) -> Result<Self, Status> {
        Ok(Self {
            consumer: field::parse("consumer", &request.consumer)?,
            scopes: request
                .scopes
                .iter()
                .map(|scope| field::parse::<Scope>("scopes", scope))
                .collect::<Result<_, _>>()?,
            allowed_sources: AllowedSources::parse(&request.allowed_sources)
                .map_err(|problem| error::invalid("allowed_sources", problem))?,
            not_before: field::timestamp("not_before", request.not_before)?,
            expires_in: field::duration("expires_in", request.expires_in)?,
        })
    }
}

/// Returns the error of an import that is committed, but not confirmed by every sidecar.
fn not_confirmed(key_id: KeyId, problem: RotationError) -> Status {
    explained(
        &format!("key {key_id} is imported, but not every sidecar accepts it yet"),
        problem,
    )
}

/// Returns the status of a failed wait, with `what` it means.
fn explained(what: &str, problem: RotationError) -> Status {
    let status = error::rotation(problem);
    let message = format!("{what}; {}", status.message());
    Status::with_metadata(status.code(), message, status.metadata().clone())
}

impl AdminApi {
    fn order(
        &self,
        request: api::CreateKeyRequest,
        imported: Option<Secret>,
    ) -> Result<Order, Status> {
        let patience = self.patience(request.timeout, request.pass_by.clone())?;
        if request.timeout.is_some() && !request.wait {
            return Err(error::invalid("timeout", "leave it out, or set wait"));
        }
        if request.pass_by.is_some() && !request.wait {
            return Err(error::invalid("pass_by", "leave it out, or set wait"));
        }
        Ok(Order {
            wait: request.wait.then_some(patience),
            imported,
            request,
        })
    }
}
