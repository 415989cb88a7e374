//! Creates, lists and shows keyrings, and confirms snapshots.

use std::sync::Arc;

use tonic::Status;

use super::{AdminApi, error, field, messages};
use crate::{
    control::{served::ServedKeyring, token::AdminCaller},
    key::{
        Change, Keyring, KeyringName, OperationRefusal, Pepper, Prefix, Revision, Timestamp,
        operation,
    },
    proto::admin as api,
};

impl AdminApi {
    pub(super) async fn create_keyring(
        &self,
        caller: AdminCaller,
        request: api::CreateKeyringRequest,
    ) -> Result<api::Keyring, Status> {
        let name: KeyringName = field::parse("name", &request.name)?;
        let prefix = match request.prefix.as_str() {
            "" => Prefix::default(),
            text => field::parse("prefix", text)?,
        };
        let help_url = Some(request.help_url).filter(|url| !url.is_empty());
        let nothing_else = |_: &Keyring, _: &Pepper, _| Ok(Vec::new());
        let (served, _) = self
            .begin_keyring_with(
                &caller,
                name,
                prefix,
                request.allow_imported,
                help_url,
                nothing_else,
            )
            .await?;
        Ok(describe(&served))
    }

    /// Creates a keyring together with the changes that `plan` returns for it. Returns the revision
    /// of the last change as well.
    pub(super) async fn begin_keyring_with(
        &self,
        caller: &AdminCaller,
        name: KeyringName,
        prefix: Prefix,
        allow_imported: bool,
        help_url: Option<String>,
        plan: impl FnOnce(&Keyring, &Pepper, Timestamp) -> Result<Vec<Change>, OperationRefusal>,
    ) -> Result<(Arc<ServedKeyring>, Revision), Status> {
        let first = operation::create_keyring(name.clone(), prefix, allow_imported, help_url)
            .map_err(|refusal| error::refused(&refusal))?;
        let (served, revision) = self
            .catalog
            .create_keyring_with(&caller.actor, name, &first, plan)
            .await
            .map_err(error::commit)?;
        tracing::info!(actor = caller.actor, auth.keyring = %served.name(), "keyring created");
        Ok((served, revision))
    }

    pub(super) fn list_keyrings(&self) -> api::ListKeyringsResponse {
        api::ListKeyringsResponse {
            keyrings: self
                .catalog
                .list()
                .iter()
                .map(|served| describe(served))
                .collect(),
        }
    }

    pub(super) fn get_keyring(
        &self,
        request: &api::GetKeyringRequest,
    ) -> Result<api::Keyring, Status> {
        let served = self.served("name", &request.name)?;
        Ok(describe(&served))
    }

    pub(super) fn confirm_snapshot(
        &self,
        caller: &AdminCaller,
        request: &api::ConfirmSnapshotRequest,
    ) -> Result<api::ConfirmSnapshotResponse, Status> {
        let served = self.served("keyring", &request.keyring)?;
        let items = served.journal().state().keyring.version_count() as u64;
        if request.items != items {
            return Err(Status::failed_precondition(format!(
                "keyring {} has {items} versions, not {}: check the number before you confirm",
                served.name(),
                request.items
            )));
        }
        served.confirm_items(items);
        tracing::warn!(actor = caller.actor, auth.keyring = %served.name(), items, "snapshot confirmed");
        Ok(api::ConfirmSnapshotResponse {})
    }

    /// Returns the keyring that a field names.
    pub(super) fn served(
        &self,
        field: &'static str,
        name: &str,
    ) -> Result<Arc<ServedKeyring>, Status> {
        let name: KeyringName = field::parse(field, name)?;
        self.catalog
            .get(&name)
            .map_err(|refusal| error::refused(&refusal))
    }
}

fn describe(served: &ServedKeyring) -> api::Keyring {
    messages::keyring(&served.journal().state().keyring, served.epoch())
}
