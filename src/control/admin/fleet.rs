//! Shows and forgets sidecars.

use tonic::Status;

use super::{AdminApi, error, messages};
use crate::{
    control::token::{AdminCaller, TokenChange},
    key::{KeyringName, operation::MAX_REASON_LEN},
    proto::admin as api,
    serving::{ForgetError, Gap, Run, RunKey},
};

impl AdminApi {
    pub(super) fn get_fleet(
        &self,
        request: &api::GetFleetRequest,
    ) -> Result<api::GetFleetResponse, Status> {
        let keyring = match request.keyring.as_str() {
            "" => None,
            name => Some(self.served("keyring", name)?.name().clone()),
        };
        let sidecars = self
            .fleet
            .members()
            .into_iter()
            .map(|(key, member)| self.describe_sidecar(key, member, keyring.as_ref()))
            .filter(|sidecar| keyring.is_none() || !sidecar.keyrings.is_empty())
            .collect();
        let gaps = self.fleet.gaps(keyring.as_ref());
        let gaps = gaps.into_iter().map(describe_gap).collect();
        Ok(api::GetFleetResponse { sidecars, gaps })
    }

    pub(super) async fn forget_sidecar(
        &self,
        caller: AdminCaller,
        request: api::ForgetSidecarRequest,
    ) -> Result<api::ForgetSidecarResponse, Status> {
        let api::ForgetSidecarRequest {
            node,
            run_id,
            reason,
        } = request;
        if reason.trim().is_empty() || reason.len() > MAX_REASON_LEN {
            let problem = format!("give a reason of at most {MAX_REASON_LEN} bytes");
            return Err(error::invalid("reason", problem));
        }
        let run = (!run_id.is_empty()).then_some(run_id.as_str());
        let refused = |refusal| {
            let which = match run {
                Some(run) => format!("run {run} of {node}"),
                None => node.clone(),
            };
            match refusal {
                ForgetError::Unknown => Status::not_found(format!(
                    "no sidecar {which} may serve; `relatch fleet` lists them"
                )),
                ForgetError::Connected => Status::failed_precondition(format!(
                    "{which} is connected: stop it, or wait until it has confirmed"
                )),
            }
        };
        let lost = self.fleet.lost_runs(&node, run).map_err(refused)?;
        // Before anything else, the audit log records who answers for it.
        let change = TokenChange::SidecarsForgotten {
            sidecars: lost.clone(),
            reason: reason.clone(),
        };
        let noted = self.tokens.note(&caller.actor, change).await;
        noted.map_err(error::commit)?;
        let forgotten = self.fleet.forget(&lost).map_err(refused)?;
        let recorded = self.fleet.record_news(&**self.catalog.store()).await;
        recorded.map_err(|failure| error::store(&failure))?;
        tracing::warn!(
            actor = caller.actor,
            node,
            runs = forgotten.len(),
            reason,
            "a sidecar is forgotten: nothing waits for it any more, although it may still serve"
        );
        Ok(api::ForgetSidecarResponse {
            forgotten: forgotten.iter().map(messages::run).collect(),
        })
    }

    fn describe_sidecar(
        &self,
        key: RunKey,
        member: Run,
        only: Option<&KeyringName>,
    ) -> api::Sidecar {
        let keyrings = member
            .keyrings
            .iter()
            .filter(|(name, _)| only.is_none_or(|only| *name == only))
            .map(|(name, holding)| {
                let progress = &holding.progress;
                let head = self.catalog.get(name).map(|served| served.revision());
                api::SidecarKeyring {
                    keyring: name.to_string(),
                    epoch: progress.epoch.get(),
                    applied_revision: progress.applied.get(),
                    durable_revision: progress.durable.get(),
                    missing: head.is_err(),
                    head_revision: head.unwrap_or_default().get(),
                    applied_at: messages::time(progress.applied_at),
                    rejected: progress
                        .rejected
                        .iter()
                        .map(|(item, reason)| format!("{item}: {reason}"))
                        .collect(),
                }
            })
            .collect();
        let clock = self.catalog.clock();
        let rest = member.rest(clock.boot());
        let (presence, since) = messages::presence(member.presence());
        api::Sidecar {
            node: key.node,
            run_id: key.run_id,
            presence: presence.into(),
            since: messages::time(since),
            serves_until: messages::time(rest.map(|rest| clock.wall().saturating_add(rest))),
            has_snapshot_file: member.file.is_some(),
            connected: member.is_connected(),
            cluster: member.about.cluster,
            version: member.about.version,
            labels: member.about.labels.into_iter().collect(),
            connected_at: messages::time(member.connected_at),
            last_seen: messages::time(Some(member.last_seen)),
            keyrings,
            complete_until: messages::time(member.complete_until),
        }
    }
}

fn describe_gap((key, gap): (RunKey, Gap)) -> api::GoneSidecar {
    api::GoneSidecar {
        node: key.node,
        cluster: gap.about.cluster,
        version: gap.about.version,
        forgotten: gap.is_forgotten,
        run_id: key.run_id,
        keyrings: gap.keyrings.iter().map(ToString::to_string).collect(),
        complete_until: messages::time(gap.complete_until),
        last_contact: messages::time(Some(gap.last_seen)),
        until: messages::time(Some(gap.until)),
    }
}
