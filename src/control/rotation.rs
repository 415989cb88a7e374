//! The steps of a rotation and of a revocation that take time: commit, wait for every sidecar, commit again.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    catalog::Catalog,
    fleet::Fleet,
    journal::CommitError,
    served::ServedKeyring,
    sink::{SecretDelivery, SinkError, Sinks},
    spans::OpenSpan,
};
use crate::{
    clock::BootTime,
    duration::written,
    key::{
        KeyId, KeyState, Keyring, Lifetime, OperationRefusal, Revision, RotationId, Secret,
        SinkName, Timestamp, VersionNumber, VersionRef, VersionState, Window,
        change::{Change, OldVersion},
        operation::{OldEnds, StageSpec, Which},
        rotation,
    },
    serving::{Barrier, Target},
};

mod wait;

pub(crate) use wait::{Goal, Patience};

/// Rotates keys and revokes them.
#[derive(Clone, Debug)]
pub(crate) struct Rotations {
    catalog: Arc<Catalog>,
    fleet: Arc<Fleet>,
    sinks: Arc<Sinks>,
    stop: CancellationToken,
}

/// The parameters of a rotation.
#[derive(Clone, Debug)]
pub(crate) struct RotationSpec {
    pub(crate) key_id: KeyId,
    /// The id of the rotation. None: a new id.
    pub(crate) id: Option<RotationId>,
    /// When the old version ends.
    pub(crate) old_ends: OldEnds,
    /// The lifetime of the new version. None: the planned lifetime of the version before it.
    pub(crate) lifetime: Option<Lifetime>,
    /// How long to wait for sidecars, and which to pass by.
    pub(crate) patience: Patience,
    /// The sink that receives the secret before the hand-over. None: the caller receives it.
    pub(crate) sink: Option<SinkName>,
    /// The time at which the policy made the rotation due. It is refused when it is no longer due:
    /// another control plane on the same store may have been first. None: a caller asked for it.
    pub(crate) due_at: Option<Timestamp>,
}

/// A version on its way to the sidecars. Its secret exists nowhere else.
#[derive(Debug)]
struct Staged {
    served: Arc<ServedKeyring>,
    rotation: RotationId,
    version: VersionRef,
    window: Window,
    secret: Secret,
    revision: Revision,
    at: BootTime,
}

/// The progress of a rotation.
#[derive(Debug)]
pub(crate) enum RotationProgress {
    /// The new version is staged, and on its way to the sidecars.
    Staged {
        rotation: RotationId,
        version: VersionNumber,
        /// The revision that staged it.
        revision: Revision,
    },
    /// How many sidecars have confirmed the new version.
    Waiting(Barrier),
}

/// A rotation after its hand-over.
#[derive(Debug)]
pub(crate) struct HandedOver {
    /// The new version's secret.
    pub(crate) secret: Secret,
    /// The new version.
    pub(crate) version: VersionRef,
    /// The version that is retiring now.
    pub(crate) old: Option<OldVersion>,
    /// The revision of the hand-over.
    pub(crate) revision: Revision,
    /// The state of all sidecars at the end of the wait.
    pub(crate) barrier: Barrier,
    /// The time from the start of the commit that staged the version to the end of the wait.
    pub(crate) propagation: Duration,
}

/// A committed revocation.
#[derive(Debug)]
pub(crate) struct Revoked {
    /// The requested versions; all of them are revoked now.
    pub(crate) versions: Vec<VersionNumber>,
    /// The revision of the revocation.
    pub(crate) revision: Revision,
    /// Whether at least one of them was not revoked before.
    pub(crate) is_new: bool,
}

/// Why a rotation was not handed over, or why the wait for sidecars failed after a commit.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RotationError {
    /// A commit failed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// Not every sidecar confirmed in time. A rotation was withdrawn and nothing was handed out; a
    /// revocation stands.
    #[error("confirmed by {confirmed} of {total} sidecars after {waited}: {missing}", confirmed = barrier.confirmed, total = barrier.total, waited = written(whole_seconds(*waited)), missing = wait::missing(barrier))]
    TimedOut {
        /// The sidecars, with those that did not confirm.
        barrier: Barrier,
        /// The length of the wait.
        waited: Duration,
    },
    /// The caller disconnected before the hand-over. The version was withdrawn.
    #[error("the caller disconnected before the hand-over; the new version was withdrawn")]
    Abandoned,
    /// The rotation was aborted, or its version was revoked.
    #[error("the rotation was aborted, or its version was revoked; nothing was handed out")]
    TakenBack,
    /// The control plane stops. Before its delivery, a rotation was withdrawn and nothing was
    /// handed out; after that, its version stays staged. A revocation stands.
    #[error("the control plane is stopping and no longer waits for sidecars")]
    Stopping,
    /// The store failed at the hand-over, and may have committed it.
    #[error(
        "the store failed during the hand-over and may have committed it; when the store works again, `relatch key show {key_id}` shows whether it did",
        key_id = version.key_id
    )]
    Unsure {
        /// The version that was to be handed over.
        version: VersionRef,
        /// The last error of the store, or the refusal of a later attempt.
        source: CommitError,
    },
}

/// The most attempts at a hand-over while the store fails, and the wait between two of them. A disk
/// that is busy for longer than that needs an operator.
const HAND_OVER_TRIES: u32 = 5;
const HAND_OVER_RETRY: Duration = Duration::from_secs(1);
/// The time after the caller's own timeout at which the reconciler withdraws a staged version that
/// no call withdrew.
const WITHDRAW_SLACK: Duration = Duration::from_secs(30);
/// A delivery in progress for longer than this is in doubt: from then on, a use of the version
/// counts as its success. No sink takes this long.
const DELIVERY_DOUBT: Duration = Duration::from_hours(1);
/// The shortest and the longest wait before a delivery is retried.
const DELIVERY_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(5));

impl Rotations {
    /// Creates the rotations of the catalog's keys, which wait for the fleet until `stop`.
    #[must_use]
    pub(crate) const fn new(
        catalog: Arc<Catalog>,
        fleet: Arc<Fleet>,
        sinks: Arc<Sinks>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            catalog,
            fleet,
            sinks,
            stop,
        }
    }

    /// Returns the sinks that a policy may name.
    #[must_use]
    pub(crate) fn sinks(&self) -> &Sinks {
        &self.sinks
    }

    /// Stages a version, waits until every sidecar that may serve accepts it, delivers it if the
    /// rotation has a sink, and hands it over.
    ///
    /// The version is withdrawn when the receiver of `progress` is dropped before the hand-over,
    /// when the wait times out, or when the control plane stops. After a delivery has begun, the
    /// version is not withdrawn: the secret may have arrived. The reconciler, which learns when the
    /// version is used, and operators decide what happens to it.
    /// To be run in a task of its own: dropping the future leaves the withdrawal to the reconciler.
    ///
    /// # Errors
    ///
    /// When the rotation was not handed over: then nothing was handed out, except where a delivery
    /// has begun. Also when the store may have committed the hand-over ([`RotationError::Unsure`]).
    pub(crate) async fn start_rotation(
        &self,
        actor: &str,
        spec: &RotationSpec,
        progress: &mpsc::Sender<RotationProgress>,
    ) -> Result<HandedOver, RotationError> {
        let span = self.catalog.tracer().begin("relatch.rotation");
        span.set_actor(actor);
        span.set("auth.key.id", spec.key_id.to_string());
        let rotated = span
            .carry(self.rotate_in(&span, actor, spec, progress))
            .await;
        match &rotated {
            Ok(_) => span.set("relatch.rotation.outcome", "handed_over"),
            Err(error) => error.tell(&span, "relatch.rotation.outcome"),
        }
        rotated
    }

    async fn rotate_in(
        &self,
        span: &OpenSpan,
        actor: &str,
        spec: &RotationSpec,
        progress: &mpsc::Sender<RotationProgress>,
    ) -> Result<HandedOver, RotationError> {
        let staged = self.stage(actor, spec).await?;
        span.set("auth.keyring", staged.served.name().to_string());
        span.set("auth.rotation.id", staged.rotation.to_string());
        span.set("auth.key.version", i64::from(staged.version.version.get()));
        let _ = progress
            .send(RotationProgress::Staged {
                rotation: staged.rotation,
                version: staged.version.version,
                revision: staged.revision,
            })
            .await;
        let goal = Goal {
            served: &staged.served,
            target: Target::Applied(staged.revision, staged.version),
            committed_at: Some(staged.at),
            patience: &spec.patience,
        };
        let waited = tokio::select! {
            waited = self.wait(&goal, progress) => waited,
            () = self.taken_back(&staged) => Err(RotationError::TakenBack),
        };
        let barrier = match waited {
            Ok(barrier) => barrier,
            Err(error @ RotationError::TakenBack) => return Err(error),
            Err(error) => {
                self.withdraw(actor, &staged, &error).await?;
                return Err(error);
            }
        };
        let propagation = self.catalog.clock().boot().saturating_since(staged.at);
        if progress.is_closed() {
            // All sidecars confirmed before this task learned that the caller disconnected.
            self.withdraw(actor, &staged, &RotationError::Abandoned)
                .await?;
            return Err(RotationError::Abandoned);
        }
        if let Some(sink) = &spec.sink {
            self.deliver(actor, &staged, sink).await?;
        }
        let (old, revision) = self.hand_over(actor, &staged, &spec.old_ends).await?;
        Ok(HandedOver {
            secret: staged.secret,
            version: staged.version,
            old,
            revision,
            barrier,
            propagation,
        })
    }

    /// Commits the hand-over. A store that fails may have written the commit: it is asked again
    /// before the caller receives a result.
    async fn hand_over(
        &self,
        actor: &str,
        staged: &Staged,
        old_ends: &OldEnds,
    ) -> Result<(Option<OldVersion>, Revision), RotationError> {
        let mut tries = 1;
        loop {
            let committed = self
                .catalog
                .commit(&staged.served, actor, |keyring, now| {
                    let VersionRef { key_id, version } = staged.version;
                    if is_handed_over(keyring, staged.rotation, staged.version) {
                        let old = keyring.key(key_id)?.replaced_by(staged.rotation, version);
                        return Ok((Vec::new(), old));
                    }
                    let changes =
                        keyring.hand_over(staged.version.key_id, staged.rotation, old_ends, now)?;
                    let old = changes.iter().find_map(Change::old_version);
                    Ok((changes, old))
                })
                .await;
            let source = match committed {
                Ok(committed) => return Ok((committed.value, committed.revision)),
                Err(error @ CommitError::Refused(_)) if tries == 1 => return Err(error.into()),
                // The failed attempt may have handed the version over, and another call may have
                // revoked or replaced it since.
                Err(source @ CommitError::Refused(_)) => {
                    let version = staged.version;
                    return Err(RotationError::Unsure { version, source });
                }
                Err(
                    error @ (CommitError::Contended | CommitError::Log(_) | CommitError::Random(_)),
                ) => error,
            };
            if tries >= HAND_OVER_TRIES {
                let version = staged.version;
                return Err(RotationError::Unsure { version, source });
            }
            tries += 1;
            tracing::warn!(
                auth.keyring = %staged.served.name(),
                auth.key.id = %staged.version.key_id,
                error = &source as &dyn std::error::Error,
                "the store failed during a hand-over; asking it again"
            );
            tokio::select! {
                () = tokio::time::sleep(HAND_OVER_RETRY) => {}
                () = self.stop.cancelled() => tries = HAND_OVER_TRIES,
            }
        }
    }

    /// Returns when a staged version is no longer pending.
    async fn taken_back(&self, staged: &Staged) {
        let mut changes = self.catalog.watch();
        loop {
            changes.mark_unchanged();
            let is_pending = {
                let state = staged.served.journal().state();
                let version = state.keyring.version(staged.version);
                version.is_some_and(|(_, version)| version.state.kind() == KeyState::Pending)
            };
            if !is_pending || changes.changed().await.is_err() {
                return;
            }
        }
    }

    async fn stage(&self, actor: &str, spec: &RotationSpec) -> Result<Staged, RotationError> {
        let served = self
            .catalog
            .holding(spec.key_id)
            .map_err(CommitError::from)?;
        let id = match spec.id {
            Some(id) => id,
            None => RotationId::generate().map_err(CommitError::from)?,
        };
        let prefix = served.journal().state().keyring.prefix().clone();
        let secret = Secret::generate(&prefix, spec.key_id).map_err(CommitError::from)?;
        let at = self.catalog.clock().boot();
        let longest = spec.patience.longest(self.fleet.max_serve_for());
        let staged = self
            .catalog
            .commit(&served, actor, |keyring, now| {
                let key = keyring.key(spec.key_id)?;
                let lifetime = spec.lifetime.unwrap_or_else(|| key.lifetime());
                let window = Window::new(None, lifetime.end(now));
                let stage = StageSpec {
                    key_id: spec.key_id,
                    rotation: id,
                    window,
                    withdraw_after: now.saturating_add(longest + WITHDRAW_SLACK),
                };
                if spec
                    .due_at
                    .is_some_and(|at| !rotation::is_rotation_due(keyring, key, at))
                {
                    return Err(not_due(spec.key_id).into());
                }
                let changes = keyring.stage(stage, &secret.presented(), served.pepper(), now)?;
                let number = key.next_number();
                Ok((changes, (number, window)))
            })
            .await?;
        let (number, window) = staged.value;
        Ok(Staged {
            served,
            rotation: id,
            version: VersionRef {
                key_id: spec.key_id,
                version: number,
            },
            window,
            secret,
            revision: staged.revision,
            at,
        })
    }

    /// Delivers the secret of a staged version. A failed delivery is retried for as long as the
    /// version is staged. The rotation is held meanwhile: the secret exists nowhere else.
    async fn deliver(
        &self,
        actor: &str,
        staged: &Staged,
        name: &SinkName,
    ) -> Result<(), RotationError> {
        let Staged {
            served,
            rotation,
            version,
            ..
        } = staged;
        let consumer = self
            .catalog
            .commit(served, actor, |keyring, now| {
                let withdraw_after = now.saturating_add(DELIVERY_DOUBT);
                let changes = keyring.begin_delivery(
                    version.key_id,
                    *rotation,
                    name.clone(),
                    withdraw_after,
                )?;
                Ok((changes, keyring.key(version.key_id)?.consumer.clone()))
            })
            .await?
            .value;
        let delivery = SecretDelivery {
            keyring: served.name(),
            consumer: &consumer,
            version: *version,
            rotation: *rotation,
            window: staged.window,
            secret: &staged.secret,
        };
        let mut wait = DELIVERY_RETRY.0;
        loop {
            let Err(error) = self.try_to_deliver(name, &delivery).await else {
                return Ok(());
            };
            tracing::error!(
                auth.keyring = %served.name(),
                auth.key.id = %version.key_id,
                auth.key.version = version.version.get(),
                error = &error as &dyn std::error::Error,
                "the secret was not delivered; the rotation is held before its hand-over"
            );
            let reason: Arc<str> = error.to_string().into();
            self.catalog
                .commit(served, actor, |keyring, now| {
                    let reason = Arc::clone(&reason);
                    let changes = keyring.hold_staged(version.key_id, *rotation, reason, now)?;
                    Ok((changes, ()))
                })
                .await?;
            tokio::select! {
                () = tokio::time::sleep(wait) => wait = DELIVERY_RETRY.1.min(2 * wait),
                () = self.stop.cancelled() => return Err(RotationError::Stopping),
            }
        }
    }

    async fn try_to_deliver(
        &self,
        name: &SinkName,
        delivery: &SecretDelivery<'_>,
    ) -> Result<(), SinkError> {
        let span = self.catalog.tracer().begin("relatch.delivery");
        span.set("relatch.sink", name.to_string());
        let delivered = match self.sinks.get(name) {
            Ok(sink) => span.carry(sink.deliver(delivery)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &delivered {
            span.fail(error.kind());
        }
        delivered
    }

    /// Withdraws the version that a call staged for `rotation`, if it is still staged. The call has
    /// failed. Returns whether the version was withdrawn. A version whose secret may be in a sink
    /// stays.
    ///
    /// # Errors
    ///
    /// When the store fails.
    pub(crate) async fn withdraw_left(
        &self,
        actor: &str,
        served: &ServedKeyring,
        key_id: KeyId,
        rotation: RotationId,
    ) -> Result<bool, CommitError> {
        let committed = self.catalog.commit(served, actor, |keyring, _| {
            let key = keyring.key(key_id)?;
            let is_left = key.pending().is_some_and(|version| {
                version.staged_by == Some(rotation)
                    && matches!(version.state, VersionState::Pending { sink: None, .. })
            });
            if !is_left {
                return Ok((Vec::new(), false));
            }
            let reason = "the call that staged it failed before the hand-over".into();
            Ok((keyring.withdraw(key_id, rotation, reason)?, true))
        });
        Ok(committed.await?.value)
    }

    /// Revokes versions of a key immediately. A repeated call changes nothing, and returns a
    /// revision at which all of them are revoked.
    ///
    /// # Errors
    ///
    /// When the revocation is refused, or the store fails.
    pub(crate) async fn revoke(
        &self,
        served: &ServedKeyring,
        actor: &str,
        key_id: KeyId,
        which: Which,
        reason: &str,
    ) -> Result<Revoked, CommitError> {
        let committed = self
            .catalog
            .commit(served, actor, |keyring, _| {
                let changes = keyring.revoke(key_id, which, reason)?;
                let versions = keyring.asked_for(key_id, which)?;
                let versions = versions.iter().map(|version| version.number).collect();
                let is_new = !changes.is_empty();
                Ok((changes, (versions, is_new)))
            })
            .await?;
        let (versions, is_new) = committed.value;
        Ok(Revoked {
            versions,
            revision: committed.revision,
            is_new,
        })
    }

    async fn withdraw(
        &self,
        actor: &str,
        staged: &Staged,
        why: &RotationError,
    ) -> Result<(), CommitError> {
        let reason: Arc<str> = why.to_string().into();
        self.catalog
            .commit(&staged.served, actor, |keyring, _: Timestamp| {
                let reason = Arc::clone(&reason);
                let key_id = staged.version.key_id;
                Ok((keyring.withdraw(key_id, staged.rotation, reason)?, ()))
            })
            .await?;
        Ok(())
    }
}

impl RotationError {
    /// Returns whether nothing was handed out, and nothing will be. This holds only for a rotation
    /// without a sink.
    #[must_use]
    pub(crate) const fn is_withdrawn(&self) -> bool {
        match self {
            Self::Commit(_)
            | Self::TimedOut { .. }
            | Self::Abandoned
            | Self::TakenBack
            | Self::Stopping => true,
            Self::Unsure { .. } => false,
        }
    }

    /// Sets `attribute` on the span of the failed operation, and marks the span as an error where
    /// the store failed, the wait timed out or the hand-over is unsure.
    fn tell(&self, span: &OpenSpan, attribute: &'static str) {
        let outcome = match self {
            Self::Commit(CommitError::Refused(_)) => "refused",
            Self::Commit(CommitError::Contended | CommitError::Log(_) | CommitError::Random(_)) => {
                "failed"
            }
            Self::TimedOut { .. } => "timed_out",
            Self::Abandoned => "abandoned",
            Self::TakenBack => "taken_back",
            Self::Stopping => "stopping",
            Self::Unsure { .. } => "unsure",
        };
        span.set(attribute, outcome);
        if matches!(outcome, "failed" | "timed_out" | "unsure") {
            span.fail(outcome);
        }
    }
}

/// Returns whether a rotation has handed a version over, which is still active.
fn is_handed_over(keyring: &Keyring, rotation: RotationId, version: VersionRef) -> bool {
    keyring.version(version).is_some_and(|(_, version)| {
        version.state.kind() == KeyState::Active && version.staged_by == Some(rotation)
    })
}

/// Rounds down to whole seconds, 1 at least: people read durations in this form.
fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs().max(1))
}

fn not_due(key_id: KeyId) -> OperationRefusal {
    OperationRefusal::Unsafe(format!("the rotation of key {key_id} is no longer due"))
}

#[cfg(test)]
mod tests;
