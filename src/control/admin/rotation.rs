//! Starts rotations and revocations, and reports their progress.

use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    AdminApi, Streamed, error, field,
    idempotency::{committed, withdrawn},
    messages,
    progress::{MAX_PROGRESS, Underway},
};
use crate::{
    control::{
        calls::{CallId, CallIdentity, Kept},
        rotation::{HandedOver, RotationError, RotationProgress, RotationSpec},
        served::ServedKeyring,
        spans,
        token::AdminCaller,
    },
    key::{
        KeyId, Lifetime, RotationId, VersionNumber, VersionState,
        operation::{MAX_REASON_LEN, OldEnds, Which},
    },
    proto::admin::{
        self as api, revoke_request, start_rotation_request, start_rotation_response::Step,
    },
    serving::Target,
};

impl AdminApi {
    pub(super) async fn start_rotation(
        &self,
        caller: AdminCaller,
        request: &api::StartRotationRequest,
    ) -> Result<Streamed<api::StartRotationResponse>, Status> {
        let overlap = field::duration("overlap", request.overlap)?;
        let old_ends = match (request.emergency, overlap) {
            (false, overlap) => OldEnds::AfterOverlap(overlap),
            (true, None) if request.reason.trim().is_empty() => {
                return Err(error::invalid(
                    "reason",
                    "is missing, give the reason of the emergency",
                ));
            }
            (true, None) if request.reason.len() > MAX_REASON_LEN => {
                let problem = format!("give a reason of at most {MAX_REASON_LEN} bytes");
                return Err(error::invalid("reason", problem));
            }
            (true, None) => OldEnds::AtOnce(request.reason.as_str().into()),
            (true, Some(_)) => {
                let problem = "an emergency rotation has no overlap; leave it out";
                return Err(error::invalid("overlap", problem));
            }
        };
        let spec = RotationSpec {
            key_id: field::parse("key_id", &request.key_id)?,
            id: None,
            old_ends,
            sink: None,
            due_at: None,
            lifetime: lifetime(request.lifetime)?,
            patience: self.patience(request.timeout, request.pass_by.clone())?,
        };
        let patience = spec.patience.clone();
        let served = self.holding(spec.key_id)?;
        self.note_passed_by(
            &caller.actor,
            "rotation",
            served.name(),
            Some(spec.key_id),
            &patience,
        )
        .await?;
        let key = &request.idempotency_key;
        let identity = self.identify(&caller, "StartRotation", key, request)?;
        let (progress, steps) = mpsc::channel(MAX_PROGRESS);
        let (outcome, last) = tokio::sync::oneshot::channel();
        let api = self.clone();
        self.tasks.spawn(spans::carried(async move {
            let key_id = spec.key_id;
            let is_repeatable = identity.is_some();
            let rotated = api
                .rotate_once(&caller, spec, &served, identity, &progress)
                .await;
            // A version that is handed over stays handed over.
            if let Err(Ok(_)) = outcome.send(rotated) {
                tracing::warn!(
                    actor = caller.actor,
                    auth.key.id = %key_id,
                    is_repeatable,
                    "the caller of a rotation disconnected before it received the new secret; only the same call with its idempotency key receives it, for ten minutes"
                );
            }
        }));
        let steps = ReceiverStream::new(steps).map(|step| Ok(started(step)));
        let api = self.clone();
        let last = spans::carried(async move {
            let stopped = || Err(Status::aborted("the control plane is stopping"));
            let (answer, underway) = last.await.unwrap_or_else(|_| stopped())?;
            let handed_over = futures_util::stream::iter([Ok(answer)]);
            let revocation = underway.map(|underway| {
                api.tell_progress(underway, Some(patience), |step| {
                    api::StartRotationResponse {
                        step: Some(Step::OldRevoked(api::OldRevoked {
                            barrier: Some(step.barrier),
                            done: step.done,
                            propagation: step.propagation,
                        })),
                    }
                })
            });
            let revocation = futures_util::stream::iter(revocation).flatten();
            Ok::<_, Status>(handed_over.chain(revocation))
        });
        let last = futures_util::stream::once(last);
        Ok(Box::pin(steps.chain(last.try_flatten())))
    }

    /// Rotates a key, unless an equal call has done so. Returns the answer, and the revocation that
    /// has still to reach the sidecars.
    async fn rotate_once(
        &self,
        caller: &AdminCaller,
        spec: RotationSpec,
        served: &Arc<ServedKeyring>,
        identity: Option<CallIdentity>,
        progress: &mpsc::Sender<RotationProgress>,
    ) -> Result<(api::StartRotationResponse, Option<Underway>), Status> {
        let mut turn = self.turn(identity).await?;
        let is_emergency = matches!(spec.old_ends, OldEnds::AtOnce(_));
        let revocation = |revision, began| Underway {
            target: Target::Revoked(revision),
            served: Arc::clone(served),
            began,
            is_new: true,
        };
        if let Some(Kept::Rotation(done)) = turn.kept() {
            let is_revoked = is_emergency && done.old.is_some();
            let underway = is_revoked.then(|| Underway {
                is_new: false,
                ..revocation(done.revision, self.catalog.clock().boot())
            });
            return Ok((handed_over(served, done, is_revoked)?, underway));
        }
        let id = turn.id(|id| staged_by(served, spec.key_id, id.into()).is_some());
        let id = match id.map_err(|error| error::commit(error.into()))? {
            CallId::New(id) => id,
            CallId::Used(id) => {
                // No equal call is under way: a version that is still staged was left by a call
                // that has failed.
                let withdrawn = self
                    .rotations
                    .withdraw_left(&caller.actor, served, spec.key_id, id.into())
                    .await
                    .map_err(error::commit)?;
                if !withdrawn {
                    let step = handed_over_before(served, spec.key_id, id.into())?;
                    let underway = is_emergency.then(|| Underway {
                        is_new: false,
                        ..revocation(served.revision(), self.catalog.clock().boot())
                    });
                    return Ok((step, underway));
                }
                id
            }
        };
        if progress.is_closed() {
            return Err(withdrawn(error::rotation(RotationError::Abandoned)));
        }
        let spec = RotationSpec {
            id: Some(id.into()),
            ..spec
        };
        let rotated = self
            .rotations
            .start_rotation(&caller.actor, &spec, progress)
            .await;
        let done = match rotated {
            Ok(done) => Arc::new(done),
            Err(error) => {
                tracing::warn!(
                    actor = caller.actor,
                    auth.key.id = %spec.key_id,
                    error = &error as &dyn std::error::Error,
                    "rotation not handed over"
                );
                return Err(if error.is_withdrawn() {
                    withdrawn(error::rotation(error))
                } else {
                    error::rotation(error)
                });
            }
        };
        tracing::info!(
            actor = caller.actor,
            auth.key.id = %spec.key_id,
            auth.key.version = done.version.version.get(),
            sidecars = done.barrier.total,
            propagation_ms = done.propagation.as_millis(),
            "rotation handed over"
        );
        turn.keep(Kept::Rotation(Arc::clone(&done)));
        let is_revoked = is_emergency && done.old.is_some();
        let underway = is_revoked.then(|| revocation(done.revision, self.catalog.clock().boot()));
        Ok((handed_over(served, &done, is_revoked)?, underway))
    }

    pub(super) async fn revoke(
        &self,
        caller: AdminCaller,
        request: api::RevokeRequest,
    ) -> Result<Streamed<api::RevokeResponse>, Status> {
        let key_id: KeyId = field::parse("key_id", &request.key_id)?;
        let which = match request.which {
            Some(revoke_request::Which::Version(number)) => Which::Version(
                VersionNumber::new(number)
                    .ok_or_else(|| error::invalid("version", "use a number from 1"))?,
            ),
            Some(revoke_request::Which::All(true)) => Which::All,
            Some(revoke_request::Which::All(false)) | None => {
                return Err(error::invalid("which", "name a version, or set `all`"));
            }
        };
        if request.pass_by.is_some() && !request.wait {
            return Err(error::invalid("pass_by", "leave it out, or set wait"));
        }
        self.patience(request.timeout, None)?;
        let served = self
            .catalog
            .holding(key_id)
            .map_err(|refusal| error::refused(&refusal))?;
        let began = self.catalog.clock().boot();
        let revoked = self
            .rotations
            .revoke(&served, &caller.actor, key_id, which, &request.reason)
            .await
            .map_err(error::commit)?;
        // The revocation is in force, even if the wait is refused.
        let patience = self.patience(request.timeout, request.pass_by);
        let patience = patience.map_err(committed)?;
        let (name, key) = (served.name(), Some(key_id));
        self.note_passed_by(&caller.actor, "revocation", name, key, &patience)
            .await
            .map_err(committed)?;
        let answer = api::RevokeResponse {
            keyring: served.name().to_string(),
            key_id: key_id.to_string(),
            versions: revoked.versions.iter().map(|v| v.get()).collect(),
            revision: revoked.revision.get(),
            ..api::RevokeResponse::default()
        };
        let underway = Underway {
            target: Target::Revoked(revoked.revision),
            served,
            began,
            is_new: revoked.is_new,
        };
        let wait = request.wait.then_some(patience);
        Ok(
            self.tell_progress(underway, wait, move |step| api::RevokeResponse {
                barrier: Some(step.barrier),
                done: step.done,
                propagation: step.propagation,
                ..answer.clone()
            }),
        )
    }
}

fn lifetime(
    lifetime: Option<start_rotation_request::Lifetime>,
) -> Result<Option<Lifetime>, Status> {
    use start_rotation_request::Lifetime as Asked;
    match lifetime {
        None => Ok(None),
        Some(Asked::ExpiresIn(duration)) => {
            let duration = field::duration("expires_in", Some(duration))?;
            Ok(duration.map(Lifetime::Limited))
        }
        Some(Asked::NeverExpires(true)) => Ok(Some(Lifetime::Unlimited)),
        Some(Asked::NeverExpires(false)) => Err(error::invalid(
            "never_expires",
            "leave it out, or give expires_in if the version is to expire",
        )),
    }
}

fn started(progress: RotationProgress) -> api::StartRotationResponse {
    let step = match progress {
        RotationProgress::Staged {
            rotation,
            version,
            revision,
        } => Step::Staged(api::Staged {
            rotation_id: rotation.to_string(),
            version: version.get(),
            revision: revision.get(),
        }),
        RotationProgress::Waiting(barrier) => Step::Barrier(messages::barrier(&barrier)),
    };
    api::StartRotationResponse { step: Some(step) }
}

/// Returns the version of a key that a rotation staged.
fn staged_by(served: &ServedKeyring, key_id: KeyId, rotation: RotationId) -> Option<VersionNumber> {
    let state = served.journal().state();
    let key = state.keyring.key(key_id).ok()?;
    let mut versions = key.versions.values();
    let staged = versions.find(|version| version.staged_by == Some(rotation));
    staged.map(|version| version.number)
}

/// Returns the answer of a call that is forgotten, and has begun `rotation`.
fn handed_over_before(
    served: &ServedKeyring,
    key_id: KeyId,
    rotation: RotationId,
) -> Result<api::StartRotationResponse, Status> {
    let state = served.journal().state();
    let key = state.keyring.key(key_id);
    let key = key.map_err(|refusal| error::refused(&refusal))?;
    let mut versions = key.versions.values();
    let Some(version) = versions.find(|version| version.staged_by == Some(rotation)) else {
        return Err(Status::internal("the staged version does not exist"));
    };
    let number = version.number;
    match &version.state {
        VersionState::Active { .. }
        | VersionState::Retiring { .. }
        | VersionState::Retired { .. } => {
            let old = key.replaced_by(rotation, number);
            let issued =
                messages::issued(&state.keyring, key, version, "", state.keyring.revision());
            Ok(api::StartRotationResponse {
                step: Some(Step::HandedOver(api::HandedOver {
                    key: Some(api::IssuedKey {
                        secret_forgotten: true,
                        ..issued
                    }),
                    old_version: old.map_or(0, |old| old.version.get()),
                    old_until: messages::time(old.map(|old| old.until)),
                    barrier: None,
                    propagation: None,
                })),
            })
        }
        VersionState::Pending { .. } => Err(Status::aborted(format!(
            "version {number} of key {key_id} is still being staged; repeat the call"
        ))),
        VersionState::Revoked { reason, .. } => Err(Status::failed_precondition(format!(
            "this call staged version {number} of key {key_id} before, which is revoked ({reason}); to rotate again, repeat the call with a new idempotency key"
        ))),
    }
}

fn handed_over(
    served: &ServedKeyring,
    done: &HandedOver,
    is_old_revoked: bool,
) -> Result<api::StartRotationResponse, Status> {
    let state = served.journal().state();
    let (key, version) = state
        .keyring
        .version(done.version)
        .ok_or_else(|| Status::internal("the version that was handed over does not exist"))?;
    let key = messages::issued(
        &state.keyring,
        key,
        version,
        done.secret.expose(),
        done.revision,
    );
    Ok(api::StartRotationResponse {
        step: Some(Step::HandedOver(api::HandedOver {
            key: Some(key),
            old_version: done.old.map_or(0, |old| old.version.get()),
            old_until: messages::time(done.old.map(|old| old.until).filter(|_| !is_old_revoked)),
            barrier: Some(messages::barrier(&done.barrier)),
            propagation: messages::elapsed(done.propagation),
        })),
    })
}
