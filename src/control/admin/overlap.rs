//! Rotations that are under way: retires a version, extends an overlap, rolls back and aborts.

use tonic::Status;

use super::{AdminApi, Streamed, error, field, messages, progress::Underway};
use crate::{
    control::{journal::CommitError, token::AdminCaller},
    key::{Change, KeyId, Timestamp, VersionNumber, VersionRef, VersionState},
    proto::admin::{self as api, extend_overlap_request::To},
    serving::Target,
};

impl AdminApi {
    pub(super) async fn retire_version(
        &self,
        caller: AdminCaller,
        request: api::RetireVersionRequest,
    ) -> Result<api::RetireVersionResponse, Status> {
        let key_id: KeyId = field::parse("key_id", &request.key_id)?;
        let version = VersionNumber::new(request.version);
        let served = self.holding(key_id)?;
        let force = request.force.then_some(request.reason.as_str());
        let committed = self
            .catalog
            .commit(&served, &caller.actor, |keyring, now| {
                let evidence = self.evidence(keyring, self.pace.now());
                let changes = keyring.retire(key_id, version, &evidence, force, now)?;
                let retired = changes.iter().find_map(|change| {
                    if let Change::VersionRetired {
                        version, reason, ..
                    } = change
                    {
                        Some((*version, reason.to_string()))
                    } else {
                        None
                    }
                });
                Ok((changes, retired))
            })
            .await
            .map_err(|error| self.in_use(&served, error))?;
        let (version, reason) = committed
            .value
            .ok_or_else(|| Status::internal("nothing was retired"))?;
        tracing::info!(
            actor = caller.actor,
            auth.key.id = %key_id,
            auth.key.version = version.get(),
            forced = request.force,
            reason,
            "version retired"
        );
        Ok(api::RetireVersionResponse {
            keyring: served.name().to_string(),
            key_id: key_id.to_string(),
            version: version.get(),
            revision: committed.revision.get(),
            reason,
        })
    }

    pub(super) async fn extend_overlap(
        &self,
        caller: AdminCaller,
        request: api::ExtendOverlapRequest,
    ) -> Result<api::ExtendOverlapResponse, Status> {
        let key_id: KeyId = field::parse("key_id", &request.key_id)?;
        let version = VersionNumber::new(request.version);
        let to = match request.to {
            Some(To::Until(until)) => Ok(field::timestamp("until", Some(until))?),
            Some(To::By(by)) => Err(field::duration("by", Some(by))?.unwrap_or_default()),
            None => return Err(error::invalid("until", "is missing, give `until` or `by`")),
        };
        let served = self.holding(key_id)?;
        let committed = self
            .catalog
            .commit(&served, &caller.actor, |keyring, now| {
                let key = keyring.key(key_id)?;
                let deadline = key
                    .retiring()
                    .filter(|retiring| version.is_none_or(|number| number == retiring.number))
                    .find_map(|retiring| match retiring.state {
                        VersionState::Retiring { until, .. } => Some(until),
                        VersionState::Pending { .. }
                        | VersionState::Active { .. }
                        | VersionState::Retired { .. }
                        | VersionState::Revoked { .. } => None,
                    });
                let until = match to {
                    Ok(until) => until.unwrap_or(now),
                    Err(by) => deadline
                        .map_or(now, |deadline| deadline.max(now))
                        .saturating_add(by),
                };
                let changes = keyring.extend(key_id, version, until, &request.reason)?;
                let extended = changes.iter().find_map(|change| {
                    if let Change::OverlapExtended { version, until, .. } = change {
                        Some((*version, *until))
                    } else {
                        None
                    }
                });
                Ok((changes, extended))
            })
            .await
            .map_err(error::commit)?;
        let (version, until): (VersionNumber, Timestamp) = committed
            .value
            .ok_or_else(|| Status::internal("nothing was extended"))?;
        tracing::info!(
            actor = caller.actor,
            auth.key.id = %key_id,
            auth.key.version = version.get(),
            until = %until,
            reason = request.reason,
            "overlap extended"
        );
        Ok(api::ExtendOverlapResponse {
            keyring: served.name().to_string(),
            key_id: key_id.to_string(),
            version: version.get(),
            until: messages::time(Some(until)),
            revision: committed.revision.get(),
        })
    }

    pub(super) async fn roll_back(
        &self,
        caller: AdminCaller,
        request: api::RollBackRequest,
    ) -> Result<Streamed<api::RollBackResponse>, Status> {
        let key_id: KeyId = field::parse("key_id", &request.key_id)?;
        if request.pass_by.is_some() && !request.wait {
            return Err(error::invalid("pass_by", "leave it out, or set wait"));
        }
        let patience = self.patience(request.timeout, request.pass_by)?;
        let served = self.holding(key_id)?;
        let (name, key) = (served.name(), Some(key_id));
        self.note_passed_by(&caller.actor, "roll-back", name, key, &patience)
            .await?;
        let began = self.catalog.clock().boot();
        let committed = self
            .catalog
            .commit(&served, &caller.actor, |keyring, now| {
                let changes = keyring.roll_back(key_id, &request.reason, now)?;
                let back = changes.iter().find_map(|change| {
                    if let Change::RolledBack {
                        version, replaced, ..
                    } = change
                    {
                        Some((*version, *replaced))
                    } else {
                        None
                    }
                });
                Ok((changes, back))
            })
            .await
            .map_err(error::commit)?;
        let (version, replaced) = committed
            .value
            .ok_or_else(|| Status::internal("nothing was rolled back"))?;
        tracing::info!(
            actor = caller.actor,
            auth.key.id = %key_id,
            auth.key.version = version.get(),
            reason = request.reason,
            "rotation rolled back"
        );
        let answer = api::RollBackResponse {
            keyring: served.name().to_string(),
            key_id: key_id.to_string(),
            version: version.get(),
            replaced_version: replaced.map_or(0, |replaced| replaced.version.get()),
            replaced_until: messages::time(replaced.map(|replaced| replaced.until)),
            revision: committed.revision.get(),
            ..api::RollBackResponse::default()
        };
        let underway = Underway {
            target: Target::Applied(committed.revision, VersionRef { key_id, version }),
            served,
            began,
            is_new: true,
        };
        let wait = request.wait.then_some(patience);
        Ok(
            self.tell_progress(underway, wait, move |step| api::RollBackResponse {
                barrier: Some(step.barrier),
                done: step.done,
                propagation: step.propagation,
                ..answer.clone()
            }),
        )
    }

    pub(super) async fn abort_rotation(
        &self,
        caller: AdminCaller,
        request: api::AbortRotationRequest,
    ) -> Result<api::AbortRotationResponse, Status> {
        let key_id: KeyId = field::parse("key_id", &request.key_id)?;
        let served = self.holding(key_id)?;
        let committed = self
            .catalog
            .commit(&served, &caller.actor, |keyring, _| {
                let pending = keyring.key(key_id)?.pending().map(|pending| pending.number);
                Ok((keyring.abort(key_id, &request.reason)?, pending))
            })
            .await
            .map_err(error::commit)?;
        tracing::info!(
            actor = caller.actor,
            auth.key.id = %key_id,
            reason = request.reason,
            "rotation aborted"
        );
        Ok(api::AbortRotationResponse {
            keyring: served.name().to_string(),
            key_id: key_id.to_string(),
            version: committed.value.map_or(0, VersionNumber::get),
            revision: committed.revision.get(),
        })
    }

    /// Returns the status of a commit that failed. If the version is in use, it names the callers.
    fn in_use(&self, served: &crate::control::served::ServedKeyring, error: CommitError) -> Status {
        let CommitError::Refused(crate::key::OperationRefusal::InUse { version, .. }) = &error
        else {
            return error::commit(error);
        };
        let who = self.callers_of(served.name(), *version);
        let status = error::commit(error);
        if who.is_empty() {
            return status;
        }
        Status::failed_precondition(format!("{}; used by {}", status.message(), who.join("; ")))
    }
}
