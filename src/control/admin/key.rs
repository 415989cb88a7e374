//! Lists and shows keys.

use tonic::Status;

use super::{AdminApi, error, field, messages};
use crate::{
    key::{ConsumerId, KeyId, KeyringName, OperationRefusal, Use, VersionRef},
    proto::admin as api,
};

impl AdminApi {
    pub(super) fn list_keys(
        &self,
        request: &api::ListKeysRequest,
    ) -> Result<api::ListKeysResponse, Status> {
        let keyrings = match request.keyring.as_str() {
            "" => self.catalog.list(),
            name => vec![self.served("keyring", name)?],
        };
        let consumer: Option<ConsumerId> = match request.consumer.as_str() {
            "" => None,
            text => Some(field::parse("consumer", text)?),
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
                    .map(|key| messages::key(&state.keyring, key, &used)),
            );
        }
        Ok(api::ListKeysResponse { keys })
    }

    pub(super) fn get_key(&self, request: &api::GetKeyRequest) -> Result<api::Key, Status> {
        let key_id: KeyId = field::parse("key_id", &request.key_id)?;
        let describe = || {
            let served = self.catalog.holding(key_id)?;
            let used = self.used(served.name());
            let state = served.journal().state();
            let key = state.keyring.key(key_id)?;
            Ok(messages::key(&state.keyring, key, used))
        };
        describe().map_err(|refusal: OperationRefusal| error::refused(&refusal))
    }

    /// Returns the use of a keyring's versions. Once all sidecars have reported, a version without
    /// a report counts as unused.
    fn used(&self, keyring: &KeyringName) -> impl Fn(VersionRef) -> Option<Use> {
        let coverage = self.fleet.coverage(keyring, self.catalog.clock().wall());
        let unused = coverage.complete_until.map(|_| Use::default());
        move |version| self.usage.use_of(keyring, version).or(unused)
    }
}
