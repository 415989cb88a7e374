//! The sidecars.

use tonic::Status;

use super::{AdminApi, wire};
use crate::{
    control::fleet::{Gap, Member, MemberKey},
    key::KeyringName,
    proto::admin as api,
};

impl AdminApi {
    pub(super) fn all_sidecars(
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

    fn describe_sidecar(
        &self,
        key: MemberKey,
        member: Member,
        only: Option<&KeyringName>,
    ) -> api::Sidecar {
        let keyrings = member
            .keyrings
            .iter()
            .filter(|(name, _)| only.is_none_or(|only| *name == only))
            .map(|(name, progress)| {
                let head = self.catalog.get(name).map(|served| served.revision());
                api::SidecarKeyring {
                    keyring: name.to_string(),
                    epoch: progress.epoch.get(),
                    applied_revision: progress.applied.get(),
                    durable_revision: progress.durable.get(),
                    missing: head.is_err(),
                    head_revision: head.unwrap_or_default().get(),
                    applied_at: wire::time(progress.applied_at),
                    rejected: progress
                        .rejected
                        .iter()
                        .map(|(item, reason)| format!("{item}: {reason}"))
                        .collect(),
                }
            })
            .collect();
        api::Sidecar {
            node: key.node,
            cluster: member.cluster,
            version: member.version,
            run_id: key.run_id,
            labels: member.labels.into_iter().collect(),
            connected: member.streams > 0,
            connected_at: wire::time(member.connected_at),
            last_seen: wire::time(Some(member.last_seen)),
            keyrings,
            complete_until: wire::time(member.complete_until),
        }
    }
}

fn describe_gap((key, gap): (MemberKey, Gap)) -> api::GoneSidecar {
    api::GoneSidecar {
        node: key.node,
        cluster: gap.cluster,
        version: gap.version,
        run_id: key.run_id,
        keyrings: gap.keyrings.iter().map(ToString::to_string).collect(),
        complete_until: wire::time(gap.complete_until),
        last_contact: wire::time(Some(gap.last_contact)),
        until: wire::time(Some(gap.until)),
    }
}
