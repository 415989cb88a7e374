//! The audit log: lists what was committed, and verifies that it is unchanged.

use tonic::Status;

use super::{AdminApi, error, field, messages};
use crate::{
    key::Revision,
    proto::admin as api,
    store::{LogEntry, LogName, MAX_PAGE, chain},
};

/// The number of entries in an answer if the caller gives no limit.
const DEFAULT_LIMIT: usize = 100;

impl AdminApi {
    pub(super) async fn list_audit(
        &self,
        request: &api::ListAuditRequest,
    ) -> Result<api::ListAuditResponse, Status> {
        let log = log_of(&request.keyring)?;
        if let LogName::Keyring(name) = &log {
            self.served("keyring", name.as_str())?;
        }
        let limit = match request.limit {
            0 => DEFAULT_LIMIT,
            limit => usize::try_from(limit).map_or(MAX_PAGE, |limit| limit.min(MAX_PAGE)),
        };
        let entries = self
            .catalog
            .store()
            .read(&log, Revision::new(request.after), limit)
            .await
            .map_err(|failure| error::store(&failure))?;
        Ok(api::ListAuditResponse {
            entries: entries.into_iter().map(entry).collect(),
        })
    }

    pub(super) async fn verify_audit(
        &self,
        request: &api::VerifyAuditRequest,
    ) -> Result<api::VerifyAuditResponse, Status> {
        let store = self.catalog.store();
        let names: Vec<LogName> = match request.keyring.as_str() {
            "" => store
                .heads()
                .await
                .map_err(|failure| error::store(&failure))?
                .into_iter()
                .map(|head| head.log)
                .collect(),
            text => vec![log_of(text)?],
        };
        let mut logs = Vec::with_capacity(names.len());
        for name in names {
            let verdict = chain::verify(store.as_ref(), &name)
                .await
                .map_err(|failure| error::store(&failure))?;
            logs.push(api::AuditVerdict {
                keyring: name.to_string(),
                entries: verdict.entries,
                intact: verdict.problem.is_none(),
                problem: verdict
                    .problem
                    .map(|problem| problem.to_string())
                    .unwrap_or_default(),
            });
        }
        Ok(api::VerifyAuditResponse { logs })
    }
}

fn log_of(keyring: &str) -> Result<LogName, Status> {
    match keyring {
        "" => Ok(LogName::Control),
        text => field::parse("keyring", text),
    }
}

fn entry(entry: LogEntry) -> api::AuditEntry {
    api::AuditEntry {
        keyring: entry.log.to_string(),
        revision: entry.revision.get(),
        at: messages::time(Some(entry.at)),
        actor: entry.actor,
        kind: entry.kind,
        payload: String::from_utf8_lossy(&entry.payload).into_owned(),
        hash: entry.hash.to_string(),
    }
}
