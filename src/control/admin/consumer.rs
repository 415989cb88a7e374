//! Creates, lists and shows consumers.

use tonic::Status;

use super::{AdminApi, error, field, messages};
use crate::{
    control::token::AdminCaller,
    key::{ConsumerId, OperationRefusal},
    proto::admin as api,
};

impl AdminApi {
    pub(super) async fn create_consumer(
        &self,
        caller: AdminCaller,
        request: api::CreateConsumerRequest,
    ) -> Result<api::Consumer, Status> {
        let served = self.served("keyring", &request.keyring)?;
        let id: ConsumerId = field::parse("consumer", &request.consumer)?;
        self.catalog
            .commit(&served, &caller.actor, |keyring, _| {
                let changes = keyring.create_consumer(id.clone(), request.name.clone())?;
                Ok((changes, ()))
            })
            .await
            .map_err(error::commit)?;
        tracing::info!(
            actor = caller.actor,
            auth.keyring = %served.name(),
            auth.consumer.id = %id,
            "consumer created"
        );
        self.describe_consumer(&request.keyring, &id)
    }

    pub(super) fn list_consumers(
        &self,
        request: &api::ListConsumersRequest,
    ) -> Result<api::ListConsumersResponse, Status> {
        let served = self.served("keyring", &request.keyring)?;
        let state = served.journal().state();
        Ok(api::ListConsumersResponse {
            consumers: state
                .keyring
                .consumers()
                .iter()
                .map(|(id, consumer)| messages::consumer(served.name(), id, consumer))
                .collect(),
        })
    }

    pub(super) fn get_consumer(
        &self,
        request: &api::GetConsumerRequest,
    ) -> Result<api::Consumer, Status> {
        let id: ConsumerId = field::parse("consumer", &request.consumer)?;
        self.describe_consumer(&request.keyring, &id)
    }

    fn describe_consumer(&self, keyring: &str, id: &ConsumerId) -> Result<api::Consumer, Status> {
        let served = self.served("keyring", keyring)?;
        let state = served.journal().state();
        state
            .keyring
            .consumers()
            .get(id)
            .map(|consumer| messages::consumer(served.name(), id, consumer))
            .ok_or_else(|| {
                error::refused(&OperationRefusal::NotFound {
                    what: "consumer",
                    name: id.to_string(),
                })
            })
    }
}
